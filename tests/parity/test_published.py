"""The numerics called `published` against the program that trained the released vision models (the BEiT fork).

`vectors/published.*` hold what that program computed, at a small size, when it was run by make_published_vectors.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megad2v.config.modalities import MaskConfig, VisionConfig
from megad2v.config.schema import (
    Config,
    DataConfig,
    LossConfig,
    MicroBatchConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TargetsConfig,
    TeacherConfig,
    TrainConfig,
)
from megad2v.engine.setup import optimizer_groups
from megad2v.errors import UserError
from megad2v.modalities.build import build_student, build_teacher
from megad2v.modalities.vision.beit_keys import INDEX, from_beit, to_beit
from megad2v.models.initialise import initialise_
from megad2v.teacher.schedule import decay_at
from megad2v.training.schedules import learning_rate
from tests.distributed.harness import run_ranks
from tests.tolerances import REFERENCE, REFERENCE_GRADIENT, SPREAD

VECTORS = Path(__file__).parent / "vectors"
SHAPE = Config(model=ModelConfig(heads=4))
"""As far as key maps ask for it."""
Tensors = dict[str, torch.Tensor]

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "ffn": {"targets": {"tensor": "ffn"}},
    "instance": {"targets": {"layer_norm": "instance", "average_norm": "none"}},
    "post_instance": {"targets": {"layer_norm": "none", "average_norm": "instance"}},
    "mse": {"loss": {"kind": "mse"}},
    "variance": {"loss": {"variance_weight": 0.7, "variance_margin": 1.5}},
}
"""The program's switches, in our keys."""


def load_vectors() -> tuple[dict[str, Any], Tensors]:
    """(description, tensors)."""
    return json.loads((VECTORS / "published.json").read_text()), load_file(VECTORS / "published.safetensors")


