"""Bytes of a JPEG, PNG or WebP -> an upright 8-bit RGB image; used by the workers, make_shards and the indexer."""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from megad2v.modalities.sample import BadSample

FORMATS = ("JPEG", "PNG", "WEBP")
JPEG_FORMATS = ("JPEG", "MPO")
"""Pillow calls a JPEG that holds several pictures MPO; its first one is a plain JPEG."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before anything is decoded (a quarter GiB of RGB; Pillow warns from here on)."""

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels."""

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


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels as people see the image, whichever way it is stored."""
    return (image.height, image.width) if orientation(image) >= 5 else image.size


class Decoded(NamedTuple):
    """An upright RGB image, perhaps decoded at 1/2, 1/4 or 1/8 of its resolution."""

    rgb: Image.Image
    size: tuple[int, int]
    """Width and height in full resolution."""
    shrink: int
    """1, 2, 4 or 8: pixels of the full resolution in one of `rgb`."""
    origin: tuple[float, float]
    """Where in `rgb` the corner of the image is: 0 but for turned images with a broken pixel at their edge."""

    def box(self, full: Box) -> Box:
        """A box given in full resolution, in pixels of `rgb`."""
        (x, y), k = self.origin, self.shrink
        return x + full[0] / k, y + full[1] / k, x + full[2] / k, y + full[3] / k


def decoded(image: Image.Image, shrink: float) -> Decoded:
    """Decode upright; a JPEG at the largest of 1, 1/2, 1/4, 1/8 that is at least 1 / `shrink`. Raises BadSample.

    libjpeg then computes fewer pixels from the same coefficients, several times faster for large photos.
    """
    turn, size, (width, height) = orientation(image), upright_size(image), image.size
    wanted = max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor <= shrink)
    if wanted > 1 and image.format in JPEG_FORMATS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pillow takes the factor from the size that it is asked for; the mode stays the file's own.
            image.draft(None, (width // wanted, height // wanted))
    done = wanted if image.size != (width, height) else 1
    rgb = upright_rgb(image)
    # libjpeg rounds sizes up: the last stored column and row may be broken pixels, and turning puts them first.
    x = rgb.width - size[0] / done if turn in (2, 3, 6, 7) else 0.0
    y = rgb.height - size[1] / done if turn in (3, 4, 7, 8) else 0.0
    return Decoded(rgb, size, done, (x, y))


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
