#!/usr/bin/env python3
"""What a checkpoint knows of labels, against a random initialisation: k-NN and a linear probe on frozen features, or
with --fine-tune a linear layer trained with the encoder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

import torch

from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.writer import write_file
from megad2v.config.schema import Config
from megad2v.convert.certificate import versions
from megad2v.convert.load import (
    WEIGHTS,
    check_tokenizer,
    checkpoint_config,
    load_encoder,
    load_tokenizer,
    open_checkpoint,
    usable_device,
)
from megad2v.data.loader import FiniteBatches, labelled_batches
from megad2v.errors import UserError
from megad2v.metrics import fine_tune
from megad2v.metrics.probe import chance_level, check_labels, extract, record, score, table
from megad2v.modalities.build import build_student
from megad2v.models.data2vec import Student
from megad2v.models.initialise import initialise_

ROWS = ("random", *WEIGHTS)
BATCH_SIZES = {"vision": 64, "speech": 8, "text": 64}
FINE_TUNE_BATCH_SIZES = {"vision": 32, "speech": 8, "text": 32}

EPILOG = """\
Shards need labels (KEY.cls) with the same class names in both sets (make_shards --classes). Images are resized by the
short side and cropped in the centre, recordings cut to speech.max_seconds in the middle, texts to text.max_tokens at
their end; nothing is masked. Features are means over patches, frames or tokens; the test set is used once.
On cores that something else keeps busy, OMP_NUM_THREADS=1 makes it several times faster.

--fine-tune trains front end, encoder and a linear layer on the mean over positions (AdamW; linear warm-up over a tenth
of the updates, then down to 0; classes balanced), each row alike, as often as --seeds says: order, linear layer,
dropout and the random weights are drawn anew. Mean and deviation of the scores behind the last update; nothing is
chosen by the test set. Its rate suits small encoders: give published Base models --lr 2e-5 and --epochs 10.

examples:
  python tools/probe.py --checkpoint runs/vision_tiny --train shards/train --test shards/test --output probe.json
  python tools/probe.py --checkpoint runs/text_tiny --train shards/train --test shards/test --fine-tune
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a run, or one of its checkpoints/step_XXXXXXXX"
    )
    top.add_argument("--modality", metavar="M", help="which one of a joint run (vision, speech, text)")
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
    top.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="samples at once (default: 64 images or texts, 8 recordings; with --fine-tune 32 and 8)",
    )
    top.add_argument("--workers", type=int, default=1, metavar="N", help="decoding processes (default: %(default)s)")
    top.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)"
    )
    top.add_argument("--output", type=Path, metavar="FILE", help="write the table as JSON, with all settings")
    defaults = fine_tune.FineTuneSettings()
    tuning = top.add_argument_group("fine-tuning")
    tuning.add_argument("--fine-tune", action="store_true", help="train the encoder too, instead of frozen features")
    tuning.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions, from --seed on (default: 3)")
    tuning.add_argument(
        "--epochs", type=int, default=defaults.epochs, metavar="N", help="over --train (default: %(default)s)"
    )
    tuning.add_argument(
        "--lr", type=float, default=defaults.lr, metavar="R", help="peak learning rate (default: %(default)s)"
    )
    return top


@dataclass(frozen=True)
class Task:
    """What all rows have in common."""

    args: argparse.Namespace
    checkpoint: Checkpoint
    config: Config
    device: torch.device
    seed: int
    batch_size: int
    train: FiniteBatches
    test: FiniteBatches


def run(args: argparse.Namespace) -> list[str]:
    """Probe; returns the lines to print. Raises UserError."""
    task = _task(args)
    head, content, lines = _fine_tuned(task) if args.fine_tune else _frozen(task)
    step = task.checkpoint.index.step
    if args.output is not None:
        content = {"checkpoint": str(args.checkpoint), "step": step, "seed": task.seed, **content}
        write_file(args.output, json.dumps({**content, "versions": versions()}, indent=2, allow_nan=False) + "\n")
    return [f"step {step:,}  {head}", *lines]


