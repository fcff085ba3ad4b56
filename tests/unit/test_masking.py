"""Block masks: budgets, sizes and aspects of blocks, coverage, purity."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

import numpy as np
import pytest

from megad2v.modalities.draws import generator
from megad2v.modalities.vision.masking import _add_block, block_mask, mask_budget


def draw(count: int, grid: int, budget: int, min_block: int, max_block: int | None = None) -> np.ndarray:
    return np.array([block_mask(grid, budget, min_block, max_block, 0.3, generator("mask", i)) for i in range(count)])


@pytest.mark.parametrize("budget,least", [(75, 70), (120, 110)])
def test_counts_at_224_pixels(budget: int, least: int) -> None:
    """The released recipes: 75 (fairseq) and 120 (BEiT fork) of 196, blocks of at least 16. Mostly at the budget."""
    counts = draw(300, 14, budget, 16).sum(axis=(1, 2))
    assert counts.max() == budget
    assert counts.min() >= least, Counter(counts.tolist())
    assert (counts >= budget - 2).mean() > 0.9
    assert len(set(counts.tolist())) > 1, "the count is an upper bound, not a constant"


def test_blocks_keep_area_and_aspect() -> None:
    """A first block: the drawn area is in 16..75 and the aspect in 0.3..3.3, up to rounding of its two sides."""
    areas, logs = [], []
    for i in range(400):
        mask = np.zeros((14, 14), dtype=bool)
        new = _add_block(mask, 75, 16, 0.3, generator("block", i))
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert new == mask.sum() == height * width, "a block is a full rectangle"
        assert height < 14
        assert width < 14
        assert (height - 0.5) / (width + 0.5) < 1 / 0.3
        assert (height + 0.5) / (width - 0.5) > 0.3
        areas.append(height * width)
        logs.append(np.log(height / width))
    assert 12 <= min(areas) < 22
    assert 68 < max(areas) <= 75, "a block with more new cells than there is room for is refused"
    assert abs(np.mean(logs)) < 0.1, "lying and standing blocks are equally likely"


def test_every_patch_can_be_hidden_and_shown() -> None:
    often = draw(600, 14, 75, 16).mean(axis=0)
    assert often.min() > 0.02, "corners too"
    assert often.max() < 0.75
    assert often[5:9, 5:9].mean() > often[0].mean(), "blocks lie within the grid, so the middle is hidden more often"
    # No direction is preferred: the average mask looks the same after turning and mirroring.
    for turned in (often[::-1], often[:, ::-1], often.T):
        assert np.abs(often - turned).mean() < 0.05


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("min_block", [1, 4, 16])
@pytest.mark.parametrize("max_block", [None, 16])
def test_never_empty_and_never_over_budget(grid: int, min_block: int, max_block: int | None) -> None:
    for budget in range(1, grid * grid + 1):
        counts = draw(8, grid, budget, min_block, max_block).sum(axis=(1, 2))
        assert counts.min() >= 1
        assert counts.max() <= budget


def test_no_budget_hides_nothing() -> None:
    assert not draw(3, 8, 0, 4).any()


def test_largest_block_is_respected() -> None:
    for i in range(50):
        mask = np.zeros((14, 14), dtype=bool)
        largest = 9
        while not mask.any():
            _add_block(mask, largest, 4, 0.3, generator("largest", i))
        assert mask.sum() <= largest


def test_pure_in_its_generator() -> None:
    assert (draw(5, 14, 75, 16) == draw(5, 14, 75, 16)).all()
    assert len({mask.tobytes() for mask in draw(50, 8, 32, 4)}) == 50


def test_masks_never_change() -> None:
    """A resumed run must draw the masks that the uninterrupted one would have drawn, also in a later version."""
    assert sha256(draw(20, 14, 75, 16).tobytes()).hexdigest()[:16] == "44a5b777e1e8089f"


def test_budget_rounds() -> None:
    assert [mask_budget(ratio, 196) for ratio in (0, 0.3827, 0.6122, 1)] == [0, 75, 120, 196]
