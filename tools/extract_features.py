#!/usr/bin/env python3
"""Features of images, recordings or texts from a checkpoint: any layers, student or teacher, in a folder of arrays."""

from __future__ import annotations

import argparse
import glob
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

from megad2v.convert.certificate import versions
from megad2v.convert.encoder import Data2VecEncoder, Layer
from megad2v.convert.features import ABOUT, FORMATS, POOLS, extract_features
from megad2v.convert.hf import check_output, written_aside
from megad2v.convert.load import WEIGHTS, check_tokenizer, usable_device
from megad2v.data.shardset import ShardSet
from megad2v.errors import UserError
from megad2v.modalities.corpus import find_files, printable
from megad2v.modalities.speech.shards import EXTENSIONS as RECORDINGS
from megad2v.modalities.vision.shards import EXTENSIONS as IMAGES

FILES = {"vision": (IMAGES, "image"), "speech": (RECORDINGS, "recording"), "text": (frozenset({".txt"}), "text")}
"""Extensions that are taken from a folder, and what messages call them."""
BUDGETS = {"vision": 12_800, "speech": 3_000, "text": 8_192}
"""Positions in a batch: 65 images of 196 patches, a minute of speech, 16 texts of 512 tokens."""

EPILOG = """\
OUTPUT gets output.npy or layer_NN.npy, float32, a row a sample (--pool mean) or a row a position (--pool none, CLS left
out), or all of them in features.safetensors; index.jsonl: id, start, length of each sample's rows; skipped.jsonl: what
could not be used, and why; features.json: what computed them. It appears at once or not at all.
Images are resized by the short side and cropped in the centre, recordings cut to speech.max_seconds in the middle,
texts to text.max_tokens at their end; a .txt is one text, each of its lines a sentence. Nothing is masked.

exit codes: 0 done, 2 the input is wrong, 1 the disk refused

examples:
  python tools/extract_features.py --checkpoint runs/vision_tiny --input PHOTOS --output features
  python tools/extract_features.py --checkpoint runs/speech_base --shards SHARDS --layer 6 9 output --output features
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="a run, or one of its checkpoints/step_XXXXXXXX")
    add("--modality", metavar="M", help="which one of a joint run (vision, speech, text)")
    add("--weights", default="student", metavar="{student,teacher}", help="whose features (default: student)")
    add("--shards", metavar="SHARDS", help="shards, as make_shards writes them")
    add("--input", nargs="+", metavar="PATH", help="or files, folders or globs of images, recordings, .txt")
    add("--output", type=Path, required=True, metavar="OUT", help="the folder to make")
    add(
        "--layer",
        nargs="+",
        default=["output"],
        metavar="N",
        help="blocks, from 1, and `output`, behind the final norm (default: output)",
    )
    add("--pool", default="mean", metavar="{mean,none}", help="a row a sample, or a row a position (default: mean)")
    add("--format", default="npy", metavar="{npy,safetensors}", help="(default: npy)")
    add("--budget", type=int, metavar="N", help="positions in a batch, padding counted (default: by modality)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--overwrite", action="store_true", help="replace an earlier OUTPUT of this program")
    return top


def run(args: argparse.Namespace) -> str:
    """Extract; one line for people. Raises UserError for what cannot be."""
    for option, value, allowed in (
        ("--weights", args.weights, WEIGHTS),
        ("--pool", args.pool, POOLS),
        ("--format", args.format, FORMATS),
    ):
        if value not in allowed:
            raise UserError(f"{option} {value}: expected {' or '.join(allowed)}")
    if (args.shards is None) == (args.input is None):
        raise UserError("expected either --shards or --input")
    if args.budget is not None and args.budget < 1:
        raise UserError(f"--budget {args.budget}: expected at least 1 position")
    check_output(args.output, overwrite=args.overwrite, mark=ABOUT)
    device = usable_device(args.device)
    encoder = Data2VecEncoder.from_checkpoint(args.checkpoint, args.weights, modality=args.modality)
    encoder.to(device)
    layers = list(dict.fromkeys(_layer(text, encoder.depth) for text in args.layer))
    samples = loose_samples(args.input, encoder.modality) if args.input else shard_samples(args.shards, encoder)
    with written_aside(args.output) as aside:
        done = extract_features(
            encoder,
            samples,
            aside,
            layers=layers,
            pool=args.pool,
            file_format=args.format,
            budget=args.budget or BUDGETS[encoder.modality],
            about={
                "checkpoint": args.checkpoint.name,
                "step": encoder.step,
                "weights": args.weights,
                "versions": versions(),
            },
        )
    skipped = f", {done['skipped']:,} skipped (skipped.jsonl)" if done["skipped"] else ""
    return (
        f"{args.output}: {done['samples']:,} samples{skipped}, {done['rows']:,} rows of {done['width']} from "
        f"{', '.join(done['layers'])}, {args.weights} of step {encoder.step:,}"
    )


def _layer(text: str, depth: int) -> Layer:
    if text == "output":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= depth:
        raise UserError(f"--layer {text}: expected output, or a block from 1 to {depth}")
    return int(text)


def shard_samples(pattern: str, encoder: Data2VecEncoder) -> Iterator[tuple[str, Any]]:
    """(id, encoded sample) of every sample. Raises UserError, also for text of another tokenizer."""
    shards = ShardSet(pattern, encoder.modality)
    check_tokenizer(encoder.tokenizer, "--shards", pattern)
    return ((raw.id, raw.data) for raw in map(shards.read, range(len(shards))))


def loose_samples(patterns: list[str], modality: str) -> Iterator[tuple[str, Any]]:
    """(id, path) of every file; an id is the path as it is given, or relative to the folder that is named. Raises
    UserError for what is not there."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"--input {pattern}: no such file or folder")
        for path in map(Path, matches):
            for name in find_files(path, *FILES[modality])[0] if path.is_dir() else [""]:
                sample_id = printable(name or path.as_posix())
                if found.setdefault(sample_id, path / name) != path / name:
                    raise UserError(f"--input: two files are called {sample_id}; name a folder that holds both")
    return iter(found.items())


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or the error's with one line."""
    args = parser().parse_args(argv)
    try:
        print(run(args))
    except UserError as error:
        print(f"extract_features: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # such as a full disk
        print(f"extract_features: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception, which cleans up
    sys.exit(main())
