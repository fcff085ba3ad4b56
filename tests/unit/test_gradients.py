"""The gate between gradient norm and update, on a stand-in for DeepSpeed; tests/distributed/test_skip.py has the real
one."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from megad2v.engine import gradients
from megad2v.engine.gradients import StepGate, both_finite


class FakeOptimizer:
    """Goes through a step as DeepSpeed's ZeRO-1/2 does: an own check, the norm, the update."""

    def __init__(self, norm: float, *, finds: bool = False, obeys: bool = True) -> None:
        self.overflow, self.updates = False, 0
        self._norm, self._finds, self._obeys = norm, finds, obeys

    def check_overflow(self, partition_gradients: bool = True) -> None:
        raise AssertionError("a further pass over all gradients")

    def scaled_global_norm(self) -> torch.Tensor:
        return torch.tensor(self._norm)

    def step(self) -> None:
        self.overflow = self._finds
        self.check_overflow()
        if not self.overflow:
            norm = self.scaled_global_norm()
            self.overflow = self._obeys and not math.isfinite(norm)
        self.updates += not self.overflow


def gate_of(optimizer: FakeOptimizer) -> StepGate:
    engine = SimpleNamespace(
        optimizer=optimizer, dp_world_size=2, zero_optimization_stage=lambda: 2, step=optimizer.step
    )
    return StepGate(engine, torch.device("cpu"))


@pytest.fixture(autouse=True)
def sent(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Four ranks with the same numbers, 2 data parallel x 2 tensor parallel."""
    tensors: list[torch.Tensor] = []
    monkeypatch.setattr(gradients.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(gradients.dist, "all_reduce", lambda t: tensors.append(t.mul_(4)))
    return tensors


def never(loss: float, norm: float) -> bool:
    return False


@pytest.mark.parametrize(("judge", "taken"), [(both_finite, True), (never, False)])
def test_the_judge_decides(judge: Callable[[float, float], bool], taken: bool, sent: list[torch.Tensor]) -> None:
    optimizer, asked = FakeOptimizer(0.1), []

    def listening(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return judge(loss, norm)

    gate = gate_of(optimizer)
    assert gate.step(torch.tensor(0.25), listening) is taken
    assert optimizer.updates == taken and optimizer.overflow is not taken
    # The loss is a sum over data-parallel ranks, each of which is there twice; the norm is everybody's, to the bit.
    assert asked == [(0.5, float(torch.tensor(0.1)))]
    assert gate.norm == float(torch.tensor(0.1))
    assert [tensor.numel() * tensor.element_size() for tensor in sent] == [16]


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_what_deepspeed_writes_for_a_norm_that_is_not_finite(norm: float) -> None:
    optimizer = FakeOptimizer(norm)
    assert gate_of(optimizer).step(torch.tensor(0.5), both_finite) is False
    assert optimizer.updates == 0


def test_a_loss_that_is_not_finite_is_enough() -> None:
    optimizer = FakeOptimizer(1.0)
    assert gate_of(optimizer).step(torch.tensor(math.nan), both_finite) is False
    assert optimizer.updates == 0


def test_what_deepspeed_finds_by_itself_is_judged_too() -> None:
    gate, asked = gate_of(FakeOptimizer(1.0, finds=True)), []
    assert gate.step(torch.tensor(0.5), lambda *values: asked.append(values) or both_finite(*values)) is False
    assert asked == [(1.0, math.inf)]


def test_a_version_of_deepspeed_that_does_not_do_as_told_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="took a step although the verdict was False"):
        gate_of(FakeOptimizer(1.0, obeys=False)).step(torch.tensor(0.5), never)
    gate = gate_of(optimizer := FakeOptimizer(1.0))
    optimizer.scaled_global_norm = lambda: torch.tensor(1.0)  # asks nobody
    with pytest.raises(RuntimeError, match="took a step although the verdict was None"):
        gate.step(torch.tensor(0.5), never)
