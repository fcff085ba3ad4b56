"""Raw image folders -> samples: which files, which class, in which order, and with which bytes.

Everything here is a pure function of the files and the options, so shards come out byte for byte the same for any
number of processes. Writing tars is `data.make`'s business.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from PIL import Image

from megad2v.errors import UserError
from megad2v.modalities.sample import BadSample
from megad2v.modalities.vision.decode import open_image, orientation, upright_rgb

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

Action = Literal["copied", "converted", "skipped"]


@dataclass(frozen=True)
class ImageFile:
    """One file to be turned into a sample."""

    path: str
    """Relative to the input folder, with forward slashes."""
    label: int
    """Class id, -1 without classes."""


@dataclass(frozen=True)
class ImageOptions:
    """What is done to an image on its way into a shard."""

    resize_short: int | None = None
    """Short side in pixels that larger images are reduced to; None leaves sizes alone. Nothing is ever enlarged."""
    quality: int = 95
    """JPEG quality (1..95) of images that must be encoded again."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    file: ImageFile
    action: Action
    reason: str
    """Why it was converted or skipped; empty when copied."""
    parts: dict[str, bytes]
    """Extension -> bytes of the sample's files; empty when skipped."""


def find_images(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[ImageFile], list[str], list[str]]:
    """(images, names of the classes, other files) under `folder`, each sorted by relative path.

    The class of an image is the first-level folder it lies in, however deep; images directly in `folder` have none.
    `classes` fixes names and ids beforehand (those of another data set). Raises UserError when the folder is missing,
    holds no image, looks like splits instead of classes, or has a class that `classes` lacks.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --input takes a folder of images or of class folders")
    images: list[str] = []
    others: list[str] = []
    for path in _walk(folder):
        hidden = any(part.startswith(".") for part in path.split("/"))
        (images if not hidden and os.path.splitext(path)[1].lower() in EXTENSIONS else others).append(path)
    if not images:
        raise UserError(f"{folder}: no image (.jpg, .jpeg, .png, .webp) among {len(others)} files; check --input")
    found = sorted({path.split("/", 1)[0] for path in images if "/" in path})
    if found and all(name.lower() in SPLIT_NAMES for name in found):
        raise UserError(
            f"{folder}: {', '.join(found)} look like splits, not classes; give one: --input {folder}/{found[0]}"
        )
    names = found if classes is None else list(classes)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise UserError(f"{folder}: class folder {unknown[0]} is not among the {len(names)} classes of --classes")
    ids = {name: label for label, name in enumerate(names)}
    files = [ImageFile(path, ids[path.split("/", 1)[0]] if "/" in path else -1) for path in images]
    return files, names if found else [], others


def _walk(folder: Path) -> Iterator[str]:
    """Relative paths of all files below a folder, sorted; symbolic links are followed, once per folder."""
    seen: set[tuple[int, int]] = set()
    paths: list[str] = []
    for root, folders, files in os.walk(folder, followlinks=True):
        stat = os.stat(root)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders.sort()  # so that it does not depend on the disk which of two links to a folder counts
        relative = Path(root).relative_to(folder)
        paths += [(relative / name).as_posix() for name in files]
    yield from sorted(paths)


def shuffled(files: Sequence[ImageFile], seed: int) -> list[ImageFile]:
    """The files in an order that mixes classes and depends on paths and seed alone."""
    return sorted(files, key=lambda file: blake2b(f"{seed}\x1f{file.path}".encode("utf-8", "surrogateescape")).digest())


def make_sample(folder: Path, file: ImageFile, options: ImageOptions) -> Outcome:
    """Read one file. It is decoded in full, so what gets into a shard is known to be whole.

    8-bit RGB files that are upright and small enough are copied byte for byte; others are turned upright, converted
    and encoded again (PNG stays PNG, all else becomes JPEG).
    """
    try:
        data = (folder / file.path).read_bytes()
        image = open_image(data)
        reasons = _reasons(image, options)
        # Read before decoding: Pillow fills `info` and may change `mode` as it goes.
        source, kind = image.format or "", KINDS[image.format or ""]
        rgb = upright_rgb(image)
    except OSError as error:
        return Outcome(file, "skipped", f"cannot be read: {error.strerror}", {})
    except BadSample as error:
        return Outcome(file, "skipped", str(error), {})
    if reasons:
        rgb = _reduced(rgb, options.resize_short)
        data, kind = _encode(rgb, source, options)
    meta = {"path": file.path.encode("utf-8", "backslashreplace").decode(), "width": rgb.width, "height": rgb.height}
    parts = {kind: data, "json": json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()}
    if file.label >= 0:
        parts["cls"] = str(file.label).encode()
    return Outcome(file, "converted" if reasons else "copied", ", ".join(reasons), parts)


def _reasons(image: Image.Image, options: ImageOptions) -> list[str]:
    """Why an image cannot be copied as it is; empty when it can."""
    reasons: list[str] = []
    if image.mode != "RGB":
        reasons.append(f"mode {image.mode}")
    elif "transparency" in image.info:
        reasons.append("transparency")
    if orientation(image) != 1:
        reasons.append(f"EXIF orientation {orientation(image)}")
    if options.resize_short and min(image.size) > options.resize_short:
        reasons.append(f"resized from {image.width}x{image.height}")
    return reasons


def _reduced(rgb: Image.Image, short: int | None) -> Image.Image:
    if not short or min(rgb.size) <= short:
        return rgb
    factor = short / min(rgb.size)
    size = (max(short, round(rgb.width * factor)), max(short, round(rgb.height * factor)))
    return rgb.resize(size, Image.Resampling.LANCZOS)


def _encode(rgb: Image.Image, source: str, options: ImageOptions) -> tuple[bytes, str]:
    out = io.BytesIO()
    if source == "PNG":
        rgb.save(out, "PNG")
        return out.getvalue(), "png"
    # Without an explicit setting libjpeg halves the colour resolution, which a source may not have done.
    rgb.save(out, "JPEG", quality=options.quality, subsampling=0)
    return out.getvalue(), "jpg"


def class_counts(labels: Counter[int], classes: Sequence[str]) -> tuple[int, ...]:
    """Samples of each class, by id."""
    return tuple(labels[label] for label in range(len(classes)))
