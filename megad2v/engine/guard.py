"""All ranks execute the same modules in the same order, or stop before they compute anything else.

ZeRO-3 gathers a module's weights when the module is about to run, and matches the gathers of the ranks by their order
alone. A rank that skips a module gets another one's weights in its place (of the same shape: silently), or waits
forever. So:

1. Agreement. What a forward will run is known on the host before it (its `Plan`). Before the first forward of a step
   all ranks compare their plans for the whole step in ONE all-reduce of a few integers, over a gloo group of their
   own: it waits neither for the device nor in any queue of collectives. It carries the step's counts as well, which
   would otherwise take an all-reduce on the device and a wait for it, and how many ranks were asked to stop. Only
   where plans differ are they gathered, and every rank raises the same `Disagreement`, which names the odd ranks and
   what they would have done.
2. Enforcement. Hooks that run before DeepSpeed's compare every module about to run with the plan. A rank that is
   about to run another one raises before it gathers that one's weights. This sends nothing; the watchdog tells the
   others.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megad2v.engine.distributed import World
from megad2v.engine.hang import exchange_limit, ranks_in_words
from megad2v.engine.setup import TrainingEngine
from megad2v.engine.watchdog import Watchdog

DIGEST_BITS = 48
"""So that (ranks - 1) x digest fits an int64 for 16,000 ranks."""


class Disagreement(RuntimeError):
    """Ranks would run, or one is about to run, different modules."""


@dataclass(frozen=True)
class Plan:
    """One forward, as far as it decides which modules run. Equal on all ranks."""

    kind: str
    """"training" or "validation"."""
    modality: str
    shape: str
    """What of the inputs' shape decides how modules run; not the sizes, which differ between ranks."""
    blocks: tuple[int, ...]
    """The student's blocks that run."""


@dataclass(frozen=True)
class Seen:
    """The data of one forward. Equal on the ranks of a tensor-parallel group."""

    samples: tuple[str, ...]
    digest: str
    """Of all else: shapes, crops, masks."""


