"""Blocks, encoder and layers against a few independent lines in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megad2v.models.attention import RelativePositionBias, outside_context, relative_index
from megad2v.models.block import Block, NormSpec, drop_path
from megad2v.models.encoder import Encoder, PartSpec, StackSpec
from megad2v.models.initialise import zeros
from megad2v.models.layers import ColumnLinear, QKVLinear, RowLinear, VanillaLayers
from tests.checkpoints import perturb_
from tests.unit.model_helpers import close

WIDTH, HEADS, TOKENS = 12, 3, 5
SHAPE = {"width": WIDTH, "heads": HEADS}
EPS = 1e-3  # large, so that leaving it out would show


def block(norm: str = "pre", *, layer_scale: float | None = None, **changes: Any) -> Block:
    arguments: dict[str, Any] = {"hidden": 20, "norms": NormSpec(norm, EPS, layer_scale), "qkv_bias": "full"}
    arguments |= {"dropout": 0.0, "attention_dropout": 0.0, "weight": zeros, "output_weight": zeros, "drop_path": 0.0}
    return perturb_(Block(VanillaLayers(), **SHAPE, **{**arguments, **changes}), 3).double()


def encoder_of(
    depth: int,
    norm: str,
    *,
    layer_scale: float | None = None,
    grid: int | None = None,
    positions: nn.Module | None = None,
    **stack: Any,
) -> Encoder:
    part = PartSpec(NormSpec(norm, EPS, layer_scale), grid, positions)
    return Encoder(StackSpec(**SHAPE, depth=depth, mlp_ratio=2, pre_norm=norm == "pre", **stack), part)


def tokens(batch: int = 2, count: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randn(batch, count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- The formulas (spec 1.4, 3.2), read from the weights' documented layout and written without torch's modules.


def norm_formula(x: Tensor, layer: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + EPS).sqrt() * layer.weight + layer.bias


def attention_formula(x: Tensor, attention: Any, bias: Tensor | None) -> Tensor:
    dim = WIDTH // HEADS
    weight = attention.qkv.weight.view(HEADS, 3, dim, WIDTH)
    q, k, v = torch.einsum("btd,hced->cbhte", x, weight)
    if attention.qkv.bias is not None:
        biases = attention.qkv.bias.view(HEADS, -1, 1, dim)
        q, v = q + biases[:, 0], v + biases[:, -1]
        if biases.shape[1] == 3:
            k = k + biases[:, 1]
    logits = torch.einsum("bhie,bhje->bhij", q, k) / math.sqrt(dim)
    weights = (logits if bias is None else logits + bias).exp()
    context = torch.einsum("bhij,bhje->bihe", weights / weights.sum(-1, keepdim=True), v).flatten(2)
    return context @ attention.output.weight + attention.output.bias


def mlp_formula(x: Tensor, mlp: Any) -> Tensor:
    hidden = x @ mlp.input.weight.T + mlp.input.bias
    return (0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))) @ mlp.output.weight + mlp.output.bias


def block_formula(x: Tensor, one: Block, bias: Tensor | None, *, pre: bool, residual: float = 1.0) -> dict[str, Tensor]:
    first, second = (getattr(scale, "gamma", 1.0) for scale in (one.attention_scale, one.mlp_scale))
    if pre:
        attention = first * attention_formula(norm_formula(x, one.attention_norm), one.attention, bias)
        x = x + attention
        branch = second * mlp_formula(norm_formula(x, one.mlp_norm), one.mlp)
        return {"attention": attention, "ffn": branch, "ffn_residual": x + branch, "block": x + branch}
    attention = first * attention_formula(x, one.attention, bias)
    x = norm_formula(residual * x + attention, one.attention_norm)
    branch = second * mlp_formula(x, one.mlp)
    total = residual * x + branch
    return {
        "attention": attention, "ffn": branch, "ffn_residual": total, "block": norm_formula(total, one.mlp_norm)
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("qkv_bias", ["full", "no_key", "none"])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_block(norm: str, qkv_bias: str, layer_scale: float | None, biased: bool) -> None:
    one = block(norm, qkv_bias=qkv_bias, layer_scale=layer_scale)
    bias = torch.randn(1, HEADS, TOKENS, TOKENS, dtype=torch.float64) if biased else None
    truth = block_formula(tokens(), one, bias, pre=norm == "pre")
    for tensor, expected in truth.items():
        output, ours = one(tokens(), bias, tensor)
        assert close(output, truth["block"])
        assert close(ours, expected), tensor


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_encoder_chains_its_blocks(norm: str) -> None:
    """The relative bias in every block; the affine norm last (pre-norm) or first (post-norm); layers kept bottom up."""
    encoder = perturb_(encoder_of(3, norm, layer_scale=0.5, grid=2), 3).double()
    bias = encoder.relative_bias.table[:, relative_index_by_counting(2)][None]
    x = tokens() if norm == "pre" else norm_formula(tokens(), encoder.norm)
    kept: dict[str, list[Tensor]] = {"attention": [], "ffn": [], "ffn_residual": [], "block": []}
    for one in encoder.blocks:
        made = block_formula(x, one, bias, pre=norm == "pre")
        x = made["block"]
        for tensor, value in made.items():
            kept[tensor].append(value)
    truth = norm_formula(x, encoder.norm) if norm == "pre" else x
    for tensor, expected in kept.items():
        for last in range(4):
            output, ours = encoder(tokens(), last=last, tensor=tensor)
            assert close(output, truth)
            assert len(ours) == last
            assert all(close(a, b) for a, b in zip(ours, expected[3 - last :], strict=True))


def test_deep_norm_scales_the_residual_stream() -> None:
    """x = LN((2 N)^(1/4) x + branch) in every block of N (arXiv:2203.00555)."""
    encoder = perturb_(encoder_of(3, "post", deep_norm=True), 3).double()
    x = norm_formula(tokens(), encoder.norm)
    for one in encoder.blocks:
        x = block_formula(x, one, None, pre=False, residual=6**0.25)["block"]
    assert close(encoder(tokens())[0], x)


def test_positions_are_added_first_to_frames_without_what_is_padding() -> None:
    positions = torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=1).double()

    class Positions(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return positions(x.transpose(1, 2)).transpose(1, 2)

    encoder = perturb_(encoder_of(2, "post", positions=Positions()), 3).double()
    without = perturb_(encoder_of(2, "post"), 3).double()
    x = tokens()
    assert close(encoder(x)[0], without(x + Positions()(x))[0])
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert close(encoder(x, padding)[0][1, :3], encoder(x[1:, :3])[0][0])


@pytest.mark.parametrize("grid", [None, 3])
def test_context_of_the_teacher(grid: int | None) -> None:
    """A position's output depends on the positions in its context, and on no others; prefix tokens on all."""
    count, prefix = 9, 1
    hidden = outside_context(count, 1 / 3, grid=grid, prefix=prefix, device=torch.device("cpu"))
    nearest = {4: {3, 4, 5}, 0: {0, 1, 2}, 8: {6, 7, 8}} if grid is None else {4: {4, 0, 1}, 0: {0, 1, 3}, 8: {8, 4, 5}}
    for position, seen in nearest.items():
        row = hidden[prefix + position]
        assert set((~row[prefix:]).nonzero().flatten().tolist()) == seen
        assert row[:prefix].all()
    assert not hidden[0].any()
    encoder = perturb_(encoder_of(1, "pre"), 3).double()
    x, other = tokens(1, 10), tokens(1, 10, seed=2)
    mixed = x.clone()
    mixed[:, prefix + 8] = other[:, prefix + 8]
    ours, again = (encoder(value, hidden_tt=hidden)[0] for value in (x, mixed))
    blind = hidden[:, prefix + 8]
    assert torch.equal(ours[:, blind], again[:, blind])
    assert not torch.equal(ours[:, ~blind], again[:, ~blind])


