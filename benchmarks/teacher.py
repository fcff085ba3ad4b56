"""What the sharded teacher costs: its update and refresh over a whole optimizer step, at any ZeRO stage.

Beside it, the way it is usually written by hand: gather every parameter of student and teacher, average on each rank.

    torchrun --nproc_per_node 2 benchmarks/teacher.py ds_configs/zero3.json [--width 384 --depth 12] [--output FILE]

Rows are medians over the steps, on rank 0; ratios are against the step of the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

from benchmarks.timing import timed
from megad2v.engine import distributed


def by_hand(engine: Any, decay: float) -> None:
    """The usual EMA hook: all parameters gathered, averaged on every rank, and written back. Collective."""
    import deepspeed
    import torch

    pairs = dict(engine.student.named_parameters())
    teacher = list(engine.teacher_module.named_parameters())
    everything = [pairs[name] for name, _ in teacher] + [p for _, p in teacher]
    partitioned = engine.state.stage == 3
    gather = deepspeed.zero.GatheredParameters(everything, modifier_rank=0) if partitioned else nullcontext()
    with gather, torch.no_grad():
        for name, average in teacher:
            average.data.mul_(decay).add_(pairs[name].data, alpha=1 - decay)


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deepspeed_json", type=Path)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--samples", type=int, default=4, help="images per micro-batch, one micro-batch per rank")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, help="append one JSON line")
    arguments = parser.parse_args()
    world = distributed.start()

    import torch

    from megad2v.config.deepspeed_json import fill_deepspeed, read_deepspeed_json
    from megad2v.config.load import load_config
    from megad2v.engine.fragments import shapes
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
    ds = fill_deepspeed(
        read_deepspeed_json(arguments.deepspeed_json), config, precision=precision, data_parallel=world.size
    )
    engine = build_engine(config, ds, world)
    teacher = ShardedTeacher(engine)
    images = torch.randint(0, 256, (arguments.samples, 3, 64, 64), dtype=torch.uint8, device=world.device)
    mask = torch.rand(arguments.samples, 1, 64, device=world.device) < 0.6

    def step() -> None:
        loss, _, _ = engine.forward(images, mask, None)
        engine.backward(loss, int(mask.sum()) * world.size)
        engine.step(1e-4)

    rows: dict[str, list[float]] = {"step": [], "update": [], "refresh": [], "by_hand": []}
    for number in range(arguments.steps + 2):
        times = {
            "step": timed(step),
            "update": timed(lambda: teacher.update(0.999)),
            "refresh": timed(teacher.refresh),
            "by_hand": timed(lambda: by_hand(engine, 0.999)),
        }
        if number >= 2:  # DeepSpeed traces the first steps
            for name, seconds in times.items():
                rows[name].append(seconds)
    middle = {name: median(values) for name, values in rows.items()}
    ours = middle["update"] + middle["refresh"]
    result = {
        "zero": engine.state.stage,
        "ranks": world.size,
        "device": str(world.device.type),
        "precision": precision,
        "parameters": sum(shape.numel() for shape in shapes(engine.student).values()),
        "seconds": middle,
        "teacher_over_step": ours / middle["step"],
        "teacher_over_by_hand": ours / middle["by_hand"],
    }
    if world.is_main:
        print(json.dumps(result, indent=1))
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
    distributed.stop()


if __name__ == "__main__":
    main()
