"""What guard and watchdog cost: whole steps with and without them, alternating in one run, and the bare exchange.

    torchrun --nproc_per_node 2 benchmarks/guard.py ds_configs/zero3.json [--width 384 --depth 12] [--output FILE]

A step is the trainer's own (count_step and take_step; no data, no log). With: one exchange over gloo on the host,
hooks on every module, a watchdog thread at its usual tick. Without: the counts in an all-reduce on the device, no
hooks, no thread. Pairs of steps are compared, since the machine's speed drifts; the ratio is the median over the
pairs, with the quartiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

from benchmarks.timing import timed
from megad2v.engine import distributed


def _bare(guard: Any, proposal: Any, count: int = 200) -> dict[str, float]:
    """Seconds of one exchange: median and worst, once all ranks are there."""
    times = [timed(lambda: guard.agree(proposal, [1, 2, 3])) for _ in range(count)]
    return {"median": median(times), "worst": max(times)}


def _hook(guard: Any, count: int = 20_000) -> float:
    """Seconds that one module's hook takes: a place noted, a name compared."""
    guard._expected = ["encoder.blocks.0"] * count
    guard._next = 0
    start = time.perf_counter()
    for _ in range(count):
        guard._about_to_run("encoder.blocks.0", None, None)
    guard._expected = None
    return (time.perf_counter() - start) / count


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deepspeed_json", type=Path)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--samples", type=int, default=4, help="images per micro-batch, one micro-batch per rank")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, help="append one JSON line")
    arguments = parser.parse_args()
    world = distributed.start()
    result = measure(arguments, world)
    if world.is_main:
        print(json.dumps(result, indent=1))
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
    distributed.stop()


def _prepare(arguments: argparse.Namespace, world: Any) -> tuple[Any, Any, list[Any], str]:
    """Engine, teacher, this rank's micro-batches, precision. Collective."""
    import torch

    from megad2v.config.deepspeed_json import fill_deepspeed, read_deepspeed_json
    from megad2v.config.load import load_config
    from megad2v.modalities.batch import Batch
    from megad2v.teacher.ema import ShardedTeacher
    from megad2v.training.setup import build_engine, resolve_precision

    config = load_config(
        "vision_tiny",
        model__width=arguments.width,
        model__depth=arguments.depth,
        model__heads=arguments.width // 64,
        data__micro_batch__samples=arguments.samples,
        train__micro_batches_per_step=world.size,
    )
    precision = resolve_precision(config.train.precision)
    ds = read_deepspeed_json(arguments.deepspeed_json)
    ds = fill_deepspeed(ds, config, precision=precision, data_parallel=world.size)
    engine = build_engine(config, ds, world)
    images = torch.randint(0, 256, (arguments.samples, 3, 64, 64), dtype=torch.uint8)
    mask = torch.rand(arguments.samples, 1, 64) < 0.6
    names = tuple(f"sample-{number:06d}" for number in range(arguments.samples))
    return engine, ShardedTeacher(engine), [Batch("vision", images, mask, sample_ids=names)], precision


def measure(arguments: argparse.Namespace, world: Any) -> dict[str, Any]:
    """The numbers, on rank 0. Collective."""
    from megad2v.engine.fragments import shapes
    from megad2v.engine.guard import Guard
    from megad2v.engine.watchdog import start_watchdog
    from megad2v.training.proposal import propose
    from megad2v.training.step import count_step, take_step

    engine, teacher, batches, precision = _prepare(arguments, world)

    def step(number: int, guard: Any) -> None:
        agree = None
        if guard is not None:
            guard.watch.at("data", step=number)
            proposal = propose(batches, kind="training", step=number, updates=number, depth=arguments.depth)
            agree = lambda own: guard.agree(proposal, own)
        counts = count_step(batches, world, agree)
        take_step(
            engine, teacher, batches, counts, world=world, seed=1, step=number, learning_rate=1e-4, decay=0.999,
            statistics=None, guard=guard,
        )  # fmt: skip

    step(0, None), step(1, None)  # DeepSpeed traces the first steps
    rows: dict[str, list[float]] = {"without": [], "with": []}
    bare, hook = {}, 0.0
    for pair in range(arguments.pairs):
        for kind in ("without", "with") if pair % 2 else ("with", "without"):
            guard = watch = None
            if kind == "with":
                watch = start_watchdog(world, Path(tempfile.gettempdir()) / "megad2v_benchmark_hang", 600.0)
                guard = Guard(engine, world, watch, limit=600.0)
            rows[kind].append(timed(lambda guard=guard: step(2, guard)))
            if guard is not None:
                if pair == 0:
                    proposal = propose(batches, kind="training", step=0, updates=0, depth=arguments.depth)
                    bare, hook = _bare(guard, proposal), _hook(guard)
                guard.close(), watch.close()
    ratios = [a / b for a, b in zip(rows["with"], rows["without"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    modules = 2 * (arguments.depth + 2) + 2
    return {
        "zero": engine.state.stage,
        "ranks": world.size,
        "device": str(world.device.type),
        "precision": precision,
        "parameters": sum(shape.numel() for shape in shapes(engine.student).values()),
        "pairs": arguments.pairs,
        "step_seconds": {kind: median(times) for kind, times in rows.items()},
        "with_over_without": {"median": median(ratios), "quartiles": [low, high]},
        "exchange_seconds": bare,
        "hook_seconds": hook,
        "added_over_step": (bare["median"] + modules * hook) / median(rows["without"]),
        "note": arguments.note,
    }


if __name__ == "__main__":
    main()
