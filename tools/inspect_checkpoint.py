#!/usr/bin/env python3
"""What a checkpoint holds and whether it is whole; for a run, all its checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

from megad2v.checkpoint.catalog import is_step
from megad2v.checkpoint.describe import describe_checkpoint, describe_run
from megad2v.errors import UserError

EPILOG = """\
Index and sizes are always looked at; --verify reads every byte and compares checksums, as a run does before it resumes.
The files are plain safetensors: KIND/NAME@START holds elements [START, START + length) of the flattened tensor NAME, in
the kinds student (float32 weights), teacher (their average), exp_avg and exp_avg_sq (Adam's moments).

examples:
  python tools/inspect_checkpoint.py runs/mine                               # all of a run; what is resumed from
  python tools/inspect_checkpoint.py runs/mine/checkpoints/step_00000500     # its layout and parameter table
  python tools/inspect_checkpoint.py runs/mine --verify --json | jq .resume

Exit code 0; 1 where PATH is a damaged checkpoint, or a run without a valid one; 2 where PATH is neither.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("path", type=Path, metavar="PATH", help="a run, or one of its checkpoints/step_XXXXXXXX")
    top.add_argument("--verify", action="store_true", help="read every byte and compare checksums")
    top.add_argument("--json", action="store_true", help="print JSON instead of text")
    return top


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 or 2, as the help says."""
    args = parser().parse_args(argv)
    describe = describe_checkpoint if is_step(args.path) else describe_run
    try:
        description = describe(args.path, verify=args.verify)
    except UserError as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return error.exit_code
    try:
        print(json.dumps(description.facts, indent=1) if args.json else "\n".join(description.lines), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; nothing is to be flushed into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if description.valid else 1


if __name__ == "__main__":
    sys.exit(main())
