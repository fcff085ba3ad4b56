#!/usr/bin/env python3
"""Train a vocabulary for text, or take over one of GPT-2's and RoBERTa's kind."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

from megad2v.errors import UserError
from megad2v.modalities.text.byte_level import import_byte_level
from megad2v.modalities.text.export import check_exportable
from megad2v.modalities.text.reading import Lines, find_inputs
from megad2v.modalities.text.tokenizer import ABOUT_FILE, MODEL_FILES, VOCABULARY_FILE
from megad2v.modalities.text.train import MODELS, TrainingOptions, train_tokenizer

EPILOG = """\
OUTPUT gets megad2v.json, the model (sentencepiece's tokenizer.model, or tokenizer.json) and vocab.tsv (id, piece).
Ids are RoBERTa's: <s> 0, <pad> 1, </s> 2, <unk> 3, then pieces, <mask> last; --vocab-size counts all of them. A text
that reads "<mask>" never becomes that id. Texts come back exactly as they were, but for U+2581, which comes back as a
space: nothing is normalised, and what the vocabulary lacks is spelled in bytes (with --no-byte-fallback: <unk>).

Inputs are streamed; of more than --max-sentences lines as many are drawn at random. Equal inputs, options and version
of sentencepiece give equal files. `--model byte` has a fixed vocabulary of 261 ids and needs no input.

examples:
  python tools/train_tokenizer.py --input 'wiki/**/*.txt.gz' --vocab-size 32000 --output tokenizer
  python tools/train_tokenizer.py --input reviews.jsonl --field body --vocab-size 8000 --output tokenizer
  python tools/train_tokenizer.py --from roberta-base/tokenizer.json --output tokenizer
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = top.add_mutually_exclusive_group()
    source.add_argument("--input", nargs="+", metavar="GLOB", help="files, folders or patterns, as make_shards text")
    source.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="tokenizer.json, or vocab.json beside merges.txt"
    )
    top.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the vocabulary")
    top.add_argument("--vocab-size", type=int, default=32_000, metavar="N", help="ids (default: %(default)s)")
    top.add_argument("--model", choices=MODELS, default="bpe", help="default: %(default)s; unigram cannot be exported")
    top.add_argument("--byte-fallback", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    top.add_argument(
        "--coverage",
        type=float,
        default=TrainingOptions.coverage,
        metavar="P",
        help="share of the text's characters with a piece of their own (default: %(default)s)",
    )
    top.add_argument(
        "--max-sentences",
        type=int,
        default=TrainingOptions.max_sentences,
        metavar="N",
        help="lines that are trained on at most (default: %(default)s)",
    )
    top.add_argument("--field", default="text", metavar="NAME", help=".jsonl and .tsv: where the text is")
    top.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw of lines (default: 0)")
    top.add_argument("--overwrite", action="store_true", help="replace the vocabulary in --output")
    return top


def run(args: argparse.Namespace) -> str:
    """Make the vocabulary; returns the lines to print. Raises UserError."""
    _check_output(args.output, args.overwrite)
    heard = ""
    if args.source is not None:
        tokenizer = import_byte_level(args.source)
    else:
        if not args.input and args.model != "byte":
            raise UserError("give --input (texts to train on) or --from (a tokenizer to take over)")
        if args.max_sentences < 1 or not 0 < args.coverage <= 1:
            raise UserError("--max-sentences: expected 1 or more; --coverage: more than 0, at most 1")
        lines = Lines(find_inputs(args.input) if args.input and args.model != "byte" else (), args.field)
        options = TrainingOptions(
            args.vocab_size, args.model, args.byte_fallback, args.coverage, args.max_sentences, args.seed
        )
        tokenizer = train_tokenizer(lines, options)
        if lines.files:
            heard = f", from {lines.read:,} lines of {len(lines.files)} files"
        if lines.passed_over:
            heard += f" ({lines.passed_over} more could not be read)"
    tokenizer.save(args.output)
    made = f"{args.output}: {tokenizer.name}, {tokenizer.vocabulary:,} ids, fingerprint {tokenizer.fingerprint}{heard}"
    try:
        check_exportable(tokenizer.name)
    except UserError as error:
        return f"{made}\ntools/convert_checkpoint.py --to hf will refuse runs with it: {error}"
    return made


def _check_output(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    ours = {ABOUT_FILE, VOCABULARY_FILE, *filter(None, MODEL_FILES.values())}
    foreign = not folder.is_dir() or any(path.name not in ours for path in folder.iterdir())
    if foreign or (any(folder.iterdir()) and not overwrite):
        raise UserError(f"{folder}: is there already; give another --output{'' if foreign else ', or --overwrite'}")
    for path in folder.iterdir():
        path.unlink()


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line when the input is wrong."""
    args = parser().parse_args(argv)
    try:
        print(run(args))
    except UserError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
