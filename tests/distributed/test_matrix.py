"""A checkpoint of any layout loads on any other: every tensor equal to the bit, and the run goes on as it would have.

All pairs, with a line for each (benchmarks/results/checkpoint_matrix.txt):

    python -m pytest tests/distributed/test_matrix.py -m slow -s -q
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import Layout
from tests.tolerances import FINAL_WEIGHTS, RESUMED_CURVE

LAYOUTS = {
    str(layout): layout
    for layout in (
        Layout(zero, data, tensor)
        for zero in ("zero1", "zero3", "zero3_offload")
        for data, tensor in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
    )
}
SOURCES_ONLY = {
    str(layout): layout
    for layout in (
        Layout("zero2", 2),
        Layout("zero2", 4),
        Layout("zero3", 1, 2, sequence=True),
        Layout("zero1", 2, 2, sequence=True),
    )
}
SOURCES = LAYOUTS | SOURCES_ONLY

QUICK = [
    ("zero1_dp2", "zero3_dp4"),
    ("zero3_offload_tp2_dp1", "zero3_dp4"),
    ("zero3_dp4", "zero3_dp4"),
    ("zero3_dp2", "zero1_tp2_dp2"),
    ("zero3_dp4", "zero1_dp2"),
    ("zero1_tp2_dp2", "zero3_dp2"),
    ("zero1_tp2_dp2", "zero3_offload_tp2_dp1"),
    ("zero1_dp2", "zero3_offload_tp2_dp1"),
]
"""(saved on, loaded on): either direction between 2 and 4 ranks, stages, tensor and data parallel; one on itself."""


def _visit(names: Iterable[str], folder: Path, output: Path, *, save: bool, load: dict[str, list[str]]) -> dict:
    """One launch on all layouts of `names`, which have the same number of ranks; what each rank returned, by layout."""
    layouts = [SOURCES[name] for name in names]
    (ranks,) = {layout.ranks for layout in layouts}
    arguments = {
        "layouts": [asdict(layout) for layout in layouts],
        "save": list(names) if save else [],
        "load": load,
        "folder": str(folder),
    }
    results = run_ranks("tests.distributed.jobs_matrix:visit", ranks, arguments, timeout=280, output=output)
    return {name: [result[name] for result in results] for name in names}


def _check(source: str, target: str, went_on: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    reference = went_on[0]
    for result in (rank["loaded"][source] for rank in loaded):
        assert result["differing"] == [], f"{source} -> {target}"
        assert result["tensors"] > 100
        assert result["losses"] == pytest.approx(reference["losses"], rel=RESUMED_CURVE)
        assert result["norms"] == pytest.approx(reference["norms"], rel=10 * RESUMED_CURVE)
        assert result["error_at_end"] < FINAL_WEIGHTS
        if source == target:
            assert (result["losses"], result["norms"]) == (reference["losses"], reference["norms"])
            assert result["unequal_at_end"] == 0
    result = loaded[0]["loaded"][source]
    error = max(abs(a / b - 1) for a, b in zip(result["losses"], reference["losses"], strict=True))
    print(
        f"{source:24} -> {target:24} {result['tensors']} tensors equal to the bit; 5 steps: losses "
        + ("equal to the bit" if error == 0 else f"within {error:.1e}")
        + f", final weights within {result['error_at_end']:.1e}",
        flush=True,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], None]:
    """Checks one of QUICK; three launches for all of them, at the first call."""
    root = tmp_path_factory.mktemp("quick")
    results: dict[str, list[Any]] = {}

    def load_of(names: Iterable[str]) -> dict[str, list[str]]:
        return {name: [source for source, target in QUICK if target == name] for name in names}

    def check(source: str, target: str) -> None:
        if not results:
            used = {name for pair in QUICK for name in pair}
            two, four = ([name for name in SOURCES if name in used and SOURCES[name].ranks == n] for n in (2, 4))
            results.update(_visit(two, root, root / "two", save=True, load={}))
            results.update(_visit(four, root, root / "four", save=True, load=load_of(four)))
            for name, ranks in _visit(two, root, root / "again", save=False, load=load_of(two)).items():
                for saved, loaded in zip(results[name], ranks, strict=True):
                    saved.update(loaded)
        assert results[source][0]["went_on"]["uneven"] > 5
        _check(source, target, [rank["went_on"] for rank in results[source]], results[target])

    return check


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("source", "target"), QUICK, ids=lambda name: name)
def test_pair(source: str, target: str, quick: Callable[[str, str], None]) -> None:
    quick(source, target)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """The folder of all saves, and how each run went on: one launch for each number of ranks."""
    folder, results = tmp_path_factory.mktemp("matrix"), {}
    for ranks in (1, 2, 4):
        names = [name for name, layout in SOURCES.items() if layout.ranks == ranks]
        visited = _visit(names, folder, folder / f"save_{ranks}", save=True, load={})
        results.update({name: [rank["went_on"] for rank in outcome] for name, outcome in visited.items()})
    return folder, results


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", LAYOUTS)
def test_loads_what_all_layouts_saved(target: str, saved: tuple[Path, dict[str, list[Any]]]) -> None:
    """One launch for a target. It begins with another source each time, so that each meets a fresh engine somewhere."""
    folder, went_on = saved
    first = list(LAYOUTS).index(target)
    sources = [*SOURCES][first:] + [*SOURCES][:first]
    loaded = _visit([target], folder, folder / f"load_{target}", save=False, load={target: sources})[target]
    for source in sources:
        _check(source, target, went_on[source], loaded)
