"""Jobs for test_joint.py: three modalities that take turns, on any layout."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.distributed.layouts import LOSS_WEIGHTS, Layout, micro_batch, modality_in, tiny_config

MODALITIES = tuple(LOSS_WEIGHTS)


def owner(name: str) -> str:
    """The modality that a parameter is of, or "shared"."""
    return next((modality for modality in MODALITIES if f"parts.{modality}." in name), "shared")


def room(name: str) -> str:
    """Where it is: in a block (a modality's norms, too: under ZeRO-3 in a leaf module), around the blocks, or in front
    end or head."""
    return "blocks" if ".blocks." in name else name.split(".")[0]


def probes(norms: str) -> dict[str, str]:
    """Of each modality, a parameter to look at through an update: the second block's norm, where it has one."""
    own = "encoder.blocks.1.parts.{}.mlp_norm.weight" if norms == "own" else "encoder.parts.{}.norm.weight"
    return {modality: own.format(modality) for modality in MODALITIES}


def runs(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train on each of `layouts`, one after the other; then, if asked for, the counts of `gathers` and the
    disagreement of `other_turn`. What each returns, by layout."""
    from tests.distributed.jobs_layout import start

    world = start()
    found: dict[str, Any] = {}
    layouts = [Layout(**fields) for fields in arguments["layouts"]]
    for number, layout in enumerate(sorted(layouts, key=lambda layout: layout.tensor)):
        if number == 0 and "turns" in arguments:  # while no tensor-parallel groups are there
            found["gathers"] = _gathers(world, arguments["turns"])
            found["other turn"] = _other_turn(world)
        found[str(layout)] = _Training(world, layout, arguments["steps"]).run(output)
    return found


class _Training:
    """One layout; sees every parameter's gradient, and the probes before and after each update."""

    def __init__(self, world: Any, layout: Layout, steps: int) -> None:
        from tests.distributed.jobs_layout import build

        self.layout, self.steps = layout, steps
        config = tiny_config(steps=steps, modality="joint", norms=layout.norms)
        self.trainer = build(world, config, layout)
        self.engine, self.axis = self.trainer.engine, self.trainer.world.tensor
        self.parameters = dict(self.engine.student.named_parameters())
        self.gradients: list[dict[str, dict[str, float]]] = []
        self.moved: list[dict[str, dict[str, float]]] = []
        self._take = self.engine.deepspeed._take_model_step
        # With an offloaded optimizer, gradients get to where the accessor looks only inside step(), just before this.
        self.engine.deepspeed._take_model_step = self._look_and_take

    def run(self, output: Path) -> dict[str, Any]:
        """Losses, norms, and by step: the largest element of the gradient by owner and room; of each absent modality's
        probe the errors that `_decay_alone` gives. Final weights go to LAYOUT.KIND.safetensors."""
        from megad2v.engine.distributed import sum_over
        from megad2v.metrics.statistics import StepStatistics
        from tests.distributed.jobs_layout import gathered

        trainer, engine = self.trainer, self.engine
        losses, norms = [], []
        for step in range(self.steps):
            statistics = StepStatistics(trainer.config.model.width, trainer.world.device)
            before = self._state() if step else None
            trainer.step(step, statistics)
            if before is not None:
                self.moved.append(self._decay_alone(step, before, self._state()))
            sum_over(trainer.world.data, statistics.sums)
            losses.append(statistics.read()["loss"])
            norms.append(engine.gradient_norm())
        # Copies on tensor-parallel ranks have to be equal to the bit: `gathered` asserts it.
        for kind, module in (("student", engine.student), ("teacher", engine.teacher_module)):
            weights = gathered(engine, module, self.axis)
            if trainer.world.is_main:
                save_file({n: v.contiguous() for n, v in weights.items()}, output / f"{self.layout}.{kind}.safetensors")
        return {"losses": losses, "norms": norms, "gradients": self.gradients, "moved": self.moved}

    def _look_and_take(self, *arguments: Any, **words: Any) -> None:
        from deepspeed.utils import safe_get_full_grad

        from tests.distributed.jobs_layout import whole

        largest: dict[str, dict[str, float]] = {}
        for name, parameter in self.parameters.items():
            value = whole(parameter, safe_get_full_grad(parameter), self.axis).abs().max().item()
            rooms = largest.setdefault(owner(name), {})
            rooms[room(name)] = max(value, rooms.get(room(name), 0.0))
        self.gradients.append(largest)
        self._take(*arguments, **words)

    def _state(self) -> dict[str, list[torch.Tensor]]:
        """Of each probe: weight and both moments, float64."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {}
        for modality, name in probes(self.layout.norms).items():
            parameter = self.parameters[name]
            moments = [safe_get_full_optimizer_state(parameter, kind) for kind in ("exp_avg", "exp_avg_sq")]
            state[modality] = [value.double() for value in (safe_get_full_fp32_param(parameter), *moments)]
        return state

    def _decay_alone(self, step: int, before: Any, after: Any) -> dict[str, dict[str, float]]:
        """Of the absent modalities: the relative errors of weight and moments against an AdamW step (PyTorch's
        formula) with a gradient of zeros, and how far the weight has moved."""
        o, t = self.trainer.config.optimizer, step + 1
        found = {}
        for modality in MODALITIES:
            if modality == modality_in(self.trainer.config, step):
                continue
            weight, first, second = before[modality]
            first, second = o.betas[0] * first, o.betas[1] * second
            root = (second / (1 - o.betas[1] ** t)).sqrt() + o.eps
            weight = weight * (1 - o.lr * o.weight_decay) - o.lr * (first / (1 - o.betas[0] ** t)) / root
            truth = dict(zip(("weight", "first", "second"), (weight, first, second), strict=True))
            found[modality] = {
                kind: float((now - truth[kind]).norm() / truth[kind].norm().clamp_min(1e-30))
                for kind, now in zip(truth, after[modality], strict=True)
            }
            found[modality]["moved"] = float((after[modality][0] - before[modality][0]).abs().max())
            found[modality]["moment"] = float(before[modality][1].abs().max())
        return found


def _gathers(world: Any, turns: list[str]) -> list[dict[str, list[int]]]:
    """ZeRO-3, nothing persistent and nothing gathered ahead: number and bytes of the all-gathers that this rank takes
    part in during a step, one after the other for the modalities in `turns`, in the teacher and in all else; and how
    many parameters of the two are still gathered behind it. "valid MODALITY" is validation."""
    from megad2v.training.evaluate import validate
    from tests.distributed.jobs_layout import CountCollectives, build

    config = tiny_config(micro_batches=2, modality="joint")
    trainer = build(world, config, Layout("zero3", 2, persistence=0, modality="joint"), prefetch=0)
    engine, steps, marks = trainer.engine, [], []
    teach = engine.teacher.forward

    def marked(*arguments: Any, **words: Any) -> Any:
        began = len(sent.calls)
        targets = teach(*arguments, **words)
        marks.append((began, len(sent.calls)))
        return targets

    engine.teacher.forward = marked
    for number, turn in enumerate(turns):
        marks.clear()
        modality = turn.split()[-1]
        with CountCollectives() as sent:
            if turn.startswith("valid"):
                batches = [micro_batch(number, world.rank, modality)]
                validate(engine, batches, world=world, width=config.model.width, guard=trainer.guard)
            else:
                trainer.step_on(number, [micro_batch(number, world.rank, modality)])
        ((begin, end),) = marks
        split = {"teacher": sent.calls[begin:end], "student": sent.calls[:begin] + sent.calls[end:]}
        gathers = {who: [size for name, size in calls if "allgather" in name] for who, calls in split.items()}
        steps.append({who: [len(sizes), sum(sizes)] for who, sizes in gathers.items()})
        steps[-1]["left"] = [len(_still_gathered(module)) for module in (engine.student, engine.teacher_module)]
    trainer.guard.close()
    return steps


def _still_gathered(module: torch.nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.ds_status.name != "NOT_AVAILABLE"]


def _other_turn(world: Any) -> dict[str, Any]:
    """The last rank takes another modality in step 1: what each says, after how many seconds; and that the step taken
    then as agreed is none the worse."""
    from megad2v.engine.guard import Disagreement
    from tests.distributed.jobs_layout import build

    trainer = build(world, tiny_config(modality="joint", micro_batches=2), Layout("zero3", 2, persistence=0))
    trainer.step_on(0, [micro_batch(0, world.rank, "vision")])
    began, said = time.monotonic(), ""
    try:
        trainer.step_on(1, [micro_batch(1, world.rank, "text" if world.rank == 1 else "speech")])
    except Disagreement as error:
        said = str(error)
    seconds = time.monotonic() - began
    trainer.step_on(1, [micro_batch(1, world.rank, "speech")])
    trainer.guard.close()
    return {"said": said, "seconds": seconds, "norm": trainer.engine.gradient_norm()}


def astray(arguments: dict[str, Any], output: Path) -> None:
    """Two ranks under ZeRO-3 agree on a step of speech; the forward of rank 1 is of text, the test's hook. No rank gets
    to the end of it: what was found is in found_N.json, when it began in began_N.json, and the watchdog ends the
    processes."""
    from megad2v.engine.guard import Disagreement, Guard
    from megad2v.engine.watchdog import start_watchdog
    from tests.distributed.jobs_layout import CountCollectives, build, start

    trainer = build(start(), tiny_config(modality="joint", micro_batches=2), Layout("zero3", 2, persistence=0))
    world, engine = trainer.world, trainer.engine
    trainer.guard.close()
    watch = start_watchdog(world, output / "hang", 60.0)  # not the watchdog's patience is to end it
    trainer.guard = Guard(engine, world, watch, limit=60.0)
    for step, modality in enumerate(MODALITIES * arguments["rounds"]):
        trainer.step_on(step, [micro_batch(step, world.rank, modality)])
    step = len(MODALITIES) * arguments["rounds"]
    agreed = micro_batch(step, world.rank, "speech")
    taken = micro_batch(step, world.rank, "text") if world.rank == 1 else agreed
    before = [p.ds_tensor.detach().clone() for p in engine.student.parameters()]
    (output / f"began_{world.rank}.json").write_text(json.dumps(time.time()))
    with CountCollectives() as sent:
        try:
            watch.at("data", step=step)
            trainer.step_on(step, [replace(taken, sample_ids=agreed.sample_ids)], agreed=[agreed])
        except Disagreement as error:
            shards = [p.ds_tensor for p in engine.student.parameters()]
            found = {
                "said": str(error),
                "gathers": sum("allgather" in name for name, _ in sent.calls),
                "gathered": _still_gathered(engine.student) + _still_gathered(engine.teacher_module),
                "shards as before": all(map(torch.equal, shards, before)),
            }
            (output / f"found_{world.rank}.json").write_text(json.dumps(found))
            watch.fail(f"Disagreement: {error}")
