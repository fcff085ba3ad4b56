"""Small images, tars and configurations for the tests of `megad2v.data` and `megad2v.modalities.vision`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megad2v.config.modalities import VisionConfig
from megad2v.config.schema import Config, DataConfig, MicroBatchConfig, TrainConfig

SHARDS = (("a.tar", 7), ("b.tar", 5), ("c.tar", 9))
TOTAL = sum(count for _, count in SHARDS)


def picture(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    """A smooth RGB image that differs from seed to seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The bytes of a saved image."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def jpeg(seed: int, width: int = 40, height: int = 36) -> bytes:
    """A small JPEG."""
    return encoded(picture(seed, width, height), quality=90)


def turned(upright: Image.Image, turn: int, kind: str, **options: Any) -> bytes:
    """The image stored so that EXIF orientation `turn` (1..8) makes it upright again."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Pillow's transposition that stores it that way
    stored = upright if turn == 1 else upright.transpose(Image.Transpose(undo[turn]))
    exif = Image.Exif()
    exif[0x0112] = turn
    return encoded(stored, kind, exif=exif, **options)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar as somebody else's tool writes it."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(shard: str, count: int, bad: Iterable[int] = ()) -> list[tuple[str, bytes]]:
    """`count` labelled samples whose pixels depend on the shard's name; those in `bad` are not images."""
    base = ord(shard[0]) * 100
    rows: list[tuple[str, bytes]] = []
    for i in range(count):
        data = b"this is no image" if i in bad else jpeg(base + i, 30 + i, 40 - i)
        rows += [(f"{i:04d}.jpg", data), (f"{i:04d}.cls", str(i % 3).encode()), (f"{i:04d}.json", b"{}")]
    return rows


def write_shards(folder: Path, bad: dict[str, set[int]] | None = None) -> Path:
    """Three shards of 7, 5 and 9 samples."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in SHARDS:
        write_tar(folder / name, members(name, count, (bad or {}).get(name, set())))
    return folder


def config(shards: Path | str | None, /, *, workers: int = 0, **data: Any) -> Config:
    """32-pixel images in 8-pixel patches, micro-batches of 2, four of them a step."""
    base = Config(
        vision=VisionConfig(image_size=32, patch_size=8),
        data=DataConfig(
            shards=None if shards is None else str(shards),
            micro_batch=MicroBatchConfig(samples=2),
            workers=workers,
            window=2,
        ),
        train=TrainConfig(micro_batches_per_step=4, seed=3),
    )
    return replace(base, data=replace(base.data, **data))
