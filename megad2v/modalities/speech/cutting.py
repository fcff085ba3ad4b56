"""A stream of 16-bit samples -> FLAC files: whole, or cut where it is quietest."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from megad2v.modalities.speech.decode import audio_library
from megad2v.modalities.speech.geometry import SAMPLE_RATE

Pcm = npt.NDArray[np.int16]

WINDOW = SAMPLE_RATE // 10
"""Samples over which quietness is measured: 100 ms, about as long as a pause between words."""


class Pieces:
    """Takes blocks of samples and keeps FLAC files of at most `limit` samples; None: one file, however long.

    Each cut lies at the quietest point of the last third of what a piece may hold, and no piece is shorter than
    a third, so the pieces are between 1/3 and 3/3 of `limit` long. Nothing is lost: together they are the stream.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._reserve = (limit or 0) // 3
        self._waiting = np.zeros(0, dtype=np.int16)
        self._encoder = _Encoder()
        self._start = 0
        self._done: list[tuple[int, int, bytes]] = []

    def add(self, block: Pcm) -> None:
        """Take the next samples."""
        if self._limit is None:
            self._encoder.write(block)
            return
        self._waiting = np.concatenate([self._waiting, block])
        while len(self._waiting) > self._limit + self._reserve:
            self._cut(self._limit)

    def finish(self) -> list[tuple[int, int, bytes]]:
        """(start in the stream, samples, FLAC) of each piece, in order."""
        if self._limit is not None and len(self._waiting) > self._limit:
            # What follows keeps its third as well.
            self._cut(min(self._limit, len(self._waiting) - self._reserve))
        self._emit(self._waiting)
        return self._done

    def _cut(self, latest: int) -> None:
        assert self._limit is not None
        at = quietest(self._waiting, self._limit - self._reserve, latest)
        self._emit(self._waiting[:at])
        self._waiting = self._waiting[at:]

    def _emit(self, samples: Pcm) -> None:
        self._encoder.write(samples)
        length, flac = self._encoder.close()
        self._done.append((self._start, length, flac))
        self._start += length
        self._encoder = _Encoder()


class _Encoder:
    """A FLAC file in memory. The same samples give the same bytes however they are divided into writes."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._file: Any = audio_library("soundfile").SoundFile(
            self._out, "w", samplerate=SAMPLE_RATE, channels=1, format="FLAC", subtype="PCM_16"
        )
        self._samples = 0

    def write(self, samples: Pcm) -> None:
        self._file.write(samples)
        self._samples += len(samples)

    def close(self) -> tuple[int, bytes]:
        self._file.close()
        return self._samples, self._out.getvalue()


def quietest(samples: Pcm, first: int, last: int) -> int:
    """The position in first..last (inclusive) with the least power, without its mean, in the window around it.

    Of equals the latest. `samples` has to reach half a window beyond both.
    """
    half = WINDOW // 2
    # Sums of integers are exact, so the answer does not depend on where the region begins.
    region = samples[first - half : last + half].astype(np.int64)
    sums, squares = (np.concatenate([[0], np.cumsum(values)]) for values in (region, region * region))
    power = WINDOW * (squares[WINDOW:] - squares[:-WINDOW]) - (sums[WINDOW:] - sums[:-WINDOW]) ** 2
    return first + len(power) - 1 - int(np.argmin(power[::-1]))
