"""Bytes of an audio file -> a 16 kHz mono waveform, for the workers; lengths from headers, for the index.

soundfile decodes (all that libsndfile reads) and soxr resamples. Both are imported when first needed: who trains on
images has neither.
"""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from megad2v.errors import UserError
from megad2v.modalities.sample import BadSample
from megad2v.modalities.speech.geometry import SAMPLE_RATE

Waveform = npt.NDArray[np.float32]

RESAMPLING = "HQ"
"""soxr's quality: 20 bits, flat to 0.91 of the band. "VHQ" would cost half as much again for noise below 16 bits."""
RATES = range(4_000, 768_001)
"""Sample rates in Hz that are believed; others are broken headers, and would blow a file up a thousandfold."""

MAX_VALUES = 2**27
"""Samples x channels that are decoded at once (half a GiB of float32, 2.3 hours at 16 kHz): a header of some bytes can
declare a thousand times as much."""

BLOCK = 2**16
"""Samples read at a time from a file that does not say how many it has."""

HEADER_BYTES = 4_096
"""Enough to hold the length of nearly every FLAC and WAV file; otherwise it is unknown, nothing worse."""
UNKNOWN_SIZES = (range(0x7FFF_0000, 0x8000_0000), range(0xFFFF_0000, 0x1_0000_0000))
"""Bytes that programs declare which write a WAV file into a pipe and cannot know: a little below 2 or 4 GiB."""
FIXED_SIZE_CODECS = frozenset({0x0001, 0x0003, 0x0006, 0x0007, 0xFFFE})
"""WAV codecs with samples of equal size: PCM, float, A-law, mu-law, extensible (one of these, in practice)."""


