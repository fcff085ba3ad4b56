"""The text front end: embeddings, positions, what student and teacher see, initial values, counts, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megad2v.errors import UserError
from megad2v.modalities.build import blank_inputs, build_student, build_teacher, positions
from megad2v.modalities.text.codecs import PAD
from megad2v.models.data2vec import Student, Teacher
from megad2v.models.initialise import initialise_
from tests.checkpoints import perturb_, small_text_config
from tests.tolerances import SPREAD

SEES = pytest.mark.parametrize("sees", ["full", "masked_only"])
MASK = 100


def models(sees: str = "full", seed: int = 0) -> tuple[Student, Teacher]:
    """A small student that learns and its teacher, moved off their initial values; rows of `<pad>` too."""
    config = small_text_config(text={"teacher_sees": sees})
    student, teacher = perturb_(build_student(config), seed), perturb_(build_teacher(config), seed + 1)
    return student.requires_grad_(True), teacher


def views(sees: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (3, 2, 9), mask and padding: the second row is short, of the third nothing was chosen."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(4, MASK, (3, 9), generator=generator)
    ids[:, 0] = 0
    padding = torch.arange(9)[None] >= torch.tensor([9, 6, 8])[:, None]
    ids[padding] = PAD
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, [0, 3, 4, 8]] = mask[1, [1, 5]] = True
    seen = ids.masked_fill(~mask & mask.any(1, keepdim=True), PAD) if sees == "masked_only" else ids
    return torch.stack([seen, ids.masked_fill(mask, MASK)], dim=1), mask, padding


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_base() -> None:
    """The released model's (spec 2.3): 126,415,872 with its head, of which the teacher averages the blocks."""
    config = small_text_config(
        width=768, depth=12, heads=12, mlp_ratio=4.0, text={"vocabulary": 50_265, "max_tokens": 512}
    )
    with torch.device("meta"):
        student = build_student(config)
        whole = build_teacher(replace(config, teacher=replace(config.teacher, scope="model")))
    assert numel(student) == 126_415_872
    assert numel(whole) == 124_054_272  # spec 4.9
    assert student.front_end.positions.weight.shape == (514, 768)


def test_positions_count_what_is_not_padding() -> None:
    """From 2; what stands between `<pad>` is closed up."""
    front_end = models()[0].front_end
    ids = torch.tensor([[[1, 7, 1, 1, 8, 9, 1]]])
    table, places = front_end.tokens.weight, front_end.positions.weight
    expected = table[ids[0, 0]] + places[[1, 2, 1, 1, 3, 4, 1]]
    masked, clean = front_end(ids, None)
    assert masked is clean or torch.equal(masked, clean)
    assert torch.equal(clean[0], expected)


@SEES
def test_views(sees: str) -> None:
    """What each view gives does not depend on the other one."""
    front_end = models(sees)[0].front_end
    inputs, mask, _ = views(sees)
    masked, clean = front_end(inputs, mask)
    assert torch.equal(masked, front_end(inputs[:, 1:], None)[1])
    assert torch.equal(clean, front_end(inputs[:, :1], None)[1])
    with pytest.raises(ValueError, match="a mask needs ids for teacher and student, got 1 row"):
        front_end(inputs[:, :1], mask)


@SEES
def test_teacher_padding(sees: str) -> None:
    front_end = models(sees)[0].front_end
    inputs, mask, padding = views(sees)
    unseen = front_end.teacher_padding(inputs, padding)
    if sees == "full":
        assert torch.equal(unseen, padding)
        assert front_end.teacher_padding(inputs, None) is None
    else:
        assert torch.equal(unseen[:2], ~mask[:2]) and torch.equal(unseen[2], padding[2])


def test_the_teacher_sees_chosen_tokens_alone() -> None:
    """Other tokens change no target under masked_only, and every target under full; the same tokens elsewhere in the
    row, in the same order, give the same targets."""
    for sees in ("masked_only", "full"):
        student, teacher = models(sees)
        inputs, mask, padding = views(sees)
        changed = inputs.clone()
        changed[0, :, 6] = 50  # not chosen
        if sees == "masked_only":
            changed[0, 0, 6] = PAD
        first, second = (student(x, mask[:, None], teacher, padding)[2] for x in (inputs, changed))
        assert torch.equal(first[:4], second[:4]) == (sees == "masked_only")
        assert torch.equal(first[4:], second[4:])
    student, teacher = models("masked_only")
    inputs, mask, padding = views("masked_only")
    moved = torch.full_like(inputs[:1], PAD)
    moved[0, 0, [1, 2, 6, 7]] = inputs[0, 0, mask[0]]
    targets = [
        teacher(x, student.front_end(x, None)[1], student.front_end.teacher_padding(x, None))[x[:, 0] != PAD]
        for x in (inputs[:1], moved)
    ]
    assert (targets[0] - targets[1]).abs().max() < 1e-5


@SEES
def test_a_row_of_which_nothing_was_chosen(sees: str) -> None:
    """Loss and gradients are those without the row."""
    student, teacher = models(sees)
    inputs, mask, padding = views(sees)
    losses, gradients = [], []
    for rows in (3, 2):
        student.zero_grad()
        loss, *_ = student(inputs[:rows], mask[:rows, None], teacher, padding[:rows])
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@SEES
def test_a_row_of_zeros_weighs_nothing(sees: str) -> None:
    """What is left of a micro-batch that lost all its samples."""
    student, teacher = models(sees)
    inputs = torch.zeros(1, 2, 8, dtype=torch.int64)
    loss, predictions, targets = student(inputs, torch.zeros(1, 1, 8, dtype=torch.bool), teacher, None)
    loss.backward()
    assert loss == 0 and len(predictions) == len(targets) == 0
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


@SEES
def test_padding_gets_no_gradient_and_changes_nothing(sees: str) -> None:
    """Rows of `<pad>` in both tables stay as they are, and longer padding changes no loss."""
    student, teacher = models(sees)
    inputs, mask, padding = views(sees)
    loss, *_ = student(inputs, mask[:, None], teacher, padding)
    loss.backward()
    for table in (student.front_end.tokens, student.front_end.positions):
        assert not table.weight.grad[PAD].any() and table.weight.grad[PAD + 1 :].any()
    longer = [nn.functional.pad(x, (0, 5), value=value) for x, value in ((inputs, PAD), (mask, False), (padding, True))]
    again, *_ = student(longer[0], longer[1][:, None], teacher, longer[2])
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)


def test_initial_values() -> None:
    """Normal(0, 0.02) everywhere (spec 2.3), `<pad>`'s rows zeros, biases zeros."""
    student = build_student(small_text_config(width=96, heads=12, text={"vocabulary": 1_000, "max_tokens": 200}))
    initialise_(student, 1)
    for table in (student.front_end.tokens.weight, student.front_end.positions.weight):
        assert not table[PAD].any()
        assert table[PAD + 1 :].std().item() == pytest.approx(0.02, rel=SPREAD)
        assert table[0].any()
    assert student.head[0].weight.std().item() == pytest.approx(0.02, rel=SPREAD)
    assert not student.head[0].bias.any()


def test_what_the_vocabulary_is_not_known_for() -> None:
    with pytest.raises(UserError, match=r"text\.vocabulary: not known; name the tokenizer's folder"):
        build_student(small_text_config(text={"vocabulary": None}))
    assert positions(small_text_config()) == 32
    assert blank_inputs(small_text_config(), 7).shape == (1, 1, 7)
