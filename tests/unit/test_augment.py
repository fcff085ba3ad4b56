"""What a training image goes through: draws against independent ones, pixels against the published operations."""

from __future__ import annotations

import io
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import permutations
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.stats import chisquare, ks_2samp, kstest

from megad2v.config.modalities import AugmentConfig, VisionConfig
from megad2v.config.schema import Config
from megad2v.modalities.draws import generator
from megad2v.modalities.vision import transforms
from megad2v.modalities.vision.decode import Decoded, decoded, open_image, upright_rgb, upright_size
from megad2v.modalities.vision.transforms import COLOUR, View, VisionTransform, draw_view, random_box
from tests.unit.data_helpers import config, encoded, jpeg, picture, turned

CONFIG = config(None)
FULL = replace(CONFIG, augment=AugmentConfig(draft=False))
PLAIN = replace(CONFIG, augment=AugmentConfig(crop_scale_min=1.0, flip=False, jitter=0.0))


@pytest.mark.parametrize("width,height", [(640, 480), (128, 200), (1, 1), (3, 2), (3000, 10), (10, 3000)])
def test_random_boxes(width: int, height: int) -> None:
    rng = generator("boxes", width, height)
    for _ in range(300):
        left, top, right, bottom = random_box(width, height, (0.08, 1.0), rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if min(width, height) > 100:
            assert 0.07 < (right - left) * (bottom - top) / (width * height) <= 1
            assert 0.73 < (right - left) / (bottom - top) < 1.37


def test_box_distribution() -> None:
    rng = generator("distribution")
    boxes = np.array([random_box(1000, 1000, (0.08, 1.0), rng) for _ in range(2000)])
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(axis=1) / 1e6
    # Of a square the largest, elongated boxes do not fit, which draws the mean a little below 0.54.
    assert 0.47 < areas.mean() < 0.54
    assert areas.min() < 0.1
    assert areas.max() > 0.93
    assert abs(np.log(sides[:, 0] / sides[:, 1]).mean()) < 0.02
    assert abs(((boxes[:, :2] + boxes[:, 2:]) / 2).mean() - 500) < 15


def test_long_image_falls_back_to_its_centre() -> None:
    assert random_box(3000, 10, (0.9, 1.0), generator("x")) == (1493, 0, 1506, 10)


def published_box(rng: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop at its defaults, as its documentation words it, with Python's generator."""
    while True:
        area, ratio = rng.uniform(0.08, 1) * width * height, math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h


def test_boxes_are_drawn_as_published() -> None:
    """Sides and places against an independent drawing (in 640 x 480 ten failures in a row do not come up)."""
    mine, python = generator("boxes as published"), random.Random(5)
    ours = np.array([random_box(640, 480, (0.08, 1.0), mine) for _ in range(4000)])
    theirs = np.array([published_box(python, 640, 480) for _ in range(4000)])
    for boxes in (ours, theirs):
        boxes[:, 2:] -= boxes[:, :2]
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    products = [boxes[:, 2] * boxes[:, 3] for boxes in (ours, theirs)]
    assert ks_2samp(*products).pvalue > 1e-3
    assert ks_2samp(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]).pvalue > 1e-3


def views(count: int, augment: AugmentConfig) -> list[View]:
    return [draw_view(90, 60, augment, generator("views", i)) for i in range(count)]


@pytest.mark.parametrize(("jitter", "low", "high"), [(0.4, 0.6, 1.4), (1.5, 0.0, 2.5)])
def test_colours_are_drawn_as_published(jitter: float, low: float, high: float) -> None:
    """torchvision's ColorJitter: factors uniform in max(0, 1 - j)..1 + j, independent, in any order."""
    drawn = views(3000, AugmentConfig(jitter=jitter))
    orders = Counter(tuple(name for name, _ in view.colour) for view in drawn)
    assert set(orders) == set(permutations(COLOUR))
    assert chisquare(list(orders.values())).pvalue > 1e-3
    factors = np.array([[dict(view.colour)[name] for name in COLOUR] for view in drawn])
    for column in factors.T:
        assert kstest(column, "uniform", (low, high - low)).pvalue > 1e-3
    correlation = np.corrcoef(np.column_stack([factors, [view.flip for view in drawn]]).T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / math.sqrt(3000), "four standard errors"


def test_switching_one_augmentation_off_leaves_the_others() -> None:
    changes = (AugmentConfig(), AugmentConfig(jitter=0.0), AugmentConfig(flip=False))
    every, plain, still = (views(40, change) for change in changes)
    assert [view[1:] for view in every] == [view[1:] for view in plain]
    assert [view[::2] for view in every] == [view[::2] for view in still]
    assert {view.colour for view in plain} == {()}
    assert {view.flip for view in still} == {False}


def test_views_never_change() -> None:
    """A resumed run must see the crops that the uninterrupted one would have seen, also in a later version."""
    rows = [(tuple((n, round(f, 9)) for n, f in v.colour), bool(v.flip), v.box) for v in views(20, AugmentConfig())]
    assert sha256(repr(rows).encode()).hexdigest()[:16] == "8af8c5b272000a33"


ENHANCE = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}


def published(image: Image.Image, view: View, size: int, filter: int = Image.Resampling.BICUBIC) -> np.ndarray:
    """The BEiT fork's operations, in its order, each on the full image: ColorJitter, flip, crop, resize. (C, S, S)."""
    for name, factor in view.colour:
        image = ENHANCE[name](image).enhance(factor)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image.crop(view.box).resize((size, size), filter)).transpose(2, 0, 1)


