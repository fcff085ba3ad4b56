"""Block masks: budgets, sizes and aspects of blocks, coverage, purity, and all of it against the spec's words."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.stats import chi2_contingency, norm

from megad2v.config.modalities import MaskConfig, VisionConfig
from megad2v.modalities.draws import generator
from megad2v.modalities.vision import masking
from megad2v.modalities.vision.masking import _add_block, block_mask, mask_budget
from megad2v.modalities.vision.transforms import VisionTransform
from tests.unit.data_helpers import config, jpeg


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


# --- against the words of spec 3.3, done once more with Python's generator and sets of cells

SIGNIFICANCE = 1e-3
"""Of each comparison. Seeds are fixed, so a comparison that passes once passes for ever; a generator that differs in
any rule is refused far below this (test_comparisons_notice_a_changed_rule)."""

DRAWS = 2000

Cells = frozenset[tuple[int, int]]


class Placed(NamedTuple):
    """One block: its rectangle, and how many cells it hid that were not hidden before."""

    height: int
    width: int
    top: int
    left: int
    new: int


def spec_mask(
    rng: random.Random,
    side: int,
    budget: int,
    smallest: int,
    largest: int,
    *,
    attempts: int = 10,
    strict: bool = True,
    log_uniform: bool = True,
    capped: bool = True,
) -> tuple[Cells, list[Placed]]:
    """Spec 3.3. The switches break one rule each, to see that the comparisons below notice."""
    hidden: Cells = frozenset()
    blocks: list[Placed] = []
    while len(hidden) < budget:
        room = min(budget - len(hidden), largest)
        for _ in range(attempts):
            area = rng.uniform(smallest, room)
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3))) if log_uniform else rng.uniform(0.3, 1 / 0.3)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if max(height, width) > side - strict:
                continue
            top, left = rng.randint(0, side - height), rng.randint(0, side - width)
            block = {(row, column) for row in range(top, top + height) for column in range(left, left + width)}
            new = block - hidden
            if new and (len(new) <= room or not capped):
                hidden |= new
                blocks.append(Placed(height, width, top, left, len(new)))
                break
        else:
            break
    return hidden, blocks


class Statistics(NamedTuple):
    """What is compared, of many masks."""

    counts: Counter[int]
    """Hidden cells of a mask."""
    blocks: Counter[int]
    """Blocks of a mask."""
    shapes: Counter[tuple[int, int]]
    """Height and width of the first block: its area and aspect at once."""
    places: Counter[tuple[int, int]]
    """Top and left of the first block."""
    new: Counter[int]
    """Cells newly hidden by the second block."""
    often: np.ndarray
    """(side, side): fraction of the masks that hide the cell."""


NONE = Placed(0, 0, 0, 0, 0)


def statistics(masks: list[np.ndarray], blocks: list[list[Placed]]) -> Statistics:
    firsts, seconds = ([placed[n] if len(placed) > n else NONE for placed in blocks] for n in (0, 1))
    return Statistics(
        Counter(int(mask.sum()) for mask in masks),
        Counter(len(placed) for placed in blocks),
        Counter((first.height, first.width) for first in firsts),
        Counter((first.top, first.left) for first in firsts),
        Counter(second.new for second in seconds),
        np.mean(masks, axis=0),
    )


@cache
def spec_statistics(seed: int, side: int, budget: int, largest: int, **changes: Any) -> Statistics:
    masks, blocks = [], []
    for number in range(DRAWS):
        hidden, placed = spec_mask(random.Random(f"{seed}/{number}"), side, budget, 16, largest, **changes)
        mask = np.zeros((side, side))
        for cell in hidden:
            mask[cell] = 1
        masks.append(mask)
        blocks.append(placed)
    return statistics(masks, blocks)


def our_statistics(monkeypatch: pytest.MonkeyPatch, side: int, budget: int, largest: int | None) -> Statistics:
    """Of block_mask, with a spy on the blocks that it places; the first block's rectangle is what it hid."""
    placed: list[Placed] = []

    def spy(mask: np.ndarray, *arguments: Any) -> int:
        before = mask.copy()
        new = _add_block(mask, *arguments)
        if new:
            rows, columns = (mask & ~before).nonzero()
            assert len(rows) == new
            placed.append(Placed(np.ptp(rows) + 1, np.ptp(columns) + 1, rows.min(), columns.min(), new))
        return new

    monkeypatch.setattr(masking, "_add_block", spy)
    masks, blocks = [], []
    for number in range(DRAWS):
        placed.clear()
        masks.append(block_mask(side, budget, 16, largest, 0.3, generator("against the spec", number)))
        blocks.append(list(placed))
    return statistics(masks, blocks)


