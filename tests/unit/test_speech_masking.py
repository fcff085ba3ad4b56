"""Span masks: against a drawing of the spec's words with numpy's own choice, and what must never happen."""

from __future__ import annotations

import numpy as np
import pytest

from megad2v.modalities.draws import generator, subset
from megad2v.modalities.speech.masking import BoolFrames, equal_counts, span_mask

DRAWS = 4000


def by_the_spec(frames: int, ratio: float, span: int, min_spans: int, rng: np.random.Generator) -> BoolFrames | None:
    """Spec 6.1, steps 1 to 3; None where it says ValueError."""
    num = max(min_spans, int(ratio * frames / span + rng.random()))
    len_min = span
    if frames - len_min <= num:
        len_min = frames - num - 1
    starts = rng.choice(frames - len_min, num, replace=False)
    hidden = {start + offset for start in starts.tolist() for offset in range(span)}
    mask = np.array([frame in hidden for frame in range(frames)])
    return None if mask.all() else mask


def ours(frames: int, ratio: float, span: int, min_spans: int = 1, draws: int = DRAWS) -> np.ndarray:
    return np.array([span_mask(frames, ratio, span, min_spans, generator("spans", i)) for i in range(draws)])


def theirs(frames: int, ratio: float, span: int, min_spans: int = 1, draws: int = DRAWS) -> np.ndarray:
    rng = np.random.default_rng(7)
    drawn = [by_the_spec(frames, ratio, span, min_spans, rng) for _ in range(draws)]
    return np.array([mask for mask in drawn if mask is not None])


def runs(masks: np.ndarray) -> np.ndarray:
    """Number of unbroken stretches of each mask."""
    return (np.diff(masks.astype(np.int8), axis=1, prepend=0) == 1).sum(axis=1)


@pytest.mark.parametrize(
    "frames,ratio,span",
    [(499, 0.65, 10), (99, 0.65, 10), (999, 0.4, 5), (24, 0.65, 10), (30, 0.9, 3), (13, 0.65, 10)],
)
def test_distribution_is_the_specs(frames: int, ratio: float, span: int) -> None:
    """Frequency of every frame, moments of the fraction and of the number of stretches, within 5 standard errors."""
    draws = DRAWS if frames < 200 else DRAWS // 2
    mine, spec = ours(frames, ratio, span, draws=draws), theirs(frames, ratio, span, draws=draws)
    assert len(spec) == draws, "nothing is taken back at these sizes"
    error = np.sqrt((mine.var(axis=0) + spec.var(axis=0)) / draws)
    assert (np.abs(mine.mean(axis=0) - spec.mean(axis=0)) <= 5 * error).all()
    for quantity in (lambda masks: masks.sum(axis=1), runs):
        one, other = quantity(mine).astype(float), quantity(spec).astype(float)
        middle = other.mean()
        for a, b in ((one, other), ((one - middle) ** 2, (other - middle) ** 2)):
            assert abs(a.mean() - b.mean()) <= 5 * np.sqrt((a.var() + b.var()) / draws) + 1e-12


def test_published_setting() -> None:
    """0.65, spans of 10, 10 s: about 49 % hidden, first frame 7 %, last frame never (spec 6.1 and 0)."""
    masks = ours(499, 0.65, 10, draws=DRAWS)
    assert masks.mean() == pytest.approx(0.49, abs=0.01)
    frequency = masks.mean(axis=0)
    assert frequency[0] == pytest.approx(0.066, abs=0.02)  # 32.4 starts of 489
    assert frequency[50:450].mean() == pytest.approx(0.49, abs=0.01)
    assert frequency[498] == 0
    assert 0 < frequency[497] < 0.11


def test_number_of_spans_is_rounded_at_random() -> None:
    """Spans of one frame are their starts: 0.65 x 33 = 21.45 of them."""
    counts = ours(33, 0.65, 1).sum(axis=1)
    assert set(counts) == {21, 22}
    assert (counts == 22).mean() == pytest.approx(0.45, abs=0.05)


def test_least_number_of_spans() -> None:
    assert set(ours(100, 0.01, 4, min_spans=3, draws=50).sum(axis=1) > 4) == {True}
    assert not ours(100, 0.001, 4, min_spans=0, draws=50).any(axis=1).all()


@pytest.mark.parametrize("span", [1, 3, 10, 50])
@pytest.mark.parametrize("ratio", [0.05, 0.65, 0.99])
def test_some_frame_is_always_visible(span: int, ratio: float) -> None:
    """Where the published program gives up: tiny T, ratios near 1, spans longer than the whole."""
    for frames in range(2, 40):
        masks = ours(frames, ratio, span, draws=20)
        assert masks.shape == (20, frames)
        assert not masks.all(axis=1).any() and masks.any(axis=1).all()


def test_where_the_program_gives_up_the_last_span_is_taken_back() -> None:
    """12 frames, spans of 10: two of the starts 0, 1, 2; 0 and 2 together hide everything."""
    taken_back = 0
    for i in range(400):
        mask, same = span_mask(12, 0.99, 10, 2, generator("twelve", i)), generator("twelve", i)
        assert int(0.99 * 12 / 10 + same.random()) in (1, 2)
        first, second = subset(3, 2, same).tolist()
        spans = [set(range(start, start + 10)) for start in (first, second)]
        if {first, second} == {0, 2}:
            taken_back += 1
            spans.pop()
        assert set(np.flatnonzero(mask)) == set().union(*spans)
    assert 80 < taken_back < 190, "a third"


def test_of_a_single_span_the_last_frame_is_taken_back() -> None:
    """10 frames, spans of 10: starts 0 (everything) or 1."""
    masks = {tuple(np.flatnonzero(span_mask(10, 0.65, 10, 1, generator("ten", i)))) for i in range(50)}
    assert masks == {tuple(range(9)), tuple(range(1, 10))}


def test_nothing_is_hidden_in_the_control() -> None:
    assert not span_mask(100, 0.0, 10, 1, generator("control")).any()


def test_subsets_are_equally_likely() -> None:
    """Ordered pairs of 5: 20, each 1 in 20."""
    drawn = [tuple(subset(5, 2, generator("pairs", i)).tolist()) for i in range(8000)]
    counts = np.array([drawn.count((a, b)) for a in range(5) for b in range(5) if a != b])
    assert counts.sum() == 8000
    assert ((counts - 400) ** 2 / 400).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_equal_counts_shows_random_frames_again() -> None:
    masks = list(ours(200, 0.65, 10, draws=6))
    counts = [int(mask.sum()) for mask in masks]
    least, fullest = min(counts), int(np.argmax(counts))
    shown = np.zeros(200)
    for i in range(300):
        trimmed = equal_counts(masks, [generator("trim", i, row) for row in range(6)])
        for mask, other in zip(masks, trimmed, strict=True):
            assert other.sum() == least
            assert not (other & ~mask).any()
        shown += masks[fullest] & ~trimmed[fullest]
    hidden, extra = masks[fullest], int(masks[fullest].sum()) - least
    expected = 300 * extra / hidden.sum()
    assert extra > 0 and abs(shown[hidden] - expected).max() < 6 * np.sqrt(expected)


def test_equal_counts_of_one_depends_on_its_own_generator() -> None:
    masks = list(ours(100, 0.65, 10, draws=3))
    first = equal_counts(masks, [generator(row) for row in range(3)])
    other = equal_counts(masks, [generator(row if row else "x") for row in range(3)])
    assert all((a == b).all() for a, b in zip(first[1:], other[1:], strict=True))
    assert (equal_counts(masks[:1], [generator(0)])[0] == masks[0]).all()
