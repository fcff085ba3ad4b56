"""A parameter that no micro-batch of a step used has exactly zero gradient, at every ZeRO stage (invariant 9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megad2v.modalities.build import build_teacher
from megad2v.models.initialise import initialise_
from megad2v.teacher.schedule import decay_at
from tests.distributed.harness import run_ranks
from tests.distributed.jobs_unused import student_with_gaps, used_in
from tests.distributed.layouts import _forward_double, micro_batch, tiny_config
from tests.tolerances import CURVE, FINAL_WEIGHTS

STEPS = 6
LAYOUTS = ["zero1", "zero2", "zero3", "zero3_offload"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """All layouts in one launch of two ranks: (what rank 0 saw, by layout; folder of final weights)."""
    output = tmp_path_factory.mktemp("unused")
    arguments = {"layouts": LAYOUTS, "steps": STEPS}
    results = run_ranks("tests.distributed.jobs_unused:gaps", 2, arguments, timeout=200, output=output)
    assert results[0] == results[1]
    return results[0], output


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    """Plain torch in float64, with a gradient of zeros where a step used nothing: the moments then decay, and weight
    decay goes on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of a few hundred elements: threads would only wait for each other
    config = tiny_config(steps=STEPS)
    student, teacher = student_with_gaps(config), build_teacher(config)
    initialise_(student, config.train.seed)
    initialise_(teacher, config.train.seed)
    student, teacher = student.double(), teacher.double()
    o, t = config.optimizer, config.teacher
    adamw = torch.optim.AdamW(student.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    losses, norms = [], []
    for step in range(STEPS):
        student.head.used = used_in(step)
        batches = [micro_batch(step, m) for m in range(config.train.micro_batches_per_step)]
        count, total = sum(batch.masked_count() for batch in batches), 0.0
        for batch in batches:
            images = (batch.inputs.double() / 255 - 0.5) / 0.5
            loss = _forward_double(student, images, batch.mask_bmt, teacher) / count
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), o.clip)))
        adamw.step()
        adamw.zero_grad(set_to_none=False)
        decay = decay_at(step + 1, start=t.decay_start, end=t.decay_end, steps=t.decay_steps)
        current = dict(student.named_parameters())
        with torch.no_grad():
            for name, average in teacher.named_parameters():
                average.lerp_(current[name], 1 - decay)
    torch.set_num_threads(threads)
    return {"losses": losses, "norms": norms, "weights": dict(student.named_parameters())}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unused_parameters_have_zero_gradient(layout: str, runs: tuple[dict[str, Any], Path]) -> None:
    gradients = runs[0][layout]["head_gradients"]
    for step, largest in enumerate(gradients):
        if used_in(step):
            assert largest > 1e-4, f"step {step}"
        else:
            assert largest == 0.0, f"step {step}"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gaps_train_as_plain_torch_does(layout: str, runs: tuple[dict[str, Any], Path], truth: dict[str, Any]) -> None:
    """Same curve, same norm before clipping, same weights: nothing stale was applied, added to or counted."""
    seen = runs[0][layout]
    assert seen["losses"] == pytest.approx(truth["losses"], rel=CURVE)
    assert seen["norms"] == pytest.approx(truth["norms"], rel=10 * CURVE)
    weights = load_file(runs[1] / f"{layout}.safetensors")
    assert weights.keys() == truth["weights"].keys()
    for name, value in truth["weights"].items():
        error = (weights[name].double() - value).norm() / value.norm().clamp_min(1e-3)
        assert error < FINAL_WEIGHTS, name
