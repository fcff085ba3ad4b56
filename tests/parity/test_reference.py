"""Every number the reference program leaves, against ours: intermediates, targets, loss, gradients, SGD and EMA step.

The vectors lie in $MEGAD2V_REFERENCE (default ../shared/reference); others of the same format can be run. What differs
between modalities is in tests/parity/programs.py.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megad2v.modalities.build import build_student, build_teacher
from megad2v.models.objective import layer_targets
from megad2v.teacher.schedule import decay_at
from tests.conftest import reference_root
from tests.parity.programs import PROGRAMS
from tests.tolerances import REFERENCE, REFERENCE_GRADIENT, REFERENCE_INSTANCE_NORM

BUFFERS = ("index", "version")
"""Ends of names in fairseq's state dicts that are no parameters."""


def _cases() -> list[tuple[str, str]]:
    """(modality, case) of the vectors that are there; without any, of ours, which are then skipped."""
    found = []
    for modality, program in PROGRAMS.items():
        path = reference_root() / f"{modality}.json"
        cases = json.loads(path.read_text())["cases"] if path.exists() else program.cases
        found += [(modality, case) for case in cases]
    return found


@cache
def vectors(folder: Path, modality: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(description, tensors)."""
    return json.loads((folder / f"{modality}.json").read_text()), load_file(folder / f"{modality}.safetensors")


def _section(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _close(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float = REFERENCE) -> None:
    """Relative Frobenius error."""
    assert ours.shape == theirs.shape, what
    relative = ((ours - theirs).double().norm() / theirs.double().norm()).item()
    assert relative < tolerance, f"{what}: relative error {relative:.2e}"


@cache
def computed(folder: Path, modality: str, name: str) -> dict[str, Any]:
    """One forward and backward of ours with the reference's weights, inputs and mask."""
    description, tensors = vectors(folder, modality)
    program, case, prefix = PROGRAMS[modality], description["cases"][name], f"cases.{name}."
    arguments = _section(tensors, f"{prefix}inputs.")
    config = program.config(description, arguments)
    student, teacher = build_student(config), build_teacher(config)
    unused = set(case["no_grad_params"])  # fairseq's vision model has a head that it never calls
    used = {name: value for name, value in _section(tensors, "student.").items() if name not in unused}
    student.load_state_dict(program.keys.from_fairseq(used, config), strict=True)
    averaged = description["teacher_of"]
    theirs = {f"{averaged}.{name}": value for name, value in _section(tensors, "teacher.").items()}
    teacher.load_state_dict(program.keys.from_fairseq(theirs, config), strict=True)
    student.eval()  # the vectors were made in eval mode, so that no dropout enters
    kept = program.watch(student, teacher)
    mask = tensors[f"{prefix}info.mask"]
    inputs, padding_bt = program.inputs(arguments, config)
    loss_sum, prediction, target = student(inputs, mask.view(len(mask), 1, -1), teacher, padding_bt)
    (loss_sum / mask.sum()).backward()
    return {
        "config": config,
        "arguments": arguments,
        "description": description,
        "case": case,
        "expected": _section(tensors, prefix),
        "student": student,
        "teacher": teacher,
        "kept": {name: value.detach() for name, value in kept.items()},
        "loss_sum": loss_sum.detach(),
        "count": int(mask.sum()),
        "prediction": prediction,
        "target": target,
    }


@pytest.fixture(params=_cases(), ids="-".join)
def run(request: pytest.FixtureRequest, reference: Path) -> dict[str, Any]:
    """`computed` for each modality and case."""
    return computed(reference, *request.param)


def test_intermediates(run: dict[str, Any]) -> None:
    """All that the reference kept."""
    program = PROGRAMS[run["config"].modality]
    expected = _section(run["expected"], "intermediates.")
    assert len(expected) >= 2 + run["config"].targets.layers
    for name, theirs in expected.items():
        ours = run["kept"][name.rpartition("_")[0]]
        theirs = program.batch_first(name, theirs)[:, : ours.shape[1]]
        padding_bt = program.padding(name, run["arguments"])
        if padding_bt is not None:
            assert not padding_bt.all()
            ours, theirs = ours[~padding_bt], theirs[~padding_bt]
        _close(ours, theirs, name)


def test_predictions_and_targets(run: dict[str, Any]) -> None:
    norms = run["config"].targets.layer_norm, run["config"].targets.average_norm
    tolerance = REFERENCE_INSTANCE_NORM if "instance" in norms else REFERENCE
    _close(run["prediction"], run["expected"]["loss_fn_calls.0.preds"], "predictions")
    _close(run["target"], run["expected"]["loss_fn_calls.0.targets"], "targets", tolerance)


def test_targets_from_their_layers(run: dict[str, Any]) -> None:
    """Without what rounding before them does to the norms."""
    config, targets = run["config"], run["config"].targets
    program, mask = PROGRAMS[config.modality], run["expected"]["info.mask"]
    prefix, layers = run["student"].prefix_tokens, []
    for number in range(config.model.depth - targets.layers, config.model.depth):
        (name,) = (n for n in run["expected"] if n.startswith(f"intermediates.{program.layer.format(number)}_"))
        layer_btd = program.batch_first(name, run["expected"][name])
        layers.append(layer_btd[:, prefix : prefix + mask.shape[1]])
    ours = layer_targets(layers, layer_norm=targets.layer_norm, average_norm=targets.average_norm)
    _close(ours[mask], run["expected"]["loss_fn_calls.0.targets"], "targets")


@pytest.mark.parametrize("modality", PROGRAMS)
def test_state_dicts_there_and_back(modality: str, reference: Path) -> None:
    """Names, shapes and values of the reference's own state dicts, to the bit."""
    description, tensors = vectors(reference, modality)
    program, (name, *_) = PROGRAMS[modality], description["cases"]
    case = description["cases"][name]
    config = program.config(description, _section(tensors, f"cases.{name}.inputs."))
    for which, prefix in (("student", ""), ("teacher", f"{description['teacher_of']}.")):
        state = {prefix + name: value for name, value in _section(tensors, f"{which}.").items()}
        state = {name: value for name, value in state.items() if name not in case["no_grad_params"]}
        back = program.keys.to_fairseq(program.keys.from_fairseq(state, config), config)
        assert back.keys() >= state.keys()
        assert all(name.endswith(BUFFERS) for name in back.keys() - state.keys())
        for name, value in state.items():
            assert torch.equal(back[name], value), name


def test_loss(run: dict[str, Any]) -> None:
    assert run["count"] == run["case"]["sample_size"]
    assert float(run["loss_sum"]) == pytest.approx(run["case"]["loss_sum"], rel=REFERENCE)
    assert float(run["loss_sum"]) / run["count"] == pytest.approx(run["case"]["loss"], rel=REFERENCE)


def _rounding(run: dict[str, Any], name: str) -> float:
    """Norm below which a gradient is rounding: a key's bias adds the same to all logits of a query, so that its true
    gradient is zero."""
    is_key_bias = name.endswith("k_proj.bias")
    return REFERENCE * max(run["case"]["grad_norms"].values()) if is_key_bias else 0.0


def test_gradient_norms(run: dict[str, Any]) -> None:
    gradients = {name: p.grad for name, p in run["student"].named_parameters()}
    ours = PROGRAMS[run["config"].modality].keys.to_fairseq(gradients, run["config"])
    for name, theirs in run["case"]["grad_norms"].items():
        norm = float(ours[name].double().norm())
        assert norm == pytest.approx(theirs, rel=REFERENCE_GRADIENT, abs=_rounding(run, name)), name
    assert set(run["case"]["grad_norms"]) == {name for name in ours if not name.endswith(BUFFERS)}


@pytest.mark.parametrize("modality", PROGRAMS)
def test_sgd_then_ema_step(modality: str, reference: Path) -> None:
    """The EMA comes after the update, with the decay of the schedule, over the encoder alone; what `teacher.copied`
    names is taken as it is."""
    description, _ = vectors(reference, modality)
    reference_config, step = description["config"], description["ema"]
    run = computed(reference, modality, step["from_case"])
    config, to_fairseq = run["config"], PROGRAMS[modality].keys.to_fairseq
    decay = decay_at(
        step["num_updates"],
        start=reference_config["ema_decay"],
        end=reference_config["ema_end_decay"],
        steps=reference_config["ema_anneal_end_step"],
    )
    assert decay == pytest.approx(step["decay"], rel=1e-12)
    copied = (*(f"encoder.{part}." for part in config.teacher.copied), *PROGRAMS[modality].copied)
    student = {n: (p - step["sgd_lr"] * p.grad).detach() for n, p in run["student"].named_parameters()}
    teacher = {
        n: torch.lerp(p, student[n], 1.0 if n.startswith(copied) else 1.0 - decay)
        for n, p in run["teacher"].named_parameters()
    }
    for ours, theirs, prefix in (
        (to_fairseq(student, config), step["student_after"], ""),
        (to_fairseq(teacher, config), step["teacher_after"], f"{run['description']['teacher_of']}."),
    ):
        compared = 0
        for name, (norm, total) in theirs.items():
            if prefix + name in ours:
                value = ours[prefix + name].double()
                assert float(value.norm()) == pytest.approx(norm, rel=REFERENCE), name
                # The sum cancels: hold its error against the number of terms times their size.
                assert float(value.sum()) == pytest.approx(total, abs=REFERENCE * float(value.abs().sum())), name
                compared += 1
        assert compared >= len([name for name in ours if not name.endswith(BUFFERS)])
