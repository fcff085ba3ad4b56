"""The sharded teacher: each rank averages exactly the fragments whose float32 masters it owns."""

from __future__ import annotations

from collections.abc import Collection

import torch

from megad2v.engine.forward_copy import forward_copy
from megad2v.engine.fragments import Fragment
from megad2v.engine.setup import TrainingEngine


class ShardedTeacher:
    """float32 averages aligned with the student's fragments, and the forward copy made from them.

    Per step and rank: `update` sends nothing at any ZeRO stage; `refresh` sends nothing under ZeRO-3 and gathers the
    teacher's size once under ZeRO-1/2.
    """

    def __init__(self, engine: TrainingEngine, copied: Collection[str] = ()) -> None:
        """Starts as a copy of the student (spec 5). Parameters whose names begin with one of `copied` stay its copies:
        every update takes their masters as they are."""
        self._copy = forward_copy(engine.teacher_module, engine.state)
        self.fragments: list[Fragment] = self._copy.fragments
        self.averages: list[torch.Tensor] = self._copy.averages
        """One float32 tensor per fragment, in the same order."""
        self._masters = [fragment.master for fragment in self.fragments]
        follows = [fragment.name.startswith(tuple(copied)) for fragment in self.fragments]
        self._averaged = _pairs(self.averages, self._masters, [not follow for follow in follows])
        self._copied = _pairs(self.averages, self._masters, follows)
        self.copy_student()

    @torch.no_grad()
    def copy_student(self) -> None:
        """Forget the average: start again from the student. Collective (it refreshes)."""
        if self.averages:  # a rank may own no fragment of a small teacher
            torch._foreach_copy_(self.averages, self._masters)
        self.refresh()

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average += (1 - decay)(student - average), from the float32 masters, in place; nothing is sent.

        lerp rather than mul and add: in float32 the latter has a gain bias of 1e-4 and more near decay 1.
        """
        for (averages, masters), weight in ((self._averaged, 1.0 - decay), (self._copied, 1.0)):
            if averages:
                torch._foreach_lerp_(averages, masters, weight)

    def refresh(self) -> None:
        """Bring the forward weights up to date with the averages. Collective under ZeRO-1/2."""
        self._copy.refresh()


Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]


def _pairs(averages: list[torch.Tensor], masters: list[torch.Tensor], which: list[bool]) -> Pairs:
    chosen = [pair for pair, wanted in zip(zip(averages, masters, strict=True), which, strict=True) if wanted]
    return [average for average, _ in chosen], [master for _, master in chosen]
