"""Gather what clothing.sh, digits.sh, books.sh or joint.sh left into one JSON: validation curves and probes of each run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(work: Path, result: Path, command: str, names: Sequence[str]) -> None:
    """Write `result` from the runs `names` that `command` left in `work`, each with probes NAME-*.json; a run that is
    missing is an error. reference-*.json are what to compare them with."""
    runs: dict[str, Any] = {}
    for name in names:
        probes = sorted(work.glob(f"{name}-*.json"))
        if not probes:
            raise SystemExit(f"gather: {work / name} has no probe: the run failed (see {work / name}.log)")
        metrics = _lines(work / name / "metrics.jsonl")
        keys = ("step", "valid_loss", "valid_retrieval", "valid_retrieval_chance", "valid_target_std", "valid_pred_std")
        if len({line["modality"] for line in metrics if "modality" in line}) > 1:
            keys = ("modality", *keys)
        runs[name] = {
            "validation": [{key: line[key] for key in keys} for line in metrics if "valid_loss" in line],
            "last_step": [line for line in metrics if "loss" in line][-1],
            **{path.stem.removeprefix(f"{name}-"): json.loads(path.read_text()) for path in probes},
            "zero": json.loads((work / name / "ds_config.json").read_text())["zero_optimization"]["stage"],
        }
    references = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("reference-*.json"))}
    text = json.dumps({"command": command, "runs": runs, **references}, indent=1)
    result.write_text(text.replace(str(work), "WORK") + "\n")  # no path of the machine that ran it
    print(f"{result}: {', '.join(runs)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
