"""Jobs for test_parallel.py: what split layers compute, and what tensor-parallel ranks draw. No DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megad2v.config.schema import Config
from megad2v.engine.setup import write_initial_weights
from megad2v.modalities.build import build_student, build_teacher
from megad2v.models.data2vec import Student, Teacher
from megad2v.models.initialise import truncated_normal
from megad2v.models.layers import VanillaLayers
from megad2v.parallel.layers import layers_for
from megad2v.parallel.sharding import shard_of
from megad2v.parallel.topology import Axis, Topology
from tests.distributed.layouts import Layout, micro_batch, tiny_config

VOCABULARY, WIDTH = 7, 6


def _start() -> Axis:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    return Topology(dist.get_world_size(), "cpu").tensor


def _over_ranks(value: Tensor, axis: Axis) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(axis.size)]
    dist.all_gather(parts, value.contiguous(), group=axis.group)
    return parts


def embedding(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """A vocabulary that the ranks cannot share equally: output and gradients against one table."""
    axis = _start()
    weight = truncated_normal(1.0)
    ours = layers_for(axis, sequence=False).embedding(VOCABULARY, WIDTH, weight=weight)
    whole = VanillaLayers.embedding(VOCABULARY, WIDTH, weight=weight)
    write_initial_weights(ours, 5), write_initial_weights(whole, 5)
    ids = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    factor = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    results = []
    for layer in (ours, whole):
        out = layer(ids)
        (out * factor).sum().backward()
        results.append(out.detach())
    shard = shard_of(ours.weight)
    own = shard.numel // WIDTH
    rows = slice(shard.start // WIDTH, shard.start // WIDTH + own)
    return {
        "rows": [rows.start, rows.stop],
        "equal": torch.equal(*results),
        "table": len(ours.weight),
        "gradient": torch.equal(ours.weight.grad[:own], whole.weight.grad[rows]),
        "padding": not ours.weight[own:].any() and not ours.weight.grad[own:].any(),
    }


def _with_dropout(config: Config) -> Config:
    return replace(config, model=replace(config.model, dropout=0.1, attention_dropout=0.1, drop_path=0.6))


class _Watch:
    """What passes through one block: the context of its attention (this rank's heads), its input and output."""

    def __init__(self, student: Student) -> None:
        block = student.encoder.blocks[-1]  # earlier ones have a lower rate of drop path
        self.seen: dict[str, Tensor] = {}
        block.attention.output.register_forward_pre_hook(lambda _, args: self._keep("context", args[0]))
        # The branch behind drop path is what targets.tensor "ffn" asks for; the output comes first all the same.
        block.register_forward_pre_hook(lambda _, args: (*args[:2], "ffn"))
        block.register_forward_hook(lambda _, args, out: self._keep_all(input=args[0], output=out[0], branch=out[1]))

    def _keep(self, name: str, value: Tensor) -> None:
        self.seen[name] = value.detach().clone()

    def _keep_all(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._keep(name, value)


def _equal_heads(student: Student, axis: Axis) -> None:
    """Every head gets rank 0's first head's weights: what differs between heads afterwards was drawn."""
    with torch.no_grad():
        for block in student.encoder.blocks:
            qkv = block.attention.qkv
            for parameter in (qkv.weight, qkv.bias):
                heads = parameter.view(qkv.heads, -1)
                first = heads[0].clone()
                dist.broadcast(first, 0, group=axis.group)
                heads.copy_(first.expand_as(heads))


def dropout(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """One training forward with dropout 0.1 everywhere and drop path. Says what was equal between the ranks."""
    axis, sequence = _start(), arguments["sequence"]
    config, layers = _with_dropout(tiny_config()), layers_for(axis, sequence=sequence)
    student, teacher = build_student(config, layers), build_teacher(config, layers)
    write_initial_weights(student, 5), write_initial_weights(teacher, 5)
    _equal_heads(student, axis)
    watch = _Watch(student)
    report: dict[str, Any] = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        report[name] = _forward(student, teacher, seed)
        report[f"{name} seen"] = dict(watch.seen)
    seen = report["first seen"]
    context = _over_ranks(seen["context"], axis)
    dropped = [part.flatten(1).eq(0).all(1).tolist() for part in _over_ranks(seen["branch"], axis)]
    losses = _over_ranks(report["first"], axis)
    return {
        "loss": [float(loss) for loss in losses],
        "loss is equal": all(torch.equal(losses[0], loss) for loss in losses),
        "output is equal": all(torch.equal(part, seen["output"]) for part in _over_ranks(seen["output"], axis)),
        "context is equal": all(torch.equal(context[0], part) for part in context[1:]),
        "dropped samples": dropped,
        "repeats": torch.equal(report["first"], report["again"]),
        "other seed differs": not torch.equal(report["first"], report["other"]),
        # Hidden dropout under sequence parallelism: the positions that were zeroed, per rank.
        "zeros": [part.ne(0).tolist() for part in _over_ranks(_zeros(seen), axis)],
    }


def _forward(student: Student, teacher: Teacher, seed: int) -> Tensor:
    torch.manual_seed(seed)
    batch = micro_batch(0, 0)
    return student(batch.inputs, batch.mask_bmt, teacher, None)[0].detach()


def drift(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """On two tensor-parallel ranks, rank 1's copies of two tensors are changed by a little, as no step should
    and a GPU might; then a checkpoint is saved."""
    from tests.distributed.jobs_layout import _save, build, gathered, start

    trainer = build(start(), tiny_config(), Layout(arguments["zero"], 1, 2))
    engine, teacher, world = trainer.engine, trainer.teacher, trainer.world
    student = next(f for f in engine.state.fragments if f.name == "encoder.norm.weight").master
    places = {f.name: average for f, average in zip(teacher.fragments, teacher.averages, strict=True)}
    average = places["encoder.blocks.1.attention.output.bias"]
    if world.tensor.rank == 1:
        student[0] += 1e-3
        average[3] += 1e-3
    _save(trainer, output / "checkpoint")
    # Both raise where copies differ.
    weights = gathered(engine, engine.student, world.tensor)
    forward = gathered(engine, engine.teacher_module, world.tensor)
    return {
        "student": student[0].item(),
        "teacher": average[3].item(),
        "student's forward": weights["encoder.norm.weight"][0].item(),
        "teacher's forward": forward["encoder.blocks.1.attention.output.bias"][3].item(),
    }


def _zeros(seen: dict[str, Tensor]) -> Tensor:
    """Where the feed-forward branch was dropped element by element, as 0 and 1."""
    return seen["branch"].eq(0).float()
