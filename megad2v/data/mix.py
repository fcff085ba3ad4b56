"""Several data sets in one stream of micro-batches, by weight, each with its own epochs.

Which set a micro-batch is from, and which of its own it is, follow from the running number alone: nothing is drawn and
nothing remembered, so the state of the data stays the step number. Sets are merged two at a time as in a Huffman tree
(the lightest first): of a pair with weights a and b the first n hold n a / (a + b), rounded. So a set has had its share
at any time, to half a micro-batch where two are mixed, to about one where many are (tests/unit/test_mix.py).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from megad2v.data.plan import Plan, Row
from megad2v.data.shardset import RawSample, Readable


class _Node(NamedTuple):
    """Compared as heapq does: by weight, then by when it was made."""

    weight: int
    number: int
    """Of the set, for a leaf."""
    first: _Node | None = None
    second: _Node | None = None


class Merge:
    """Running number of a micro-batch -> (which set, which of its micro-batches)."""

    def __init__(self, weights: Sequence[int]) -> None:
        nodes = [_Node(weight, number) for number, weight in enumerate(weights)]
        heapq.heapify(nodes)
        made = len(nodes)
        while len(nodes) > 1:
            light, heavy = heapq.heappop(nodes), heapq.heappop(nodes)
            heapq.heappush(nodes, _Node(light.weight + heavy.weight, made, heavy, light))
            made += 1
        self._root = nodes[0]

    def place(self, number: int) -> tuple[int, int]:
        """(set, its micro-batch) of micro-batch `number`."""
        node = self._root
        while node.first is not None and node.second is not None:
            before = _share(number, node)
            if _share(number + 1, node) > before:
                node, number = node.first, before
            else:
                node, number = node.second, number - before
        return node.number, number

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` micro-batches each set has."""
        counts: dict[int, int] = {}
        todo = [(self._root, total)]
        while todo:
            node, number = todo.pop()
            if node.first is None or node.second is None:
                counts[node.number] = number
            else:
                first = _share(number, node)
                todo += [(node.first, first), (node.second, number - first)]
        return [counts[number] for number in range(len(counts))]


def _share(total: int, node: _Node) -> int:
    """How many of a pair's first `total` are the first one's: its part, rounded."""
    assert node.first is not None
    return (2 * total * node.first.weight + node.weight) // (2 * node.weight)


def whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as the smallest whole numbers with the same ratios, sorted by name: 0.5 and 0.25 are 2 and 1, as 4 and 2
    are."""
    exact = {name: Fraction(repr(weight)) for name, weight in sorted(weights.items())}
    whole = math.lcm(*(weight.denominator for weight in exact.values()))
    numbers = {name: int(weight * whole) for name, weight in exact.items()}
    divisor = math.gcd(*numbers.values())
    return {name: number // divisor for name, number in numbers.items()}


class MixedSamples:
    """Several sets as one long list of samples, in the order of their names; ids are "<set>:<shard>/<key>"."""

    def __init__(self, sets: Mapping[str, Readable], weights: Mapping[str, int]) -> None:
        self._names = sorted(sets)
        self._sets = [sets[name] for name in self._names]
        self._weights = [weights[name] for name in self._names]
        self.starts = [0, *accumulate(len(samples) for samples in self._sets)]

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def fingerprint(self) -> str:
        """Hex hash of what the order depends on: the sets, their names and weights."""
        rows = zip(self._names, self._weights, self._sets, strict=True)
        text = "\n".join(f"{name} {weight} {samples.fingerprint}" for name, weight, samples in rows)
        return blake2b(text.encode(), digest_size=8).hexdigest()

    def sample_id(self, index: int) -> str:
        """As ShardSet.sample_id."""
        which, own = self._locate(index)
        return f"{self._names[which]}:{self._sets[which].sample_id(own)}"

    def read(self, index: int) -> RawSample:
        """As ShardSet.read."""
        which, own = self._locate(index)
        raw = self._sets[which].read(own)
        return RawSample(f"{self._names[which]}:{raw.id}", raw.data, raw.kind, raw.label)

    def close(self) -> None:
        """Close all."""
        for samples in self._sets:
            samples.close()

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return which, index - self.starts[which]


class MixedPlan:
    """The plans of several sets, merged: a micro-batch is of one set, and its rows' epochs are that set's."""

    def __init__(self, plans: Mapping[str, Plan], weights: Mapping[str, int], starts: Sequence[int]) -> None:
        self._names = sorted(plans)
        self._plans = [plans[name] for name in self._names]
        self._starts = starts
        self._merge = Merge([weights[name] for name in self._names])
        self.epoch_size = sum(plan.epoch_size for plan in self._plans)
        """Samples of an epoch of every set."""

    def numbered(self, number: int) -> list[Row]:
        """The rows of micro-batch `number` (0, 1, ...)."""
        which, own = self._merge.place(number)
        return [(epoch, self._starts[which] + index) for epoch, index in self._plans[which].numbered(own)]

    def epochs(self, micro_batches: int) -> dict[str, float]:
        """Set -> epochs that the first so many micro-batches have of it."""
        counts = self._merge.counts(micro_batches)
        rows = zip(self._names, self._plans, counts, strict=True)
        return {name: plan.epochs(count)[""] for name, plan, count in rows}
