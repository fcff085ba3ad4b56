"""Multi-head self-attention and the relative position bias that vision adds to its logits."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megad2v.models.initialise import Initialiser, zeros
from megad2v.models.layers import Layers


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_dim) + bias) v, projected back to D. torch's SDPA picks the kernel."""

    def __init__(
        self,
        layers: Layers,
        width: int,
        heads: int,
        *,
        qkv_bias: str,
        dropout: float,
        weight: Initialiser,
        output_weight: Initialiser,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.draws = layers.head_draws if dropout else nullcontext
        self.qkv = layers.qkv(width, heads, bias=qkv_bias, weight=weight)
        self.output = layers.row(width, width, weight=output_weight, bias=zeros)

    def forward(self, x_btd: Tensor, bias: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D); `bias` is added to the logits, broadcastable to (B, heads, T, T)."""
        q, k, v = self.qkv(x_btd)
        dropout = self.dropout if self.training else 0.0
        with self.draws():
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.output(context.transpose(1, 2).flatten(2))


def relative_index(grid: int) -> Tensor:
    """Which of the (2 grid - 1)^2 + 3 table entries biases each pair of [CLS, patches] (spec 3.2; BEiT).

    Returns int64 (1 + grid^2, 1 + grid^2). Patch i attending to j reads (dy + grid - 1)(2 grid - 1) + dx + grid - 1
    with d = pos_i - pos_j; the last three entries serve CLS -> patch, patch -> CLS, CLS -> CLS.
    """
    span = 2 * grid - 1
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    y, x = y.flatten(), x.flatten()
    patches = (y[:, None] - y[None] + grid - 1) * span + (x[:, None] - x[None] + grid - 1)
    index = torch.empty(1 + grid * grid, 1 + grid * grid, dtype=torch.int64)
    index[1:, 1:] = patches
    index[0, :] = span * span
    index[:, 0] = span * span + 1
    index[0, 0] = span * span + 2
    return index


@lru_cache(maxsize=16)
def outside_context(positions: int, fraction: float, *, grid: int | None, prefix: int, device: torch.device) -> Tensor:
    """Which of the others a position may not attend to when its context is the nearest `fraction` of the input.

    Returns bool (T, T), T = prefix + positions, True where row i may not see column j. Every position sees
    max(1, round(fraction x positions)), itself among them: the nearest ones of a sequence, or of a grid (the larger of
    the two offsets counts); of equally near ones those that come first. Prefix tokens see everything and are seen by
    none but themselves, since one of them would carry the whole input to all in two blocks.
    """
    index = torch.arange(positions)
    if grid is None:
        distance = (index[:, None] - index[None]).abs()
    else:
        rows, columns = index // grid, index % grid
        distance = torch.maximum((rows[:, None] - rows[None]).abs(), (columns[:, None] - columns[None]).abs())
    count = max(1, round(fraction * positions))
    order = distance * positions + index  # the index decides between equals
    nearest = order.topk(count, dim=1, largest=False).indices
    seen = torch.zeros(positions, positions, dtype=torch.bool).scatter_(1, nearest, True)
    hidden = torch.zeros(prefix + positions, prefix + positions, dtype=torch.bool)
    hidden[prefix:, prefix:] = ~seen
    hidden[prefix:, :prefix] = True
    return hidden.to(device)


class RelativePositionBias(nn.Module):
    """A learned bias per head and relative offset on a square grid of patches with one CLS token in front.

    The table is (heads, entries), heads first, so that a tensor-parallel rank's heads are contiguous.
    """

    def __init__(self, layers: Layers, grid: int, heads: int) -> None:
        super().__init__()
        entries = (2 * grid - 1) ** 2 + 3
        self.table = layers.head_table(heads, entries)
        self.initialisers = {"table": zeros}
        self.register_buffer("index", relative_index(grid), persistent=False)

    def forward(self) -> Tensor:
        """-> (1, heads, T, T) with T = 1 + grid^2."""
        return self.table[:, self.index].unsqueeze(0)