@pytest.mark.parametrize(("positions", "grid"), [(49, 7), (50, None)])
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.75, 0.99, 1.0])
def test_every_position_has_as_much_context(positions: int, grid: int | None, fraction: float) -> None:
    hidden = outside_context(positions, fraction, grid=grid, prefix=0, device=torch.device("cpu"))
    assert set((~hidden).sum(1).tolist()) == {max(1, round(fraction * positions))}
    assert not hidden.diagonal().any()


# --- What is random


def test_dropout_behind_the_norm_of_post_norm_encoders() -> None:
    """What enters the first block is dropped too (spec 1.4, 2.3); pre-norm models have no such place."""
    for norm, dropped in (("post", True), ("pre", False)):
        encoder = encoder_of(0, norm, dropout=0.5).double().train()
        torch.nn.init.ones_(encoder.norm.weight)
        torch.nn.init.zeros_(encoder.norm.bias)
        assert bool((encoder(tokens(4))[0] == 0).any()) == dropped
        assert not (encoder.eval()(tokens(4))[0] == 0).any()


def test_drop_path_drops_samples_and_keeps_the_mean() -> None:
    rate, count = 0.3, 4000
    torch.manual_seed(0)
    x = torch.ones(count, 3, 2)
    dropped = drop_path(x, rate, True)
    kept = dropped[:, 0, 0] != 0
    assert torch.equal(dropped, kept.view(-1, 1, 1) / x.new_tensor(1 - rate) * x), "whole samples, the others scaled up"
    five_sigma = 5 * math.sqrt(rate * (1 - rate) / count)
    assert abs(float(kept.float().mean()) - (1 - rate)) < five_sigma
    assert torch.equal(drop_path(x, rate, False), x)


