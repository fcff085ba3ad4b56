"""Three modalities that take turns: every layout trains as plain torch does, and what is absent has zero gradient."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

from megad2v.modalities.build import build_student, build_teacher
from tests.distributed.harness import run_ranks
from tests.distributed.jobs_joint import MODALITIES
from tests.distributed.layouts import TURNS, Layout, plain_run, tiny_config
from tests.tolerances import CURVE, FINAL_WEIGHTS, FORMULA

STEPS = 6
ZERO = ("zero1", "zero2", "zero3", "zero3_offload")
GRIDS = [(1, 1), (2, 1), (4, 1), (1, 2)]
"""(data, tensor)."""
LAYOUTS = [
    *[Layout(zero, data, tensor, persistence=0, modality="joint") for zero in ZERO for data, tensor in GRIDS],
    Layout("zero3", 2, modality="joint"),
    Layout("zero3", 2, resident=True, persistence=0, modality="joint"),
    Layout("zero3", 2, persistence=0, norms="shared", modality="joint"),
    Layout("zero3", 1, 2, sequence=True, persistence=0, modality="joint"),
]
SLOW = tuple(f"joint_{zero}_dp4_persist_0" for zero in ("zero1", "zero2", "zero3_offload"))
TURNS_COUNTED = [
    *("vision", "vision", "speech", "speech", "speech", "text", "text"),
    *("vision", "text", "valid text", "speech", "valid speech", "vision", "valid text", "text"),
]
GATHERS = {"vision": (7, 6), "speech": (15, 5), "text": (7, 3)}
"""Of a step's one forward and backward, in student and teacher: one for each module that holds weights (a block is
one)."""


class Launches:
    """All layouts with the same number of ranks in one launch, the slow ones in another."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._done: dict[Any, Any] = {}

    def __call__(self, ranks: int, *, slow: bool = False) -> tuple[list[Any], Path]:
        """(what each rank returned, folder of final weights)."""
        if (ranks, slow) not in self._done:
            output = self._factory.mktemp(f"joint_{ranks}_{slow}")
            layouts = [one for one in LAYOUTS if one.ranks == ranks and (str(one) in SLOW) == slow]
            arguments: dict[str, Any] = {"layouts": [asdict(layout) for layout in layouts], "steps": STEPS}
            if ranks == 2:
                arguments["turns"] = TURNS_COUNTED
            try:
                outcome = run_ranks("tests.distributed.jobs_joint:runs", ranks, arguments, timeout=280, output=output)
            except AssertionError as error:
                outcome = error
            self._done[ranks, slow] = outcome, output
        outcome, output = self._done[ranks, slow]
        if isinstance(outcome, AssertionError):
            raise AssertionError(f"the launch on {ranks} ranks failed: {outcome}")
        return outcome, output


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Shared by the tests of this file."""
    return Launches(tmp_path_factory)


@cache
def _truth(norms: str) -> dict[str, Any]:
    """Plain torch in float64, with gradients of zeros for what a step has not used."""
    return plain_run(tiny_config(steps=STEPS, modality="joint", norms=norms), STEPS)


def _seen(launches: Launches, layout: Layout) -> tuple[dict[str, Any], Path]:
    results, output = launches(layout.ranks, slow=str(layout) in SLOW)
    assert all(result[str(layout)] == results[0][str(layout)] for result in results)
    return results[0][str(layout)], output


CASES = [
    pytest.param(one, id=str(one), marks=[pytest.mark.slow] if str(one) in SLOW else []) for one in LAYOUTS
]  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", CASES)
def test_trains_as_plain_torch_does(layout: Layout, launches: Launches) -> None:
    """Losses, gradient norms (loss weights, clipping), final weights of student and teacher (what is copied, too)."""
    seen, output = _seen(launches, layout)
    truth = _truth(layout.norms)
    assert seen["losses"] == pytest.approx(truth["losses"], rel=CURVE)
    assert seen["norms"] == pytest.approx(truth["norms"], rel=10 * CURVE)
    assert min(truth["norms"]) < 3.0 < max(truth["norms"])
    for kind in ("student", "teacher"):
        weights = load_file(output / f"{layout}.{kind}.safetensors")
        assert weights.keys() == truth[kind].keys()
        for name, value in truth[kind].items():
            error = (weights[name].double() - value).norm() / value.norm().clamp_min(1e-3)
            assert error < FINAL_WEIGHTS, f"{kind} {name}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", CASES)
def test_absent_modalities_have_zero_gradient(layout: Layout, launches: Launches) -> None:
    """Exactly; in front ends, heads, around the blocks, and inside of them (under ZeRO-3 leaf modules)."""
    gradients = _seen(launches, layout)[0]["gradients"]
    assert len(gradients) == STEPS
    for step, found in enumerate(gradients):
        assert found.keys() == {*MODALITIES, "shared"}
        rooms = {"parts", "encoder", *(["blocks"] if layout.norms == "own" else [])}
        for modality in MODALITIES:
            assert found[modality].keys() == rooms
            for room, largest in found[modality].items():
                there = modality == TURNS[step]
                assert (largest > 1e-6) if there else (largest == 0.0), f"step {step}: {modality} {room}"
        assert found["shared"]["blocks"] > 1e-6


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", CASES)
def test_moments_of_the_absent_decay_and_weight_decay_goes_on(layout: Layout, launches: Launches) -> None:
    """The rule (docs/joint.md): as with a gradient of zeros. A modality that was there before still moves, by what
    is left of its first moment."""
    moved = _seen(launches, layout)[0]["moved"]
    assert len(moved) == STEPS - 1
    for step, found in enumerate(moved, start=1):
        assert set(found) == set(MODALITIES) - {TURNS[step]}
        for modality, errors in found.items():
            assert max(errors[kind] for kind in ("weight", "first", "second")) < FORMULA, (step, modality, errors)
            assert (errors["moment"] > 0) == (modality in TURNS[:step])
            assert errors["moved"] > 1e-6, (step, modality, errors)


@pytest.mark.timeout(300)
def test_gathers_of_a_step(launches: Launches) -> None:
    """All-gathers under ZeRO-3, without prefetching. The first step of a modality, which records its trace, gathers
    everything for the forward and once more for the backward; each later one once, whoever's turn was before. The
    teacher has no backward: one and the same number always. Validation costs a forward and leaves nothing gathered."""
    config = tiny_config(modality="joint")
    for modality, (student, teacher) in GATHERS.items():
        assert student == _modules_with_weights(build_student(config), modality)
        assert teacher == _modules_with_weights(build_teacher(config), modality)
    results, _ = launches(2)
    assert results[0]["gathers"] == results[1]["gathers"]
    sizes: dict[str, int] = {}
    for number, (turn, found) in enumerate(zip(TURNS_COUNTED, results[0]["gathers"], strict=True)):
        modality = turn.split()[-1]
        student, teacher = GATHERS[modality]
        passes = 2 if turn == modality and turn not in TURNS_COUNTED[:number] else 1
        assert found["student"] == [passes * student, passes * sizes.setdefault(turn, found["student"][1] // passes)]
        assert found["teacher"][0] == teacher, turn
        assert found["left"] == [0, 0], turn


def _modules_with_weights(model: nn.Module, modality: str) -> int:
    """That run in a step of `modality`; a block counts as one."""
    rooms = [model.parts[modality], model.encoder.parts[modality]]
    around = [one for room in rooms for one in room.modules() if list(one.parameters(recurse=False))]
    return len(around) + len(model.encoder.blocks)


@pytest.mark.timeout(300)
def test_a_rank_that_takes_another_modality_is_named_by_all(launches: Launches) -> None:
    """Before anything of the step is computed; the step can then be taken as agreed."""
    found = [rank["other turn"] for rank in launches(2)[0]]
    for one in found:
        assert one["said"].startswith(
            "ranks disagree before step 1: rank 1 would run modality text in its micro-batch 0, rank 0 speech "
            "(front_end and head of parts.text, encoder.parts.text on samples s1-1-0 s1-1-1 s1-1-2 ("
        ), one["said"]
        assert one["said"].endswith("Nothing of the step was computed")
        assert one["seconds"] < 10
        assert one["norm"] == found[0]["norm"] > 0


@pytest.mark.timeout(100)
@pytest.mark.parametrize("rounds", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_whose_forward_is_of_another_modality_stops_before_it_gathers(rounds: int, tmp_path: Path) -> None:
    """Its plan was that of the others, so only its own hooks can know; the others, waiting in a gather, leave with it:
    all within 10 s. `rounds` of good steps before: DeepSpeed then fetches ahead by its trace."""
    with pytest.raises(AssertionError, match="failed on 2 ranks") as failed:
        run_ranks("tests.distributed.jobs_joint:astray", 2, {"rounds": rounds}, timeout=80, output=tmp_path)
    ended = time.time()
    (path,) = tmp_path.glob("found_*.json")
    assert path.name == "found_1.json"
    found = json.loads(path.read_text())
    said = "rank 1 is about to run parts.text.front_end in the place of parts.speech.front_end "
    said += f"(step {3 * rounds}, 0 of its 1 forwards done)"
    assert found["said"].startswith(said)
    assert found["shards as before"]
    if rounds == 0:
        assert found["gathers"] == 0 and not found["gathered"]
    else:  # what both ranks had fetched ahead may be there, rightly
        assert not [name for name in found["gathered"] if "parts.text." in name and ".blocks." not in name]
    story = str(failed.value)
    assert "rank 0: exited 1" in story and "rank 1: exited 1" in story and "Traceback" not in story
    samples = " ".join(f"s{3 * rounds}-1-{row}" for row in range(3))
    for rank in range(2):
        assert ended - json.loads((tmp_path / f"began_{rank}.json").read_text()) < 10
        log = (tmp_path / f"rank{rank}.log").read_text() + (tmp_path / "hang" / f"rank{rank}.txt").read_text()
        assert said in log and samples in log, log
