"""Split layers against whole ones, and random numbers of tensor-parallel ranks (invariant 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks

JOBS = "tests.distributed.jobs_parallel"


@pytest.mark.timeout(90)
def test_vocabulary_is_split_unequally(tmp_path: Path) -> None:
    results = run_ranks(f"{JOBS}:embedding", 2, timeout=60, output=tmp_path)
    assert [result["rows"] for result in results] == [[0, 4], [4, 7]]
    assert all(result["equal"] and result["gradient"] for result in results)
    assert all(result["table"] == 4 and result["padding"] for result in results)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_copies_that_drifted_apart_are_one_again_after_a_checkpoint(zero: str, tmp_path: Path) -> None:
    results = run_ranks(f"{JOBS}:drift", 2, {"zero": zero}, timeout=60, output=tmp_path)
    for result in results:  # what rank 0 has, masters, averages and forward weights alike
        assert result == {"student": 1.0, "teacher": 0.0, "student's forward": 1.0, "teacher's forward": 0.0}
    told = (tmp_path / "rank0.log").read_text()
    assert "copies of 2 tensors had drifted apart (student encoder.norm.weight@0" in told


@pytest.fixture(scope="module")
def draws(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[dict[str, Any]]]:
    """By sequence parallelism, what each of two ranks saw."""
    return {
        sequence: run_ranks(
            f"{JOBS}:dropout", 2, {"sequence": sequence}, timeout=60, output=tmp_path_factory.mktemp("dropout")
        )
        for sequence in (False, True)
    }


@pytest.mark.timeout(150)
@pytest.mark.parametrize("sequence", [False, True], ids=["tp2", "tp2_sequence"])
def test_dropout(sequence: bool, draws: dict[bool, list[dict[str, Any]]]) -> None:
    for seen in draws[sequence]:
        # What every rank computes for itself after the encoder is the same to the bit.
        assert seen["loss is equal"], seen["loss"]
        # All heads have equal weights: only their dropout can tell them apart.
        assert not seen["context is equal"]
        first, second = seen["dropped samples"]
        assert first == second
        assert any(first) and not all(first), "drop path drew all samples alike: choose another seed"
        # Steps repeat to the bit, whatever was drawn in between.
        assert seen["repeats"] and seen["other seed differs"]
        if sequence:  # each rank has other positions, and other numbers for them
            assert seen["zeros"][0] != seen["zeros"][1]
        else:
            assert seen["output is equal"] and seen["zeros"][0] == seen["zeros"][1]
