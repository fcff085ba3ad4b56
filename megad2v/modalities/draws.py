"""Random numbers of the worker side: one generator for each purpose and sample, keyed by a hash.

So neither the number of ranks or workers nor the order of reading can change what is drawn, and switching one thing
off leaves the others as they were. Only `random()` is drawn from the generators: its stream is the one that numpy
never changes.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt


def generator(*parts: object) -> np.random.Generator:
    """A generator whose stream depends on the parts alone."""
    seed = blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "little")))


def subset(size: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """`count` different whole numbers of 0..size-1 in random order, every such sequence equally likely."""
    return np.argsort(rng.random(size), kind="stable")[:count]
