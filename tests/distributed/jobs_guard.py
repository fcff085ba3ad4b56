"""Jobs for test_guard.py: ranks that propose, or do, different things."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SKIPPED, INSTEAD = 0, 1
"""Blocks of equal shape: rank 1 leaves out the first and goes on to the second."""


def agreement(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Four ranks, two of them tensor-parallel neighbours: what each case makes of the exchange, and what it sends."""
    from megad2v.engine import distributed
    from megad2v.engine.guard import Disagreement, Guard
    from megad2v.engine.watchdog import Watchdog
    from megad2v.modalities.build import build_student, build_teacher
    from megad2v.training.proposal import propose
    from tests.distributed.jobs_layout import CountCollectives
    from tests.distributed.layouts import micro_batch, tiny_config

    world = distributed.start(tensor_parallel=arguments["tensor_parallel"])
    config = tiny_config()
    modules = SimpleNamespace(student=build_student(config), teacher_module=build_teacher(config))
    guard = Guard(modules, world, Watchdog(), limit=20.0)
    batches = [micro_batch(0, world.data.rank), micro_batch(0, world.data.rank + 2)]
    same = propose(batches, kind="training", step=1, updates=0, depth=2)
    odd = world.rank == 1
    shorter = replace(same, plans=same.plans[:1])
    cases = {
        "same": same,
        "skips": propose(batches, kind="training", step=1, updates=0, depth=2, blocks=(1,)) if odd else same,
        "updates": replace(same, updates=7) if odd else same,
        "validation": replace(same, plans=tuple(replace(p, kind="validation") for p in same.plans)) if odd else same,
        "fewer forwards": shorter if odd else same,
        "other samples": replace(same, seen=propose([micro_batch(9, 0), batches[1]], kind="training", step=1,
                                                    updates=0, depth=2).seen) if odd else same,
    }  # fmt: skip
    seen: dict[str, Any] = {}
    for name, proposal in cases.items():
        with CountCollectives() as sent:
            try:
                seen[name] = guard.agree(proposal, [world.data.rank + 1, 10, 0])
            except Disagreement as error:
                seen[name] = str(error)
        seen[f"{name}, sent"] = sent.calls
    with CountCollectives() as sent:
        seen["asked to leave"] = [guard.agree(same, [1], leave=odd), guard.leaving]
    seen["asked to leave, sent"] = sent.calls
    seen["after all that"] = [guard.agree(same, [1]), guard.leaving]
    return seen


def skip(arguments: dict[str, Any], output: Path) -> None:
    """Two ranks under ZeRO-3; in step `step`, rank 1 leaves a block out that it had agreed to run. With `guard`, or
    without: then the second block's weights are looked at as they were gathered.

    No rank gets to the end of it: what was found is in found_N.json, and with the guard the watchdog ends the
    processes.
    """
    from megad2v.engine.guard import Disagreement, Guard
    from megad2v.engine.watchdog import start_watchdog
    from megad2v.training.proposal import propose
    from megad2v.training.step import count_step, take_step
    from tests.distributed.jobs_layout import CountCollectives, build, gathered, start
    from tests.distributed.layouts import Layout, micro_batch, tiny_config

    trainer = build(start(), tiny_config(micro_batches=2), Layout("zero3", 2, persistence=0))
    world, engine, teacher = trainer.world, trainer.engine, trainer.teacher
    watch = start_watchdog(world, output / "hang", 20.0)
    guard = Guard(engine, world, watch, limit=20.0)
    block = engine.student.encoder.blocks[INSTEAD]
    weights = gathered(engine, engine.student)
    truth = {n: p for n, p in weights.items() if n.startswith(f"encoder.blocks.{INSTEAD}.")}
    found: dict[str, Any] = {}
    path = output / f"found_{world.rank}.json"

    def step(number: int, blocks: tuple[int, ...] | None) -> None:
        watch.at("data", step=number)
        batches = [micro_batch(number, world.rank)]
        if arguments["guard"]:
            proposal = propose(batches, kind="training", step=number, updates=number, depth=2)
            counts = count_step(batches, world, lambda own: guard.agree(proposal, own))
        else:
            counts = count_step(batches, world)
        take_step(
            engine, teacher, batches, counts, world=world, seed=1, step=number, learning_rate=1e-3, decay=0.9,
            statistics=None, blocks=blocks, guard=guard if arguments["guard"] else None,
        )  # fmt: skip

    for number in range(arguments["step"]):
        step(number, None)
    before = [p.ds_tensor.detach().clone() for p in engine.student.parameters()]
    sent = CountCollectives()
    marks: list[int] = []
    engine.student.encoder.relative_bias.register_forward_hook(lambda *_: marks.append(len(sent.calls)))
    if not arguments["guard"]:
        guard.close()
        block.register_forward_pre_hook(lambda *_: _look(block, truth, world.rank, path))
    try:
        with sent:
            step(arguments["step"], (INSTEAD,) if world.rank == 1 else None)
    except Disagreement as error:
        found = {
            "said": str(error),
            "sent since the module before": len(sent.calls) - marks[-1],
            "gathered": [p.ds_status.name for p in block.parameters()],
            "shards as before": all(
                torch.equal(p.ds_tensor, b) for p, b in zip(engine.student.parameters(), before, strict=True)
            ),
        }
        path.write_text(json.dumps(found))
        watch.fail(f"Disagreement: {error}")


def _look(block: Any, truth: dict[str, torch.Tensor], rank: int, path: Path) -> None:
    """After DeepSpeed has gathered the block and before it computes: whose weights are these?"""
    wrong = [
        name
        for name, parameter in block.named_parameters()
        if not torch.equal(parameter.data, truth[f"encoder.blocks.{INSTEAD}.{name}"])
    ]
    path.write_text(json.dumps({"wrong": wrong, "of": len(truth)}))
    if rank == 1:
        os._exit(1)  # seen enough: from here on the run computes nonsense, or hangs
