"""For the tests of models."""

from __future__ import annotations

from torch import Tensor

from tests.tolerances import DOUBLE


def close(ours: Tensor, truth: Tensor, tolerance: float = DOUBLE) -> bool:
    """Whether the relative error, in norm, is within the tolerance."""
    return bool((ours - truth).norm() <= tolerance * truth.norm())
