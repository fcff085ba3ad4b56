"""How fast documents become blocks of whole sentences, and what the plan of very many blocks takes.

    python benchmarks/text_rows.py [--tokens 2e7] [--blocks 7e7] [--output FILE]

Blocks: CPU time of one process, so that other jobs on the machine count little, on shards of random ids in sentences of
25 tokens on average, from the page cache, for documents of three sizes; the better of two. Plan: resident memory of one
process that holds tables of so many blocks (in a run they are mapped files), before and after it has made the plan.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import numpy as np

from megad2v.data.blocks import BLOCK, build
from megad2v.data.buckets import BucketPlan, LengthBudget
from megad2v.data.index import build as build_index
from megad2v.data.writer import DatasetWriter
from megad2v.modalities.text.decode import write_tokens

MAX_TOKENS = 512
PER_SHARD = 100_000


def cut(mean: int, tokens: int) -> dict[str, Any]:
    """Blocks of documents of `mean` tokens, `tokens` in all."""
    rng, total = np.random.default_rng(0), 0
    with tempfile.TemporaryDirectory() as folder:
        with DatasetWriter(Path(folder, "shards"), "text", "text", 10**10) as writer:
            for number in range(max(4, tokens // mean)):
                ids = rng.integers(4, 30_000, max(2, int(rng.exponential(mean)))).astype("<u2")
                ids[rng.random(len(ids)) < 1 / 25] = 2
                ids[-1] = 2
                writer.write(f"{number:08d}", {"tokens.npy": write_tokens(ids), "json": b"{}"})
                total += len(ids)
            writer.finish()
        tar = Path(folder, "shards", "text-000000.tar")
        index, seconds = build_index(tar, "text"), []
        for _ in range(2):
            begin = time.process_time()
            blocks = build(tar, index, MAX_TOKENS)
            seconds.append(time.process_time() - begin)
    megabytes = 2 * total / 1e6
    return {
        "case": f"blocks, documents of {mean:,} tokens",
        "documents": len(index),
        "blocks": len(blocks),
        "megabytes": round(megabytes),
        "cpu_seconds": round(min(seconds), 2),
        "megabytes_per_cpu_second": round(megabytes / min(seconds)),
    }


def plan(count: int) -> dict[str, Any]:
    """Length buckets of `count` blocks, most of them nearly full."""
    rng, shards = np.random.default_rng(0), count // PER_SHARD
    tables = [np.zeros(PER_SHARD, BLOCK) for _ in range(shards)]
    for table in tables:
        full = rng.random(PER_SHARD) < 0.6
        table["length"] = np.where(full, rng.integers(460, 512, PER_SHARD), rng.integers(2, 512, PER_SHARD))
    before, begin = _resident(), time.process_time()
    lengths = np.concatenate([table["length"] for table in tables], dtype=np.int64) + 1
    sizes = [PER_SHARD] * shards
    made = BucketPlan(lengths, sizes, LengthBudget(2, MAX_TOKENS, total=16_384), ratio=1.1, seed=1, window=4)
    seconds = time.process_time() - begin
    del lengths
    return {
        "case": "plan",
        "blocks": made.epoch_size,
        "tables_megabytes": round(len(tables) * tables[0].nbytes / 1e6),
        "kept_megabytes": round(_resident() - before),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before),
        "cpu_seconds": round(seconds, 1),
    }


def _resident() -> float:
    """Megabytes of this process, now."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1e3


def main() -> None:
    """Print one JSON object a line, and write them to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=2e7, help="in each set of documents (default: %(default)g)")
    parser.add_argument("--blocks", type=float, default=7e7, help="of the plan (default: %(default)g)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = [plan(int(arguments.blocks))]  # first: the peak is the process's
    print(json.dumps(rows[0]), flush=True)
    for mean in (900, 9_000, 500_000):
        rows.append(cut(mean, int(arguments.tokens)))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.output is not None:
        arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
