"""What a rank pays for a large data set: seconds to open it and to plan, memory, time of a micro-batch anywhere in it.

    python benchmarks/index_scale.py [--shards 10000] [--samples 10000] [--folder TMP] [--output FILE]

Indexes are real and of real size, written by the package (44 bytes a sample: 4.4 GB for 100 million); the tars beside
them are holes of the size that the indexes state, so bytes read from them are zeros. Each modality is measured in ranks
of their own, started together; each then forks workers that plan and read. Memory is what /proc/self/smaps_rollup
says, less what the process had after its imports: "anonymous" is the process's own, "file" are mapped pages of indexes,
which all processes of a node share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import numpy as np

from megad2v.config.schema import Config, DataConfig, MicroBatchConfig
from megad2v.data import index
from megad2v.data.format import KINDS
from megad2v.data.plan import training_plan
from megad2v.data.shardset import ShardSet

MODALITIES = {"vision": "jpg", "speech": "flac"}
BYTES = {"vision": 50_000, "speech": 200_000}
"""Of a sample."""
PLANNED, READ = 300, 300
"""Micro-batches planned at random places; samples read."""


def make(folder: Path, modality: str, shards: int, samples: int) -> float:
    """Holes for tars, and their indexes; returns gigabytes of indexes."""
    folder.mkdir()
    kind, size = KINDS.index(MODALITIES[modality]), BYTES[modality]
    rng = np.random.default_rng(0)
    total = 0
    for number in range(shards):
        tar = folder / f"{modality}-{number:06d}.tar"
        with tar.open("wb") as file:
            file.truncate(samples * (size + 1024))
        records = np.zeros(samples, dtype=index.RECORD)
        names = [f"{number * samples + row:09d}".encode() for row in range(samples)]
        records["offset"] = np.arange(samples, dtype=np.uint64) * (size + 1024) + 512
        records["size"], records["kind"], records["key_size"], records["label"] = size, kind, 9, -1
        records["key_start"] = np.arange(samples, dtype=np.uint64) * 9
        lengths = rng.normal(14, 4, samples).clip(2.1, 34) * 16_000 if modality == "speech" else np.full(samples, 2e5)
        stat = tar.stat()
        with tar.open("rb") as file:
            found = index.made_index(records, lengths.astype("<u4"), b"".join(names), file.fileno(), stat)
        path = index.index_path(tar, modality)
        index.store(found, path)
        total += path.stat().st_size
    return total / 1e9


def resident(before: dict[str, float] | None = None) -> dict[str, float]:
    """MiB of this process: its own, and mapped from files; and the most it ever had of both."""
    fields = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    now = {"anonymous": int(fields["Anonymous:"]), "file": int(fields["Rss:"]) - int(fields["Anonymous:"])}
    now["peak"] = int(peak)
    return {key: round(kib / 1024 - (before[key] if before else 0), 1) for key, kib in now.items()}


def rank(folder: str, modality: str, workers: int) -> dict[str, Any]:
    """Open, plan, and look at random micro-batches, as a rank does; then the same in forked workers."""
    budget = MicroBatchConfig(samples=16) if modality == "vision" else MicroBatchConfig(samples=None, seconds=240.0)
    config = Config(modality=modality, data=DataConfig(shards=folder, micro_batch=budget))
    before, result = resident(), {}

    def step(name: str, action: Any) -> Any:
        started = time.perf_counter()
        value = action()
        result[f"{name}_seconds"] = round(time.perf_counter() - started, 3)
        result[f"{name}_mib"] = resident(before)
        return value

    shards = step("open", lambda: ShardSet(folder, modality))
    step("fingerprint", lambda: shards.fingerprint)
    plan, _ = step("plan", lambda: training_plan(config, shards))
    result["samples"] = len(shards)
    last = 3 * len(shards) // 16
    places = np.random.default_rng(os.getpid()).integers(last, size=PLANNED).tolist()

    def look() -> None:
        times = []
        for number in places:
            started = time.perf_counter()
            rows = plan.numbered(number)
            times.append(1000 * (time.perf_counter() - started))
            shards.read(rows[0][1])
        result["numbered_ms"] = {"median": round(float(np.median(times)), 2), "max": round(max(times), 1)}

    def run_on() -> None:
        for number in range(places[0], places[0] + PLANNED):
            for _, sample in plan.numbered(number):
                shards.read(sample)

    step("random", look)
    step("in_order", run_on)
    result["workers"] = []
    for _ in range(workers):
        seen, told = os.pipe()
        if not os.fork():
            start = resident()
            run_on()
            os.write(told, json.dumps(resident(start)).encode())
            os._exit(0)
        os.wait()
        result["workers"].append(json.loads(os.read(seen, 4096)))
    return result


def main() -> None:
    """Make the data, measure each modality, remove the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=10_000, help="of a shard")
    parser.add_argument("--modality", nargs="+", choices=MODALITIES, default=list(MODALITIES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where there is room (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="append the results")
    parser.add_argument("--note", default="")
    parser.add_argument("--rank", nargs=2, metavar=("FOLDER", "MODALITY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        print(json.dumps(rank(*args.rank, args.workers)))
        return
    scratch = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        for modality in args.modality:
            folder = scratch / modality
            started = time.perf_counter()
            gigabytes = make(folder, modality, args.shards, args.samples)
            print(f"{modality}: {gigabytes:.1f} GB of indexes in {time.perf_counter() - started:.0f} s", flush=True)
            command = [sys.executable, __file__, "--rank", str(folder), modality, "--workers", str(args.workers)]
            ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(args.ranks)]
            for number, process in enumerate(ranks):
                found = json.loads(process.communicate()[0])
                line = {"modality": modality, "shards": args.shards, "rank": number, "note": args.note, **found}
                print(json.dumps(line), flush=True)
                if args.output:
                    with args.output.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
