"""A joint model seen by one modality is that modality's own model: names, outputs and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megad2v.config.load import load_config
from megad2v.config.parts import modalities, of_modality
from megad2v.config.schema import Config
from megad2v.modalities.build import build_student, build_teacher, copied_prefixes, joint_name
from megad2v.models.initialise import initialise_
from tests.checkpoints import perturb_
from tests.distributed.layouts import CONV_LAYERS, LONGEST, PATCH, PIXELS, VOCABULARY, micro_batch

MODALITIES = ("vision", "speech", "text")


def joint_config(**changes: object) -> Config:
    config = load_config(
        "joint_tiny", model__width=24, model__depth=4, vision__image_size=PIXELS, vision__patch_size=PATCH,
        speech__conv_layers=[list(layer) for layer in CONV_LAYERS], speech__position_groups=4,
        text__vocabulary=VOCABULARY, text__max_tokens=LONGEST, **changes,
    )  # fmt: skip
    return config


def inputs_of(modality: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    batch = micro_batch(2, 4, modality)
    return batch.inputs, batch.mask_bmt, batch.padding_bt


@pytest.mark.parametrize("norms", ["own", "shared"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_one_modality_of_it_is_that_modality_s_model(modality: str, norms: str) -> None:
    """Loss, predictions, targets and gradients to the bit; and no gradient anywhere else."""
    config = joint_config(**({} if norms == "own" else {"joint__norms": "shared", "joint__text__copied": []}))
    alone = of_modality(config, modality)
    joint, joint_teacher = perturb_(build_student(config), 1), perturb_(build_teacher(config), 2)
    joint.requires_grad_(True).train()  # perturb_ freezes
    student, teacher = build_student(alone).train(), build_teacher(alone)
    for own, shared in ((student, joint), (teacher, joint_teacher)):
        known = dict(shared.named_parameters())
        own.load_state_dict({name: known[joint_name(modality, name, known)] for name, _ in own.named_parameters()},
                            strict=False)  # fmt: skip
    inputs, mask_bmt, padding_bt = inputs_of(modality)
    expected = student(inputs, mask_bmt, teacher, padding_bt)
    found = joint(inputs, mask_bmt, joint_teacher, padding_bt, None, modality)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(found[1]) > 5 and found[0] > 0
    expected[0].backward()
    found[0].backward()
    known = dict(joint.named_parameters())
    used = set()
    for name, parameter in student.named_parameters():
        used.add(joint_name(modality, name, known))
        ours = known[joint_name(modality, name, known)].grad
        assert (parameter.grad is None) == (ours is None), name
        assert ours is None or torch.equal(parameter.grad, ours), name
    assert all(parameter.grad is None for name, parameter in known.items() if name not in used)
    others = [name for name in known if name not in used]
    assert others and all(f"parts.{modality}." not in name for name in others)


def test_what_is_shared() -> None:
    """Attention and MLPs are everybody's; of the rest each parameter is of one modality."""
    config = joint_config()
    for name, _ in build_student(config).named_parameters():
        shared = ".attention." in name or ".mlp." in name
        assert shared != any(f"parts.{modality}." in name for modality in MODALITIES), name
    shared_norms = joint_config(joint__norms="shared", joint__text__copied=[])
    names = [name for name, _ in build_student(shared_norms).named_parameters()]
    assert "encoder.blocks.0.attention_norm.weight" in names
    assert "encoder.parts.text.norm.weight" in names


def test_any_subset() -> None:
    config = joint_config(joint__speech__weight=0.0)
    assert modalities(config) == ("vision", "text")
    assert not any("speech" in name for name, _ in build_student(config).named_parameters())
    alone = joint_config(joint__speech__weight=0.0, joint__text__weight=0.0)
    assert modalities(alone) == ("vision",)
    initialise_(build_student(alone), 1)


def test_matrices_start_alike_whoever_else_takes_part() -> None:
    """Values are drawn by name: leaving a modality out changes nobody else's start."""
    full, less = (build_student(joint_config(**changes)) for changes in ({}, {"joint__speech__weight": 0.0}))
    for model in (full, less):
        initialise_(model, 3)
    known = dict(full.named_parameters())
    assert all(torch.equal(parameter, known[name]) for name, parameter in less.named_parameters())


def test_the_teacher_s_parameters_are_called_as_the_student_s() -> None:
    config = joint_config()
    student = dict(build_student(config).named_parameters())
    names = [name for name, _ in build_teacher(config).named_parameters()]
    assert set(names) <= set(student)
    fronts = {name.split(".")[1] for name in names if name.startswith("parts.")}
    assert fronts == {"vision"}  # scope model; the others' front ends are the student's
    copied = copied_prefixes(config)
    assert copied == ["encoder.parts.speech.positions.", "encoder.parts.text.norm."]
    assert all(any(name.startswith(prefix) for name in names) for prefix in copied)


def test_a_view_of_one_modality_is_itself() -> None:
    config = replace(Config(), modality="vision")
    assert of_modality(config, "vision") is config and modalities(config) == ("vision",)
