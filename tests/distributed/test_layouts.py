"""Every layout computes what plain torch computes on one process in float64 (invariants 1, 2 and 3).

A launch of DeepSpeed costs seconds, so the layouts with the same number of ranks share one (two: the quick ones, which
`make test` runs, and the rest).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megad2v.checkpoint.reader import Checkpoint
from megad2v.modalities.text.codecs import PAD
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import Layout, plain_run, tiny_config
from tests.tolerances import CURVE, FINAL_WEIGHTS, STEP_GRADIENT, STEP_GRADIENT_ABS, TEACHER

STEPS = 20
ZERO = ("zero1", "zero2", "zero3", "zero3_offload")
GRIDS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]
"""(data, tensor)."""

CURVES = [
    *[Layout(zero, data, tensor) for zero in ZERO for data, tensor in GRIDS],
    *[Layout(zero, data, tensor, sequence=True) for zero in ZERO for data, tensor in GRIDS if tensor > 1],
    *[Layout("zero3_offload_param", data, tensor) for data, tensor in ((1, 1), (2, 1), (1, 2), (2, 2))],
    *[Layout("zero3", data, tensor, resident=True) for data, tensor in ((2, 1), (1, 2), (2, 2))],
    *[Layout(zero, 2, compiled=True) for zero in ("zero1", "zero3")],
    Layout("zero3", 1, 2, compiled=True),
    Layout("zero3", 1, 2, sequence=True, compiled=True),
    *[Layout(zero, data, tensor, modality="speech") for zero in ZERO for data, tensor in GRIDS if tensor < 4],
    *[Layout(zero, 1, 2, sequence=True, modality="speech") for zero in ("zero1", "zero2", "zero3")],
    Layout("zero3", 2, persistence=0, modality="speech"),
    *[Layout(zero, data, tensor, modality="text") for zero in ZERO for data, tensor in GRIDS],
    *[Layout(zero, 1, 2, sequence=True, modality="text") for zero in ("zero1", "zero2", "zero3")],
    *[
        Layout(zero, data, tensor, sequence=tensor > 1, modality="text", teacher_sees="masked_only")
        for zero in ("zero1", "zero2", "zero3")
        for data, tensor in ((1, 1), (2, 1), (1, 2), (2, 2))
    ],
    *[Layout("zero3", 2, persistence=0, modality="text", teacher_sees=sees) for sees in ("full", "masked_only")],
]
QUICK_CURVES = {
    *("zero1_dp1", "zero2_dp1", "zero3_dp1"),
    *("zero1_dp2", "zero2_dp2", "zero3_dp2", "zero3_offload_dp2", "zero3_offload_param_dp2", "zero3_dp2_resident"),
    *("zero1_tp2_dp1", "zero3_tp2_dp1", "zero2_tp2_dp1_sequence", "zero3_tp2_dp1_sequence"),
    *("speech_zero1_dp1", "speech_zero2_dp2", "speech_zero3_dp2_persist_0"),
    *("speech_zero1_tp2_dp1", "speech_zero3_tp2_dp1_sequence", "speech_zero3_tp2_dp2"),
    *("text_zero1_dp1", "text_zero2_dp2", "text_masked_only_zero3_dp2_persist_0"),
    *("text_zero1_tp2_dp1", "text_masked_only_zero3_tp2_dp1_sequence", "text_zero3_tp2_dp2"),
    *("zero3_dp4", "zero1_tp2_dp2", "zero3_tp2_dp2_sequence", "zero3_offload_tp2_dp2", "zero3_tp4_dp1_sequence"),
}

ORACLES = [
    *[Layout(zero, data) for zero in ("zero1", "zero2") for data in (1, 2)],
    *[Layout("zero3", data, persistence=threshold) for data in (1, 2) for threshold in (0, None, 1_000_000)],
    *[Layout(zero, 2, scope="model") for zero in ("zero1", "zero3")],
    *[Layout(zero, data, 2) for zero in ("zero1", "zero2", "zero3") for data in (1, 2)],
    Layout("zero3", 2, 2, persistence=0),
    *[Layout("zero3", 2, tensor, resident=True) for tensor in (1, 2)],
    *[
        Layout(zero, 2, tensor, modality=modality)
        for modality in ("speech", "text")
        for zero in ("zero1", "zero2", "zero3")
        for tensor in (1, 2)
    ],
]
QUICK_ORACLES = {
    *("zero1_dp2", "zero2_dp2", "zero3_dp2_persist_0", "zero3_dp2", "zero3_dp2_persist_1000000", "zero3_dp2_resident"),
    *("zero1_tp2_dp2", "zero3_tp2_dp2", "speech_zero1_dp2", "speech_zero3_dp2", "speech_zero2_tp2_dp2"),
    "text_zero3_tp2_dp2",
}
"""For fewer steps: a missed shard, a stale weight or a wrong index shows within a few."""


class Launches:
    """Runs a job for all layouts that share a number of ranks, once."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._done: dict[Any, Any] = {}

    def __call__(
        self, job: str, layout: Layout, together: list[Layout], *, steps: int, timeout: float
    ) -> tuple[list[Any], Path]:
        """What each rank returned for `layout`, and the folder it wrote to. `together`: layouts to run beside it."""
        sharing = [other for other in together if other.ranks == layout.ranks]
        key = (job, steps, tuple(map(str, sharing)))
        if key not in self._done:
            output = self._factory.mktemp(f"{job}_{layout.ranks}_ranks")
            arguments = {"layouts": [asdict(other) for other in sharing], "steps": steps}
            try:
                outcome = run_ranks(
                    f"tests.distributed.jobs_layout:{job}", layout.ranks, arguments, timeout=timeout, output=output
                )
            except AssertionError as error:
                outcome = error
            self._done[key] = (outcome, output)
        outcome, output = self._done[key]
        if isinstance(outcome, AssertionError):
            raise AssertionError(f"the launch that {layout} shares failed: {outcome}")
        return [result[str(layout)] for result in outcome], output


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Shared by the tests of this file."""
    return Launches(tmp_path_factory)


@cache
def _plain(modality: str, teacher_sees: str) -> dict[str, Any]:
    """The float64 run of plain torch."""
    return plain_run(tiny_config(modality=modality, teacher_sees=teacher_sees), STEPS)


def _relative(ours: torch.Tensor, truth: torch.Tensor, floor: float) -> float:
    return float((ours.double() - truth).norm() / max(float(truth.norm()), floor))


def _cases(layouts: list[Layout], quick: set[str]) -> list[Any]:
    assert quick <= set(map(str, layouts))
    return [
        pytest.param(layout, id=str(layout), marks=[] if str(layout) in quick else pytest.mark.slow)
        for layout in layouts
    ]


def _beside(layout: Layout, layouts: list[Layout], quick: set[str]) -> list[Layout]:
    """Quick ones share a launch; slow ones with those of their modality, so that a launch ends in its time."""
    if str(layout) in quick:
        return [other for other in layouts if str(other) in quick]
    return [other for other in layouts if str(other) not in quick and other.modality == layout.modality]


@pytest.mark.timeout(420)
@pytest.mark.parametrize("layout", _cases(CURVES, QUICK_CURVES))
def test_same_step_as_plain_torch(layout: Layout, launches: Launches) -> None:
    """Step-1 gradients, losses and norms of 20 steps (so clipping too), final weights; the checkpoint holds them.
    Speech: with layer drop (invariant 9), lengths that differ between ranks and micro-batches, copied positions. Text:
    lengths likewise, a row of zeros for lost samples, rows of `<pad>` that stay zeros, a copied norm."""
    reference = _plain(layout.modality, layout.teacher_sees)
    together = _beside(layout, CURVES, QUICK_CURVES)
    results, output = launches("curves", layout, together, steps=STEPS, timeout=400)
    if layout.data > 1:  # otherwise a local count of masked positions would pass for the global one
        first, last = results[0], results[-1]
        assert [sum(c) for c in first["counts"]] != [sum(c) for c in last["counts"]]
    gradients = load_file(output / f"{layout}.gradients.safetensors")
    assert set(gradients) == set(reference["gradients"])
    for name in gradients:
        truth = reference["gradients"][name]
        error = (gradients[name].double() - truth).norm()
        assert error < STEP_GRADIENT * truth.norm() + STEP_GRADIENT_ABS, f"{name}: {error:.1e} of {truth.norm():.1e}"
    for result in results:
        assert result["losses"] == pytest.approx(reference["losses"], rel=CURVE)
        assert result["norms"] == pytest.approx(reference["norms"], rel=10 * CURVE)
    checkpoint = Checkpoint(output / str(layout))
    for kind in ("student", "teacher"):
        weights = load_file(output / f"{layout}.{kind}.safetensors")
        assert set(weights) == set(reference[kind])
        for name, truth in reference[kind].items():
            assert _relative(weights[name], truth, 1e-3) < FINAL_WEIGHTS, f"{kind} {name}"
            assert torch.equal(checkpoint.full(kind, name), weights[name]), f"{kind} {name} in the checkpoint"
            if name.startswith(("front_end.tokens.", "front_end.positions.")):
                assert not weights[name][PAD].any() and weights[name][PAD + 1 :].any(1).all(), f"{kind} {name}"


@pytest.mark.timeout(420)
@pytest.mark.parametrize("layout", _cases(ORACLES, QUICK_ORACLES))
def test_teacher_equals_float64_oracle(layout: Layout, launches: Launches) -> None:
    _check_teacher(layout, *launches("oracles", layout, _quick_oracles(layout), steps=60, timeout=400))


def _quick_oracles(layout: Layout) -> list[Layout]:
    return _beside(layout, ORACLES, QUICK_ORACLES)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ORACLES, ids=str)
def test_teacher_equals_float64_oracle_1000_steps(layout: Layout, launches: Launches) -> None:
    _check_teacher(layout, *launches("oracles", layout, [layout], steps=1000, timeout=800))


def _check_teacher(layout: Layout, results: list[Any], output: Path) -> None:
    assert sum(result["covered"] for result in results) == results[0]["teacher_numel"]  # every element, once
    assert (sum(result["copied_numel"] for result in results) > 0) == (layout.modality != "vision")
    for result in results:
        assert result["shard_error"] < TEACHER
        assert result["forward_error"] < TEACHER
        assert result["copied_differ"] == 0
        assert result["target_error"] < 10 * TEACHER  # float32 forwards of equal weights; a stale weight gives 1e-3
        assert result["update"] == []
        if layout.zero == "zero3" and not layout.resident:
            assert result["refresh"] == []
        else:
            ((name, size),) = result["refresh"]
            assert "allgather" in name
            # This tensor-parallel rank's part of the teacher, padded: a flat buffer to a multiple of the ranks, under
            # ZeRO-3 every parameter.
            padding = 64 if not layout.resident else 64 * layout.data
            assert 4 * result["own_numel"] <= size < 4 * (result["own_numel"] + padding)
