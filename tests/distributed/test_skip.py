"""A step that is not finite, or a spike, on ONE rank is refused by all and leaves no trace (DESIGN section 5)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.distributed.harness import run_ranks

# bf16 at stage 1 is another optimizer class inside DeepSpeed, at stage 2 it has a check of its own; offload keeps
# gradients where the others do not.
CASES = [
    *[(layout, "fp32", 1) for layout in ("zero1", "zero2", "zero3", "zero3_offload")],
    *[(layout, "bf16", 1) for layout in ("zero1", "zero2")],
    *[("zero1", "fp32", 2), ("zero3", "fp32", 2), ("zero1", "bf16", 2)],
]
NAMES = [f"{layout} {precision} tp{tensor}" for layout, precision, tensor in CASES]
KINDS = {
    *("student", "exp_avg", "exp_avg_sq", "teacher", "adam_step", "student's forward", "teacher's forward", "history"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All cases in one launch of two ranks: what each rank saw."""
    output = tmp_path_factory.mktemp("skip")
    return run_ranks("tests.distributed.jobs_skip:skip", 2, {"cases": CASES}, timeout=150, output=output)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", NAMES)
def test_spoilt_on_one_rank_is_refused_by_all(case: str, runs: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(run[case] for run in runs):
        assert seen["taken"] == [True, False, True, False, True], f"rank {rank}"
        for kind in ("nan", "spike"):
            kept, moved = seen["over the spoilt step"][kind], seen["over the next step"][kind]
            assert kept == dict.fromkeys(KINDS, True), f"rank {rank}: the refused step ({kind}) changed something"
            assert moved == dict.fromkeys(KINDS, False), f"rank {rank}: the step after it ({kind}) did not train"
        same = seen["with the spared run"]
        assert same == dict.fromkeys(KINDS, True), f"rank {rank}: the refused steps left something behind"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", NAMES)
def test_all_ranks_judge_the_same_numbers(case: str, runs: list[dict[str, Any]]) -> None:
    first, second = (run[case]["judgements"] for run in runs)
    assert [judgement["reason"] for judgement in first] == [judgement["reason"] for judgement in second]
    nan, spike = first
    assert nan["reason"] == "not finite: loss and gradient norm"
    assert spike == second[1]  # to the bit, although only rank 1 met it
    assert spike["reason"].startswith("spike: loss ") and "of the last 16 steps taken" in spike["reason"]
    assert math.isfinite(spike["loss"]) and spike["norm"] > 100


@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", NAMES)
def test_a_good_step_costs_one_small_all_reduce(case: str, runs: list[dict[str, Any]]) -> None:
    """Against the same step with DeepSpeed deciding alone. bf16 under ZeRO-2 saves a check of its own."""
    for seen in (run[case] for run in runs):
        assert seen["sent more"] == [["c10d::allreduce_", 16]]
        assert seen["sent less"] == ([["c10d::allreduce_", 1]] if case == "zero2 bf16 tp1" else [])
        assert seen["sent"] > 2  # and something was counted
