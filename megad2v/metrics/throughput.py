"""Seconds per step, tokens per second and model FLOPs utilisation, averaged since they were last read."""

from __future__ import annotations


class Throughput:
    """Collects global counts and local times; reading starts a new interval."""

    def __init__(self, *, tokens_per_sample: int, flops_per_sample: float, peak_flops: float | None) -> None:
        """`peak_flops` of all ranks together, None where the device's is unknown."""
        self._tokens, self._flops, self._peak = tokens_per_sample, flops_per_sample, peak_flops
        self._clear()

    def _clear(self) -> None:
        self._steps, self._samples, self._seconds, self._data = 0, 0, 0.0, 0.0

    def add(self, samples: int, *, step_seconds: float, data_seconds: float) -> None:
        """One step: samples over all ranks, wall-clock seconds, and how much of them was waiting for data."""
        self._steps += 1
        self._samples += samples
        self._seconds += step_seconds
        self._data += data_seconds

    def read(self) -> dict[str, float | None]:
        """Means over the interval: `step_seconds`, `data_seconds`, `tokens_per_second`, `mfu` (None if unknown)."""
        steps, seconds = max(1, self._steps), max(1e-9, self._seconds)
        rate = self._samples / seconds
        values = {
            "step_seconds": self._seconds / steps,
            "data_seconds": self._data / steps,
            "tokens_per_second": rate * self._tokens,
            "mfu": rate * self._flops / self._peak if self._peak else None,
        }
        self._clear()
        return values