@dataclass(frozen=True)
class Proposal:
    """What one rank would do in a step."""

    step: int
    updates: int
    """Updates taken so far: differs where ranks disagreed whether the last one was finite."""
    plans: tuple[Plan, ...]
    seen: tuple[Seen, ...]


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[: DIGEST_BITS // 8], "little")


def _against_first(digest: int, rank: int, size: int) -> int:
    """Summed over `size` ranks: 0 where all digests are equal, and (but for one chance in 2**48) only there."""
    return (size - 1) * digest if rank == 0 else -digest


class Guard:
    """Watches over the forwards of one engine. Making it is collective (a gloo group of all ranks)."""

    def __init__(self, engine: TrainingEngine, world: World, watch: Watchdog, *, limit: float = 0.0) -> None:
        """`limit` is train.hang_timeout: the exchange waits longer, since the watchdog has more to say."""
        self.world, self.watch, self._engine = world, watch, engine
        self.depth = len(engine.student.encoder.blocks)
        self._group = None
        if world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=exchange_limit(limit))
        self._plans: tuple[Plan, ...] = ()
        self._seen: tuple[Seen, ...] = ()
        self._step, self._done = 0, 0
        self.leaving = 0
        """Ranks that asked, in the last agreement, not to begin its step. The same number on all ranks."""
        self._expected: list[str] | None = None
        self._next = 0
        self._names = {
            **dict(_units(engine.student)),
            **{f"teacher.{name}": module for name, module in _units(engine.teacher_module)},
        }
        self._hooks = [
            # prepend: DeepSpeed's own hooks, already there, gather the module's weights.
            module.register_forward_pre_hook(partial(self._about_to_run, name), prepend=True)
            for name, module in self._names.items()
        ]
        self._hooks += [
            module.register_forward_hook(partial(self._note_backward, name))
            for name, module in _units(engine.student)
            if name.startswith("encoder.blocks.")
        ]
        self._orders: dict[tuple[str, tuple[int, ...]], list[str]] = {}

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    # --- agreement

    def agree(self, proposal: Proposal, counts: Sequence[int] = (), *, leave: bool = False) -> list[int]:
        """Compare `proposal` with those of all ranks, then guard its forwards. Returns `counts` summed over the
        data-parallel ranks; `leaving` is how many of all ranks said `leave`. Raises Disagreement on every rank alike.

        One all-reduce (sum) of 3 + len(counts) int64 over all ranks, on the host. The ranks of a tensor-parallel group
        bring the same counts; the first of them is heard.
        """
        self.watch.at("exchange")
        world, tensor = self.world, self.world.tensor
        own = [
            _against_first(_digest((proposal.step, proposal.updates, proposal.plans)), world.rank, world.size),
            _against_first(_digest(proposal.seen), tensor.rank, tensor.size),
            int(leave),  # of every rank: a signal may reach any
            *(count if tensor.rank == 0 else 0 for count in counts),
        ]
        if self._group is not None:
            exchanged = torch.tensor(own, dtype=torch.int64)
            dist.all_reduce(exchanged, group=self._group)
            own = exchanged.tolist()
            if own[0] or own[1]:
                self._explain(proposal)
        self._step, self._plans, self._seen, self._done = proposal.step, proposal.plans, proposal.seen, 0
        self.leaving = own[2]
        return own[3:]

    def _explain(self, proposal: Proposal) -> None:
        """Gather the proposals (some kilobytes a rank) and raise what is wrong with them. Collective."""
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, proposal, group=self._group)
        raise Disagreement(differences(gathered, self.depth, self.world.tensor.size))

    # --- enforcement

    @contextlib.contextmanager
    def forward(self, place: int) -> Iterator[None]:
        """Around forward number `place` of those agreed on. Raises Disagreement where it ran other modules."""
        self.watch.at("forward", samples=self._seen[place].samples)
        if place != self._done:
            raise Disagreement(f"rank {self.world.rank} is about to run forward {place} of the step, not {self._done}")
        self._expected, self._next = self._order(self._plans[place]), 0
        self._engine.expect(self._plans[place])
        try:
            yield
            if self._next < len(self._expected):
                self._refuse(f"has ended the forward without {self._expected[self._next]}")
        finally:
            self._expected = None
        self._done += 1

    def finish(self) -> None:
        """After the last forward of those agreed on, before the update."""
        if self._done != len(self._plans):
            self._refuse(f"has run {self._done} of the {len(self._plans)} forwards that all ranks agreed on")

    def _order(self, plan: Plan) -> list[str]:
        """Names of the modules in the order in which the student's forward runs them."""
        key = plan.modality, plan.blocks
        if key not in self._orders:
            encoder = self._engine.student.encoder
            joint = hasattr(encoder, "parts")
            of_part = f"parts.{plan.modality}." if joint else ""
            pre_norm = (encoder.parts[plan.modality] if joint else encoder).pre_norm
            teacher = range(sum(name.startswith("teacher.encoder.blocks.") for name in self._names))
            wanted = [
                f"{of_part}front_end",
                f"teacher.{of_part}front_end",
                *_encoder("teacher.", of_part, teacher, pre_norm=pre_norm),
                *_encoder("", of_part, plan.blocks, pre_norm=pre_norm),
                f"{of_part}head",
            ]
            self._orders[key] = [name for name in wanted if name in self._names]
        return self._orders[key]

    def _about_to_run(self, name: str, module: nn.Module, arguments: object) -> None:
        watch = self.watch
        watch.at(watch.place.phase, name)
        expected = self._expected
        if expected is None:  # not in a forward that was agreed on: a backward that computes again, or a look inside
            return
        if self._next >= len(expected):
            self._refuse(f"is about to run {name} after the end of the forward")
        if expected[self._next] != name:
            self._refuse(f"is about to run {name} in the place of {expected[self._next]}")
        self._next += 1

    def _refuse(self, what: str) -> None:
        """Raise, before anything is gathered for the wrong module."""
        raise Disagreement(
            f"rank {self.world.rank} {what} (step {self._step}, {self._done} of its {len(self._plans)} forwards done). "
            "All ranks had agreed on the modules; going on would mix weights of different ones under ZeRO-3"
        )

    def _note_backward(self, name: str, module: nn.Module, arguments: object, output: tuple[Tensor, Tensor]) -> None:
        """Let the watchdog see how far a backward has come: it reaches a block's output before the block."""
        if output[0].requires_grad:
            output[0].register_hook(partial(self._reached, name))

    def _reached(self, name: str, gradient: Tensor) -> None:
        self.watch.at("backward", name)


