"""Decay of the average as a function of updates taken."""

from __future__ import annotations


def decay_at(update: int, *, start: float, end: float, steps: int) -> float:
    """Decay used when the average absorbs the weights after `update` updates: linear to `end` over `steps`, then
    constant (spec 5; data2vec paper section 3.2). fairseq's loop indexes alike: its step t starts by absorbing the
    weights after t updates with d(t)."""
    if update >= steps:
        return end
    return start + (end - start) * update / steps