def audio_library(name: str) -> ModuleType:
    """soundfile or soxr. Raises UserError where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # soundfile raises OSError where libsndfile is missing
        raise UserError(
            f"speech needs soundfile and soxr, and {name} does not import ({error}); pip install 'megad2v[speech]'"
        ) from error


def read_waveform(data: bytes) -> Waveform:
    """(samples,) float32 in about [-1, 1], 16 kHz mono, of a whole audio file in memory.

    16 kHz mono FLAC or WAV, which our shards hold, is only decoded. Other people's shards may hold other rates, more
    channels and other formats: channels are averaged and the rate converted, at every reading.
    Raises BadSample for what cannot be decoded in full, is empty, absurdly long, or holds NaN; UserError without the
    libraries.
    """
    soundfile = audio_library("soundfile")
    try:
        with sound_file(io.BytesIO(data)) as file:
            rate, declared = file.samplerate, declared_frames(file)
            check_rate(rate)
            if (declared or 0) * file.channels > MAX_VALUES:
                raise BadSample(f"{declared} samples x {file.channels} channels are more than the {MAX_VALUES} allowed")
            samples_tc = _read_all(file, declared)
    except soundfile.LibsndfileError as error:
        raise BadSample(decoder_message(error)) from error
    if len(samples_tc) < (declared or 0):
        raise BadSample(f"truncated: {len(samples_tc)} of {declared} samples")
    return resampled(samples_tc, rate)


def resampled(samples_tc: npt.NDArray[np.float32], rate: int) -> Waveform:
    """(T, C) at `rate` Hz -> (samples,) at 16 kHz. Raises BadSample for a rate that cannot be meant, for nothing at
    all, and for samples that are not finite."""
    check_rate(rate)
    waveform = mono(samples_tc)
    if rate != SAMPLE_RATE and waveform.size:
        waveform = audio_library("soxr").resample(waveform, rate, SAMPLE_RATE, quality=RESAMPLING)
    if not waveform.size:
        raise BadSample("no samples")
    return waveform


def sound_file(source: io.BytesIO | Path) -> Any:
    """An open soundfile.SoundFile that only ever reads on. Raises soundfile.LibsndfileError.

    SoundFile seeks to where it is after each read, which fails at the end of a FLAC that was written into a pipe.
    """
    file = audio_library("soundfile").SoundFile(source)
    file.seekable = lambda: False
    return file


def declared_frames(file: Any) -> int | None:
    """Samples per channel that an open SoundFile declares; None for a FLAC that was written into a pipe."""
    return file.frames if file.frames < 2**62 else None


def _read_all(file: Any, declared: int | None) -> npt.NDArray[np.float32]:
    """(T, C) float32. Memory is reserved for what is declared, or for one block after the other."""
    blocks, left = [], MAX_VALUES // file.channels
    while len(block := file.read(BLOCK if declared is None else declared + 1, dtype="float32", always_2d=True)):
        blocks.append(block)
        left -= len(block)
        if left < 0:
            raise BadSample(f"more than the {MAX_VALUES} samples x channels allowed")
    if len(blocks) == 1:
        return blocks[0]
    return np.concatenate(blocks) if blocks else np.zeros((0, file.channels), dtype=np.float32)


def check_rate(rate: int) -> None:
    """Raises BadSample for a sample rate that cannot be meant."""
    if rate not in RATES:
        raise BadSample(f"sample rate {rate} Hz is not within {RATES.start} to {RATES.stop - 1}")


def mono(samples_tc: npt.NDArray[np.float32]) -> Waveform:
    """(T, C) -> (T,): the mean over channels. Raises BadSample for samples that are not finite."""
    channels = samples_tc.shape[1]
    # Adding columns is several times faster than mean(axis=1) over so short an axis.
    waveform = samples_tc[:, 0] if channels == 1 else sum(samples_tc.T) / np.float32(channels)
    if not np.isfinite(waveform).all():
        raise BadSample("holds NaN or infinite samples")
    return np.ascontiguousarray(waveform)


def decoder_message(error: Exception) -> str:
    """One short line without the path, which would differ from machine to machine."""
    text = getattr(error, "error_string", None) or f"{type(error).__name__}: {error}"
    return "cannot be decoded: " + " ".join(str(text).removeprefix("Error : ").split())[:200].rstrip(".")


def resampled_length(frames: int, rate: int) -> int:
    """How many samples soxr makes at 16 kHz of `frames` at `rate` Hz: rounded, halves upwards."""
    return (2 * frames * SAMPLE_RATE + rate) // (2 * rate)


def is_unknown(size: int) -> bool:
    """Whether a declared number of bytes means that it was not known."""
    return any(size in sizes for sizes in UNKNOWN_SIZES)


def header_length(head: bytes, size: int | None = None) -> int:
    """Samples at 16 kHz, from the first bytes of a FLAC or WAV file of `size` bytes; 0 when they do not say, or when a
    WAV states more than fits (libsndfile reads what is there, without a word). Needs no library."""
    try:
        frames, rate = _flac_length(head) if head[:4] == b"fLaC" else _wav_length(head, size)
    except (struct.error, ValueError):
        return 0
    return resampled_length(frames, rate) if rate in RATES else 0


def decoded_length(data: bytes) -> int:
    """Samples at 16 kHz of a whole file, by decoding it; 0 where it cannot be, or where no decoder is installed."""
    try:
        return len(read_waveform(data))
    except (BadSample, UserError):
        return 0


def _flac_length(head: bytes) -> tuple[int, int]:
    """(samples, rate) from STREAMINFO, which is always the first block (RFC 9639, section 8.2); 0 samples: unknown."""
    (packed,) = struct.unpack_from(">Q", head, 18)  # rate 20 bits, channels 3, bits per sample 5, samples 36
    return packed & (2**36 - 1), packed >> 44


def _wav_length(head: bytes, file_size: int | None) -> tuple[int, int]:
    """(samples, rate) from the chunks of a RIFF or RF64 file. Raises ValueError when they do not say."""
    block = rate = large = 0
    for name, start, size in _chunks(head):
        if name == b"fmt ":
            codec, _, rate, _, block = struct.unpack_from("<HHIIH", head, start)
            if codec not in FIXED_SIZE_CODECS or not block:
                raise ValueError("samples have no fixed size")
        elif name == b"ds64":  # the 64-bit sizes of RF64 (EBU Tech 3306)
            (large,) = struct.unpack_from("<Q", head, start + 8)
        elif name == b"data" and block:
            size = large or size
            if (is_unknown(size) and not large) or (file_size is not None and start + size > file_size):
                break
            return size // block, rate
    raise ValueError("length is not known")


def _chunks(head: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start of the content, size) of the chunks that begin within `head`."""
    if head[:4] not in (b"RIFF", b"RF64") or head[8:12] != b"WAVE":
        raise ValueError("not a WAV file")
    at = 12
    while at + 8 <= len(head):
        name, size = struct.unpack_from("<4sI", head, at)
        yield name, at + 8, size
        at += 8 + size + size % 2
