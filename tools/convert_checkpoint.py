#!/usr/bin/env python3
"""Turn a checkpoint into what others load (--to), or what others wrote into a checkpoint for --train.init (--from).

One process, no GPU, no DeepSpeed, nothing is fetched; whatever layout wrote the checkpoint."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: everything needed is in the checkpoint

from safetensors import SafetensorError

from megad2v.convert.certificate import CertificateError
from megad2v.convert.fairseq import BEIT_FILE, FILE, export_beit, export_fairseq
from megad2v.convert.hf import export
from megad2v.convert.importing import import_weights
from megad2v.convert.load import WEIGHTS, open_checkpoint
from megad2v.convert.streamed import return_freed_memory
from megad2v.errors import UserError

TARGETS: dict[str, Callable[..., dict[str, Any]]] = {"hf": export, "fairseq": export_fairseq, "beit": export_beit}
SOURCES = ("hf", "fairseq", "beit")

EPILOG = """\
--to hf       model.safetensors, config.json, image processor, feature extractor or tokenizer, a model card (README.md):
              transformers.AutoModel.from_pretrained(OUT)
--to fairseq  checkpoint.pt (data2vec_audio, data2vec_text, data2vec_vision, student and float32 teacher), for text
              dict.txt: fairseq.checkpoint_utils.load_model_ensemble_and_task(["OUT/checkpoint.pt"])
--to beit     checkpoint.pth for facebookresearch/data2vec_vision, the program behind the published vision models, which
              compute otherwise than fairseq's port: recipes vision_base, vision_large, vision_huge14
--from hf     a folder with config.json and weights; --from fairseq, beit: a .pt or .pth file. No code in it is run.
              What the file lacks (a teacher, the regression head) starts as in a new run, and is printed line by line.
              Then:  launch/pretrain.py --config RECIPE --train.init OUT

Each conversion writes parity.json: before OUT gets its name, the result is read back, and every hidden state compared
with ours; of text the ids of some thousand texts, too. More: docs/convert.md

exit codes: 0 done, 2 the input is wrong, 1 both do not compute the same (nothing is written), or the disk refused

examples:
  python tools/convert_checkpoint.py --checkpoint runs/vision_tiny --to hf --output exports/vision_tiny
  python tools/convert_checkpoint.py --checkpoint runs/speech_base --to fairseq --output exports/speech_base
  python tools/convert_checkpoint.py --checkpoint runs/joint_tiny --modality text --to hf --output exports/text
  python tools/convert_checkpoint.py --from fairseq --input audio_base_ls.pt --output imported/speech_base
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--checkpoint", type=Path, metavar="DIR", help="a run, or one of its checkpoints/step_XXXXXXXX")
    top.add_argument("--to", metavar="{hf,fairseq,beit}", help="what to write from --checkpoint")
    top.add_argument("--from", dest="source", metavar="{hf,fairseq,beit}", help="what --input was written by")
    top.add_argument("--input", type=Path, metavar="PATH", help="the file or folder to make a checkpoint of")
    top.add_argument("--output", type=Path, required=True, metavar="OUT", help="new or empty folder")
    top.add_argument(
        "--weights",
        metavar="{student,teacher}",
        help="with --to: student (default), what released data2vec models hold; teacher, its moving average",
    )
    top.add_argument("--modality", metavar="M", help="with --to: which one of a joint run (vision, speech, text)")
    top.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="with --from, text: tokenizer.json, vocab.json (merges.txt beside it) or a folder with one "
        "(default: what lies beside the input)",
    )
    top.add_argument("--overwrite", action="store_true", help="replace an earlier conversion at OUT")
    return top


def run(args: argparse.Namespace) -> str:
    """Convert; returns the lines to print. Raises UserError, CertificateError."""
    if (args.to is None) == (args.source is None):
        raise UserError("give --checkpoint with --to, or --input with --from")
    return _import(args) if args.to is None else _export(args)


def _export(args: argparse.Namespace) -> str:
    if args.to not in TARGETS:
        raise UserError(f"--to {args.to}: cannot be written; expected {' or '.join(TARGETS)}")
    if args.checkpoint is None or args.input is not None or args.tokenizer is not None:
        raise UserError(f"--to {args.to}: goes with --checkpoint, and neither --input nor --tokenizer")
    weights = args.weights or "student"
    if weights not in WEIGHTS:
        raise UserError(f"--weights {weights}: expected {' or '.join(WEIGHTS)}")
    checkpoint = open_checkpoint(args.checkpoint, args.modality)
    parity = TARGETS[args.to](checkpoint, args.output, weights=weights, overwrite=args.overwrite)
    following = {
        "hf": f'transformers.AutoModel.from_pretrained("{args.output}"); see {args.output / "README.md"}',
        "fairseq": f'fairseq.checkpoint_utils.load_model_ensemble_and_task(["{args.output / FILE}"]); '
        "see docs/convert.md",
        "beit": f"run_class_finetuning.py --finetune {args.output / BEIT_FILE}; see docs/convert.md",
    }
    return (
        f"{args.output}: {weights} weights of step {checkpoint.index.step:,}; every hidden state equals ours "
        f"(max abs difference {parity['max_abs']:.1e}, float64 {parity['relative_float64']:.1e} relative)\n"
        f"next: {following[args.to]}"
    )


def _import(args: argparse.Namespace) -> str:
    if args.source not in SOURCES:
        raise UserError(f"--from {args.source}: cannot be read; expected {' or '.join(SOURCES)}")
    if args.input is None or any(value is not None for value in (args.checkpoint, args.weights, args.modality)):
        raise UserError(f"--from {args.source}: goes with --input, and neither --checkpoint, --weights nor --modality")
    parity = import_weights(args.source, args.input, args.output, tokenizer=args.tokenizer, overwrite=args.overwrite)
    lines = "".join(f"  {line}\n" for line in parity["report"])
    return (
        f"{args.output}: {parity['from']} of step {parity['step']:,}; every hidden state equals ours (max abs "
        f"difference {parity['max_abs']:.1e}, float64 {parity['relative_float64']:.1e} relative)\n{lines}"
        f"next: launch/pretrain.py --config RECIPE --train.init {args.output}; see docs/convert.md"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or the error's with one line."""
    args = parser().parse_args(argv)
    return_freed_memory()
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception, which cleans up
    sys.exit(main())
