#!/usr/bin/env python3
"""Generate a small corpus to try megad2v with: no download, the same files for the same seed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

from megad2v.errors import UserError
from megad2v.modalities.vision.synthetic import CLASSES, write_demo_images

EPILOG = f"""\
OUT/image/<class>/*.jpg   one shape per class ({", ".join(CLASSES)}), 96 to 128 pixels a side

examples:
  python tools/make_demo_data.py demo
  python tools/make_demo_data.py demo-valid --images-per-class 25 --seed 2
  python tools/make_shards.py image --input demo/image --output shards/train
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("out", type=Path, metavar="OUT", help="folder to write to; made if missing")
    top.add_argument(
        "--images-per-class", type=int, default=250, metavar="N", help="pictures of each class (default: %(default)s)"
    )
    top.add_argument("--seed", type=int, default=1, metavar="N", help="another seed, other pictures (default: 1)")
    top.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: all %(default)s cores here)",
    )
    top.add_argument("--overwrite", action="store_true", help="replace the demo pictures that are there")
    return top


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line when the input is wrong."""
    args = parser().parse_args(argv)
    try:
        if args.images_per_class < 1 or args.workers < 1:
            raise UserError("--images-per-class and --workers: expected at least 1")
        folder = args.out / "image"
        write_demo_images(folder, args.images_per_class, args.seed, workers=args.workers, overwrite=args.overwrite)
    except UserError as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{folder}: {args.images_per_class * len(CLASSES)} pictures in {len(CLASSES)} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
