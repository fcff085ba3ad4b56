"""Bytes of a JPEG, PNG or WebP -> an upright 8-bit RGB image; used by the workers, make_shards and the indexer."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from megad2v.modalities.sample import BadSample

FORMATS = ("JPEG", "PNG", "WEBP")
JPEG_FORMATS = ("JPEG", "MPO")
"""Pillow calls a JPEG that holds several pictures MPO; its first one is a plain JPEG."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before anything is decoded (a quarter GiB of RGB; Pillow warns from here on)."""

HEADER_BYTES = 16_384
"""Enough to hold the size of nearly every image; a longer preamble makes its size unknown, nothing worse."""

WHITE = (255, 255, 255)


def open_image(data: bytes) -> Image.Image:
    """An image whose header is parsed and whose pixels are not. Raises BadSample."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd EXIF blocks and large images; both are dealt with here, and users have enough logs.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's parsers raise many types on junk; each means the same here
        raise BadSample(_reason(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} allowed")
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 (upright) when there is none or it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode, turn by the EXIF orientation, convert to 8-bit RGB. Raises BadSample."""
    turn = orientation(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            rgb = to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BadSample(_reason(error)) from error
    return rgb if turn == 1 else rgb.transpose(_TURNS[turn])


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation; the whole exif_transpose would also rewrite metadata that nobody reads."""


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: 16-bit gray is scaled (Pillow would clip it), transparency laid on white."""
    if image.mode.startswith("I"):
        high_byte = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*WHITE, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def pixel_count(head: bytes) -> int:
    """Width x height from the first bytes of a file; 0 when they do not say."""
    try:
        image = open_image(head)
    except BadSample:
        return 0
    return image.width * image.height


def _reason(error: Exception) -> str:
    """One short line; Pillow names the memory address of the buffer, which would differ from run to run."""
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
