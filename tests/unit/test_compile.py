"""train.compile: one graph per block must not run into torch's limit on graphs per function."""

from __future__ import annotations

import pytest
import torch

from megad2v.config.load import load_config
from megad2v.engine.setup import check_compiler, compile_each_block
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.build import build_encoder, build_student, build_teacher
from megad2v.modalities.speech.geometry import samples_needed
from megad2v.models.initialise import initialise_
from tests.checkpoints import small_config


@pytest.mark.slow
def test_deep_models_with_a_rate_per_block_and_batches_that_shrink() -> None:
    """Every block has its own rate of drop path, so a graph of its own; dropped samples make smaller batches."""
    config = small_config(depth=10, drop_path=0.25)
    encoder, plain = build_encoder(config), build_encoder(config)
    initialise_(encoder, 1), initialise_(plain, 1)
    torch.compiler.reset()
    compile_each_block(encoder, backend="eager")
    for mode in (True, False):
        encoder.train(mode), plain.train(mode)
        for samples in (4, 3, 2, 1):
            x_btd = torch.randn(samples, 17, config.model.width)
            torch.manual_seed(0)
            compiled, _ = encoder(x_btd)
            torch.manual_seed(0)
            assert torch.allclose(compiled, plain(x_btd)[0], atol=1e-5)
            compiled.sum().backward()


@pytest.mark.slow
def test_modalities_that_take_turns_have_graphs_of_their_own() -> None:
    """Norms before or behind, the teacher's tensors, padding, sizes: times three. And the graphs compute the same."""
    layers = {f"joint__{modality}__targets__layers": 1 for modality in ("vision", "speech", "text")}
    config = load_config(
        "joint_tiny", model__width=16, model__depth=2, model__heads=2, model__drop_path=0.2, vision__image_size=32,
        speech__position_depth=1, text__vocabulary=100, **layers,
    )  # fmt: skip
    student, plain, teacher = build_student(config), build_student(config), build_teacher(config)
    for model in (student, plain, teacher):
        initialise_(model, 1)
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 8  # what an earlier test has raised it to must not help
    compile_each_block(student, backend="eager"), compile_each_block(teacher, backend="eager")
    for mode in (True, False):
        student.train(mode), plain.train(mode)
        for step in range(2):
            for batch in small_batches(step):
                sums = []
                for model in (plain, student):
                    torch.manual_seed(0)
                    with torch.set_grad_enabled(mode):
                        inputs = batch.inputs, batch.mask_bmt, teacher, batch.padding_bt, None, batch.modality
                        sums.append(model(*inputs)[0])
                assert torch.allclose(*sums, rtol=1e-5), (batch.modality, mode, step)
                if mode:
                    sums[1].backward()


def small_batches(step: int) -> list[Batch]:
    """One of each modality, of other sizes in each step; text and speech with padding in step 1."""
    rows, frames, ids = 4 - step, 9 + 3 * step, 20 + 3 * step
    padded = torch.zeros(rows, max(frames, ids), dtype=torch.bool) if step else None
    if padded is not None:
        padded[0, frames - 1] = padded[0, ids - 1] = True
    waveforms = torch.randn(rows, samples_needed(frames, load_config("joint_tiny").speech.conv_layers))
    pieces = torch.randint(4, 99, (rows, 2, ids))
    return [
        Batch("vision", torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8), torch.rand(rows, 1, 16) < 0.5),
        Batch(
            "speech", waveforms, torch.rand(rows, 1, frames) < 0.5, padded[:, :frames] if padded is not None else None
        ),
        Batch("text", pieces, torch.rand(rows, 1, ids) < 0.5, padded[:, :ids] if padded is not None else None),
    ]


def test_no_compiler_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"train\.compile: needs a C\+\+ compiler"):
        check_compiler()