def same_distribution(one: Counter[Any], other: Counter[Any]) -> float:
    """The chi-square test's p-value of two samples; values seen fewer than 20 times in both together are one class."""
    common = [value for value, count in (one + other).items() if count >= 20]
    rows = [[counter[value] for value in common] for counter in (one, other)]
    table = np.array([[*row, counter.total() - sum(row)] for row, counter in zip(rows, (one, other))])
    table = table[:, table.sum(axis=0) > 0]
    return float(chi2_contingency(table).pvalue) if table.shape[1] > 1 else 1.0


def p_values(one: Statistics, other: Statistics) -> dict[str, float]:
    """Of every comparison; the cells' frequencies by their largest z, corrected for their number (Bonferroni)."""
    values = {
        name: same_distribution(getattr(one, name), getattr(other, name))
        for name in ("counts", "blocks", "shapes", "places", "new")
    }
    both = (one.often + other.often) / 2
    z = np.abs(one.often - other.often) / np.sqrt(2 * both * (1 - both) / DRAWS)
    return {**values, "often": min(1.0, 2 * float(norm.sf(z.max())) * z.size)}


@pytest.mark.parametrize(
    ("side", "budget", "largest"),
    [(14, 75, 196), (14, 120, 196), (14, 120, 40), (16, 157, 256), (16, 98, None)],
    ids=["fairseq", "published", "max_block", "patch14", "patch14-null"],
)
def test_distribution_is_the_spec_s(monkeypatch: pytest.MonkeyPatch, side: int, budget: int, largest: int) -> None:
    """Counts, blocks, areas and aspects, places, and each cell's frequency. Null is a largest block of all patches."""
    ours = our_statistics(monkeypatch, side, budget, largest)
    spec = spec_statistics(1, side, budget, largest or side**2)
    found = p_values(ours, spec)
    assert min(found.values()) > SIGNIFICANCE, found
    # Spec 3.3 saw 73..75 and 118..120 in a few draws. In many the tail is longer, ours and the spec's alike.
    if largest == 196:
        for counts in (ours.counts, spec.counts):
            assert sum(counts[budget - short] for short in range(3)) > 0.93 * DRAWS
            assert max(counts) == budget


@pytest.mark.parametrize(
    ("change", "noticed_by"),
    [
        ({"strict": False}, "shapes"),
        ({"log_uniform": False}, "shapes"),
        ({"attempts": 3}, "counts"),
        ({"capped": False}, "counts"),
    ],
)
def test_comparisons_notice_a_changed_rule(change: dict[str, Any], noticed_by: str) -> None:
    """The comparisons above can fail: two runs of the spec agree, and one with another rule does not."""
    spec = spec_statistics(1, 14, 120, 196)
    assert min(p_values(spec_statistics(2, 14, 120, 196), spec).values()) > SIGNIFICANCE
    assert p_values(spec_statistics(2, 14, 120, 196, **change), spec)[noticed_by] < 1e-6


def test_no_block_spans_the_grid() -> None:
    """Strictly smaller than the grid in both directions (spec 3.3), however large the area; one less does occur."""
    sides = Counter()
    for number in range(400):
        mask = np.zeros((6, 6), dtype=bool)
        if _add_block(mask, 36, 16, 0.3, generator("strict", number)):
            sides.update((int(mask.any(axis=1).sum()), int(mask.any(axis=0).sum())))
    assert max(sides) == 5
    assert sides[5] > 100


def test_other_grids_reach_the_worker() -> None:
    """Patches of 14 in 224 pixels: 16 x 16, the published fraction of them hidden."""
    settings = replace(
        config(None), vision=VisionConfig(image_size=224, patch_size=14), mask=MaskConfig(ratio=120 / 196, min_block=16)
    )
    counts = [int(VisionTransform(settings, "train")(jpeg(1), str(i), 0).mask_mt.sum()) for i in range(8)]
    assert VisionTransform(settings, "train")(jpeg(1), "id", 0).mask_mt.shape == (1, 256)
    assert max(counts) == 157
    assert min(counts) >= 153
