"""A parameter that no micro-batch of a step used has exactly zero gradient, at every ZeRO stage (invariant 9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.harness import run_ranks
from tests.distributed.jobs_unused import student_with_gaps, used_in
from tests.distributed.layouts import plain_run, tiny_config
from tests.tolerances import CURVE, FINAL_WEIGHTS

STEPS = 6
LAYOUTS = ["zero1", "zero2", "zero3", "zero3_offload"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """All layouts in one launch of two ranks: (what rank 0 saw, by layout; folder of final weights)."""
    output = tmp_path_factory.mktemp("unused")
    arguments = {"layouts": LAYOUTS, "steps": STEPS}
    results = run_ranks("tests.distributed.jobs_unused:gaps", 2, arguments, timeout=200, output=output)
    assert results[0] == results[1]
    return results[0], output


def _prepare(student: Any, step: int) -> None:
    student.head.used = used_in(step)


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    """Plain torch in float64, with a gradient of zeros where a step used nothing: the moments then decay, and weight
    decay goes on."""
    config = tiny_config(steps=STEPS)
    return plain_run(config, STEPS, student=student_with_gaps(config), prepare=_prepare)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unused_parameters_have_zero_gradient(layout: str, runs: tuple[dict[str, Any], Path]) -> None:
    gradients = runs[0][layout]["head_gradients"]
    for step, largest in enumerate(gradients):
        if used_in(step):
            assert largest > 1e-4, f"step {step}"
        else:
            assert largest == 0.0, f"step {step}"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gaps_train_as_plain_torch_does(layout: str, runs: tuple[dict[str, Any], Path], truth: dict[str, Any]) -> None:
    """Same curve, same norm before clipping, same weights: nothing stale was applied, added to or counted."""
    seen = runs[0][layout]
    assert seen["losses"] == pytest.approx(truth["losses"], rel=CURVE)
    assert seen["norms"] == pytest.approx(truth["norms"], rel=10 * CURVE)
    weights = load_file(runs[1] / f"{layout}.safetensors")
    assert weights.keys() == truth["student"].keys()
    for name, value in truth["student"].items():
        error = (weights[name].double() - value).norm() / value.norm().clamp_min(1e-3)
        assert error < FINAL_WEIGHTS, name
