"""Masks of text: against a drawing of the spec's words with Python's own generator, and BERT's split."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.stats import binomtest, chi2_contingency, chisquare, norm

from megad2v.modalities.draws import generator
from megad2v.modalities.text.masking import span_mask, student_view

SIGNIFICANCE = 1e-3
"""Of each comparison; seeds are fixed, so what passes once passes for ever."""
DRAWS = 4000


class Statistics(NamedTuple):
    """What is compared, of many masks."""

    counts: Counter[int]
    """Positions chosen in a mask."""
    runs: Counter[int]
    """Unbroken stretches of a mask."""
    often: np.ndarray
    """(tokens,): fraction of the masks that choose the position."""
    neighbours: np.ndarray
    """(tokens - 1,): fraction of the masks that choose a position and the next."""


def statistics(masks: np.ndarray) -> Statistics:
    edges = np.diff(masks.astype(np.int8), axis=1, prepend=0) == 1
    return Statistics(
        Counter(masks.sum(axis=1).tolist()),
        Counter(edges.sum(axis=1).tolist()),
        masks.mean(axis=0),
        (masks[:, 1:] & masks[:, :-1]).mean(axis=0),
    )


def by_the_spec(
    size: int,
    ratio: float,
    span: int,
    rng: random.Random,
    *,
    rounded: bool = True,
    replacing: bool = False,
    specials: bool = True,
    room: bool = False,
) -> np.ndarray:
    """Spec 2.2, with lists. The switches break one rule each, to see that the comparisons below notice."""
    number = int(ratio * size / span + (rng.random() if rounded else 0.5))
    places = range(0 if specials else 1, size - (span - 1 if room else 0))
    starts = rng.choices(places, k=number) if replacing else rng.sample(places, number)
    mask = np.zeros(size, dtype=bool)
    for start in starts:
        mask[start : start + span] = True
    return mask


@cache
def spec_statistics(seed: int, size: int, ratio: float, span: int, **changes: Any) -> Statistics:
    rng = random.Random(seed)
    return statistics(np.array([by_the_spec(size, ratio, span, rng, **changes) for _ in range(DRAWS)]))


def ours(size: int, ratio: float, span: int, draws: int = DRAWS) -> np.ndarray:
    return np.array([span_mask(size, ratio, span, generator("text", i)) for i in range(draws)])


def same_counts(one: Counter[int], other: Counter[int]) -> float:
    """p-value that both come from one distribution; rare values are pooled."""
    total = one + other
    frequent = [value for value, count in total.items() if count >= 40]
    table = np.array([[found[value] for value in frequent] for found in (one, other)])
    rest = np.array([[sum(found.values())] for found in (one, other)]) - table.sum(axis=1, keepdims=True)
    table = np.concatenate([table, rest], axis=1) if rest.sum() >= 40 else table
    return float(chi2_contingency(table).pvalue) if table.shape[1] > 1 else 1.0


def same_rates(one: np.ndarray, other: np.ndarray) -> float:
    """p-value of the largest difference of two sets of frequencies, corrected for how many there are."""
    both = (one + other) / 2
    deviation = np.sqrt(2 * both * (1 - both) / DRAWS)
    z = np.abs(one - other)[deviation > 0] / deviation[deviation > 0]
    return float(min(1.0, 2 * norm.sf(z.max()) * len(z))) if len(z) else 1.0


def p_values(one: Statistics, other: Statistics) -> dict[str, float]:
    return {
        "counts": same_counts(one.counts, other.counts),
        "runs": same_counts(one.runs, other.runs),
        "often": same_rates(one.often, other.often),
        "neighbours": same_rates(one.neighbours, other.neighbours),
    }


@pytest.mark.parametrize(
    "size,ratio,span", [(512, 0.35, 4), (128, 0.35, 4), (37, 0.35, 4), (9, 0.35, 4), (128, 0.15, 1), (20, 0.9, 7)]
)
def test_distribution_is_the_spec_s(size: int, ratio: float, span: int) -> None:
    found = p_values(statistics(ours(size, ratio, span)), spec_statistics(1, size, ratio, span))
    assert min(found.values()) > SIGNIFICANCE, found


@pytest.mark.parametrize(
    "change,noticed_by",
    [
        ({"rounded": False}, "counts"),
        ({"replacing": True}, "counts"),
        ({"specials": False}, "often"),
        ({"room": True}, "often"),
    ],
)
def test_comparisons_notice_a_changed_rule(change: dict[str, Any], noticed_by: str) -> None:
    spec = spec_statistics(1, 37, 0.35, 4)
    assert min(p_values(spec_statistics(2, 37, 0.35, 4), spec).values()) > SIGNIFICANCE
    assert p_values(spec_statistics(2, 37, 0.35, 4, **change), spec)[noticed_by] < 1e-6


def test_published_setting() -> None:
    """0.35 in spans of 4, rows of 512: 30.8 % chosen, the first token 7 to 9 % (spec 2.2)."""
    often = ours(512, 0.35, 4).mean(axis=0)
    assert often.mean() == pytest.approx(0.308, abs=0.002)
    assert 0.07 < often[0] < 0.10 and often[0] < often[1] < often[2] < often[3]
    assert often[511] == pytest.approx(0.308, abs=0.03), "`</s>` is chosen like any other token"


def test_number_of_spans_is_rounded_at_random() -> None:
    """Spans of one token are their starts: 0.15 x 33 = 4.95 of them."""
    counts = Counter(ours(33, 0.15, 1).sum(axis=1).tolist())
    assert set(counts) == {4, 5} and binomtest(counts[5], DRAWS, 0.95).pvalue > SIGNIFICANCE


def test_short_rows() -> None:
    """`<s>` and a token: 0.175 spans, so often none."""
    masks = ours(2, 0.35, 4)
    assert binomtest(int(masks.any(axis=1).sum()), DRAWS, 0.175).pvalue > SIGNIFICANCE
    assert ours(1, 0.99, 1, 50).shape == (50, 1)


def test_nothing_is_hidden_in_the_control() -> None:
    assert not ours(100, 0.0, 4, 50).any()


def test_masks_never_change() -> None:
    """A resumed run must draw the masks that the uninterrupted one would have drawn, also in a later version."""
    ids = np.arange(100, 200)
    views = [student_view(ids, ours(100, 0.3, 2, 20)[i], 1000, 0.2, 0.3, generator("views", i)) for i in range(20)]
    digest = sha256(ours(100, 0.35, 4, 20).tobytes() + np.array(views).astype("<i8").tobytes()).hexdigest()[:16]
    assert digest == "8e9cc563b16e1d0a"


# --- what the student sees at the chosen positions


def views(vocabulary: int, random: float, kept: float, rows: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, chosen, what the student sees), each (rows, 200)."""
    rng = np.random.default_rng(5)
    ids = rng.integers(4, vocabulary - 1, (rows, 200))
    ids[:, 0], ids[:, -1] = 0, 2
    chosen = rng.random((rows, 200)) < 0.15
    seen = [
        student_view(*row, vocabulary, random, kept, generator("views", i))
        for i, row in enumerate(zip(ids, chosen, strict=True))
    ]
    return ids, chosen, np.array(seen)