def published_config(theirs: dict[str, Any], *, micro_batches: int = 1, **init: Any) -> Config:
    """Our configuration for the program's arguments; what it has no argument for is written out."""
    patches = (theirs["img_size"] // theirs["patch_size"]) ** 2
    steps = theirs["epochs"] * theirs["steps_per_epoch"]
    return Config(
        model=ModelConfig(
            width=theirs["embed_dim"],
            depth=theirs["depth"],
            heads=theirs["num_heads"],
            mlp_ratio=theirs["mlp_ratio"],
            norm="pre",
            norm_eps=theirs["norm_eps"],
            layer_scale=theirs["init_values"],
            qkv_bias="no_key",
            relative_bias=theirs["use_shared_rel_pos_bias"],
            head_layers=1,
            init="beit",
        ),
        vision=VisionConfig(
            image_size=theirs["img_size"],
            patch_size=theirs["patch_size"],
            mean=tuple(theirs["mean"]),
            std=tuple(theirs["std"]),
        ),
        mask=MaskConfig(
            ratio=theirs["num_mask_patches"] / patches,
            min_block=theirs["min_mask_patches_per_block"],
            max_block=theirs["max_mask_patches_per_block"],
            min_aspect=0.3,
        ),
        targets=TargetsConfig(
            layers=len(theirs["target_layers"]), tensor="block", layer_norm="layer", average_norm="layer"
        ),
        loss=LossConfig(kind="smooth_l1", beta=theirs["l1_beta"], scale="mean"),
        teacher=TeacherConfig(scope="model", decay_start=theirs["ema_decay"], decay_end=theirs["ema_decay"]),
        optimizer=OptimizerConfig(
            lr=theirs["lr"],
            betas=(0.9, 0.999),
            eps=theirs["opt_eps"],
            weight_decay=theirs["weight_decay"],
            decay_all=False,
            clip=theirs["clip_grad"],
        ),
        schedule=ScheduleConfig(
            kind="cosine",
            warmup_steps=theirs["warmup_epochs"] * theirs["steps_per_epoch"],
            peak_in_warmup=True,
            min_lr=theirs["min_lr"],
        ),
        data=DataConfig(micro_batch=MicroBatchConfig(samples=theirs["batch"] // micro_batches)),
        train=TrainConfig(steps=steps, micro_batches_per_step=micro_batches),
    )


def ours(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors behind `prefix`, which are a state dict of the program, under our names."""
    prefix += "."
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return from_beit(found, SHAPE)


def close(mine: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Relative Frobenius error."""
    relative = ((mine - theirs).double().norm() / theirs.double().norm()).item()
    assert relative < REFERENCE, f"{what}: relative error {relative:.2e}"


@pytest.fixture(scope="module")
def vectors() -> tuple[dict[str, Any], Tensors]:
    return load_vectors()


@pytest.fixture(scope="module")
def runs(vectors: tuple[dict[str, Any], Tensors]) -> dict[str, dict[str, Any]]:
    """By case, one forward and backward of ours with the program's weights, uint8 images and masks."""
    description, tensors = vectors
    out = {}
    for case, changes in CASES.items():
        config = published_config(description["config"])
        for section, keys in changes.items():
            config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **keys)})
        student, teacher = build_student(config), build_teacher(config)
        student.load_state_dict(ours(tensors, "student"), strict=True)
        weights = ours(tensors, "teacher")
        unaveraged = {name for name in weights if name.startswith("head.")}  # the program averages its head too, unused
        assert unaveraged == {"head.weight", "head.bias"}
        teacher.load_state_dict({n: v for n, v in weights.items() if n not in unaveraged}, strict=True)
        kept: Tensors = {}
        _listen(student, teacher, kept)
        mask = tensors["inputs.0.mask"].flatten(1).unsqueeze(1)
        loss_sum, prediction, target = student(tensors["inputs.0.images"], mask, teacher)
        loss = loss_sum / mask.sum()
        loss.backward()
        gradients = to_beit({n: p.grad for n, p in student.named_parameters()}, SHAPE)
        gradients.pop(INDEX)
        out[case] = {
            "kept": kept,
            "loss": float(loss.detach()),
            "prediction": prediction,
            "target": target,
            "gradients": gradients,
        }
    return out


def _listen(student: Any, teacher: Any, kept: Tensors) -> None:
    def keep(name: str, pick: Any) -> Any:
        return lambda module, inputs, output: kept.__setitem__(name, pick(output).detach())

    student.front_end.patches.register_forward_hook(keep("patch_embed", lambda o: o))
    teacher.front_end.patches.register_forward_hook(keep("teacher_patch_embed", lambda o: o))
    student.encoder.register_forward_hook(keep("student_encoder_out", lambda o: o[0][:, 1:]))
    for number, block in enumerate(teacher.encoder.blocks):
        block.register_forward_hook(keep(f"teacher_block{number}_end", lambda o: o[0]))


def test_intermediates(runs: Any, vectors: Any) -> None:
    description, tensors = vectors
    kept = runs["plain"]["kept"]
    assert {f"{name}_BTC" for name in kept} == set(description["cases"]["plain"]["intermediates"])
    for name, value in kept.items():
        close(value, tensors[f"cases.plain.intermediates.{name}_BTC"], name)


def test_predictions(runs: Any, vectors: Any) -> None:
    """After the final norm and one linear layer, at masked patches."""
    close(runs["plain"]["prediction"], vectors[1]["cases.plain.preds"], "predictions")


@pytest.mark.parametrize("case", ["plain", "ffn", "instance", "post_instance"])
def test_targets(case: str, runs: Any, vectors: Any) -> None:
    close(runs[case]["target"], vectors[1][f"cases.{case}.targets"], "targets")


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str, runs: Any, vectors: Any) -> None:
    run, theirs = runs[case], vectors[0]["cases"][case]
    assert len(run["prediction"]) == theirs["sample_size"]
    assert run["loss"] == pytest.approx(theirs["loss"], rel=REFERENCE)
    assert run["gradients"].keys() == theirs["grad_norms"].keys()
    # The variance term's gradient is of the other sign in part: what is left has lost a digit.
    tolerance = REFERENCE_GRADIENT if case == "variance" else REFERENCE
    for name, norm in theirs["grad_norms"].items():
        assert float(run["gradients"][name].double().norm()) == pytest.approx(norm, rel=tolerance), name


@pytest.mark.parametrize("scope", ["encoder", "model"])
def test_weight_decay_groups(scope: str, vectors: Any) -> None:
    """What its create_optimizer decays, whatever the teacher averages."""
    description, _ = vectors
    config = published_config(description["config"])
    config = dataclasses.replace(config, teacher=TeacherConfig(scope=scope))
    student = build_student(config)
    averaged = {name for name, _ in build_teacher(config).named_parameters()}
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    groups = optimizer_groups(student, averaged, weight_decay=0.05, decay_all=False)
    assert [names[id(p)] in averaged for group in groups for p in group["params"]] == sorted(
        (name in averaged for name in names.values()), reverse=True
    )
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] > 0}
    theirs = to_beit({n: p.detach() for n, p in student.named_parameters() if n in decayed}, SHAPE)
    assert theirs.keys() - {INDEX} == set(description["training"]["decayed"])
    everything = optimizer_groups(student, averaged, weight_decay=0.05, decay_all=True)
    assert all(group["weight_decay"] == 0.05 for group in everything)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """The program's three steps on one process, ours under ZeRO-3 on two with half of the images each."""
    output = tmp_path_factory.mktemp("published")
    return run_ranks("tests.parity.jobs_published:train", 2, {"zero": "zero3"}, timeout=120, output=output), output


