"""What checkpoints cost: bytes, bandwidth, the stall of a save in the background, memory, and metadata of many ranks.

    torchrun --nproc_per_node 2 benchmarks/checkpoint.py ds_configs/zero3.json [--width 512 --depth 8] [--output FILE]

Speed. A real engine of that size; saves in the foreground alternate with a plain sequential write of as many bytes by
every rank (one buffer, one file, one fsync; all ranks at once), to the same folder. Ratios are medians over the pairs,
with quartiles. Then training steps with a save in the background; its stall is what `save_stall_seconds` says, the
largest of all ranks. Memory: how far the peak of resident memory lies above what was resident before the save.

Metadata. Checkpoints as so many ZeRO-3 ranks would write of vision_large, with all of its parameters, but three values
in each fragment: every file is really written and read. Times of one rank; the files of the others are the others'.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import torch
import torch.distributed as dist

from benchmarks.timing import timed
from megad2v.checkpoint.background import BackgroundWriter
from megad2v.checkpoint.catalog import damage, step_directory
from megad2v.checkpoint.layout import INDEX, FileRecord, Index, Piece, fragments_of
from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.stream import CHUNK, as_bytes, write_tensors
from megad2v.engine import distributed
from megad2v.engine.distributed import World

VALUES = 3
"""In each fragment of the metadata part."""


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deepspeed_json", type=Path)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="images per micro-batch, one micro-batch per rank")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 1024], help="of the metadata part")
    parser.add_argument(
        "--folder", type=Path, help="on the file system to be measured (default: the system's for temporary files)"
    )
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, help="append JSON lines")
    arguments = parser.parse_args()
    world = distributed.start()
    made = tempfile.mkdtemp(prefix="checkpoint_benchmark_", dir=arguments.folder) if world.is_main else ""
    folder = Path(distributed.broadcast_text(made))
    try:
        rows = [speed(arguments, world, folder)]
        if world.is_main:
            rows += [metadata(folder, ranks) for ranks in arguments.ranks]
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if world.is_main:
        words = " ".join(sys.argv).partition(" --note")[0].partition(" --output")[0]  # these two come last
        command = f"torchrun --nproc_per_node {world.size} {words}"
        for row in rows:
            row |= {"note": arguments.note, "command": command}
            print(json.dumps(row, indent=1), flush=True)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    distributed.barrier()
    distributed.stop()
    distributed.leave_now(0)


# --- speed


def speed(arguments: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Saves of a real engine against plain writes, in the foreground and in the background. Collective."""
    trainer = _trainer(arguments, world)
    from megad2v.training.state import state_memory

    own = sum(memory.numel() for _, _, memory in state_memory(trainer.engine, trainer.teacher)) * 4
    plain = torch.rand(own // 4)
    saves: list[float] = []
    writes: list[float] = []
    trainer.step()  # so that there are moments
    run = folder / "run"
    for pair in range(arguments.pairs + 1):
        shutil.rmtree(run, ignore_errors=True)
        (folder / f"plain{world.rank}").unlink(missing_ok=True)
        write, save = (partial(_plain, folder / f"plain{world.rank}", plain), partial(trainer.save, run, pair))
        times = {action: _until_all(action) for action in ((write, save) if pair % 2 else (save, write))}
        if pair:  # the first opens files and libraries
            writes.append(times[write]), saves.append(times[save])
    peak = _peak_above(partial(trainer.save, run, arguments.pairs + 1))
    minimum = 12 * trainer.student_values + 4 * trainer.teacher_values
    directory = step_directory(run, arguments.pairs + 1)
    written = sum(path.stat().st_size for path in directory.iterdir())
    row = {
        "what": "speed",
        "parameters": trainer.student_values,
        "ranks": world.size,
        "zero_stage": trainer.engine.state.stage,
        "bytes_written": written,
        "bytes_over_minimum": written / minimum,
        "save_seconds": median(saves),
        "plain_write_seconds": median(writes),
        "bandwidth_mb_per_s": written / median(saves) / 1e6,
        "bandwidth_over_plain": _spread([write / save for write, save in zip(writes, saves, strict=True)]),
        "peak_above_resident_mb": [round(value / 1e6, 1) for value in _all(peak)],
        "whole_state_mb": minimum / 1e6,
        "rank_share_mb": [round(value / 1e6, 1) for value in _all(own)],
    }
    return row | _in_the_background(arguments, trainer, run, median(saves))


def _in_the_background(arguments: argparse.Namespace, trainer: Any, run: Path, foreground: float) -> dict[str, Any]:
    saver = BackgroundWriter()
    saved, during, without = [], [], []
    step_peak = _peak_above(trainer.step)
    peak = 0
    for number in range(arguments.pairs + 1):
        shutil.rmtree(run, ignore_errors=True)
        without.append(_until_all(trainer.step))
        before = _resident()
        _reset_peak()
        distributed.barrier()
        trainer.save(run, number, write=partial(saver.start, begun=time.perf_counter()))
        step_times = [_until_all(partial(trainer.step, saver.before_update))]
        while not saver.ready():
            step_times.append(_until_all(trainer.step))
        saved.append(saver.finish())
        during += step_times if number else []
        peak = _peak() - before if number == 0 else peak  # the first save allocates what the others use again
    stalls = [max(_all(one.stall_seconds)) for one in saved[1:]]  # the first also allocates
    return {
        "background_stall_seconds": median(stalls),
        "background_stall_over_foreground_save": _spread([stall / foreground for stall in stalls]),
        "background_save_seconds": median([one.save_seconds for one in saved[1:]]),
        "step_seconds": median(without[1:]),
        "step_seconds_while_writing": median(during),
        "background_peak_above_resident_mb": [round(value / 1e6, 1) for value in _all(peak)],
        "of_which_a_step_without_saving_mb": [round(value / 1e6, 1) for value in _all(step_peak)],
    }


class _Trainer:
    """An engine, its teacher, and a step that takes no data from anywhere."""

    def __init__(self, config: Any, engine: Any, teacher: Any, world: World, samples: int) -> None:
        from megad2v.engine.fragments import shapes

        self.config, self.engine, self.teacher, self.world = config, engine, teacher, world
        self.student_values = sum(shape.numel() for shape in shapes(engine.student).values())
        self.teacher_values = sum(shape.numel() for shape in shapes(engine.teacher_module).values())
        size, grid = config.vision.image_size, config.vision.image_size // config.vision.patch_size
        self._images = torch.randn(samples, 3, size, size, device=world.device)
        self._mask = torch.rand(samples, 1, grid * grid, device=world.device) < 0.5

    def step(self, before_update: Callable[[], None] | None = None) -> None:
        loss = self.engine.forward(self._images, self._mask, None, None)[0]
        self.engine.backward(loss, int(self._mask.sum()) * self.world.size)
        if before_update is not None:
            before_update()
        self.engine.step(1e-4)
        self.teacher.update(0.999)
        self.teacher.refresh()

    def save(self, run: Path, step: int, **more: Any) -> None:
        from megad2v.training.state import Progress, save

        save(
            step_directory(run, step),
            self.engine,
            self.teacher,
            Progress(step=step),
            self.config,
            world=self.world,
            data_fingerprint="",
            **more,
        )


def _trainer(arguments: argparse.Namespace, world: World) -> _Trainer:
    from megad2v.config.deepspeed_json import fill_deepspeed, read_deepspeed_json
    from megad2v.config.schema import Config, ModelConfig, TargetsConfig, TrainConfig
    from megad2v.teacher.ema import ShardedTeacher
    from megad2v.training.setup import build_engine, resolve_precision

    config = Config(
        model=ModelConfig(width=arguments.width, depth=arguments.depth, heads=8),
        targets=TargetsConfig(layers=2),
        train=TrainConfig(micro_batches_per_step=world.size),
    )
    precision = resolve_precision("auto")
    filled = fill_deepspeed(
        read_deepspeed_json(arguments.deepspeed_json), config, precision=precision, data_parallel=world.size
    )
    engine = build_engine(config, filled, world)
    return _Trainer(config, engine, ShardedTeacher(engine), world, arguments.samples)


def _plain(path: Path, values: torch.Tensor) -> None:
    block = as_bytes(values)
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(block), 16 * CHUNK):
            file.write(block[start : start + 16 * CHUNK])
        os.fsync(file.fileno())


