"""Which tokens are chosen, and what the student sees in their place (fairseq's MaskTokensDataset; spec 2.2).

BERT's masks are spans of 1 with a share of random and of kept tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megad2v.modalities.draws import subset
from megad2v.modalities.text.codecs import UNK

BoolTokens = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]

FIRST_ORDINARY = UNK + 1
"""Ids from here to vocabulary - 2 are pieces of text."""


def span_mask(tokens: int, ratio: float, span: int, rng: np.random.Generator) -> BoolTokens:
    """A (tokens,) mask, True where chosen: `ratio` x tokens / span spans, rounded up or down at random; maybe none.

    Starts are drawn without replacement from all positions, `<s>` and `</s>` too. Spans extend to the right, what
    sticks out at the end is cut off, and they may overlap: so fewer than `ratio` are chosen (0.35 in spans of 4:
    0.31), and the first ones seldom. A pure function of its arguments and the state of `rng`.
    """
    count = int(ratio * tokens / span + rng.random())
    covered = subset(tokens, count, rng)[:, None] + np.arange(span)
    mask = np.zeros(tokens, dtype=np.bool_)
    mask[covered[covered < tokens]] = True
    return mask


def student_view(
    ids: Ids, chosen: BoolTokens, vocabulary: int, random: float, kept: float, rng: np.random.Generator
) -> Ids:
    """(tokens,) `<mask>` at the chosen positions, but for two fractions of them: `random` become any ordinary token,
    all equally likely, and `kept` stay what they are.

    Each position is decided on its own, so the fractions are expected ones. fairseq's random tokens may also be
    `<mask>`, which stands among its ordinary ids; ours are not. A pure function of its arguments and `rng`'s state.
    """
    view = ids.copy()
    view[chosen] = vocabulary - 1
    if random + kept == 0:
        return view
    apart, which, token = rng.random((3, len(ids)))
    spared = chosen & (apart < random + kept)
    keeps = spared & (which * (random + kept) < kept)
    view[keeps] = ids[keeps]
    replaced = spared & ~keeps
    ordinary = vocabulary - 1 - FIRST_ORDINARY
    view[replaced] = FIRST_ORDINARY + (token[replaced] * ordinary).astype(np.int64)
    return view