def test_drop_path_grows_with_depth() -> None:
    encoder = encoder_of(5, "pre", drop_path=0.4)
    assert [one.drop_path for one in encoder.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert encoder_of(1, "pre", drop_path=0.4).blocks[0].drop_path == 0.0


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("which", ["dropout", "attention_dropout", "drop_path"])
def test_dropout_only_while_training(norm: str, which: str) -> None:
    plain, random = block(norm), block(norm, **{which: 0.5})
    expected = plain(tokens(), None)[0]
    assert torch.equal(random(tokens(), None)[0], expected)
    random.train()
    assert not torch.equal(random(tokens(), None)[0], expected)


@pytest.mark.parametrize(("norm", "dropped"), [("pre", True), ("post", False)])
def test_where_the_ffn_target_is_taken(norm: str, dropped: bool) -> None:
    """Vision (pre) after dropout and drop path, speech and text (post) before: sources differ (spec 1.4, 3.2)."""
    branch = block(norm, dropout=0.5).train()(tokens(8), None, "ffn")[1]
    assert bool((branch == 0).any()) == dropped


# --- Padding


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_padded_keys_do_not_matter(norm: str) -> None:
    encoder = perturb_(encoder_of(2, norm), 3).double()
    x, other = tokens(), tokens(seed=2)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    mixed = torch.where(padding[..., None], other, x)
    (ours, layers), (again, layers_again) = (encoder(v, padding, last=2) for v in (x, mixed))
    assert not torch.equal(x, mixed)
    for first, second in zip([ours, *layers], [again, *layers_again], strict=True):
        assert close(first[~padding], second[~padding])
    alone, _ = encoder(x[1:, :3])
    assert close(ours[1:, :3], alone), "as if the sequence had been shorter"
    assert not close(ours[1:, :3], encoder(x)[0][1:, :3], 1e-3), "without the mask they would matter"


# --- Layers, as tensor parallelism will cut them: every slice one contiguous range of the flattened weight


def piece(full: Tensor, rank: int, ranks: int) -> Tensor:
    return full.flatten().chunk(ranks)[rank]


def fill(layer: nn.Module, **values: Tensor) -> nn.Module:
    """Set parameters from flat ranges, as a loader would."""
    layer.double()
    for name, value in values.items():
        parameter = getattr(layer, name)
        parameter.data = value.view(parameter.shape)
    return layer


def wide(kind: Any, *shape: int, **words: Any) -> Any:
    return perturb_(kind(*shape, weight=zeros, **words), 4).double()


@pytest.mark.parametrize("ranks", [2, 3])
def test_column_slice_is_contiguous(ranks: int) -> None:
    full = wide(ColumnLinear, WIDTH, 18, bias=zeros)
    assert close(full(tokens()), torch.einsum("btd,ed->bte", tokens(), full.weight) + full.bias)
    outputs = []
    for rank in range(ranks):
        part = ColumnLinear(WIDTH, 18 // ranks, weight=zeros, bias=zeros)
        fill(part, weight=piece(full.weight, rank, ranks), bias=piece(full.bias, rank, ranks))
        outputs.append(part(tokens()))
    assert close(torch.cat(outputs, dim=-1), full(tokens()))


@pytest.mark.parametrize("ranks", [2, 3])
def test_row_slice_is_contiguous(ranks: int) -> None:
    full = wide(RowLinear, WIDTH, 7, bias=zeros)
    assert close(full(tokens()), torch.einsum("btd,de->bte", tokens(), full.weight) + full.bias)
    total = full.bias
    for rank, x in enumerate(tokens().chunk(ranks, dim=-1)):
        part = fill(RowLinear(WIDTH // ranks, 7, weight=zeros, bias=None), weight=piece(full.weight, rank, ranks))
        total = total + part(x)
    assert close(total, full(tokens()))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("bias", ["full", "no_key", "none"])
def test_qkv_slice_is_contiguous(ranks: int, bias: str) -> None:
    full = wide(QKVLinear, WIDTH, 6, WIDTH // 6, bias=bias)
    expected = full(tokens())
    assert expected[0].shape == (2, 6, TOKENS, 2)
    parts = []
    for rank in range(ranks):
        # A rank's layer has fewer heads of the same size: width 12 in, 12 / ranks out of each of q, k and v.
        part = QKVLinear(WIDTH, 6 // ranks, WIDTH // 6, bias=bias, weight=zeros)
        fill(part, **{name: piece(p, rank, ranks) for name, p in full.named_parameters()})
        parts.append(part(tokens()))
    for ours, theirs in zip(zip(*parts, strict=True), expected, strict=True):
        assert close(torch.cat(ours, dim=1), theirs)


def test_relative_bias_slice_is_contiguous() -> None:
    full = perturb_(RelativePositionBias(VanillaLayers(), 3, 6), 5)
    for rank in range(3):
        part = RelativePositionBias(VanillaLayers(), 3, 2)
        part.table.data = piece(full.table, rank, 3).view(part.table.shape)
        assert torch.equal(part(), full()[:, 2 * rank : 2 * rank + 2])


def relative_index_by_counting(grid: int) -> Tensor:
    """Number the offsets (down, right) in reading order, then look up every pair."""
    span = range(1 - grid, grid)
    number = {offset: n for n, offset in enumerate((down, right) for down in span for right in span)}
    places = [(y, x) for y in range(grid) for x in range(grid)]
    to_patch, to_cls, both = len(number), len(number) + 1, len(number) + 2
    rows = [[both] + [to_patch] * len(places)]
    rows += [[to_cls] + [number[a[0] - b[0], a[1] - b[1]] for b in places] for a in places]
    return torch.tensor(rows)


@pytest.mark.parametrize("grid", [1, 2, 3, 8])
def test_relative_index(grid: int) -> None:
    index = relative_index(grid)
    assert torch.equal(index, relative_index_by_counting(grid))
    assert sorted(set(index.flatten().tolist())) == list(range((2 * grid - 1) ** 2 + 3)), "every entry has a use"
