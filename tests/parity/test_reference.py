"""Every number the reference program leaves, against ours: intermediates, targets, loss, gradients, SGD and EMA step.

The vectors lie in $MEGAD2V_REFERENCE (default ../shared/reference); others of the same format can be run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megad2v.config.schema import Config, LossConfig, MaskConfig, ModelConfig, TargetsConfig, VisionConfig
from megad2v.modalities.build import build_student, build_teacher
from megad2v.modalities.vision.fairseq_keys import from_fairseq, to_fairseq
from megad2v.teacher.schedule import decay_at
from tests.tolerances import REFERENCE, REFERENCE_GRADIENT


@pytest.fixture(scope="module")
def vision(reference: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(description, tensors) of the vision vectors."""
    return json.loads((reference / "vision.json").read_text()), load_file(reference / "vision.safetensors")


def vision_config(reference: dict[str, Any]) -> Config:
    """Our configuration for the reference's own keys."""
    kinds = [("layer_norm_target_layer", "layer"), ("instance_norm_target_layer", "instance")]
    per_layer = next((ours for theirs, ours in kinds if reference[theirs]), "none")
    averaged = (
        "layer" if reference["layer_norm_targets"] else "instance" if reference["instance_norm_targets"] else "none"
    )
    return Config(
        model=ModelConfig(
            width=reference["embed_dim"],
            depth=reference["depth"],
            heads=reference["num_heads"],
            # fairseq's port ignores `mlp_ratio`: its blocks are always four times as wide (see the weights' shapes).
            mlp_ratio=4.0,
            layer_scale=reference["layer_scale_init_value"],
            drop_path=reference["drop_path"],
            attention_dropout=reference["attention_dropout"],
            relative_bias=reference["shared_rel_pos_bias"],
        ),
        vision=VisionConfig(image_size=reference["image_size"], patch_size=reference["patch_size"]),
        mask=MaskConfig(
            ratio=reference["num_mask_patches"] / (reference["image_size"] // reference["patch_size"]) ** 2
        ),
        targets=TargetsConfig(
            layers=reference["average_top_k_layers"],
            tensor="block" if reference["end_of_block_targets"] else "ffn",
            layer_norm=per_layer,
            average_norm=averaged,
        ),
        loss=LossConfig(
            kind="smooth_l1" if reference["loss_beta"] > 0 else "mse", beta=reference["loss_beta"], scale="rsqrt_width"
        ),
    )


def _section(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _close(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float = REFERENCE) -> None:
    """Relative Frobenius error, and the largest error over the tensor's largest value."""
    relative = ((ours - theirs).double().norm() / theirs.double().norm()).item()
    assert relative < tolerance, f"{what}: relative error {relative:.2e}"


@pytest.fixture(scope="module")
def run(vision: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> dict[str, Any]:
    """One forward and backward of ours with the reference's weights, inputs and mask."""
    description, tensors = vision
    config = vision_config(description["config"])
    heads = config.model.heads
    student, teacher = build_student(config), build_teacher(config)
    (case,) = description["cases"]
    unused = set(description["cases"][case]["no_grad_params"])  # fairseq's vision model has a head that it never calls
    used = {name: value for name, value in _section(tensors, "student.").items() if name not in unused}
    student.load_state_dict(from_fairseq(used, heads=heads), strict=True)
    theirs = {f"encoder.{name}": value for name, value in _section(tensors, "teacher.").items()}
    teacher.load_state_dict(from_fairseq(theirs, heads=heads), strict=True)
    student.eval()  # the vectors were made in eval mode, so that no dropout enters
    inputs = _section(tensors, f"cases.{case}.inputs.")
    mask = tensors[f"cases.{case}.info.mask"]
    kept: dict[str, torch.Tensor] = {}
    student.encoder.register_forward_hook(lambda m, i, o: kept.__setitem__("student_encoder_out", o[0][:, 1:]))
    student.front_end.register_forward_hook(lambda m, i, o: kept.__setitem__("patch_embed", o[1][:, 1:]))
    for index, block in enumerate(teacher.encoder.blocks):
        block.register_forward_hook(lambda m, i, o, n=index: kept.__setitem__(f"teacher_block{n}_end", o[0]))
    (image,) = (value for value in inputs.values() if value.dim() == 4)
    loss_sum, prediction, target = student(image, mask.view(len(mask), 1, -1), teacher)
    (loss_sum / mask.sum()).backward()
    return {
        "config": config,
        "case": description["cases"][case],
        "prefix": f"cases.{case}.",
        "student": student,
        "teacher": teacher,
        "kept": kept,
        "loss_sum": loss_sum.detach(),
        "count": int(mask.sum()),
        "prediction": prediction,
        "target": target,
    }


def test_intermediates(run: dict[str, Any], vision: Any) -> None:
    _, tensors = vision
    assert len(run["kept"]) == 2 + run["config"].model.depth
    for name, ours in run["kept"].items():
        _close(ours.detach(), tensors[f"{run['prefix']}intermediates.{name}_BTC"], name)


def test_predictions_and_targets(run: dict[str, Any], vision: Any) -> None:
    _, tensors = vision
    _close(run["prediction"], tensors[f"{run['prefix']}loss_fn_calls.0.preds"], "predictions")
    _close(run["target"], tensors[f"{run['prefix']}loss_fn_calls.0.targets"], "targets")


def test_loss(run: dict[str, Any]) -> None:
    assert run["count"] == run["case"]["sample_size"]
    assert float(run["loss_sum"]) == pytest.approx(run["case"]["loss_sum"], rel=REFERENCE)
    assert float(run["loss_sum"]) / run["count"] == pytest.approx(run["case"]["loss"], rel=REFERENCE)


def test_gradient_norms(run: dict[str, Any]) -> None:
    gradients = {name: p.grad for name, p in run["student"].named_parameters()}
    ours = to_fairseq(gradients, heads=run["config"].model.heads)
    for name, theirs in run["case"]["grad_norms"].items():
        assert float(ours[name].double().norm()) == pytest.approx(theirs, rel=REFERENCE_GRADIENT), name
    assert set(run["case"]["grad_norms"]) == {name for name in ours if not name.endswith("index")}


def test_sgd_then_ema_step(run: dict[str, Any], vision: Any) -> None:
    """The EMA comes after the update, with the decay of the schedule, over the encoder alone."""
    description, _ = vision
    reference, step = description["config"], description["ema"]
    heads = run["config"].model.heads
    decay = decay_at(
        step["num_updates"],
        start=reference["ema_decay"],
        end=reference["ema_end_decay"],
        steps=reference["ema_anneal_end_step"],
    )
    assert decay == pytest.approx(step["decay"], rel=1e-12)
    student = {n: (p - step["sgd_lr"] * p.grad).detach() for n, p in run["student"].named_parameters()}
    teacher = {n: torch.lerp(p, student[n], 1.0 - decay) for n, p in run["teacher"].named_parameters()}
    for ours, theirs, prefix in (
        (to_fairseq(student, heads=heads), step["student_after"], ""),
        (to_fairseq(teacher, heads=heads), step["teacher_after"], "encoder."),
    ):
        compared = 0
        for name, (norm, total) in theirs.items():
            if prefix + name in ours:
                value = ours[prefix + name].double()
                assert float(value.norm()) == pytest.approx(norm, rel=REFERENCE), name
                # The sum cancels: hold its error against the number of terms times their size.
                assert float(value.sum()) == pytest.approx(total, abs=REFERENCE * float(value.abs().sum())), name
                compared += 1
        assert compared >= len([name for name in ours if not name.endswith("index")])
