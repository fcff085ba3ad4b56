#!/usr/bin/env python3
"""Turn a folder of raw files into WebDataset shards that megad2v (and webdataset itself) reads."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

from megad2v.data.format import DATASET_FILE
from megad2v.data.make import make_images, parse_size
from megad2v.errors import UserError
from megad2v.modalities.vision.shards import ImageOptions

EPILOG = """\
INPUT is one folder per class, or one flat folder (no labels):

    INPUT/cat/001.jpg          class "cat"; folders below a class folder belong to it
    INPUT/dog/x/y/002.png      class "dog"

OUTPUT gets image-000000.tar, ... (plain tars: KEY.jpg, KEY.cls, KEY.json), index/, dataset.json and report.jsonl
(a line for every file that was skipped or converted, with the reason). Images are shuffled, so that every shard mixes
the classes; the bytes depend on the files and options alone, not on --workers.

Upright 8-bit RGB files are copied byte for byte. Others (EXIF-rotated, CMYK, gray, 16-bit, transparent, larger than
--resize-short) are converted. Files that cannot be decoded in full are skipped.

examples:
  python tools/make_shards.py image --input imagenet/train --output shards/train --resize-short 256
  python tools/make_shards.py image --input imagenet/val   --output shards/val   --classes shards/train
"""


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each modality."""
    top = argparse.ArgumentParser(description=__doc__)
    commands = top.add_subparsers(dest="modality", required=True, metavar="{image}")
    image = commands.add_parser(
        "image",
        help="JPEG, PNG and WebP images, in class folders or one flat folder",
        description="Turn a folder of images into shards.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    image.add_argument("--input", type=Path, required=True, metavar="DIR", help="folder of class folders, or of images")
    image.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty folder for the shards")
    image.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that decode and convert; 0: none but the main one (default: all %(default)s cores here)",
    )
    image.add_argument(
        "--max-shard-size",
        default="512MB",
        metavar="SIZE",
        help="largest tar, such as 512MB or 1GiB (default: %(default)s); several shards per data.window mix best",
    )
    image.add_argument(
        "--resize-short",
        type=int,
        metavar="N",
        help="reduce images whose short side exceeds N pixels to N (default: keep sizes); none is enlarged",
    )
    image.add_argument(
        "--quality", type=int, default=95, metavar="Q", help="JPEG quality of converted images (default: 95)"
    )
    image.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the shuffle (default: 0)")
    image.add_argument(
        "--classes",
        type=Path,
        metavar="DIR",
        help="take class names and ids from these shards (test sets: those of train)",
    )
    image.add_argument(
        "--overwrite", action="store_true", help="replace shards that make_shards wrote to --output before"
    )
    return top


def run(args: argparse.Namespace) -> str:
    """Make the shards; returns the line to print. Raises UserError."""
    for name, value, low, high in (
        ("--workers", args.workers, 0, 1024),
        ("--resize-short", 1 if args.resize_short is None else args.resize_short, 1, 65_535),
        ("--quality", args.quality, 1, 100),
    ):
        if not low <= value <= high:
            raise UserError(f"{name}: expected {low} to {high}, got {value}")
    classes = args.classes.parent if args.classes is not None and args.classes.name == DATASET_FILE else args.classes
    made = make_images(
        args.input,
        args.output,
        options=ImageOptions(args.resize_short, args.quality),
        workers=args.workers,
        max_shard_bytes=parse_size(args.max_shard_size),
        seed=args.seed,
        classes_of=classes,
        overwrite=args.overwrite,
    )
    return f"{args.output}: {made.summary}"


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line when the input is wrong."""
    args = parser().parse_args(argv)
    try:
        print(run(args))
    except UserError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
