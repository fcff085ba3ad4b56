"""Initial values: nothing left to chance, nothing that depends on how the model was built, and the spec's spreads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from megad2v.modalities.build import build_encoder, build_student, build_teacher
from megad2v.models.initialise import initial_value, initialise_, initialisers, truncated_normal
from tests.checkpoints import small_config
from tests.tolerances import SPREAD

SHAPES = [
    {},
    {"norm": "post", "layer_scale": None, "qkv_bias": "full", "relative_bias": False, "head_layers": 1},
    {"qkv_bias": "none", "head_layers": 2, "init": "bert"},
    {"head_layers": 1, "init": "beit"},
]


def models() -> Iterator[nn.Module]:
    for shape in SHAPES:
        for scope in ("encoder", "model"):
            config = small_config(scope=scope, **shape)
            yield build_student(config)
            yield build_teacher(config)


def values(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    initialise_(model, seed)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_every_element_is_initialised() -> None:
    """Parameters are filled with NaN first, and so is the tensor that an initialiser gets."""
    for model in models():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        for name, value in values(model).items():
            assert value.isfinite().all(), name


def test_an_initialiser_that_forgets_elements_shows() -> None:
    half = initial_value(1, "x", torch.Size([4]), lambda value, generator: value[:2].zero_())
    assert half.isnan().tolist() == [False, False, True, True]


def test_module_that_does_not_say_how_is_refused() -> None:
    model = nn.Sequential(build_student(small_config()), nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"Linear does not say how to initialise its parameter 1\.weight"):
        initialise_(model, 1)


def test_values_are_pure_in_seed_and_name() -> None:
    student = build_student(small_config(head_layers=2))
    first = values(student)
    torch.manual_seed(99)  # the global generator has no say
    torch.rand(7)
    again = build_student(small_config(head_layers=2))
    with torch.no_grad():
        for name, parameter, initialiser in reversed(list(initialisers(again))):
            parameter.copy_(initial_value(1, name, parameter.shape, initialiser))
    assert all(torch.equal(first[name], parameter) for name, parameter in again.named_parameters())
    # Another model whose blocks come at other places in the order: what has the same name starts the same.
    deeper = values(build_student(small_config(head_layers=1, depth=5)))
    shared = first.keys() & deeper.keys()
    assert len(shared) == len([name for name in first if not name.startswith("head.")])
    assert all(torch.equal(first[name], deeper[name]) for name in shared)


def test_seeds_and_names_differ() -> None:
    one, other = (values(build_student(small_config()), seed) for seed in (1, 2))
    drawn = [name for name, value in one.items() if value.unique().numel() > 1]
    assert len(drawn) > 10
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    mlp = [one[f"encoder.blocks.{block}.mlp.input.weight"] for block in range(3)]
    assert not torch.equal(mlp[0], mlp[1])


@pytest.mark.parametrize("scope", ["encoder", "model"])
def test_teacher_starts_as_the_student(scope: str) -> None:
    config = small_config(scope=scope)
    student, teacher = values(build_student(config)), values(build_teacher(config))
    assert all(torch.equal(student[name], value) for name, value in teacher.items())
    assert any(name.startswith("front_end.") for name in teacher) == (scope == "model")


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_spread_of_the_encoder(norm: str) -> None:
    """0.02 everywhere; in pre-norm models, output weights of block l (from 1) divided by sqrt(2 l) (spec 3.2)."""
    config = small_config(width=96, norm=norm, layer_scale=0.3, qkv_bias="full")
    encoder = build_encoder(config)
    initialise_(encoder, 1)
    for number, block in enumerate(encoder.blocks, start=1):
        last = 0.02 / math.sqrt(2 * number) if norm == "pre" else 0.02
        for layer, std in (
            (block.attention.qkv, 0.02),
            (block.attention.output, last),
            (block.mlp.input, 0.02),
            (block.mlp.output, last),
        ):
            assert layer.weight.std().item() == pytest.approx(std, rel=SPREAD)
            assert abs(layer.weight.mean().item()) < 5 * std / math.sqrt(layer.weight.numel())
            assert not layer.bias.any()
        for layer_norm in (block.attention_norm, block.mlp_norm, encoder.norm):
            assert (layer_norm.weight == 1).all()
            assert not layer_norm.bias.any()
        assert (block.attention_scale.gamma == 0.3).all()
        assert (block.mlp_scale.gamma == 0.3).all()
    assert not encoder.relative_bias.table.any()


def test_spread_outside_the_encoder() -> None:
    """Patch embedding and head start as torch's layers do: uniform within +-1/sqrt(fan in)."""
    student = build_student(small_config(width=96, head_layers=1))
    initialise_(student, 1)
    for parameter, fan_in in (
        (student.front_end.patches.weight, 3 * 8 * 8),
        (student.head.weight, 96),
        (student.head.bias, 96),
    ):
        bound = 1 / math.sqrt(fan_in)
        assert 0.9 * bound < parameter.abs().max().item() <= bound
        if parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=SPREAD)


