"""Generated pictures for demos and tests: one shape per class on a varied background, no download.

What a small model can learn from context: outlines go on, colours run in smooth gradients, stripes repeat. What tells
the classes apart is the outline alone; colour, texture, size, place and rotation are drawn independently of the class.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from megad2v.modalities.demo import in_processes, write_demo
from megad2v.modalities.draws import generator

Floats = npt.NDArray[np.float32]

SMALLEST, LARGEST = 96, 128
"""Range of both sides in pixels."""
QUALITY = 90
CHUNK = 50
"""Pictures that a process draws at a time."""


def _disc(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - 1


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - 0.75) - 0.22


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - 0.85


def _triangle(u: Floats, v: Floats) -> Floats:
    side = math.sqrt(3) / 2
    return np.maximum(np.maximum(side * u - v / 2, -side * u - v / 2), v) - 0.5


def _cross(u: Floats, v: Floats) -> Floats:
    upright = np.maximum(np.abs(u) - 0.3, np.abs(v) - 1)
    return np.minimum(upright, np.maximum(np.abs(u) - 1, np.abs(v) - 0.3))


def _star(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - (0.68 + 0.32 * np.cos(5 * np.arctan2(v, u)))


def _crescent(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.hypot(u, v) - 1, 0.8 - np.hypot(u - 0.5, v))


def _bars(u: Floats, v: Floats) -> Floats:
    nearest = np.minimum(np.abs(v), np.abs(np.abs(v) - 0.7))
    return np.maximum(nearest - 0.2, np.abs(u) - 1)


SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "bars": _bars,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
"""Class name -> roughly the distance to the outline, negative inside, in units of the shape's size."""

CLASSES = tuple(sorted(SHAPES))


def demo_image(shape: str, number: int, seed: int) -> bytes:
    """A JPEG of 96 to 128 pixels a side; a pure function of its arguments."""
    rng = generator(seed, "demo image", shape, number)
    width, height = (int(SMALLEST + rng.random() * (LARGEST - SMALLEST + 1)) for _ in range(2))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    radius = min(width, height) * (0.22 + 0.2 * rng.random())
    left, top = (radius + rng.random() * (side - 2 * radius) for side in (width, height))
    angle = 2 * math.pi * rng.random()
    u = (math.cos(angle) * (x - left) + math.sin(angle) * (y - top)) / radius
    v = (math.cos(angle) * (y - top) - math.sin(angle) * (x - left)) / radius

    back, front = _two_palettes(rng)
    ground = _surface(x / width, y / height, back, rng)
    figure = _surface(x / width, y / height, front, rng)
    # A pixel's worth of soft edge, so that outlines are not jagged.
    inside = np.clip(0.5 - SHAPES[shape](u, v) * radius, 0, 1)[..., None]
    image_hwc = ground + (figure - ground) * inside
    out = io.BytesIO()
    Image.fromarray(np.clip(image_hwc * 255, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def _two_palettes(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """(2, 3) end colours of a gradient for background and figure, one light and one dark, so that outlines show."""
    dark = 0.45 * rng.random((2, 3), dtype=np.float32)
    light = 0.55 + 0.45 * rng.random((2, 3), dtype=np.float32)
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _surface(x: Floats, y: Floats, colours: Floats, rng: np.random.Generator) -> Floats:
    """(H, W, 3) in about [0, 1]: a gradient in a random direction, half the time with stripes or dots on it."""
    angle, phase = 2 * math.pi * rng.random(2)
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    ramp = 0.5 + 0.5 * np.sin(2.2 * along + phase)
    surface = colours[0] + (colours[1] - colours[0]) * ramp[..., None]
    frequency = 2 * math.pi * (3 + 6 * rng.random())
    texture = rng.random()
    if texture < 0.25:
        surface = surface + 0.1 * np.sin(frequency * across)[..., None]
    elif texture < 0.5:
        surface = surface + 0.12 * (np.sin(frequency * along) * np.sin(frequency * across))[..., None]
    return surface.astype(np.float32)


def write_demo_images(folder: Path, per_class: int, seed: int, *, workers: int, overwrite: bool = False) -> None:
    """Write folder/<class>/<class>_00000.jpg, ...; the folder appears only when it is complete.

    Raises UserError when it exists (with `overwrite`: when it holds anything but demo classes) or cannot be written.
    """

    def fill(aside: Path) -> None:
        for name in CLASSES:
            (aside / name).mkdir()
        in_processes(_write_some, _jobs(aside, per_class, seed), workers)

    write_demo(folder, CLASSES, fill, overwrite=overwrite)


def _jobs(folder: Path, per_class: int, seed: int) -> Iterator[tuple[Path, str, range, int]]:
    for name in CLASSES:
        for start in range(0, per_class, CHUNK):
            yield folder / name, name, range(start, min(start + CHUNK, per_class)), seed


def _write_some(job: tuple[Path, str, range, int]) -> None:
    folder, name, numbers, seed = job
    for number in numbers:
        (folder / f"{name}_{number:05d}.jpg").write_bytes(demo_image(name, number, seed))
