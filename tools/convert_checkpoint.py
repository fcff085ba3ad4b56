#!/usr/bin/env python3
"""Turn a checkpoint into a folder that others load. Needs no GPU and no DeepSpeed, whatever layout wrote it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: everything needed is in the checkpoint

from safetensors import SafetensorError

from megad2v.convert.certificate import CertificateError
from megad2v.convert.hf import export
from megad2v.convert.load import WEIGHTS, open_checkpoint
from megad2v.errors import UserError

TARGETS = ("hf",)

EPILOG = """\
OUTPUT gets model.safetensors, config.json, preprocessor_config.json (text: tokenizer.json, tokenizer_config.json), a
model card (README.md) and parity.json: before the folder gets its name, it is loaded with transformers and every hidden
state is compared with ours; of text the ids of some thousand texts, too.

exit codes: 0 done, 2 the input is wrong, 1 the export does not compute what our model computes (nothing is written)

example:
  python tools/convert_checkpoint.py --checkpoint runs/vision_tiny --to hf --output exports/vision_tiny
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a run, or one of its checkpoints/step_XXXXXXXX"
    )
    top.add_argument("--to", required=True, metavar="{hf}", help="hf: Hugging Face transformers")
    top.add_argument("--output", type=Path, required=True, metavar="OUT", help="new or empty folder")
    top.add_argument(
        "--weights",
        default="student",
        metavar="{student,teacher}",
        help="student (default): what released data2vec models hold; teacher: its moving average",
    )
    top.add_argument("--overwrite", action="store_true", help="replace an earlier export at OUT")
    return top


def run(args: argparse.Namespace) -> str:
    """Export; returns the lines to print. Raises UserError, CertificateError."""
    if args.to not in TARGETS:
        raise UserError(f"--to {args.to}: cannot be written; expected {' or '.join(TARGETS)}")
    if args.weights not in WEIGHTS:
        raise UserError(f"--weights {args.weights}: expected {' or '.join(WEIGHTS)}")
    checkpoint = open_checkpoint(args.checkpoint)
    parity = export(checkpoint, args.output, weights=args.weights, overwrite=args.overwrite)
    return (
        f"{args.output}: {args.weights} weights of step {checkpoint.index.step:,}; every hidden state equals ours "
        f"(max abs difference {parity['max_abs']:.1e}, float64 {parity['relative_float64']:.1e} relative)\n"
        f'next: transformers.AutoModel.from_pretrained("{args.output}"); see {args.output / "README.md"}'
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or the error's with one line."""
    args = parser().parse_args(argv)
    try:
        print(run(args))
    except (UserError, CertificateError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, SafetensorError) as error:  # such as a full disk
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