def _until_all(action: Callable[[], Any]) -> float:
    """Seconds from when all ranks are there until all are done. Collective."""
    return timed(lambda: (action(), distributed.barrier()))


def _all(value: float) -> list[float]:
    """`value` of every rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4)
    return {"median": median(values), "quartile_1": low, "quartile_3": high}


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(f"{key}:")).split()[1]) * 1024


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_above(action: Callable[[], Any]) -> int:
    """Bytes by which the peak of resident memory rises above what is resident now."""
    before = _resident()
    _reset_peak()
    action()
    return _peak() - before


# --- metadata


def metadata(folder: Path, ranks: int) -> dict[str, Any]:
    """Write and read a checkpoint of `ranks` files. One process."""
    names = _names()
    directory = folder / f"of_{ranks}"
    directory.mkdir()
    start = time.perf_counter()
    records = [_write_rank(directory, rank, names) for rank in range(ranks)]
    writing = time.perf_counter() - start
    shapes = {name: [ranks * VALUES] for name in names}
    index = Index(step=1, shapes=shapes, files=records, state={}, config={}, layout={"ranks": ranks}, code={})
    row: dict[str, Any] = {"what": "metadata", "ranks": ranks, "parameters_by_name": len(names)}
    text, row["index_dump_seconds"] = _clock(index.dumps)
    (directory / INDEX).write_text(text)
    row |= {"index_mb": len(text) / 1e6, "fragments": sum(len(record.fragments) * 4 for record in records)}
    row["write_own_file_seconds"] = writing / ranks
    loaded, row["index_load_seconds"] = _clock(lambda: Index.load(directory / INDEX))
    assert loaded == index
    _, row["open_seconds"] = _clock(lambda: Checkpoint(directory, check_sizes=False))
    problem, row["verify_share_seconds"] = _clock(lambda: damage(directory, share=(0, ranks)))
    assert problem is None
    _, row["sizes_of_all_files_seconds"] = _clock(lambda: damage(directory, checksums=False))
    for targets in sorted({ranks, ranks // 2, 8}, reverse=True):
        opened = Checkpoint(directory, check_sizes=False)
        _, seconds = _clock(partial(_load_rank, opened, targets // 2, targets, ranks, names))
        row[f"load_onto_{targets}_ranks_seconds"] = seconds
    shutil.rmtree(directory)
    return row


def _names() -> list[str]:
    from megad2v.config.load import parse_command_line
    from megad2v.modalities.build import build_student

    recipe = parse_command_line(["--deepspeed", "ds_configs/zero3.json", "--config", "vision_large"]).config
    with torch.device("meta"):
        return [name for name, _ in build_student(recipe).named_parameters()]


def _write_rank(directory: Path, rank: int, names: list[str]) -> FileRecord:
    values = torch.arange(VALUES, dtype=torch.float32) + rank * VALUES
    kinds = ("student", "exp_avg", "exp_avg_sq", "teacher")
    pieces = [Piece(kind, name, rank * VALUES, values) for name in names for kind in kinds]
    path = directory / f"rank{rank:05d}.safetensors"
    return FileRecord(path.name, *write_tensors(path, pieces), fragments_of(pieces))


def _load_rank(checkpoint: Checkpoint, rank: int, targets: int, ranks: int, names: list[str]) -> None:
    slot = math.ceil(ranks * VALUES / targets)
    start = rank * slot
    expected = torch.arange(start, start + slot, dtype=torch.float32)
    for name in names:
        for kind in ("student", "exp_avg", "exp_avg_sq", "teacher"):
            assert torch.equal(checkpoint.read(kind, name, start, slot), expected)


def _clock(action: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
