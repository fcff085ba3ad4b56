"""Targets and loss against the formulas of the paper, written out in NumPy and float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megad2v.modalities.build import build_student, build_teacher
from megad2v.models.data2vec import Student
from megad2v.models.objective import layer_targets, regression_loss, variance_loss
from tests.checkpoints import perturb_, small_config
from tests.tolerances import FORMULA

Floats = npt.NDArray[np.float64]
AXES = {"layer": -1, "instance": 1}
NORMS = ("none", "layer", "instance")


def layers(count: int) -> list[torch.Tensor]:
    """(B, T, D) = (3, 7, 10), each with its own scale and offset per layer, channel and position: then no two orders
    of averaging and normalising, and no two axes, give the same."""
    generator = torch.Generator().manual_seed(count)
    made = []
    for number in range(count):
        scale = 0.5 + 2 * torch.rand(1, 7, 10, generator=generator)
        offset = 3 * torch.randn(3, 1, 10, generator=generator)
        made.append((number + 1) * (torch.randn(3, 7, 10, generator=generator) * scale + offset))
    return made


def formula(x: Floats, kind: str) -> Floats:
    if kind == "none":
        return x
    axis = AXES[kind]
    mean = x.mean(axis, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5)


def difference(ours: torch.Tensor, truth: Floats) -> float:
    return float(np.linalg.norm(ours.double().numpy() - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("each", NORMS)
@pytest.mark.parametrize("average", NORMS)
def test_targets(count: int, each: str, average: str) -> None:
    tensors = layers(count)
    truth = formula(np.mean([formula(layer.double().numpy(), each) for layer in tensors], axis=0), average)
    ours = layer_targets(tensors, layer_norm=each, average_norm=average)
    assert ours.dtype == torch.float32
    assert difference(ours, truth) < FORMULA


@pytest.mark.parametrize("each", NORMS)
@pytest.mark.parametrize("after", NORMS)
def test_every_layer_a_target(each: str, after: str) -> None:
    """targets.average false: (B, T, K, D), each layer by itself through both normalisations."""
    tensors = layers(3)
    ours = layer_targets(tensors, layer_norm=each, average_norm=after, average=False)
    for number, layer in enumerate(tensors):
        assert difference(ours[:, :, number], formula(formula(layer.double().numpy(), each), after)) < FORMULA


def test_padding_stays_out_of_instance_norm() -> None:
    """Targets of a padded sample are those of the sample by itself; fairseq's statistics take the padding in."""
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = padding[2, 1:] = True
    ours = layer_targets(layers(2), layer_norm="instance", average_norm="instance", padding_bt=padding)
    alone = layer_targets([x[1:2, :4] for x in layers(2)], layer_norm="instance", average_norm="instance")
    assert difference(ours[1:2, :4], alone.double().numpy()) < FORMULA
    whole = layer_targets(layers(2), layer_norm="instance", average_norm="instance")
    assert difference(ours[:1], whole[:1].double().numpy()) < FORMULA
    assert difference(whole[1:2, :4], alone.double().numpy()) > 0.1
    assert ours.isfinite().all(), "one frame has no spread"


def test_variance_term() -> None:
    """Mean over channels of max(0, margin - sqrt(unbiased variance + 1e-6)), of one head's predictions or several's."""
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 0.2, 0.4, 0.8, 1, 2])
    spread = np.sqrt(rows.double().numpy().var(axis=0, ddof=1) + 1e-6)
    truth = np.maximum(0, 0.5 - spread).mean()
    assert 0.05 < truth < 0.3
    assert float(variance_loss(rows, 0.5)) == pytest.approx(truth, rel=FORMULA)
    shifted = torch.stack([rows, rows + 3], dim=1)  # two heads, each with the same spread around another mean
    assert float(variance_loss(shifted, 0.5)) == pytest.approx(truth, rel=FORMULA)
    for few in (rows[:0], rows[:1]):
        assert float(variance_loss(few, 0.5)) == 0.0


