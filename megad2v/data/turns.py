"""Whose turn it is: the modality of every optimizer step of a joint run.

Steps are dealt out by weight as `mix.Merge` deals micro-batches, and then shuffled inside windows of `WINDOW` steps by
a permutation of (seed, window). Not a free draw by the weights: that strays from them by the root of the number of
steps, and how many of a modality's own steps lie behind step n could only be counted by drawing them all, so a run
could not resume from n alone. Nor the merge as it is: with weights fixed it alternates strictly, every modality for
ever after the same other, whose gradient Adam's moments then always hold.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megad2v.config.parts import JOINT, modalities
from megad2v.config.schema import Config
from megad2v.data.mix import Merge, whole_weights
from megad2v.data.order import KeyedPermutation

WINDOW = 64
"""Steps that are shuffled together. Another number is another stream of samples for every joint run."""


class Turns:
    """Optimizer step -> its modality and which of that modality's own steps it is: a pure function of (seed, step).

    Own steps come in order, none twice, none left out. After any whole number of windows a modality has had its share
    to about one step, at any time to a few more. Only ratios of weights count. Raises ValueError for a weight that is
    not above 0, and for none at all.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        if not weights or min(weights.values()) <= 0:
            raise ValueError(f"expected weights above 0, got {dict(weights)}")
        self.weights = whole_weights(weights)
        """Modality -> weight in smallest whole numbers, sorted by name."""
        self._names = list(self.weights)
        self._merge = Merge(list(self.weights.values()))
        self._seed = seed
        self._latest: tuple[int, list[tuple[str, int]]] | None = None

    def at(self, step: int) -> tuple[str, int]:
        """(modality, own step) of step `step`, both from 0."""
        window, slot = divmod(step, WINDOW)
        return self._window(window)[slot]

    def counts(self, steps: int) -> dict[str, int]:
        """How many of the first `steps` steps each modality has."""
        window, rest = divmod(steps, WINDOW)
        counts = dict(zip(self._names, self._merge.counts(window * WINDOW), strict=True))
        for modality, _ in self._window(window)[:rest]:
            counts[modality] += 1
        return counts

    def _window(self, window: int) -> list[tuple[str, int]]:
        """The steps of a window; the latest one is kept, since steps follow each other."""
        if self._latest is None or self._latest[0] != window:
            start, own = window * WINDOW, self._merge.counts(window * WINDOW)
            steps = []
            for place in KeyedPermutation(WINDOW, "turns", self._seed, window)(np.arange(WINDOW)).tolist():
                which, _ = self._merge.place(start + place)
                steps.append((self._names[which], own[which]))
                own[which] += 1
            self._latest = window, steps
        return self._latest[1]


def training_turns(config: Config) -> Turns:
    """The turns of a run; one of a single modality has all of them."""
    joint = config.modality == JOINT
    weights = {name: getattr(config.joint, name).weight if joint else 1.0 for name in modalities(config)}
    return Turns(weights, config.train.seed)