def test_bert_differs_in_the_head_alone() -> None:
    """Normal 0.02 and zero biases there (spec 2.3)."""
    fairseq, bert = (values(build_student(small_config(width=96, head_layers=2, init=i))) for i in ("fairseq", "bert"))
    for name, value in bert.items():
        if not name.startswith("head."):
            assert torch.equal(value, fairseq[name]), name
        elif name.endswith("bias"):
            assert not value.any()
        else:
            assert value.std().item() == pytest.approx(0.02, rel=SPREAD)
            assert value.abs().max().item() > 3 * 0.02


def test_beit_cuts_every_matrix_and_token_at_one_deviation() -> None:
    """A normal of 0.02 cut at +-0.02 has deviation 0.02 sqrt(1 - 2 phi(1) / (2 Phi(1) - 1)); output weights are then
    divided by sqrt(2 l). tests/parity/test_published.py compares with the program's own values."""
    density, inside = math.exp(-0.5) / math.sqrt(2 * math.pi), math.erf(math.sqrt(0.5))
    spread = math.sqrt(1 - 2 * density / inside)
    for name, value in values(build_student(small_config(width=96, head_layers=1, init="beit"))).items():
        if name.endswith(("bias", "table")):
            assert not value.any(), name
        elif value.dim() > 1 or name.endswith("token"):
            number = name.split(".")[2] if ".blocks." in name else ""
            cut = 0.02 / math.sqrt(2 * (int(number) + 1)) if ".output." in name else 0.02
            assert 0.9 * cut < value.abs().max().item() <= cut, name
            many = value.numel() > 9000
            assert value.std().item() == pytest.approx(spread * cut, rel=SPREAD if many else 10 * SPREAD), name


def test_tokens_start_as_in_fairseq() -> None:
    """trunc_normal_(t, 0.02) passes 0.02 as the MEAN: std 1 cut at +-2 leaves 0.88 (spec 3.2)."""
    value = initial_value(1, "token", torch.Size([100_000]), truncated_normal(1.0, 0.02))
    assert value.std().item() == pytest.approx(0.88, rel=SPREAD)
    assert value.abs().max().item() <= 2
    tokens = build_student(small_config(width=960)).front_end
    initialise_(tokens, 1)
    assert tokens.mask_token.std().item() == pytest.approx(0.88, rel=5 * SPREAD)
    assert not torch.equal(tokens.mask_token, tokens.cls_token)


def test_deep_norm_starts_smaller() -> None:
    """Values, outputs and MLPs times (8 N)^(-1/4), query and key not (arXiv:2203.00555)."""
    plain, deep = (values(build_encoder(small_config(norm="post", deep_norm=d, depth=2)), 1) for d in (False, True))
    factor = 16**-0.25
    for number in range(2):
        block = f"blocks.{number}."
        for name in ("attention.output.weight", "mlp.input.weight", "mlp.output.weight"):
            torch.testing.assert_close(deep[block + name], plain[block + name] * factor)
        ours, theirs = (v[f"{block}attention.qkv.weight"].unflatten(0, (3, 3, -1)) for v in (deep, plain))
        assert torch.equal(ours[:, :2], theirs[:, :2])
        torch.testing.assert_close(ours[:, 2], theirs[:, 2] * factor)
