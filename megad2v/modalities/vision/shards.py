"""Raw image folders -> samples: which files, which class, and with which bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megad2v.modalities.corpus import (
    Corpus,
    Outcome,
    SourceFile,
    class_folders,
    find_files,
    label_ids,
    printable,
)
from megad2v.modalities.sample import BadSample
from megad2v.modalities.vision.decode import open_image, orientation, upright_rgb

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class ImageOptions:
    """What is done to an image on its way into a shard."""

    resize_short: int | None = None
    """Short side in pixels that larger images are reduced to; None leaves sizes alone. Nothing is ever enlarged."""
    quality: int = 95
    """JPEG quality (1..95) of images that must be encoded again."""


def image_corpus(folder: Path, options: ImageOptions, classes: Sequence[str] | None = None) -> Corpus:
    """All images under `folder`. The class of an image is the first-level folder it lies in, however deep; images
    directly in `folder` have none.

    `classes` fixes names and ids beforehand (those of another data set). Raises UserError when the folder is missing,
    holds no image, looks like splits instead of classes, or has a class that `classes` lacks.
    """
    images, others = find_files(folder, EXTENSIONS, "image")
    found = class_folders(folder, images)
    ids = label_ids(folder, found, classes)
    return Corpus(
        name="image",
        modality="vision",
        noun="images",
        folder=folder,
        files=[SourceFile(path, ids[path.split("/", 1)[0]] if "/" in path else -1) for path in images],
        classes=list(ids) if found else [],
        others=others,
        why_not="not a .jpg, .jpeg, .png or .webp file, or hidden",
        make_samples=make_sample,
        options=options,
    )


def make_sample(folder: Path, file: SourceFile, options: ImageOptions) -> Outcome:
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
        return Outcome(file, "skipped", f"cannot be read: {error.strerror}")
    except BadSample as error:
        return Outcome(file, "skipped", str(error))
    if reasons:
        rgb = _reduced(rgb, options.resize_short)
        data, kind = _encode(rgb, source, options)
    meta = {"path": printable(file.path), "width": rgb.width, "height": rgb.height}
    parts = {kind: data, "json": json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()}
    if file.label >= 0:
        parts["cls"] = str(file.label).encode()
    return Outcome(file, "converted" if reasons else "copied", ", ".join(reasons), (parts,))


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