def drawn_view(config: Config, data: bytes, sample_id: str, epoch: int = 0) -> View:
    """The view that VisionTransform draws for this sample."""
    rng = generator(config.train.seed, epoch, sample_id, "augment")
    return draw_view(*upright_size(open_image(data)), config.augment, rng)


def test_published_operations_byte_for_byte() -> None:
    """Every order of the colours, flipped or not, crops larger and smaller than the output, the whole image, gray."""
    kinds = set()
    for number in range(60):
        size = (37 + 5 * (number % 17), 29 + 7 * (number % 13))
        grain = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        image = Image.blend(picture(number, *size), Image.fromarray(grain), 0.3)
        data, settings = encoded(image, "PNG"), CONFIG
        if number % 5 == 0:
            settings = replace(CONFIG, augment=AugmentConfig(crop_scale_min=0.999, jitter=0.9))
        view = drawn_view(settings, data, str(number))
        given = VisionTransform(settings, "train")(data, str(number), 0).inputs.numpy()
        assert given.tobytes() == published(image, view, 32).tobytes(), (number, view)
        kinds.add((tuple(name for name, _ in view.colour), view.flip))
    assert len(kinds) == 12, "a case for every order, flipped and not"


@pytest.mark.parametrize("folder", ["clothing_fullsize", "clothing/test/hat"])
def test_published_operations_on_photos(shared: Callable[[str], Path], folder: str) -> None:
    """At 224 pixels nothing of these photos is decoded smaller, and without `augment.draft` nothing ever is."""
    large = replace(CONFIG, vision=VisionConfig(image_size=224, patch_size=16))
    small = replace(CONFIG, augment=AugmentConfig(draft=False))
    for path in sorted(shared(f"data/image/{folder}").rglob("*.jpg"))[:30]:
        data = path.read_bytes()
        for settings in (large, small):
            given = VisionTransform(settings, "train")(data, path.name, 1).inputs.numpy()
            expected = published(
                upright_rgb(open_image(data)), drawn_view(settings, data, path.name, 1), given.shape[1]
            )
            assert given.tobytes() == expected.tobytes(), path


def test_half_the_images_are_flipped() -> None:
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 16, 32))
    only_flip = replace(PLAIN, augment=replace(PLAIN.augment, flip=True))
    transform, data = VisionTransform(only_flip, "train"), encoded(image, "PNG")
    flipped = sum(int(transform(data, str(i), 0).inputs[0, 0, 0]) == 0 for i in range(400))
    assert 160 < flipped < 240


def test_jitter_keeps_within_its_strength() -> None:
    flat = encoded(Image.new("RGB", (32, 32), (100, 100, 100)), "PNG")
    transform = VisionTransform(replace(PLAIN, augment=replace(PLAIN.augment, jitter=0.4)), "train")
    means = np.array([transform(flat, str(i), 0).inputs.float().mean().item() for i in range(300)])
    # Of a flat gray image contrast and saturation change nothing, so only brightness shows: 100 x (0.6 .. 1.4).
    assert means.min() >= 59
    assert means.max() <= 141
    assert abs(means.mean() - 100) < 5
    colour = encoded(picture(1, 32, 32), "PNG")
    saturation = [np.ptp(transform(colour, str(i), 0).inputs.numpy().astype(int), axis=0).mean() for i in range(50)]
    assert max(saturation) > 1.3 * min(saturation)


