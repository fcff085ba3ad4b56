"""An audio file on disk as a stream of 16 kHz mono blocks, so that its length costs no memory; for make_shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megad2v.errors import UserError
from megad2v.modalities.sample import BadSample
from megad2v.modalities.speech.decode import (
    RESAMPLING,
    Waveform,
    audio_library,
    check_rate,
    declared_frames,
    decoder_message,
    is_unknown,
    mono,
    sound_file,
)
from megad2v.modalities.speech.geometry import SAMPLE_RATE

DECODERS = ("soundfile", "torchaudio")
BLOCK_VALUES = 2**19
"""Samples x channels that are decoded at a time: 2 MiB of float32."""
SHORTER = re.compile(r"^\s*(.+?)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""libsndfile's remark on a chunk whose declared size does not fit the file."""
SAMPLE_CHUNKS = frozenset({"data", "SSND", "BODY", "Data Size", "Riff size", "riff"})
"""The chunks with the samples; RF64 and W64 are judged by the whole. Other chunks may be cut, audio is not."""
CHUNK_SLACK = 64
"""Bytes: some programs count a missing pad byte, or the header, as samples."""
MP3_SLACK = 2 * 1152
"""Samples by which whole MP3s come out shorter than declared: the encoder's delay and padding, counted or not."""
NIST_COUNT = re.compile(rb"\nsample_count -i (\d+)")
NIST_HEADER = 1024
OGG_TAIL = 2 * 65_307
"""Two of the largest pages of an Ogg file, so that the last one is in it from its beginning."""


@dataclass(frozen=True)
class Recording:
    """An open audio file."""

    rate: int
    """Hz, of the file."""
    channels: int
    frames: int | None
    """Samples per channel that the file declares; None where it does not say."""
    format: str
    """Such as "FLAC" or "WAV"."""
    subtype: str
    """How samples are stored, such as "PCM_16"."""
    blocks_tc: Iterator[Waveform]
    """(T, C) float32 blocks; raises BadSample where the file is damaged or ends too soon."""

    @property
    def description(self) -> str:
        """For the report."""
        channels = "mono" if self.channels == 1 else f"{self.channels} channels"
        return f"{self.format} {self.subtype}, {self.rate} Hz, {channels}"

    @property
    def is_shard_format(self) -> bool:
        """Whether it is what shards hold: FLAC of 16 bits, 16 kHz, mono."""
        return (self.format, self.subtype, self.rate, self.channels) == ("FLAC", "PCM_16", SAMPLE_RATE, 1)

    def waveform(self) -> Iterator[Waveform]:
        """(T,) blocks at 16 kHz, channels averaged. The whole is soxr's answer for the whole file, to the bit."""
        if self.rate == SAMPLE_RATE:
            yield from map(mono, self.blocks_tc)
            return
        stream = audio_library("soxr").ResampleStream(self.rate, SAMPLE_RATE, 1, dtype="float32", quality=RESAMPLING)
        for block_tc in self.blocks_tc:
            yield stream.resample_chunk(mono(block_tc))
        yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def require_decoder(decoder: str) -> None:
    """Raises UserError where what is needed cannot be imported. torchaudio is only ever imported when it is chosen."""
    audio_library("soundfile"), audio_library("soxr")  # the former writes the FLACs in any case
    if decoder == "torchaudio":
        _torchaudio()


def _torchaudio() -> Any:
    try:
        import torchaudio
    except (ImportError, OSError, RuntimeError) as error:  # a build for another torch or CUDA fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--decoder torchaudio: it does not import here ({reason}); leave the option out (soundfile decodes), or "
            "install a torchaudio that fits torch (docs/install.md)"
        ) from error
    return torchaudio


@contextmanager
def open_recording(path: Path, decoder: str = "soundfile") -> Iterator[Recording]:
    """The file at `path`, header read. Raises BadSample when it is no audio that `decoder` reads, OSError."""
    if decoder == "torchaudio":
        yield _load_whole(path)
        return
    soundfile = audio_library("soundfile")
    with path.open("rb"):  # libsndfile says "System error." for all that the system has a name for
        pass
    try:
        file = sound_file(path)
    except soundfile.LibsndfileError as error:
        raise BadSample(decoder_message(error)) from error
    with file:
        check_rate(file.samplerate)
        _check_whole(path, file)
        frames = declared_frames(file)
        blocks = _read_blocks(file, frames)
        yield Recording(file.samplerate, file.channels, frames, file.format, file.subtype, blocks)


def _read_blocks(file: Any, declared: int | None) -> Iterator[Waveform]:
    soundfile = audio_library("soundfile")
    size, found = max(1, BLOCK_VALUES // file.channels), 0
    try:
        while len(block_tc := file.read(size, dtype="float32", always_2d=True)):
            found += len(block_tc)
            yield block_tc
    except soundfile.LibsndfileError as error:
        raise BadSample(f"{decoder_message(error)}, after {found / file.samplerate:.1f} s") from error
    if declared is not None and found < declared - (MP3_SLACK if file.format == "MP3" else 0):
        raise BadSample(f"truncated or damaged: {found} of {declared} samples")


def _check_whole(path: Path, file: Any) -> None:
    """Raises BadSample for a file that ends too soon. libsndfile corrects the length of most formats in silence."""
    for chunk, declared, actual in SHORTER.findall(file.extra_info):
        short = int(actual) + CHUNK_SLACK < int(declared)
        if chunk in SAMPLE_CHUNKS and short and not is_unknown(int(declared)):
            raise BadSample(f"truncated: {actual} of {declared} bytes ({chunk} chunk)")
    if file.format == "NIST":
        with path.open("rb") as raw:
            count = NIST_COUNT.search(raw.read(NIST_HEADER))
        if count and file.frames < int(count[1]):
            raise BadSample(f"truncated: {file.frames} of {int(count[1])} samples")
    if file.format == "OGG":
        _check_last_page(path)


def _check_last_page(path: Path) -> None:
    """Raises BadSample when the last page of an Ogg file is not whole (RFC 3533, section 6)."""
    with path.open("rb") as raw:
        size = raw.seek(0, 2)
        raw.seek(max(0, size - OGG_TAIL))
        tail = raw.read()
    start = tail.rfind(b"OggS")
    segments = tail[start + 26] if 0 <= start < len(tail) - 26 else None
    end = None if segments is None else start + 27 + segments + sum(tail[start + 27 : start + 27 + segments])
    if end is None or end > len(tail):
        raise BadSample("truncated: the last page is not whole")


def _load_whole(path: Path) -> Recording:
    """All of a file through torchaudio, which has no blocks: memory grows with its length."""
    with path.open("rb"):
        pass
    try:
        samples_ct, rate = _torchaudio().load(str(path))
    except ImportError as error:  # torchaudio is there, the backend that it decodes with is not
        raise UserError(f"--decoder torchaudio: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # its backends (FFmpeg, SoX, TorchCodec) share no type of error
        raise BadSample(f"cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    check_rate(int(rate))
    samples_tc = samples_ct.t().float().contiguous().numpy()
    size = max(1, BLOCK_VALUES // samples_tc.shape[1])
    blocks = (samples_tc[start : start + size] for start in range(0, len(samples_tc), size))
    kind = path.suffix.lstrip(".").upper()
    return Recording(int(rate), samples_tc.shape[1], len(samples_tc), kind, "(torchaudio)", blocks)
