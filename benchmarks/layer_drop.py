"""What layer drop does to ZeRO-3's gathering: all-gathers and their bytes per step of a narrow speech model.

    torchrun --nproc_per_node 2 benchmarks/layer_drop.py [--rate 0.05] [--output FILE]

12 blocks; DeepSpeed's prefetch bucket is 7 of them, and biases and norms stay gathered, as its defaults have it for the
base model. Three runs: no block
dropped, blocks dropped, and blocks dropped with DeepSpeed's one trace instead of one for each set (engine.traces).
Means over all steps but the first two.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megad2v.config.deepspeed_json import fill_deepspeed, read_deepspeed_json
from megad2v.config.modalities import SpeechConfig
from megad2v.config.schema import Config, ModelConfig, OptimizerConfig, TargetsConfig, TrainConfig
from megad2v.engine import distributed
from megad2v.engine.distributed import World
from megad2v.modalities.speech.geometry import frame_count
from megad2v.training.layer_drop import kept_blocks

DEPTH, SAMPLES, WARM_UP = 12, 4_000, 2


class Gathered(TorchDispatchMode):
    """Counts all-gathers and adds up the size of what they fill."""

    calls = bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d" and "allgather" in func._schema.name:
            output = next(leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.calls, self.bytes = self.calls + 1, self.bytes + output.numel() * output.element_size()
        return func(*args, **(kwargs or {}))


def _config(width: int) -> Config:
    convolutions = tuple((64, kernel, stride) for _, kernel, stride in SpeechConfig().conv_layers)
    return Config(
        modality="speech",
        model=ModelConfig(
            width=width, depth=DEPTH, heads=4, norm="post", layer_scale=None, relative_bias=False, head_layers=1
        ),
        speech=SpeechConfig(conv_layers=convolutions),
        targets=TargetsConfig(layers=8, tensor="ffn", layer_norm="instance", average_norm="none"),
        optimizer=OptimizerConfig(lr=1e-4),
        train=TrainConfig(micro_batches_per_step=2),
    )


def _measure(world: World, arguments: argparse.Namespace, *, rate: float, traces: bool) -> dict[str, Any]:
    from megad2v.teacher.ema import ShardedTeacher
    from megad2v.training.setup import build_engine, resolve_precision

    config = _config(arguments.width)
    ds = read_deepspeed_json(Path(__file__).resolve().parents[1] / "ds_configs" / "zero3.json")
    ds["zero_optimization"]["stage3_prefetch_bucket_size"] = 7 * 12 * arguments.width**2
    ds["zero_optimization"]["stage3_param_persistence_threshold"] = 10 * arguments.width
    precision = resolve_precision(config.train.precision)
    engine = build_engine(config, fill_deepspeed(ds, config, precision=precision, data_parallel=2), world)
    if not traces:
        engine._traces = []
    teacher = ShardedTeacher(engine)
    waveforms = torch.randn(2, SAMPLES, device=world.device)
    mask = torch.rand(2, 1, frame_count(SAMPLES, config.speech.conv_layers), device=world.device) < 0.5
    rows: list[tuple[int, int]] = []
    for step in range(arguments.steps + WARM_UP):
        kept = kept_blocks(1, step, depth=DEPTH, rate=rate)
        with Gathered() as gathered:
            engine.backward(engine.forward(waveforms, mask, None, kept)[0], 2 * int(mask.sum()))
            engine.step(1e-4)
            teacher.update(0.999)
            teacher.refresh()
        rows.append((gathered.calls, gathered.bytes))
    calls, sizes = zip(*rows[WARM_UP:], strict=True)
    return {"gathers": mean(calls), "gathered_mib": mean(sizes) / 2**20}


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, help="append one JSON line per run")
    arguments = parser.parse_args()
    world = distributed.start()
    for rate, traces in ((0.0, True), (arguments.rate, True), (arguments.rate, False)):
        row = {"layer_drop": rate, "trace": "per set of blocks" if traces else "one"}
        row |= _measure(world, arguments, rate=rate, traces=traces)
        row |= {"width": arguments.width, "steps": arguments.steps, "ranks": world.size, "device": world.device.type}
        if world.is_main:
            print(json.dumps(row), flush=True)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    distributed.stop()
    distributed.leave_now(0)


if __name__ == "__main__":
    main()
