"""train.compile: one graph per block must not run into torch's limit on graphs per function."""

from __future__ import annotations

import pytest
import torch

from megad2v.engine.setup import check_compiler, compile_each_block
from megad2v.errors import UserError
from megad2v.modalities.build import build_encoder
from megad2v.models.initialise import initialise_
from tests.checkpoints import small_config


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


def test_no_compiler_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"train\.compile: needs a C\+\+ compiler"):
        check_compiler()
