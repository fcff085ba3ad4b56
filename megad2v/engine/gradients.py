"""Between the gradient norm and the update: the moment at which a step can still be refused.

DeepSpeed computes the global gradient norm inside `optimizer.step()`, reads it, and leaves without an update where it
is not finite. `StepGate` stands in that place: it asks the trainer's judge, and gives DeepSpeed an infinite norm for a
step that the judge refuses, so that a refused step is cleaned up exactly as an overflow is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Judge = Callable[[float, float], bool]
"""(loss per masked position, gradient norm before clipping), both of the whole step -> may it be taken?"""


def both_finite(loss: float, norm: float) -> bool:
    """The judge of those who bring none."""
    return math.isfinite(loss) and math.isfinite(norm)


class StepGate:
    """Asks a judge about every step of one DeepSpeed engine, at any ZeRO stage.

    Per step and rank: one all-reduce of 16 bytes over ALL ranks, and one host read of its result. DeepSpeed's own
    reads of the norm (one, and under ZeRO-1/2 one per optimizer group that is clipped) then find it on the host; its
    further pass over all gradients (bf16 under ZeRO-2) with an all-reduce and a read is left out, because a gradient
    that is not finite makes the norm not finite.
    """

    def __init__(self, engine: Any, device: torch.device) -> None:
        """`device` is where the processes' collectives take their tensors."""
        self.norm = math.nan
        """Global L2 norm of the last step's gradient, before clipping; not finite where the gradient was not."""
        self._engine, self._device = engine, device
        self._loss: Tensor | None = None
        self._judge: Judge = both_finite
        self._allowed: bool | None = None
        optimizer = engine.optimizer
        self._is_bf16_optimizer = hasattr(optimizer, "bf16_groups_flat")
        if engine.zero_optimization_stage() == 3:
            groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [self._ask(_combined(groups()))]
        elif not self._is_bf16_optimizer:
            norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda: self._ask(norm())
            # It would set `overflow`, which `step` has cleared; the norm is taken next and says the same.
            optimizer.check_overflow = lambda partition_gradients=True: None

    def step(self, loss: Tensor, judge: Judge) -> bool:
        """Let DeepSpeed take the step if `judge` allows it; whether it did. Collective, the same on every rank.

        `loss` is this rank's share: its sum over data-parallel ranks is the step's loss (the same on the ranks of a
        tensor-parallel group). Raises RuntimeError where DeepSpeed did not do as it was told: then this class does not
        fit its version, and weights may have changed that should not have.
        """
        self._loss, self._judge, self._allowed = loss.detach(), judge, None
        with self._bf16_norm():
            self._engine.step()
        skipped = bool(getattr(self._engine.optimizer, "overflow", False))
        if self._allowed is None and skipped:  # it found something before it came to the norm
            self._ask(torch.tensor(math.inf))
        if self._allowed is None or self._allowed == skipped:
            raise RuntimeError(
                f"DeepSpeed {'skipped' if skipped else 'took'} a step although the verdict was {self._allowed}: "
                "megad2v/engine/gradients.py does not fit this version of it"
            )
        return self._allowed

    @contextlib.contextmanager
    def _bf16_norm(self) -> Iterator[None]:
        """bf16 under ZeRO-1 takes the norm by a function of its module, which is exchanged for the time of a step."""
        if not self._is_bf16_optimizer:
            yield
            return
        from deepspeed.runtime import bf16_optimizer

        original = bf16_optimizer.get_global_norm_of_tensors

        def norm(input_tensors: list[Tensor], **words: Any) -> Tensor:
            # A tensor-parallel rank that leaves replicated gradients to the first has none at all where a step drops
            # every block.
            return self._ask(original(input_tensors=input_tensors or [torch.zeros((), device=self._device)], **words))

        bf16_optimizer.get_global_norm_of_tensors = norm
        try:
            yield
        finally:
            bf16_optimizer.get_global_norm_of_tensors = original

    def _ask(self, norm: Tensor) -> Tensor:
        """The norm if the step may be taken, else infinity; on the host, so that to read it again costs nothing.

        Every rank judges the same bits: an all-reduce over all ranks gives each the same two numbers, even where the
        ranks' own norms should differ in the last bit or only one of them is not finite. In float64 the sum of N equal
        float32 numbers is exact, so dividing by N gives the norm back.
        """
        norm = torch.where(norm < 0, math.inf, norm)  # DeepSpeed marks "not finite" by -1
        agreed = torch.stack([self._loss.to(self._device).double(), norm.to(self._device).double()])
        dist.all_reduce(agreed)
        ranks = dist.get_world_size()
        loss, norm_sum = agreed.tolist()  # the one host read of a step
        self.norm = norm_sum / ranks
        self._allowed = self._judge(loss * self._engine.dp_world_size / ranks, self.norm)
        return torch.tensor(self.norm if self._allowed else math.inf, dtype=torch.float32)


def _combined(norms: list[Any]) -> Tensor:
    """ZeRO-3 has a norm per sub-group; infinite where any is marked as not finite."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return combine_grad_norm_groups(norms)
