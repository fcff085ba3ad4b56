"""Ranks that would run different modules say so, and stop before any weight is mixed (invariant 6)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks

STEP = 2
"""After two good steps: DeepSpeed then fetches ahead by its trace."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All cases of disagreement, on a grid of 2 x 2 ranks."""
    return run_ranks(
        "tests.distributed.jobs_guard:agreement",
        4,
        {"tensor_parallel": 2},
        timeout=100,
        output=tmp_path_factory.mktemp("agreement"),
    )


@pytest.mark.timeout(120)
def test_one_small_exchange_where_all_agree(seen: list[dict[str, Any]]) -> None:
    """The counts are summed over the data-parallel ranks: 1 + 2, each once."""
    for rank in seen:
        assert rank["same"] == [3, 20, 0]
        ((name, size),) = rank["same, sent"]
        assert "allreduce" in name and size == 6 * 8
        assert rank["after all that"] == [[2], 0]


@pytest.mark.timeout(120)
def test_all_hear_of_one_that_was_asked_to_leave(seen: list[dict[str, Any]]) -> None:
    """Rank 1 is not the first of its tensor-parallel group, whose counts are heard; and nothing more is sent."""
    for rank in seen:
        assert rank["asked to leave"] == [[2], 1]
        ((name, size),) = rank["asked to leave, sent"]
        assert "allreduce" in name and size == 4 * 8


WORDS = {
    "skips": "ranks disagree before step 1: rank 1 would skip encoder.blocks.0 in its micro-batch 0, "
    "unlike ranks 0, 2, 3",
    "updates": "ranks disagree before step 1: rank 1 counted 7 updates so far, ranks 0, 2, 3 0",
    "validation": "ranks disagree before step 1: rank 1 would run kind validation in its micro-batch 0, "
    "ranks 0, 2, 3 training",
    "fewer forwards": "ranks disagree before step 1: rank 1 would run 1 forwards, ranks 0, 2, 3 2",
    "other samples": "tensor-parallel ranks 0 and 1 do not see the same data in micro-batch 0 of step 1: "
    "samples s0-0-0 s0-0-1 s0-0-2",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", WORDS)
def test_every_rank_raises_the_same_words(case: str, seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank[case] == seen[0][case]
        assert rank[case].startswith(WORDS[case]), rank[case]
        assert rank[case].endswith("Nothing of the step was computed")


def _found(output: Path) -> dict[int, Any]:
    return {int(path.stem[6:]): json.loads(path.read_text()) for path in output.glob("found_*.json")}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("step", [0, STEP])
def test_a_rank_that_skips_a_block_stops_before_it_gathers(step: int, tmp_path: Path) -> None:
    """Its plan was that of the others, so only its own hooks can know; the others, waiting in a gather, leave too."""
    with pytest.raises(AssertionError, match="failed on 2 ranks") as failed:
        run_ranks("tests.distributed.jobs_guard:skip", 2, {"guard": True, "step": step}, timeout=90, output=tmp_path)
    (rank, found), *others = _found(tmp_path).items()
    assert rank == 1 and not others
    expected = (
        f"rank 1 is about to run encoder.blocks.1 in the place of encoder.blocks.0 (step {step}, 0 of its 1 forwards"
    )
    assert found["said"].startswith(expected)
    assert found["sent since the module before"] == 0
    assert found["shards as before"]
    if step == 0:  # later, what both ranks had fetched ahead may be there, rightly
        assert set(found["gathered"]) == {"NOT_AVAILABLE"}
    story = str(failed.value)
    assert "rank 0: exited 1" in story and "rank 1: exited 1" in story
    assert "Traceback" not in story
    assert f"Disagreement: {expected}" in (tmp_path / "rank0.log").read_text()
    assert f"rank 1 failed (at step {step}, forward, " in story
    assert re.search(r"^phase: (forward|backward)$", (tmp_path / "hang" / "rank0.txt").read_text(), re.MULTILINE)


@pytest.mark.timeout(120)
def test_without_the_guard_the_same_skip_mixes_weights_silently(tmp_path: Path) -> None:
    """What it is for. If DeepSpeed ever finds this by itself, the guard may go."""
    with pytest.raises(AssertionError, match="failed on 2 ranks"):
        run_ranks("tests.distributed.jobs_guard:skip", 2, {"guard": False, "step": 0}, timeout=90, output=tmp_path)
    found = _found(tmp_path)
    assert found[1]["wrong"], "rank 1 was given its own block's weights"
    assert len(found[1]["wrong"]) > 3, found