def _task(args: argparse.Namespace) -> Task:
    """Raises UserError for arguments that cannot be."""
    for name in args.weights:
        if name not in ROWS:
            raise UserError(f"--weights {name}: expected any of {' '.join(ROWS)}")
    if args.output is not None and (not args.output.absolute().parent.is_dir() or args.output.is_dir()):
        raise UserError(f"--output {args.output}: expected a file's name in an existing folder")
    if min(args.seeds, args.epochs) < 1 or not args.lr > 0:
        raise UserError("--seeds and --epochs: expected at least 1, --lr more than 0")
    if args.fine_tune and args.layer is not None:
        raise UserError("--layer: is for frozen features; fine-tuning trains the whole encoder")
    device = usable_device(args.device)
    checkpoint = open_checkpoint(args.checkpoint, args.modality)
    config = checkpoint_config(checkpoint)
    if args.layer is not None and not 1 <= args.layer <= config.model.depth:
        raise UserError(f"--layer: expected 1 to {config.model.depth}, got {args.layer}")
    sizes = FINE_TUNE_BATCH_SIZES if args.fine_tune else BATCH_SIZES
    batch_size = sizes[config.modality] if args.batch_size is None else args.batch_size
    train, test = (labelled_batches(pattern, config, batch_size, args.workers) for pattern in (args.train, args.test))
    if any(a != b for a, b in zip(train.classes, test.classes)):  # one may have more classes
        raise UserError("--train and --test have different class names; make the test shards with --classes TRAIN")
    tokenizer = load_tokenizer(checkpoint)
    for option, pattern in (("--train", args.train), ("--test", args.test)):
        check_tokenizer(tokenizer, option, pattern)
    seed = config.train.seed if args.seed is None else args.seed
    return Task(args, checkpoint, config, device, seed, batch_size, train, test)


def _frozen(task: Task) -> tuple[str, dict[str, Any], list[str]]:
    """Counts, the table as JSON, the table as lines."""
    args = task.args
    models = {name: _model(name, task, task.seed) for name in dict.fromkeys(args.weights)}
    train, test = (extract(models, batches, layer=args.layer) for batches in (task.train, task.test))
    check_labels(train.labels, test.labels, task.train.classes)
    rows, chance = score(train, test, seed=task.seed), chance_level(test.labels)
    content = {
        "train": {"shards": args.train, "samples": len(train.labels), "dropped": train.dropped},
        "test": {"shards": args.test, "samples": len(test.labels), "dropped": test.dropped},
        "classes": list(task.train.classes),
        **record(rows, chance, args.layer),
    }
    counts = _counts(len(train.labels), len(test.labels), train.dropped + test.dropped, task.train.classes)
    return counts, content, table(rows, chance)


def _fine_tuned(task: Task) -> tuple[str, dict[str, Any], list[str]]:
    """The same. Samples that cannot be decoded are passed over in training, and not scored."""
    args, classes, labels = task.args, task.train.classes, task.train.labels
    check_labels(labels, task.test.labels, classes)
    settings = fine_tune.FineTuneSettings(epochs=args.epochs, lr=args.lr)
    seeds = range(task.seed, task.seed + args.seeds)
    models: dict[str, Callable[[int], Student]] = {name: partial(_model, name, task) for name in args.weights}

    def in_order_of(seed: int) -> FiniteBatches:
        return labelled_batches(
            args.train, task.config, task.batch_size, args.workers, epochs=settings.epochs, seed=seed
        )

    weights = fine_tune.balanced_weights(labels, len(classes))
    rows = fine_tune.score(models, in_order_of, task.test, weights, settings=settings, seeds=seeds)
    chance, dropped = chance_level(task.test.labels), rows[0].dropped
    train, test = len(labels) - dropped.train, len(task.test.labels) - dropped.test
    content = {
        "train": {"shards": args.train, "samples": train, "dropped": dropped.train},
        "test": {"shards": args.test, "samples": test, "dropped": dropped.test},
        "classes": list(classes),
        **fine_tune.record(rows, chance, settings, seeds, task.batch_size),
    }
    counts = _counts(train, test, dropped.train + dropped.test, classes)
    return f"{counts} seeds {len(seeds)}", content, fine_tune.table(rows, chance)


def _counts(train: int, test: int, dropped: int, classes: Sequence[str]) -> str:
    """For people; what could not be decoded is in neither set."""
    counts = f"train {train:,} test {test:,} classes {len(classes)}"
    return f"{counts} dropped {dropped:,}" if dropped else counts


def _model(name: str, task: Task, seed: int) -> Student:
    """A fresh copy, without gradients; `seed` draws random weights."""
    if name != "random":
        return load_encoder(task.checkpoint, name).to(task.device)
    student = build_student(task.config).eval().requires_grad_(False)
    initialise_(student, seed)
    return student.to(task.device)


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