def test_losses_norms_rates_and_decays(trained: Any, vectors: Any) -> None:
    """The mean is over all ranks' positions, of which they have unequal numbers; two of the gradients are clipped."""
    (first, second), theirs = trained[0], vectors[0]["training"]
    assert all(a != b for a, b in zip(first["counts"], second["counts"], strict=True))
    assert first["losses"] == pytest.approx(theirs["losses"], rel=REFERENCE)
    assert first["norms"] == pytest.approx(theirs["grad_norms"], rel=REFERENCE)
    assert [norm > vectors[0]["config"]["clip_grad"] for norm in first["norms"]] == [True, True, False]
    assert first["rates"] == pytest.approx(theirs["rates"], rel=1e-12)
    assert first["decays"] == pytest.approx(theirs["decays"], rel=1e-12)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_weights_after_adamw_and_ema(kind: str, trained: Any, vectors: Any) -> None:
    """Decay groups, clipping, bias correction, the order update - average, and what is averaged: all but the head."""
    mine, theirs = load_file(trained[1] / f"{kind}.safetensors"), ours(vectors[1], f"{kind}_after")
    before = ours(vectors[1], kind)
    assert mine.keys() == {name for name in theirs if kind == "student" or not name.startswith("head.")}
    for name, value in mine.items():
        close(value, theirs[name], name)
        assert not torch.equal(theirs[name], before[name])


def test_learning_rates(vectors: Any) -> None:
    """Of ViT-B and ViT-L on ImageNet, without warm-up, and with one update of it."""
    for run in vectors[0]["learning_rates"]:
        schedule = ScheduleConfig(warmup_steps=run["warmup_steps"], peak_in_warmup=True, min_lr=run["min_lr"])
        for step, theirs in run["values"].items():
            mine = learning_rate(int(step), peak=run["lr"], steps=run["steps"], schedule=schedule)
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-18), (run["steps"], step)


def test_decay_ramp(vectors: Any) -> None:
    """The program absorbs with d(t) what update t + 1 left, fairseq and we with d(t + 1); and it stops one value short
    until its epoch ends. The published runs have no ramp (`ema_start_at 0`)."""
    ramp = vectors[0]["ramp"]
    values = [decay_at(t, start=ramp["start"], end=ramp["end"], steps=ramp["steps"]) for t in range(ramp["steps"])]
    assert ramp["used"] == pytest.approx([*values, values[-1], values[-1]], rel=1e-12)


def test_teacher_is_in_eval_mode(vectors: Any) -> None:
    """After an epoch of training: targets know neither drop path nor attention dropout."""
    teacher = build_teacher(published_config(vectors[0]["config"])).train()
    assert any(module.training for module in teacher.modules()) == vectors[0]["training"]["teacher_in_train_mode"]


def test_initial_values(vectors: Any) -> None:
    """Spread and largest value of every parameter as its constructor leaves them."""
    initial = vectors[0]["initial"]
    size = {key: initial[key] for key in ("embed_dim", "depth", "mlp_ratio")}
    student = build_student(published_config(vectors[0]["config"] | size))
    initialise_(student, 1)
    mine = to_beit({name: p.detach() for name, p in student.named_parameters()}, SHAPE)
    mine.pop(INDEX)
    assert mine.keys() == initial["std_and_largest"].keys()
    for name, (std, largest) in initial["std_and_largest"].items():
        value = mine[name]
        if std == 0:
            assert (value == value.flatten()[0]).all(), name
            assert float(value.abs().max()) == pytest.approx(largest, rel=1e-7), name
        else:
            many = value.numel() > 9000
            assert float(value.std()) == pytest.approx(std, rel=SPREAD if many else 5 * SPREAD), name
            assert float(value.abs().max()) == pytest.approx(largest, rel=SPREAD if many else 5 * SPREAD), name


def test_keys_there_and_back(vectors: Any) -> None:
    """Every tensor of its state dict, the position index included, and nothing else."""
    tensors = {n.removeprefix("student."): v for n, v in vectors[1].items() if n.startswith("student.")}
    again = to_beit(from_beit(tensors, SHAPE), SHAPE)
    assert torch.equal(again.pop(INDEX), vectors[1]["position_index"])
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    for other in ("pos_embed", "blocks.0.attn.relative_position_bias_table", "blocks.0.attn.relative_position_index"):
        with pytest.raises(UserError, match=f"{other}: our vision model has no such parameter"):
            from_beit({**tensors, other: torch.zeros(2, 2)}, SHAPE)
