#!/usr/bin/env python
"""Kill -9 one rank or all of a run, again and again, and compare what comes out with a run that nobody touched.

    python benchmarks/kills.py --shards runs/demo/shards/image/train > benchmarks/results/kills_cpu.jsonl

One line for each kill (tests/cli/kills.py says what the fields are), and a last one with the comparison. Two processes
under ZeRO-3 on a CPU; needs the test suite's modules, so a checkout of the repository. Everything is written into a
temporary folder (--keep PATH: into that one).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.cli.kills import RANKS, Outcome, draw, killed_run
from tests.cli.live_run import LiveRun
from tests.cli.test_kills import SAVE_EVERY, flags, same_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=1e9, help="no further kill after this long")
    parser.add_argument("--keep", type=Path)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megad2v-kills-") as temporary:
        folder = words.keep or Path(temporary)
        whole, run = folder / "whole", folder / "run"
        with LiveRun(flags(words.shards, whole, words.steps, SAVE_EVERY), ranks=RANKS, logs=folder / "logs") as live:
            assert live.wait(1200) == [0] * RANKS, live.log()
        began = time.monotonic()
        numbers = (n for n in range(words.kills) if time.monotonic() - began < 60 * words.minutes)
        kills = (draw(words.seed, number) for number in numbers)
        outcomes: list[Outcome] = []
        for outcome in killed_run(flags(words.shards, run, words.steps, SAVE_EVERY), kills, folder / "logs"):
            outcomes.append(outcome)
            print(json.dumps(outcome.line()), flush=True)
        same_run(run, whole, words.steps)
    print(json.dumps(summary(outcomes, words.steps)), flush=True)


def summary(outcomes: list[Outcome], steps: int) -> dict[str, object]:
    """What all kills have in common."""
    return {
        "kills": len(outcomes),
        "resumed_from_the_newest_committed": sum(one.resumed == one.committed for one in outcomes),
        "checkpoints_passed_over": sum(one.passed_over for one in outcomes),
        "most_steps_lost": max(one.logged - one.resumed for one in outcomes),
        "save_every": SAVE_EVERY,
        "left_unfinished": Counter(one.unfinished or "nothing" for one in outcomes),
        "latest_was_behind": sum(one.latest_behind for one in outcomes),
        "steps": steps,
        "curve_trace_and_last_checkpoint_equal_to_the_bit": True,  # same_run has raised where they are not
    }


if __name__ == "__main__":
    main()
