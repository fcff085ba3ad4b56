#!/usr/bin/env python3
"""What the frozen features of a checkpoint say about labels: k-NN and linear probe, against a random initialisation."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

import torch

from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.writer import write_file
from megad2v.config.schema import Config
from megad2v.convert.certificate import versions
from megad2v.convert.load import WEIGHTS, checkpoint_config, load_encoder, open_checkpoint
from megad2v.data.loader import labelled_batches
from megad2v.errors import UserError
from megad2v.metrics.probe import chance_level, check_labels, extract, record, score, table
from megad2v.modalities.build import build_student
from megad2v.models.data2vec import Student
from megad2v.models.initialise import initialise_

ROWS = ("random", *WEIGHTS)
BATCH_SIZES = {"vision": 64, "speech": 8}

EPILOG = """\
Shards need labels (KEY.cls) with the same class names in both sets (make_shards --classes). Images are resized by the
short side and cropped in the centre, recordings cut to speech.max_seconds in the middle; nothing is masked. Features
are means over patches or frames; the test set is used once.
On cores that something else keeps busy, OMP_NUM_THREADS=1 makes it several times faster.

example:
  python tools/probe.py --checkpoint runs/vision_tiny --train shards/train --test shards/test --output probe.json
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a run, or one of its checkpoints/step_XXXXXXXX"
    )
    top.add_argument("--train", required=True, metavar="SHARDS", help="labelled shards that the probes are fitted on")
    top.add_argument("--test", required=True, metavar="SHARDS", help="labelled shards that they are scored on")
    top.add_argument(
        "--weights",
        nargs="+",
        default=list(ROWS),
        metavar="W",
        help="rows of the table, of: random student teacher (default: all); random is what this run started from",
    )
    top.add_argument(
        "--layer", type=int, metavar="N", help="features of block N, from 1 (default: the output behind the final norm)"
    )
    top.add_argument(
        "--seed", type=int, metavar="N", help="of the random row and of the folds (default: the run's train.seed)"
    )
    top.add_argument("--batch-size", type=int, metavar="N", help="samples at once (default: 64 images, 8 recordings)")
    top.add_argument("--workers", type=int, default=1, metavar="N", help="decoding processes (default: %(default)s)")
    top.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)"
    )
    top.add_argument("--output", type=Path, metavar="FILE", help="write the table as JSON, with all settings")
    return top


def run(args: argparse.Namespace) -> list[str]:
    """Probe; returns the lines to print. Raises UserError."""
    for name in args.weights:
        if name not in ROWS:
            raise UserError(f"--weights {name}: expected any of {' '.join(ROWS)}")
    if args.output is not None and (not args.output.absolute().parent.is_dir() or args.output.is_dir()):
        raise UserError(f"--output {args.output}: expected a file's name in an existing folder")
    device = _device(args.device)
    checkpoint = open_checkpoint(args.checkpoint)
    config = checkpoint_config(checkpoint)
    if args.layer is not None and not 1 <= args.layer <= config.model.depth:
        raise UserError(f"--layer: expected 1 to {config.model.depth}, got {args.layer}")
    seed = config.train.seed if args.seed is None else args.seed
    batch_size = BATCH_SIZES[config.modality] if args.batch_size is None else args.batch_size
    sets = [labelled_batches(pattern, config, batch_size, args.workers) for pattern in (args.train, args.test)]
    if any(a != b for a, b in zip(*(batches.classes for batches in sets))):  # one may have more classes
        raise UserError("--train and --test have different class names; make the test shards with --classes TRAIN")
    models = {name: _model(name, checkpoint, config, seed).to(device) for name in dict.fromkeys(args.weights)}
    train, test = (extract(models, batches, layer=args.layer) for batches in sets)
    check_labels(train.labels, test.labels, sets[0].classes)
    rows, chance = score(train, test, seed=seed), chance_level(test.labels)
    if args.output is not None:
        content = {
            "checkpoint": str(args.checkpoint),
            "step": checkpoint.index.step,
            "seed": seed,
            "train": {"shards": args.train, "samples": len(train.labels), "dropped": train.dropped},
            "test": {"shards": args.test, "samples": len(test.labels), "dropped": test.dropped},
            "classes": list(sets[0].classes),
            **record(rows, chance, args.layer),
            "versions": versions(),
        }
        write_file(args.output, json.dumps(content, indent=2) + "\n")
    counts = f"train {len(train.labels):,} test {len(test.labels):,} classes {len(sets[0].classes)}"
    dropped = f" dropped {train.dropped + test.dropped}" if train.dropped + test.dropped else ""
    return [f"step {checkpoint.index.step:,}  {counts}{dropped}", *table(rows, chance)]


def _model(name: str, checkpoint: Checkpoint, config: Config, seed: int) -> Student:
    if name != "random":
        return load_encoder(checkpoint, name)
    student = build_student(config).eval().requires_grad_(False)
    initialise_(student, seed)
    return student


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    return device


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line when the input is wrong."""
    args = parser().parse_args(argv)
    try:
        print("\n".join(run(args)))
    except UserError as error:
        print(f"probe: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
