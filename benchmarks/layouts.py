"""What the layouts of docs/parallel.md cost: seconds per step, bytes sent, activations kept for backward.

    torchrun --nproc_per_node 2 benchmarks/layouts.py [--width 384 --depth 6] [--output FILE]

One row per layout, on rank 0; ratios are against the first (ZeRO-3, data-parallel) in the same run. A step is 4
micro-batches over all ranks. `sent` adds up the collectives of one step: the size of the whole tensor, an
all-reduce twice; `kept` is what autograd keeps of one forward, parameters left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.timing import timed
from megad2v.engine import distributed
from megad2v.engine.distributed import World
from megad2v.parallel.topology import Topology

MICRO_BATCHES, WARM_UP = 4, 2
COLLECTIVES = ("allreduce", "allgather", "reducescatter", "broadcast")

LAYOUTS: list[tuple[str, dict[str, Any]]] = [  # smaller tensor sizes first: DeepSpeed remembers the last mpu
    ("zero3", {}),
    ("zero3", {"teacher__resident": True}),
    ("zero1", {}),
    ("zero3_offload_param", {}),
    ("zero3", {"parallel__tensor": 2}),
    ("zero3", {"parallel__tensor": 2, "parallel__sequence": True}),
]


class Sent(TorchDispatchMode):
    """Adds up collectives."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.replace("_", "")
        if func.namespace in ("c10d", "_c10d_functional") and any(word in name for word in COLLECTIVES):
            out = func(*args, **(kwargs or {}))
            # A ring sends a reduced tensor round twice, a gathered or scattered one once.
            rounds = 2 if "allreduce" in name else 1
            self.bytes += rounds * max(_bytes(one) for one in (*args, out))
            return out
        return func(*args, **(kwargs or {}))


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Adds up what autograd keeps, every storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, torch.nn.Parameter):
            self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


def _rows(world: World, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megad2v.config.deepspeed_json import fill_deepspeed, read_deepspeed_json
    from megad2v.config.load import load_config
    from megad2v.training.setup import build_engine, resolve_precision

    folder = Path(__file__).resolve().parents[1] / "ds_configs"
    for zero, keys in LAYOUTS:
        config = load_config(
            "vision_tiny",
            model__width=arguments.width,
            model__depth=arguments.depth,
            model__heads=arguments.width // 64,
            data__micro_batch__samples=arguments.samples,
            train__micro_batches_per_step=MICRO_BATCHES,
            **keys,
        )
        here = replace(world, topology=Topology(config.parallel.tensor, world.device.type))
        precision = resolve_precision(config.train.precision)
        ds = fill_deepspeed(
            read_deepspeed_json(folder / f"{zero}.json"), config, precision=precision, data_parallel=here.data.size
        )
        yield {"layout": " ".join([zero, *(f"{key.split('__')[1]} {value}" for key, value in keys.items())]),
               **_measure(build_engine(config, ds, here), here, arguments), "precision": precision}  # fmt: skip


def _measure(engine: Any, world: World, arguments: argparse.Namespace) -> dict[str, Any]:
    from megad2v.teacher.ema import ShardedTeacher

    teacher = ShardedTeacher(engine)
    images = torch.randint(0, 256, (arguments.samples, 3, 64, 64), dtype=torch.uint8, device=world.device)
    mask = torch.rand(arguments.samples, 1, 64, device=world.device) < 0.6
    count = int(mask.sum()) * MICRO_BATCHES

    def forward() -> Tensor:
        return engine.forward(images, mask, None)[0]

    def step() -> None:
        for _ in range(MICRO_BATCHES // world.data.size):
            engine.backward(forward(), count)
        engine.step(1e-4)
        teacher.update(0.999)
        teacher.refresh()

    seconds = [timed(step) for _ in range(arguments.steps + WARM_UP)]
    with Sent() as sent:
        step()
    kept = Kept()
    with kept:
        forward()
    return {
        "step_seconds": median(seconds[WARM_UP:]),
        "sent_mib": sent.bytes / 2**20,
        "kept_mib": sum(kept.storages.values()) / 2**20,
    }


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--samples", type=int, default=8, help="images per micro-batch")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--output", type=Path, help="append one JSON line per layout")
    arguments = parser.parse_args()
    world = distributed.start()
    first: dict[str, Any] = {}
    for row in _rows(world, arguments):
        first = first or row
        ratios = {f"{key}_ratio": round(row[key] / first[key], 3) for key in ("step_seconds", "sent_mib", "kept_mib")}
        row = {**row, **ratios, "ranks": world.size, "device": world.device.type}
        if world.is_main:
            print(json.dumps(row), flush=True)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    distributed.stop()
    distributed.leave_now(0)


if __name__ == "__main__":
    main()
