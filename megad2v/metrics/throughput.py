"""Seconds per step, tokens per second and model FLOPs utilisation, averaged since they were last read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class SampleFlops:
    """FLOPs of samples of any length, from those of three: T positions cost a + b T + c T^2, since attention is
    quadratic and all else linear. So sums over samples are enough, and micro-batches need not be listed."""

    def __init__(self, count: Callable[[int], float], positions: int) -> None:
        """`count`: positions of one sample -> its FLOPs; `positions`: about as many as samples have."""
        points = np.array([1, 2, 3], dtype=np.float64) * positions
        values = np.array([count(int(point)) for point in points])
        self._coefficients = np.linalg.solve(points[:, None] ** np.arange(3), values)

    def __call__(self, samples: int, positions: int, squares: int) -> float:
        """Of so many samples with so many positions in all, whose squares add up to `squares`."""
        return float(self._coefficients @ np.array([samples, positions, squares], dtype=np.float64))


class Throughput:
    """Collects global counts and local times; reading starts a new interval."""

    def __init__(self, *, flops: Callable[[int, int, int], float], peak_flops: float | None) -> None:
        """`flops` of (samples, positions, squares); `peak_flops` of all ranks together, None where the device's is
        unknown."""
        self._flops, self._peak = flops, peak_flops
        self._clear()

    def _clear(self) -> None:
        self._steps, self._positions = 0, 0
        self._done, self._seconds, self._data = 0.0, 0.0, 0.0

    def add(self, samples: int, positions: int, squares: int, *, step_seconds: float, data_seconds: float) -> None:
        """One step: samples over all ranks, their positions and the sum of each one's positions squared; wall-clock
        seconds, and how much of them was waiting for data."""
        self._steps += 1
        self._positions += positions
        self._done += self._flops(samples, positions, squares)
        self._seconds += step_seconds
        self._data += data_seconds

    def read(self) -> dict[str, float | None]:
        """Means over the interval: `step_seconds`, `data_seconds`, `tokens_per_second`, `mfu` (None if unknown)."""
        steps, seconds = max(1, self._steps), max(1e-9, self._seconds)
        values = {
            "step_seconds": self._seconds / steps,
            "data_seconds": self._data / steps,
            "tokens_per_second": self._positions / seconds,
            "mfu": self._done / seconds / self._peak if self._peak else None,
        }
        self._clear()
        return values
