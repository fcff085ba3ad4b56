"""Samples that are meant to do harm, or grew wild: refused before memory is spent, never unpickled, named, left out."""

from __future__ import annotations

import io
import os
import pickle  # noqa: TID251 - to show that nobody reads it
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megad2v.config.schema import Config
from megad2v.data.index import build
from megad2v.data.loader import TrainingLoader
from megad2v.modalities.sample import BadSample
from megad2v.modalities.text.decode import read_tokens, write_tokens
from tests.unit.data_helpers import config, encoded, jpeg, picture, write_tar
from tests.unit.speech_helpers import flac, speech_config, tone
from tests.unit.text_helpers import text_config

MEBIBYTE = 2**20


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """One bit a pixel, all of it black, in as few bytes as it gets."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = zlib.compress(bytes(min(10**6, (width // 8 + 1) * height)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def ten_hours() -> bytes:
    """A short FLAC whose header states 576 million samples."""
    data = bytearray(flac(tone(2000, 0)))
    (packed,) = struct.unpack_from(">Q", data, 18)
    struct.pack_into(">Q", data, 18, (packed >> 36 << 36) | 10 * 3600 * 16_000)
    return bytes(data)


def wav(frames: int) -> bytes:
    """A header that states so many frames at 16 kHz, and a second of them."""
    data = (
        b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16) + b"data" + struct.pack("<I", 2 * frames)
    )
    return b"RIFF" + struct.pack("<I", 36 + 2 * frames) + data + bytes(32_000)


def npy(header_shape: bytes) -> bytes:
    return write_tokens(np.arange(4, dtype=np.uint16)).replace(b"(4,), }" + b" " * 9, b"(" + header_shape + b",), }", 1)


class Touch:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (self._path, os.O_CREAT)


@contextmanager
def little_memory(mebibytes: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < mebibytes * MEBIBYTE, f"{peak / MEBIBYTE:.0f} MiB"


def first_step(settings: Config, good: int) -> dict[str, str]:
    """Reasons by sample of what an epoch drops; `good` samples are left."""
    reasons: dict[str, str] = {}
    met: set[str] = set()
    with closing(TrainingLoader(settings, rank=0, world=1, start_step=0)) as loader, little_memory(64):
        for _, step in zip(range(4), loader):
            for batch in step:
                met |= set(batch.sample_ids)
                reasons |= dict(batch.dropped)
    assert len(met) == good
    return {sample.split("/")[1]: reason for sample, reason in reasons.items()}


def test_images(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="MiB"), little_memory(1):
        bytearray(2 * MEBIBYTE)
    bomb, text = png(31_623, 31_623), png(64, 64, chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(10**8), 9)))
    assert len(bomb) < 4096 and len(text) < 200_000
    rows = [
        ("bomb.png", bomb),
        ("text.png", text),
        ("recording.jpg", flac(tone(2000, 0))),
        ("pickle.jpg", pickle.dumps(Touch(tmp_path / "touched"))),
        ("empty.jpg", b""),
        ("cut.jpg", jpeg(1)[:300]),
        ("only.cls", b"1"),
        *[(f"{number}.jpg", jpeg(number)) for number in range(4)],
        ("grey.png", encoded(picture(9).convert("L"), "PNG")),
    ]
    reasons = first_step(config(write_tar(tmp_path / "x.tar", rows)), good=5)
    assert set(reasons) == {"bomb", "text", "recording", "pickle", "empty", "cut"}
    assert "1000014129 pixels" in reasons["bomb"]
    assert reasons["recording"] == reasons["pickle"] == reasons["empty"] == "not a JPEG, PNG or WebP image"
    assert all("\n" not in reason and len(reason) < 250 for reason in reasons.values())
    assert not (tmp_path / "touched").exists()


def test_recordings(tmp_path: Path) -> None:
    rows = [
        ("hours.flac", ten_hours()),
        ("hours.wav", wav(10 * 3600 * 16_000)),  # one sample of two files: the FLAC is the one that is read
        ("long.wav", wav(10 * 3600 * 16_000)),
        ("image.flac", jpeg(0)),
        ("cut.flac", flac(tone(4000, 1))[:900]),
        *[(f"{number}.flac", flac(tone(3000 + number, number))) for number in range(4)],
    ]
    tar = write_tar(tmp_path / "x.tar", rows)
    lengths = dict(zip(("hours", "long"), build(tar, "speech").lengths.tolist(), strict=False))
    assert lengths == {"hours": 576_000_000, "long": 16_000}, "a WAV is as long as what is there"
    reasons = first_step(speech_config(tar), good=5)
    assert set(reasons) == {"hours", "image", "cut"}
    assert "576000000 samples x 1 channels are more than" in reasons["hours"]
    assert all("\n" not in reason and len(reason) < 250 for reason in reasons.values())


@pytest.mark.parametrize("modality,kind", [("vision", "jpg"), ("speech", "wav"), ("text", "tokens.npy")])
def test_members_of_gigabytes(modality: str, kind: str, tmp_path: Path) -> None:
    """More than one read gives, and than memory should hold for what a decoder would refuse; a hole on the disk."""
    sound = {"vision": jpeg(0), "speech": flac(tone(3000, 0)), "text": write_tokens(np.arange(4, 9, dtype=np.uint16))}
    tar, hole = tmp_path / "x.tar", 3 * 2**30
    with tar.open("wb") as file:
        for name, data in ((f"large.{kind}", b""), ("sound." + kind.replace("wav", "flac"), sound[modality])):
            info = tarfile.TarInfo(name)
            info.size = len(data) or hole
            file.write(info.tobuf() + data)
            file.seek(-len(data) % 512 + (0 if data else hole), os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    settings = {"vision": config, "speech": speech_config, "text": text_config}[modality](tar)
    reasons = first_step(settings, good=1)
    assert [*reasons.values()] == [f"{hole} bytes are more than the {2**30} allowed"]


def test_texts(tmp_path: Path) -> None:
    objects = io.BytesIO()
    np.save(objects, np.array([Touch(tmp_path / "touched")], dtype=object), allow_pickle=True)
    bare = pickle.dumps(Touch(tmp_path / "touched"))
    huge = npy(b"1000000000")
    assert b"(1000000000,)" in huge
    for data in (huge, objects.getvalue(), bare, jpeg(0), b"", huge[:20]):
        with pytest.raises(BadSample) as caught, little_memory(8):
            read_tokens(data)
        assert len(str(caught.value)) < 300
    assert not (tmp_path / "touched").exists()
    pickle.loads(bare)  # noqa: S301
    assert (tmp_path / "touched").exists(), "it would have"
