"""A step that is not finite on ONE rank is skipped by all, and leaves no trace (DESIGN section 5)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.harness import run_ranks

# bf16 at stage 1 is another optimizer class inside DeepSpeed, at stage 2 it has a check of its own; offload keeps
# gradients where the others do not.
CASES = [
    *(("zero1", "fp32"), ("zero2", "fp32"), ("zero3", "fp32"), ("zero3_offload", "fp32")),
    *(("zero1", "bf16"), ("zero2", "bf16")),
]
KINDS = {"student", "exp_avg", "exp_avg_sq", "teacher", "adam_step", "student's forward", "teacher's forward"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All cases in one launch of two ranks: what each rank saw."""
    output = tmp_path_factory.mktemp("skip")
    return run_ranks("tests.distributed.jobs_skip:skip", 2, {"cases": CASES}, timeout=150, output=output)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", [" ".join(case) for case in CASES])
def test_not_finite_on_one_rank_is_skipped_by_all(case: str, runs: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(run[case] for run in runs):
        assert seen["taken"] == [True, False, True], f"rank {rank}"
        kept, moved, same = seen["over the poisoned step"], seen["over the next step"], seen["with the spared run"]
        assert kept == dict.fromkeys(KINDS, True), f"rank {rank}: the skipped step changed something"
        assert moved == dict.fromkeys(KINDS, False), f"rank {rank}: the next step did not train"
        assert same == dict.fromkeys(KINDS, True), f"rank {rank}: the skipped step left something behind"
