"""The guard's own rules, on plain modules in one process: order of modules, words, and what counts as the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megad2v.config.modalities import VisionConfig
from megad2v.config.schema import Config, ModelConfig, TargetsConfig
from megad2v.engine.guard import Disagreement, Guard, Plan, Proposal, Seen, differences
from megad2v.engine.watchdog import Watchdog
from megad2v.modalities.batch import Batch
from megad2v.modalities.build import build_student, build_teacher
from megad2v.models.initialise import initialise_
from megad2v.parallel.topology import Axis
from megad2v.training.layer_drop import kept_blocks
from megad2v.training.proposal import propose, seen, shape_class

DEPTH = 3
ALONE = SimpleNamespace(rank=0, size=1, tensor=Axis(0, 1), data=Axis(0, 1))


def config(**model: Any) -> Config:
    base = ModelConfig(width=16, depth=DEPTH, heads=2, **model)
    return Config(model=base, vision=VisionConfig(image_size=16), targets=TargetsConfig(layers=2))


def batch(**changes: Any) -> Batch:
    mask = torch.zeros(2, 1, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    made = Batch("vision", torch.zeros(2, 3, 16, 16, dtype=torch.uint8), mask, sample_ids=("a", "b"))
    return replace(made, **changes)


class Trained:
    """Student, teacher and a guard over them."""

    def __init__(self, config: Config) -> None:
        self.student, self.teacher_module = build_student(config), build_teacher(config)
        initialise_(self.student, 1), initialise_(self.teacher_module, 1)
        self.watch = Watchdog()
        self.expected: list[object] = []
        self.expect = self.expected.append
        self.guard = Guard(self, ALONE, self.watch)  # type: ignore[arg-type]

    def agree(self, *, blocks: tuple[int, ...] | None = None, forwards: int = 1) -> None:
        proposal = propose([batch()] * forwards, kind="training", step=1, updates=0, depth=DEPTH, blocks=blocks)
        assert self.guard.agree(proposal, [3]) == [3]

    def forward(self, place: int = 0, run: tuple[int, ...] | None = None) -> torch.Tensor:
        with self.guard.forward(place):
            one = batch()
            return self.student(one.inputs, one.mask_bmt, self.teacher_module, None, run)[0]


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("scope", ["encoder", "model"])
@pytest.mark.parametrize("head_layers", [0, 2])
def test_every_shape_of_model_passes(norm: str, scope: str, head_layers: int) -> None:
    settings = config(norm=norm, head_layers=head_layers, relative_bias=norm == "pre")
    trained = Trained(replace(settings, teacher=replace(settings.teacher, scope=scope)))
    for kept in (None, (0, 2), ()):
        trained.agree(blocks=kept, forwards=2)
        trained.forward(0, kept).backward()
        trained.forward(1, kept)
        trained.guard.finish()
    # The engine gathers by what was agreed on.
    assert [plan.blocks for plan in trained.expected] == [(0, 1, 2)] * 2 + [(0, 2)] * 2 + [()] * 2


def test_the_place_is_known_to_the_module() -> None:
    trained = Trained(config())
    trained.agree()
    places: list[str] = []
    at = trained.watch.at
    trained.watch.at = lambda *a, **k: (at(*a, **k), places.append(trained.watch.place.describe()))  # type: ignore
    loss = trained.forward()
    at("backward")
    loss.backward()
    said = [place.removeprefix("step 0, ").removesuffix(", samples a b") for place in places]
    assert said == [
        "forward",
        "forward, front_end",
        "forward, teacher.encoder.relative_bias",
        *[f"forward, teacher.encoder.blocks.{block}" for block in range(DEPTH)],
        "forward, teacher.encoder.norm",
        "forward, encoder.relative_bias",
        *[f"forward, encoder.blocks.{block}" for block in range(DEPTH)],
        "forward, encoder.norm",
        "forward, head",
        *[f"backward, encoder.blocks.{block}" for block in reversed(range(DEPTH))],
    ]


def test_a_module_left_out_or_added() -> None:
    trained = Trained(config())
    trained.agree()
    with pytest.raises(Disagreement, match=r"rank 0 is about to run encoder.blocks.2 in the place of encoder.blocks.1"):
        trained.forward(run=(0, 2))
    trained.agree(blocks=(0, 2))
    with pytest.raises(Disagreement, match=r"about to run encoder.blocks.1 in the place of encoder.blocks.2"):
        trained.forward()
    trained.agree()
    trained.student.head = nn.Identity()  # another module than the one that is watched
    with pytest.raises(Disagreement, match="has ended the forward without head"):
        trained.forward()


def test_a_forward_left_out_or_added() -> None:
    trained = Trained(config())
    trained.agree(forwards=2)
    with pytest.raises(Disagreement, match="about to run forward 1 of the step, not 0"):
        trained.forward(1)
    trained.agree(forwards=2)
    trained.forward()
    with pytest.raises(Disagreement, match="has run 1 of the 2 forwards"):
        trained.guard.finish()


def test_outside_a_forward_nothing_is_enforced() -> None:
    trained = Trained(config())
    trained.student.features(torch.zeros(1, 3, 16, 16))
    trained.guard.close()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in trained.student.modules())


def test_what_counts_as_the_same() -> None:
    """Sizes and padding differ between data-parallel ranks; tensor-parallel ranks share all."""
    shorter = batch(inputs=torch.zeros(1, 3, 16, 16, dtype=torch.uint8), padding_bt=torch.zeros(1, 4, dtype=torch.bool))
    assert shape_class(batch()) == shape_class(shorter) == "uint8 inputs of 4 dimensions with 1 mask(s)"
    assert shape_class(batch(inputs=torch.zeros(2, 100))) != shape_class(batch())
    assert seen(batch()) == seen(batch())
    for other in (
        shorter,
        batch(sample_ids=("a", "c")),
        batch(fingerprints=("x", "y")),
        batch(dropped=(("c", "bad"),)),
    ):
        assert seen(other) != seen(batch())


def test_who_is_odd() -> None:
    plan = Plan("training", "vision", "s", (0, 1, 2))
    usual = Proposal(4, 4, (plan, plan), (Seen(("a",), "d"), Seen(("b",), "d")))
    other = replace(usual, plans=(plan, replace(plan, modality="speech")))
    drops = replace(usual, plans=(replace(plan, blocks=(2,)), plan))
    late = replace(usual, step=3)
    said = differences([usual, other, usual, drops, late, usual], 3, 1)
    assert said == (
        "ranks disagree before step 4: rank 1 would run modality speech in its micro-batch 1, ranks 0, 2, 5 vision "
        "(front_end and head of parts.speech, encoder.parts.speech on samples b (d)); "
        "rank 3 would skip encoder.blocks.0, encoder.blocks.1 in its micro-batch 0, unlike ranks 0, 2, 5; "
        "rank 4 would take step 3, ranks 0, 2, 5 step 4. Nothing of the step was computed"
    )
    adds = replace(usual, plans=(replace(plan, blocks=(0, 1, 2)), replace(plan, blocks=(0, 1))))
    base = replace(usual, plans=(replace(plan, blocks=(0, 1)), replace(plan, blocks=(0, 1))))
    assert "rank 1 would run encoder.blocks.2 in its micro-batch 0, unlike rank 0" in differences([base, adds], 3, 1)


def test_layer_drop_is_a_pure_draw() -> None:
    assert kept_blocks(1, 5, depth=12, rate=0.0) is None
    draws = [kept_blocks(1, step, depth=12, rate=0.25) for step in range(4000)]
    assert draws == [kept_blocks(1, step, depth=12, rate=0.25) for step in range(4000)]
    assert draws != [kept_blocks(2, step, depth=12, rate=0.25) for step in range(4000)]
    for block in range(12):  # standard deviation 0.007
        assert sum(block in (kept or ()) for kept in draws) / 4000 == pytest.approx(0.75, abs=0.03)
