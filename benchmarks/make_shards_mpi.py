"""make_shards over MPI ranks beside processes of one machine: seconds and CPU seconds of the whole command.

    python benchmarks/make_shards_mpi.py [--images-per-class 400] [--short 64] [--rounds 3] [--output FILE]

Input: demo pictures, each decoded, reduced and encoded again. The ways alternate within a round, and their best round
counts. Ranks and workers each include what starting them costs, given apart as the time for a corpus of eight pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOL = [sys.executable, "tools/make_shards.py", "image"]
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np"]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    **dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMP_NUM_THREADS"), "1"),
}


def measure(command: list[str]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    wall, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ways(source: Path, out: Path, short: int) -> dict[str, list[str]]:
    """Name -> command line."""
    words = ["--input", str(source), "--output", str(out), "--resize-short", str(short), "--max-shard-size", "500KB"]
    alone = [*TOOL, *words]
    return {
        "--workers 0": [*alone, "--workers", "0"],
        "--workers 1": [*alone, "--workers", "1"],
        "--workers 2": [*alone, "--workers", "2"],
        "1 rank": [*MPIRUN, "1", *alone, "--mpi"],
        "2 ranks": [*MPIRUN, "2", *alone, "--mpi"],
    }


def main() -> None:
    """Measure, print, and append JSON lines where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-per-class", type=int, default=400)
    parser.add_argument("--short", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, help="append JSON lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for data, amount in (("few", 1), ("many", arguments.images_per_class)):
            demo = ["tools/make_demo_data.py", str(folder / data), "--only", "image", "--images-per-class", str(amount)]
            subprocess.run([sys.executable, *demo], cwd=ROOT, check=True, capture_output=True)
        found: dict[str, dict[str, list[tuple[float, float]]]] = {"few": {}, "many": {}}
        for _ in range(arguments.rounds):
            for data, times in found.items():
                for way, command in ways(folder / data / "image", folder / "out", arguments.short).items():
                    times.setdefault(way, []).append(measure(command))
                    shutil.rmtree(folder / "out")
    rows: list[dict[str, Any]] = []
    for way in found["many"]:
        (wall, cpu), (start, start_cpu) = ([min(column) for column in zip(*found[d][way])] for d in ("many", "few"))
        rows.append(
            {
                "way": way,
                "images": 8 * arguments.images_per_class,
                "wall_seconds": round(wall, 2),
                "cpu_seconds": round(cpu, 2),
                "start_wall_seconds": round(start, 2),
                "start_cpu_seconds": round(start_cpu, 2),
                "note": arguments.note,
            }
        )
        print(json.dumps(rows[-1]))
    if arguments.output:
        with arguments.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