@pytest.mark.parametrize("mode", ["train", "valid"])
def test_draft_decoding_keeps_the_resolution(monkeypatch: pytest.MonkeyPatch, mode: transforms.Mode) -> None:
    """What is resized has at least the output's size, and would not have it at the next smaller decoding."""
    met: list[tuple[float, int]] = []
    resize, shrinks = Image.Image.resize, [0]

    def spy_resize(self: Image.Image, size: tuple[int, int], resample: int, box: tuple[float, ...]) -> Image.Image:
        met.append((min(box[2] - box[0], box[3] - box[1]), shrinks[-1]))
        return resize(self, size, resample, box)

    def spy_decoded(image: Image.Image, shrink: float) -> Decoded:
        result = decoded(image, shrink)
        assert result.rgb.size == tuple(math.ceil(side / result.shrink) for side in result.size)
        shrinks.append(result.shrink)
        return result

    photos = [jpeg(7, 60 + 61 * i, 50 + 47 * i) for i in range(14)]
    monkeypatch.setattr(Image.Image, "resize", spy_resize)
    monkeypatch.setattr(transforms, "decoded", spy_decoded)
    for number, data in enumerate(photos):
        VisionTransform(CONFIG, mode)(data, str(number), 0)
    assert len(met) == len(photos)
    assert {shrink for _, shrink in met} == {1, 2, 4, 8}
    for side, shrink in met:
        assert shrink == 1 or side >= 32
        assert shrink == 8 or side < 64
    met.clear()
    for number, data in enumerate(photos):
        VisionTransform(FULL, mode)(data, str(number), 0)
    assert {shrink for _, shrink in met} == {1}, "augment.draft false"


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference in levels of 0..255."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize("turn", range(1, 9))
def test_draft_decoding_moves_nothing(turn: int) -> None:
    """Sides that 8 does not divide leave a broken pixel at an edge, and turning may put it first.

    Right: at most 2 levels off, by libjpeg's averaging. With such pixels taken for whole ones it was 9 to 20.
    """
    coarse = np.random.default_rng(0).integers(0, 256, (24, 18, 3), dtype=np.uint8)
    upright = Image.fromarray(coarse).resize((397, 531), Image.Resampling.BICUBIC)
    data = turned(upright, turn, "JPEG", quality=95)
    assert decoded(open_image(data), 8).shrink == 8
    for mode in ("train", "valid"):
        for number in range(6):
            quick, slow = (
                VisionTransform(replace(c, augment=replace(c.augment, jitter=0.0)), mode)(data, str(number), 0)
                for c in (CONFIG, FULL)
            )
            assert difference(quick.inputs.numpy(), slow.inputs.numpy()) < 2.5


def recompressed(pixels_chw: np.ndarray) -> np.ndarray:
    """The image after being stored as a JPEG of quality 95."""
    data = encoded(Image.fromarray(np.ascontiguousarray(pixels_chw.transpose(1, 2, 0))), quality=95)
    return np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)


def test_draft_decoding_differs_little_on_photos(shared: Callable[[str], Path]) -> None:
    """By less than storing the finished crop at JPEG quality 95, and about as much as bilinear from bicubic.

    Single crops differ by more (docs/images.md): where the colours clip fine texture, it matters that they come before
    the averaging. So the mean and the median are bounded here, and a crop that is off altogether.
    """
    quick, jpeg95, bilinear = [], [], []
    settings = replace(CONFIG, vision=VisionConfig(image_size=64, patch_size=8))
    exact = replace(settings, augment=AugmentConfig(draft=False))
    for path in sorted(shared("data/image/clothing_fullsize").rglob("*.jpg")):
        data = path.read_bytes()
        slow = VisionTransform(exact, "train")(data, path.name, 0).inputs.numpy()
        quick.append(difference(slow, VisionTransform(settings, "train")(data, path.name, 0).inputs.numpy()))
        jpeg95.append(difference(slow, recompressed(slow)))
        view, rgb = drawn_view(exact, data, path.name), upright_rgb(open_image(data))
        bilinear.append(difference(slow, published(rgb, view, 64, Image.Resampling.BILINEAR)))
    assert mean(quick) < mean(jpeg95)
    assert median(quick) < median(bilinear)
    assert max(quick) < 20
