#!/usr/bin/env python3
"""Index WebDataset tars, anybody's, so that training can open them at once; says what they hold and what is odd."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

from megad2v.data.format import MODALITY_KINDS
from megad2v.data.indexing import index_shards
from megad2v.errors import UserError

EPILOG = """\
Training indexes what has no index itself, one tar after the other; do it ahead for large sets. Files of one key (the
path up to the first dot of its last part) are a sample: KEY.jpg|jpeg|png|webp, KEY.flac|wav, KEY.tokens.npy, one or
several of them, and KEY.cls; whatever else is there stays unused. Indexes are written to index/ beside the tars, or
where that cannot be written to $MEGAD2V_INDEX (default: ~/.cache/megad2v/index), which training looks into as well.
A tar that has an index is only looked at again when its size, time or first bytes have changed. docs/data.md has more.

examples:
  python tools/index_shards.py cc12m/
  python tools/index_shards.py 'laion/{00000..00999}.tar' --workers 16 --modality vision
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, folders, globs or brace patterns of tars")
    top.add_argument(
        "--modality",
        nargs="+",
        choices=list(MODALITY_KINDS),
        default=list(MODALITY_KINDS),
        help="look for these only (default: all)",
    )
    top.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="tars indexed at a time; 0: in the main process (default: all %(default)s cores here)",
    )
    top.add_argument("--again", action="store_true", help="index also what has not changed")
    return top


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line when the input is wrong; other tars are indexed all the same."""
    args = parser().parse_args(argv)
    try:
        if not 0 <= args.workers <= 1024:
            raise UserError(f"--workers: expected 0 to 1024, got {args.workers}")
        survey = index_shards(
            args.shards, modalities=args.modality, workers=args.workers, again=args.again, progress=sys.stderr.isatty()
        )
        print("\n".join(survey.lines()))
        if problem := survey.problem():
            raise UserError(problem)
    except UserError as error:
        print(f"index_shards: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("index_shards: interrupted; tars that were finished keep their indexes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
