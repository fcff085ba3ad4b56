"""Which frames are hidden from the student: spans (wav2vec 2.0's algorithm; spec 6.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megad2v.modalities.draws import subset

BoolFrames = npt.NDArray[np.bool_]


def span_mask(frames: int, ratio: float, span: int, min_spans: int, rng: np.random.Generator) -> BoolFrames:
    """A (frames,) mask, True where hidden: `ratio` x frames / span spans, at least `min_spans`, which may overlap.

    Starts are drawn without replacement and far enough from the end for a whole span and one frame, so that the last
    frame is never hidden and the first ones seldom are; where that leaves too few starts they move up to the end, and
    what sticks out is cut off. Something always stays visible (where everything would be hidden, the published program
    gives up): the spans drawn last are taken back, and of a single span the last frame.
    Ratio 0 hides nothing. A pure function of its arguments and the state of `rng`.
    """
    mask = np.zeros(frames, dtype=np.bool_)
    if ratio == 0:
        return mask
    count = max(min_spans, int(ratio * frames / span + rng.random()))
    reserve = span if frames - span > count else frames - count - 1
    starts = subset(frames - reserve, count, rng)
    covered = starts[:, None] + np.arange(span)
    for kept in range(len(starts), 0, -1):
        mask[covered[:kept][covered[:kept] < frames]] = True
        if not mask.all():
            return mask
        mask[:] = False
    if len(starts):
        mask[:-1] = True
    return mask


def equal_counts(masks: Sequence[BoolFrames], rngs: Sequence[np.random.Generator]) -> list[BoolFrames]:
    """The masks with as many frames hidden as in the one that hides fewest: random others are shown again, frames and
    not whole spans. Each mask has a generator of its own; the published program trims all with the last sample's."""
    least = min(int(np.count_nonzero(mask)) for mask in masks)
    trimmed: list[BoolFrames] = []
    for mask, rng in zip(masks, rngs, strict=True):
        hidden = np.flatnonzero(mask)
        kept = np.zeros_like(mask)
        kept[hidden[subset(len(hidden), least, rng)]] = True
        trimmed.append(kept)
    return trimmed
