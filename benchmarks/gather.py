"""Gather what benchmarks/clothing.sh or digits.sh left into one JSON: validation curves and probes of each run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SEEDS = ("seed1", "seed2", "seed3")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(work: Path, result: Path, command: str) -> None:
    """Write `result` from the runs that `command` left in `work`; a run that is missing is an error."""
    runs: dict[str, Any] = {}
    for name in (*SEEDS, "shuffled"):
        if not (work / f"{name}-probe.json").exists():
            raise SystemExit(f"gather: {work / name} has no probe: the run failed (see {work / name}.log)")
        metrics = _lines(work / name / "metrics.jsonl")
        keys = ("step", "valid_loss", "valid_retrieval", "valid_retrieval_chance", "valid_target_std", "valid_pred_std")
        runs[name] = {
            "validation": [{key: line[key] for key in keys} for line in metrics if "valid_loss" in line],
            "last_step": [line for line in metrics if "loss" in line][-1],
            "probe": json.loads((work / f"{name}-probe.json").read_text()),
            "zero": json.loads((work / name / "ds_config.json").read_text())["zero_optimization"]["stage"],
        }
    text = json.dumps({"command": command, "runs": runs}, indent=1)
    result.write_text(text.replace(str(work), "WORK") + "\n")  # no path of the machine that ran it
    print(f"{result}: {', '.join(runs)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
