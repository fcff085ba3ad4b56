"""Front end, student and teacher: what is hidden, what is compared, and what no gradient reaches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megad2v.config.schema import Config
from megad2v.modalities.build import build_student, build_teacher
from megad2v.models.data2vec import Student, Teacher
from megad2v.models.objective import layer_targets, regression_loss
from tests.checkpoints import perturb_, small_config
from tests.tolerances import FORMULA
from tests.unit.model_helpers import close


def pair(config: Config) -> tuple[Student, Teacher]:
    return perturb_(build_student(config), 1), perturb_(build_teacher(config), 2)


def pixels(seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_patches_and_tokens() -> None:
    front_end = perturb_(build_student(small_config()).front_end, 1).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (front_end.mean, front_end.std))
    normalised = (pixels().double() / 255 - mean) / std
    cut = normalised.view(2, 3, 4, 8, 4, 8)  # rows of patches, rows, columns of patches, columns
    embedded = torch.einsum("bcyixj,dcij->byxd", cut, front_end.patches.weight).flatten(1, 2) + front_end.patches.bias
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [0, 3, 7]], mask[1, [1, 2, 14, 15]] = True, True
    masked, clean = front_end(normalised, mask)
    assert close(clean[:, 1:], embedded)
    for view in (masked, clean):
        assert (view[:, 0] == front_end.cls_token).all()
    assert (masked[:, 1:][mask] == front_end.mask_token).all()
    assert torch.equal(masked[:, 1:][~mask], clean[:, 1:][~mask])
    same, alone = front_end(pixels(), None)
    assert same is alone
    assert close(alone, clean, FORMULA), "bytes are normalised on the device"


def test_student_predicts_the_masked_positions() -> None:
    """Row r of predictions and targets is the r-th masked patch, in reading order, without CLS."""
    student, _ = pair(small_config(head_layers=2))
    mask = torch.zeros(2, 1, 16, dtype=torch.bool)
    mask[0, 0, [1, 5]], mask[1, 0, [0, 2, 15]] = True, True
    labels = torch.arange(32.0).view(2, 16, 1).expand(2, 16, 24)
    _, prediction, target = student(pixels(), mask, lambda inputs, clean, padding: labels)
    assert target[:, 0].tolist() == [1, 5, 16, 18, 31]
    encoded = student.encoder(student.front_end(pixels(), mask[:, 0])[0])[0]
    rows = torch.stack([encoded[b, 1 + t] for b, t in [(0, 1), (0, 5), (1, 0), (1, 2), (1, 15)]])
    assert close(prediction, student.head(rows), FORMULA)


def test_shuffled_targets_are_for_training_only() -> None:
    """The control permutes targets, and is validated against the true ones."""
    config = small_config()
    student, teacher = pair(config)
    mask = torch.ones(2, 1, 16, dtype=torch.bool)
    truth = student(pixels(), mask, teacher)[2]
    student.spec = replace(student.spec, shuffle=True)
    assert torch.equal(student(pixels(), mask, teacher)[2], truth)
    shuffled = student.train()(pixels(), mask, teacher)[2]
    assert not torch.equal(shuffled, truth)
    assert torch.equal(shuffled.sort(0).values, truth.sort(0).values)


def test_two_masks_per_sample_are_refused() -> None:
    student, teacher = pair(small_config())
    with pytest.raises(ValueError, match="one mask per sample, got 2"):
        student(pixels(), torch.zeros(2, 2, 16, dtype=torch.bool), teacher)


@pytest.mark.parametrize("scope", ["encoder", "model"])
@pytest.mark.parametrize("tensor", ["block", "ffn"])
def test_targets_are_the_top_layers_without_cls(scope: str, tensor: str) -> None:
    config = small_config(scope=scope)
    student, teacher = pair(config)
    spec = replace(student.spec, layers=2, tensor=tensor, average_norm="instance")
    teacher.spec = spec
    seen: list[tuple[Tensor, Tensor]] = []
    for one in teacher.encoder.blocks:
        one.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    clean = student.front_end(pixels(), None)[1]
    targets = teacher(pixels(), clean)
    assert targets.shape == (2, 16, 24)
    top = [outputs[("block", "ffn").index(tensor)][:, 1:] for outputs in seen[-2:]]
    assert len(seen) == config.model.depth
    assert torch.equal(targets, layer_targets(top, layer_norm="none", average_norm="instance"))
    # With scope "model" the teacher embeds the pixels itself; else it takes what it is given.
    assert torch.equal(teacher(pixels(), clean + 1), targets) == (scope == "model")
    assert torch.equal(teacher(pixels(2), clean), targets) == (scope == "encoder")


def test_teacher_never_leaves_eval_mode() -> None:
    config = small_config(dropout=0.5, attention_dropout=0.5, drop_path=0.5)
    teacher = perturb_(build_teacher(config), 2)
    wrapped = nn.ModuleDict({"teacher": teacher}).train()  # an engine calls train() on what it wraps
    assert wrapped.training
    assert not any(module.training for module in teacher.modules())
    clean = torch.randn(2, 17, 24)
    assert torch.equal(teacher(pixels(), clean), teacher(pixels(), clean))


@pytest.mark.parametrize("scope", ["encoder", "model"])
def test_no_gradient_through_the_targets(scope: str) -> None:
    """Stopped twice: the teacher records nothing, and the student hands it a view cut off from its own graph."""
    config = small_config(scope=scope)
    teacher = build_teacher(config)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    student, teacher = perturb_(build_student(config), 1).train().requires_grad_(), perturb_(teacher, 2)
    clean = student.front_end(pixels(), None)[1]
    assert clean.requires_grad
    assert not teacher.requires_grad_()(pixels(), clean).requires_grad

    handed: list[Tensor] = []

    def targets(inputs: Tensor, clean_btd: Tensor, padding: Tensor | None) -> Tensor:
        handed.append(clean_btd)
        return teacher(inputs, clean_btd, padding)

    loss, prediction, target = student(pixels(), torch.ones(2, 1, 16, dtype=torch.bool), targets)
    assert not any(tensor.requires_grad for tensor in (handed[0], prediction, target))
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # With every patch masked, the patches' only way into the loss would be the targets.
    assert not student.front_end.patches.weight.grad.any()
    assert student.front_end.mask_token.grad.any()


def test_features_are_the_encoder_of_the_clean_view() -> None:
    student, _ = pair(small_config())
    expected = student.encoder(student.front_end(pixels(), None)[1])[0]
    assert torch.equal(student.features(pixels()), expected)
    assert expected.shape == (2, 17, 24)


def test_padding_with_relative_bias_and_prefix() -> None:
    """Student and teacher both leave padded patches out; CLS is never padding."""
    student, teacher = pair(small_config())
    images = pixels()
    mask, padding = torch.zeros(2, 1, 16, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 0, 2:6], padding[1, 12:] = True, True
    changed = images.clone()
    changed[1, :, 24:] = 255 - changed[1, :, 24:]  # patches 12..15 are the last row
    same = student(changed, mask, teacher, padding)
    for ours, theirs in zip(student(images, mask, teacher, padding), same, strict=True):
        assert close(ours.double(), theirs.double(), FORMULA)
    whole = student(images, mask, teacher)[0]
    assert not close(whole, student(changed, mask, teacher)[0], FORMULA)
    assert close(whole, student(images, mask, teacher, torch.zeros_like(padding))[0], FORMULA)


ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "K": {"targets": {"layers": 2}},
    "attention output": {"targets": {"tensor": "attention"}},
    "FFN output": {"targets": {"tensor": "ffn"}},
    "FFN output and residual": {"targets": {"tensor": "ffn_residual"}},
    "a projection per layer": {"targets": {"average": False}},
    "teacher context": {"teacher": {"context": 0.3}},
    "variance regularisation": {"loss": {"variance_weight": 1.0}},
    "DeepNorm": {"model": {"deep_norm": True}},
}
"""The paper's switches, as keys of the configuration, each against the same post-norm model."""


