"""Random numbers of the worker side: one generator for each purpose and sample, keyed by a hash.

So neither the number of ranks or workers nor the order of reading can change what is drawn, and switching one thing
off leaves the others as they were. Only `random()` is drawn from the generators: its stream is the one that numpy
never changes.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence


class _Key(ISeedSequence):
    """The key of a Philox generator as it is. Given as `key=`, numpy would first draw another from the system: three
    times the time, for every generator."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> npt.NDArray[np.uint64]:
        """Philox asks for two words of 64 bits."""
        return np.frombuffer(self._key, dtype="<u8")


def generator(*parts: object) -> np.random.Generator:
    """A generator whose stream depends on the parts alone."""
    key = blake2b("\x1f".join([str(part) for part in parts]).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(_Key(key)))


def subset(size: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """`count` different whole numbers of 0..size-1 in random order, every such sequence equally likely."""
    return np.argsort(rng.random(size), kind="stable")[:count]