def _encoder(prefix: str, of_part: str, blocks: Sequence[int], *, pre_norm: bool) -> list[str]:
    """Names of an encoder's modules in their order, `of_part` those that belong to one modality."""
    own = f"{prefix}encoder.{of_part}"
    run = [f"{prefix}encoder.blocks.{block}" for block in blocks]
    body = [*run, f"{own}norm"] if pre_norm else [f"{own}norm", *run]
    return [f"{own}relative_bias", f"{own}positions", *body]


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose order is enforced: together they hold every parameter."""
    parts = [f"parts.{name}." for name in getattr(model, "parts", ())] or [""]
    names = [
        f"{room}{part}{name}"
        for part in parts
        for room, name in (
            ("", "front_end"),
            ("encoder.", "relative_bias"),
            ("encoder.", "positions"),
            ("encoder.", "norm"),
            ("", "head"),
        )
    ]
    for name in names:
        module = model
        for part in name.split("."):
            module = getattr(module, part, None)
        if module is not None:
            yield name, module
    for number, block in enumerate(model.encoder.blocks):
        yield f"encoder.blocks.{number}", block


def differences(proposals: Sequence[Proposal], depth: int, tensor_size: int) -> str:
    """What the proposals of all ranks, in rank order, disagree about: one line that names the ranks in the minority."""
    whole = [(p.step, p.updates, p.plans) for p in proposals]
    if len(set(whole)) > 1:
        usual = _most_common(whole)
        odd: dict[Any, list[int]] = {}
        for rank, one in enumerate(whole):
            if one != usual:
                odd.setdefault(one, []).append(rank)
        others = [rank for rank, one in enumerate(whole) if one == usual]
        usually = ranks_in_words(others)
        said = "; ".join(
            f"{ranks_in_words(ranks)} {_difference(one, usual, depth, usually, proposals[ranks[0]].seen)}"
            for one, ranks in odd.items()
        )
        return f"ranks disagree before step {usual[0]}: {said}. Nothing of the step was computed"
    for first in range(0, len(proposals), tensor_size):
        group = proposals[first : first + tensor_size]
        for place, data in enumerate(zip(*(p.seen for p in group), strict=False)):
            for number, one in enumerate(data):
                if one != data[0]:
                    return (
                        f"tensor-parallel ranks {first} and {first + number} do not see the same data in micro-batch "
                        f"{place} of step {group[0].step}: {_data(data[0])} and {_data(one)}. Nothing of the step was "
                        "computed"
                    )
    return "ranks disagree, and their proposals look alike: this is a bug, please report it"


def _most_common(values: Sequence[Any]) -> Any:
    """Ties go to the value of the lowest rank."""
    return Counter(values).most_common(1)[0][0]


def _difference(one: Any, usual: Any, depth: int, others: str, seen: Sequence[Seen]) -> str:
    """What `one` has otherwise than `usual`, which `others` would do; `seen` is the data of the first who has it."""
    (step, updates, plans), (usual_step, usual_updates, usual_plans) = one, usual
    if step != usual_step:
        return f"would take step {step}, {others} step {usual_step}"
    if updates != usual_updates:
        return f"counted {updates} updates so far, {others} {usual_updates}"
    if len(plans) != len(usual_plans):
        return f"would run {len(plans)} forwards, {others} {len(usual_plans)}"
    for place, (plan, usual_plan) in enumerate(zip(plans, usual_plans, strict=True)):
        for field in ("kind", "modality", "shape"):
            mine, theirs = getattr(plan, field), getattr(usual_plan, field)
            if mine != theirs:
                said = f"would run {field} {mine} in its micro-batch {place}, {others} {theirs}"
                return said if field != "modality" else f"{said} ({_modules(mine)} on {_data(seen[place])})"
        skips = [block for block in range(depth) if block in usual_plan.blocks and block not in plan.blocks]
        adds = [block for block in range(depth) if block in plan.blocks and block not in usual_plan.blocks]
        words = [
            f"{verb} {', '.join(f'encoder.blocks.{block}' for block in blocks)}"
            for verb, blocks in (("skip", skips), ("run", adds))
            if blocks
        ]
        if words:
            return f"would {' and '.join(words)} in its micro-batch {place}, unlike {others}"
    return f"differs from {others}"


def _modules(modality: str) -> str:
    """What only this modality runs in a joint model."""
    return f"front_end and head of parts.{modality}, encoder.parts.{modality}"


def _data(seen: Seen) -> str:
    return f"samples {' '.join(seen.samples) or 'none'} ({seen.digest[:8]})"
