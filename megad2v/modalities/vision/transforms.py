"""Worker side of images: decode, augment, mask. Everything random is pure in (seed, epoch, sample id).

Random numbers come from one generator per sample and purpose, keyed by a hash, so neither the number of ranks or
workers nor the order of reading can change a crop or a mask, and switching one augmentation off leaves the masks alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageStat

from megad2v.config.modalities import AugmentConfig
from megad2v.config.schema import Config
from megad2v.modalities.batch import Batch
from megad2v.modalities.draws import generator
from megad2v.modalities.sample import Mode, Sample, fingerprint
from megad2v.modalities.vision.decode import Box, decoded, open_image, upright_size
from megad2v.modalities.vision.masking import block_mask, mask_budget

PixelBox = tuple[int, int, int, int]
"""left, top, right, bottom in whole pixels."""

Colour = tuple[tuple[str, float], ...]
"""Operations of `COLOUR` with their factors, in the order in which they are applied."""

ASPECT = (3 / 4, 4 / 3)
"""Aspect ratios of the random resized crop (spec 3.1: the usual default)."""
CROP_ATTEMPTS = 10
BICUBIC = Image.Resampling.BICUBIC
COLOUR = ("brightness", "contrast", "saturation")
"""The operations of the colour jitter; the published one (torchvision's ColorJitter) leaves the hue alone."""


class View(NamedTuple):
    """What is drawn for one training sample; teacher and student get the same view."""

    colour: Colour
    """Applied to the whole image first."""
    flip: bool
    """Mirrored left to right, after the colours."""
    box: PixelBox
    """The crop, in the upright and flipped image in full resolution."""


def draw_view(width: int, height: int, augment: AugmentConfig, rng: np.random.Generator) -> View:
    """Draw the view of an image of `width` x `height` pixels (BEiT fork, datasets.py; torchvision's distributions).

    Factors are uniform in max(0, 1 - jitter)..1 + jitter and every order is equally likely. The same numbers are drawn
    whatever is switched off, so that an ablation of one augmentation leaves the others as they were.
    """
    low, high = max(0.0, 1 - augment.jitter), 1 + augment.jitter
    factors = [low + (high - low) * rng.random() for _ in COLOUR]
    order = sorted(range(len(COLOUR)), key=[rng.random() for _ in COLOUR].__getitem__)
    colour = tuple((COLOUR[which], factors[which]) for which in order) if augment.jitter else ()
    flip = rng.random() < 0.5 and augment.flip
    # Last, because it may take any number of attempts.
    return View(colour, flip, random_box(width, height, (augment.crop_scale_min, augment.crop_scale_max), rng))


def random_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> PixelBox:
    """Random resized crop: area uniform in `scale` x the image's, aspect log-uniform in 3/4..4/3.

    When no draw fits (very long images), the largest centred box whose aspect is in range. Source: the BEiT fork's
    RandomResizedCropAndInterpolationWithTwoPic, which draws as torchvision's RandomResizedCrop does.
    """
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(CROP_ATTEMPTS):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_square(width: int, height: int) -> Box:
    """The box that "resize the short side, then crop the centre" leaves."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


class VisionTransform:
    """Encoded image -> uint8 (C, S, S), mask (1, T) and fingerprint, as the (validated) configuration and mode say.

    Calling raises BadSample.
    """

    modality = "vision"

    def __init__(self, config: Config, mode: Mode) -> None:
        self._size = config.vision.image_size
        self._augment = config.augment
        self._mask = config.mask
        self._seed = config.train.seed
        self._mode = mode
        self._grid = config.vision.image_size // config.vision.patch_size
        self._budget = mask_budget(config.mask.ratio, self._grid**2)

    @property
    def positions(self) -> int:
        """T: patches of an image."""
        return self._grid**2

    def __call__(self, data: bytes, sample_id: str, epoch: int) -> Sample:
        """One sample, the same on every machine. Raises BadSample when the bytes are not a whole image."""
        image = open_image(data)
        if self._mode == "train":
            image = self._augmented(image, generator(self._seed, epoch, sample_id, "augment"))
        else:
            image = self._centred(image)
        pixels_chw = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        mask = self._draw_mask(sample_id, epoch)
        return Sample(torch.from_numpy(pixels_chw), torch.from_numpy(mask), fingerprint(pixels_chw, mask))

    def collate(
        self, samples: list[Sample], sample_ids: list[str], labels: list[int], dropped: list[tuple[str, str]]
    ) -> Batch:
        """inputs (B, C, S, S), mask_bmt (B, 1, T); without samples one row of zeros that hides nothing."""
        if samples:
            inputs = torch.stack([sample.inputs for sample in samples])
            masks = torch.stack([sample.mask_mt for sample in samples])
        else:
            inputs = torch.zeros(1, 3, self._size, self._size, dtype=torch.uint8)
            masks = torch.zeros(1, 1, self.positions, dtype=torch.bool)
        return Batch(
            modality=self.modality,
            inputs=inputs,
            mask_bmt=masks,
            labels=torch.tensor(labels if samples else [-1], dtype=torch.int64),
            sample_ids=tuple(sample_ids),
            fingerprints=tuple(sample.fingerprint for sample in samples),
            dropped=tuple(dropped),
        )

    def _draw_mask(self, sample_id: str, epoch: int) -> np.ndarray:
        if self._mode == "probe" or self._budget == 0:
            return np.zeros((1, self.positions), dtype=np.bool_)
        # Validation is compared over time, so its masks must not follow the epoch.
        rng = generator(self._seed, epoch if self._mode == "train" else self._mode, sample_id, "mask")
        mask = self._mask
        hidden = block_mask(self._grid, self._budget, mask.min_block, mask.max_block, mask.min_aspect, rng)
        return hidden.reshape(1, -1)

    def _augmented(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        view = draw_view(*upright_size(image), self._augment, rng)
        full = decoded(image, self._shrink(view.box))
        # The box is drawn in the flipped image; the pixels are cut from the one that is not.
        first, top, last, bottom = view.box
        width = full.size[0]
        left, top, right, bottom = full.box((width - last, top, width - first, bottom) if view.flip else view.box)
        # Whole pixels, since the published crop is a copy: resizing must not blend in what lies around it. Without
        # draft decoding the box already is whole.
        cut = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
        crop = jittered_crop(full.rgb, cut, view.colour)
        inner = left - cut[0], top - cut[1], right - cut[0], bottom - cut[1]
        if view.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            inner = crop.width - inner[2], inner[1], crop.width - inner[0], inner[3]
        return crop.resize((self._size, self._size), BICUBIC, box=inner)

    def _centred(self, image: Image.Image) -> Image.Image:
        """The short side resized to S, the centre cut out."""
        box = centre_square(*upright_size(image))
        full = decoded(image, self._shrink(box))
        return full.rgb.resize((self._size, self._size), BICUBIC, box=full.box(box))

    def _shrink(self, box: Box) -> float:
        """By how much a photo may be decoded smaller: the box keeps at least S pixels in both directions."""
        return min(box[2] - box[0], box[3] - box[1]) / self._size if self._augment.draft else 1.0


def jittered_crop(rgb: Image.Image, cut: PixelBox, colour: Colour) -> Image.Image:
    """The part `cut` of the image after the operations on the WHOLE image, byte for byte as PIL.ImageEnhance has it.

    Only contrast looks beyond a pixel, at the mean gray of the image as it is by then. So what comes before it is
    computed for the whole image, and it and what follows for the part alone.
    """
    if not colour:
        return rgb.crop(cut)
    contrast = [name for name, _ in colour].index("contrast")
    for name, factor in colour[:contrast]:
        rgb = _enhanced(rgb, name, factor, gray=0)
    gray = int(ImageStat.Stat(rgb.convert("L")).mean[0] + 0.5)
    crop = rgb.crop(cut)
    for name, factor in colour[contrast:]:
        crop = _enhanced(crop, name, factor, gray)
    return crop


def _enhanced(rgb: Image.Image, name: str, factor: float, gray: int) -> Image.Image:
    """Blend with black (brightness), with `gray` (contrast) or with the image's own gray (saturation)."""
    if name == "saturation":
        return Image.blend(rgb.convert("L").convert("RGB"), rgb, factor)
    return Image.blend(Image.new("RGB", rgb.size, (gray if name == "contrast" else 0,) * 3), rgb, factor)
