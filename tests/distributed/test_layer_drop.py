"""Blocks that a step drops have exactly zero gradient, and the curve is that of plain torch, at every ZeRO stage."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.harness import run_ranks
from tests.distributed.jobs_layer_drop import config_with_drop, kept_in
from tests.distributed.layouts import Layout, plain_run
from tests.tolerances import CURVE, FINAL_WEIGHTS

STEPS = 6
LAYOUTS = [
    *[Layout(zero, 2, persistence=0) for zero in ("zero1", "zero2", "zero3", "zero3_offload", "zero3_offload_param")],
    *[Layout(zero, 1, 2, sequence=True, persistence=0) for zero in ("zero1", "zero3", "zero3_offload")],
    Layout("zero3", 2, resident=True, persistence=0),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """All layouts in one launch of two ranks: (what rank 0 saw, by layout; folder of final weights)."""
    output = tmp_path_factory.mktemp("layer_drop")
    arguments = {"layouts": [asdict(layout) for layout in LAYOUTS], "steps": STEPS}
    results = run_ranks("tests.distributed.jobs_layer_drop:drops", 2, arguments, timeout=200, output=output)
    assert results[0] == results[1]
    return results[0], output


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    """Plain torch in float64, with gradients of zeros for what a step dropped."""
    return plain_run(config_with_drop(STEPS), STEPS)


def test_the_steps_differ() -> None:
    """Otherwise the rest would show little."""
    kept = [kept_in(step) for step in range(STEPS)]
    assert len(set(kept)) >= 3 and any(len(blocks) < 2 for blocks in kept) and len({b for k in kept for b in k}) == 3


@pytest.mark.timeout(90)
def test_a_step_without_blocks_in_bf16(tmp_path: Path) -> None:
    first, second = run_ranks("tests.distributed.jobs_layer_drop:all_dropped", 2, timeout=60, output=tmp_path)
    assert first == second
    assert all(0 < norm < 100 for norm in first)


@pytest.mark.timeout(90)
def test_a_dropped_block_is_not_gathered(tmp_path: Path) -> None:
    """All-gathers of a step under ZeRO-3, without prefetching: a set of blocks that was met before costs 22 for all
    three and one less for each that is dropped; met for the first time, when its trace is recorded, 38 and two less.
    Without a trace for each set (engine.traces) every step after another set would cost 38 again. Validation in between
    breaks nothing."""
    everything = (0, 1, 2)
    kept = [everything, everything, (0, 2), everything, (1,), (0, 2), (), None, everything, (1,), (), None]
    first, second = run_ranks(
        "tests.distributed.jobs_layer_drop:gathers", 2, {"kept": kept}, timeout=60, output=tmp_path
    )
    assert first == second
    (recording_calls, recording_bytes), (calls, size) = first["steps"][:2]
    assert (recording_calls, calls) == (38, 22)
    for number, blocks in enumerate(kept):
        if blocks is None:
            continue
        dropped = 3 - len(blocks)
        if blocks in kept[:number]:
            assert first["steps"][number] == [calls - dropped, size - dropped * first["block"]], number
        else:
            expected = [recording_calls - 2 * dropped, recording_bytes - 2 * dropped * first["block"]]
            assert first["steps"][number] == expected, number


@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dropped_blocks_have_zero_gradient(layout: Layout, runs: tuple[dict[str, Any], Path]) -> None:
    for step, gradients in enumerate(runs[0][str(layout)]["gradients"]):
        for block, largest in enumerate(gradients):
            assert (largest > 1e-6) if block in kept_in(step) else (largest == 0.0), f"step {step}, block {block}"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layer_drop_trains_as_plain_torch_does(
    layout: Layout, runs: tuple[dict[str, Any], Path], truth: dict[str, Any]
) -> None:
    seen = runs[0][str(layout)]
    assert seen["losses"] == pytest.approx(truth["losses"], rel=CURVE)
    assert seen["norms"] == pytest.approx(truth["norms"], rel=10 * CURVE)
    weights = load_file(runs[1] / f"{layout}.safetensors")
    assert weights.keys() == truth["student"].keys()
    for name, value in truth["student"].items():
        error = (weights[name].double() - value).norm() / value.norm().clamp_min(1e-3)
        assert error < FINAL_WEIGHTS, name
