"""Which patches are hidden from the student: rectangular blocks (BEiT's generator; spec 3.3).

tests/unit/test_masking.py draws them once more, from the spec's words, and compares the distributions.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

ATTEMPTS = 10
"""Draws for one block before the mask is taken as it is (spec 3.3)."""

BoolGrid = npt.NDArray[np.bool_]


def mask_budget(ratio: float, positions: int) -> int:
    """Patches that a mask may hide at most: round(ratio x positions)."""
    return round(ratio * positions)


def block_mask(
    grid: int, budget: int, min_block: int, max_block: int | None, min_aspect: float, rng: np.random.Generator
) -> BoolGrid:
    """A (grid, grid) mask, True where hidden, of at most `budget` patches; fewer when no further block fits.

    `min_block`, `max_block`: smallest and largest area drawn for a block in patches, uniform between (None: no limit
    but the budget); `max_block` also bounds what one block newly hides. `min_aspect`: smallest height over width, its
    inverse the largest, log-uniform between. A pure function of its arguments and the state of `rng`. A budget above 0
    always hides something.
    """
    mask = np.zeros((grid, grid), dtype=np.bool_)
    largest = grid * grid if max_block is None else max_block
    count = 0
    while count < budget:
        added = _add_block(mask, min(budget - count, largest), min_block, min_aspect, rng)
        if not added:
            break
        count += added
    if budget > 0 and count == 0:
        # Tiny grids and budgets below the smallest block can refuse every draw, and a sample that hides nothing
        # would teach nothing: place one square that fits.
        side = max(1, min(grid - 1, math.isqrt(min(budget, largest))))
        top, left = _below(rng, grid - side + 1), _below(rng, grid - side + 1)
        mask[top : top + side, left : left + side] = True
    return mask


def _add_block(mask: BoolGrid, cap: int, min_block: int, min_aspect: float, rng: np.random.Generator) -> int:
    """Hide one more block with 1..cap new patches; returns how many are new, 0 when every attempt failed."""
    grid = mask.shape[0]
    log_aspect = math.log(min_aspect)
    for _ in range(ATTEMPTS):
        # With less room than min_block the range runs downwards, which is what the published generator does.
        area = min_block + (cap - min_block) * rng.random()
        aspect = math.exp(log_aspect * (1 - 2 * rng.random()))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:
            continue
        top, left = _below(rng, grid - height + 1), _below(rng, grid - width + 1)
        block = mask[top : top + height, left : left + width]
        new = block.size - int(np.count_nonzero(block))
        if 0 < new <= cap:
            block[:] = True
            return new
    return 0


def _below(rng: np.random.Generator, end: int) -> int:
    """A whole number in 0..end-1. Only `rng.random` is used here: its stream is the one numpy never changes."""
    return int(rng.random() * end)