def ablated(**sections: dict[str, Any]) -> tuple[float, Tensor]:
    """Loss and targets of one micro-batch."""
    config = small_config(norm="post", head_layers=1)
    config = replace(config, **{
        name: replace(getattr(config, name), **values) for name, values in sections.items()
    })  # fmt: skip
    student, teacher = pair(config)
    masks = torch.zeros(2, 1, 16, dtype=torch.bool)
    masks[:, :, 3:9] = True
    loss, _, targets = student.train()(pixels(), masks, teacher)
    return float(loss), targets


@pytest.mark.parametrize("switch", ABLATIONS)
def test_ablation_switches_change_the_outcome(switch: str) -> None:
    before, targets = ablated()
    after, other = ablated(**ABLATIONS[switch])
    assert abs(after - before) > 1e-4 * abs(before)
    same = switch == "variance regularisation"  # the one that is about predictions alone
    assert torch.equal(targets, other) == same
    assert ablated(**ABLATIONS[switch])[0] == after


def test_every_layer_by_its_own_projection() -> None:
    """The loss is the mean over layers of what each head leaves, and every head learns."""
    config = small_config(head_layers=1)
    config = replace(config, targets=replace(config.targets, average=False, layers=2))
    student, teacher = build_student(config), build_teacher(config)
    for seed, model in enumerate((student, teacher)):
        perturb_(model, seed)
    student.requires_grad_(True)
    masks = torch.zeros(2, 1, 16, dtype=torch.bool)
    masks[:, :, 3:9] = True
    loss, predictions, targets = student(pixels(), masks, teacher)
    assert predictions.shape == targets.shape == (12, 24)
    encoded = student.encoder(student.front_end(pixels(), masks[:, 0])[0])[0][:, 1:][masks[:, 0]]
    truth = teacher(pixels(), teacher_view(student), None)[masks[:, 0]]
    each = [
        regression_loss(head(encoded), truth[:, number], kind="smooth_l1", beta=2.0, scale="rsqrt_width")
        for number, head in enumerate(student.head.heads)
    ]
    assert loss.item() == pytest.approx(sum(part.item() for part in each) / 2, rel=1e-6)
    loss.backward()
    assert all(head.weight.grad.norm() > 0 for head in student.head.heads)


def teacher_view(student: Any) -> Tensor:
    return student.front_end(pixels(), None)[1].detach()