def test_targets_of_bf16_layers_are_averaged_in_float32() -> None:
    tensors = [layer.bfloat16() for layer in layers(4)]
    ours = layer_targets(tensors, layer_norm="instance", average_norm="layer")
    assert torch.equal(ours, layer_targets([t.float() for t in tensors], layer_norm="instance", average_norm="layer"))


def test_flat_channels_stay_finite() -> None:
    """A collapsed teacher has no spread to divide by: epsilon keeps its targets at zero instead of NaN."""
    flat = torch.full((2, 5, 8), 3.0)
    assert not layer_targets([flat, flat], layer_norm="instance", average_norm="layer").any()


def errors(kind: str, beta: float, difference: Floats) -> Floats:
    if kind == "mse":
        return difference**2
    small = np.abs(difference) < beta
    return np.where(small, difference**2 / (2 * beta), np.abs(difference) - beta / 2)


@pytest.mark.parametrize(("kind", "beta"), [("mse", 2.0), ("smooth_l1", 2.0), ("smooth_l1", 0.25)])
@pytest.mark.parametrize(("scale", "factor"), [("rsqrt_width", 10**-0.5), ("mean", 0.1), ("sum", 1.0)])
def test_loss_and_its_gradient(kind: str, beta: float, scale: str, factor: float) -> None:
    generator = torch.Generator().manual_seed(5)
    prediction = (2 * torch.randn(13, 10, generator=generator)).requires_grad_()
    target = torch.randn(13, 10, generator=generator)
    away = prediction.detach().double().numpy() - target.double().numpy()
    assert 0.1 < (np.abs(away) < beta).mean() < 0.9, "both branches of smooth L1 are met"

    loss = regression_loss(prediction, target, kind=kind, beta=beta, scale=scale)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(factor * errors(kind, beta, away).sum(), rel=FORMULA)

    loss.backward()
    slope = 2 * away if kind == "mse" else np.clip(away / beta, -1, 1)
    assert difference(prediction.grad, factor * slope) < FORMULA


def test_loss_of_bf16_rows_is_summed_in_float32() -> None:
    rows = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(6)).bfloat16()
    loss = regression_loss(rows[0], rows[1], kind="mse", beta=0.0, scale="sum")
    assert loss.item() == pytest.approx((rows[0].double() - rows[1].double()).square().sum().item(), rel=FORMULA)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
def test_no_rows_weigh_nothing(kind: str) -> None:
    prediction = torch.empty(0, 8, requires_grad=True)
    loss = regression_loss(prediction, torch.empty(0, 8), kind=kind, beta=2.0, scale="rsqrt_width")
    assert loss.item() == 0.0
    loss.backward()
    assert prediction.grad.shape == (0, 8)


def small_student(head_layers: int) -> tuple[Student, torch.nn.Module]:
    config = small_config(head_layers=head_layers)
    student, teacher = perturb_(build_student(config), 1), perturb_(build_teacher(config), 2)
    return student.train().requires_grad_(), teacher


@pytest.mark.parametrize("head_layers", [0, 1, 2])
def test_micro_batch_that_hides_nothing_has_zero_gradients(head_layers: int) -> None:
    """A rank whose samples were all dropped still runs every module (DESIGN invariant 6) and must not move a weight."""
    student, teacher = small_student(head_layers)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    loss, prediction, target = student(images, torch.zeros(2, 1, 16, dtype=torch.bool), teacher)
    assert loss.item() == 0.0
    assert prediction.shape == target.shape == (0, 24)
    loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, f"{name} was not used"
        assert not parameter.grad.any(), name


def test_loss_is_a_sum_over_rows_of_all_micro_batches() -> None:
    """Summed losses of parts add up to the whole's: only so can a step be divided by its global count."""
    student, teacher = small_student(1)
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    mask = torch.arange(16) < torch.tensor([1, 5, 9, 14]).view(4, 1, 1)
    whole = student(images, mask, teacher)[0]
    parts = [student(images[rows], mask[rows], teacher)[0] for rows in (slice(0, 1), slice(1, 4))]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=FORMULA)