def test_every_chosen_token_is_masked() -> None:
    ids, chosen, seen = views(1000, 0.0, 0.0)
    assert (seen[chosen] == 999).all() and (seen[~chosen] == ids[~chosen]).all()


@pytest.mark.parametrize("random,kept", [(0.1, 0.1), (0.3, 0.1), (0.2, 0.0), (0.0, 0.2), (1.0, 0.0), (0.0, 1.0)])
def test_split(random: float, kept: float) -> None:
    """80/10/10 is BERT's. A random token is the old one by chance: 1 in 60,000."""
    vocabulary = 60_000
    ids, chosen, seen = views(vocabulary, random, kept)
    assert (seen[~chosen] == ids[~chosen]).all()
    before, after = ids[chosen], seen[chosen]
    found = [int((after == vocabulary - 1).sum()), int(((after != before) & (after != vocabulary - 1)).sum())]
    found.append(len(after) - sum(found))
    for count, expected in zip(found, (1 - random - kept, random, kept), strict=True):
        assert binomtest(count, len(after), expected).pvalue > SIGNIFICANCE, (found, expected)


def test_fractions_lie_on_each_other() -> None:
    """Which of the two a spared token becomes is drawn apart from whether it is spared: `random` alone and `kept`
    alone spare the same positions as both together do."""
    _, chosen, both = views(60_000, 0.1, 0.1)
    _, _, alone = views(60_000, 0.2, 0.0)
    assert ((both != 59_999) & chosen == (alone != 59_999) & chosen).all()


def test_random_tokens_are_uniform_over_ordinary_ids() -> None:
    vocabulary = 30
    _, chosen, seen = views(vocabulary, 1.0, 0.0, rows=4000)
    counts = Counter(seen[chosen].tolist())
    assert set(counts) == set(range(4, vocabulary - 1)), "no special, no <mask>"
    assert chisquare([counts[i] for i in range(4, vocabulary - 1)]).pvalue > SIGNIFICANCE


def test_smallest_vocabulary() -> None:
    """One ordinary id."""
    _, chosen, seen = views(6, 1.0, 0.0)
    assert set(seen[chosen].tolist()) == {4}
