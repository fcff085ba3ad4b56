"""Worker side of images: decode, augment, mask. Everything random is pure in (seed, epoch, sample id).

Random numbers come from one generator per sample and purpose, keyed by a hash, so neither the number of ranks or
workers nor the order of reading can change a crop or a mask, and switching one augmentation off leaves the masks alone.
"""

from __future__ import annotations

import math
import warnings
from hashlib import blake2b

import numpy as np
import torch
from PIL import Image, ImageEnhance

from megad2v.config.schema import AugmentConfig, Config
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.draws import generator
from megad2v.modalities.sample import Mode, Sample
from megad2v.modalities.vision.decode import JPEG_FORMATS, open_image, orientation, upright_rgb
from megad2v.modalities.vision.masking import block_mask, mask_budget

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels."""

ASPECT = (3 / 4, 4 / 3)
"""Aspect ratios of the random resized crop (spec 3.1: the usual default)."""
CROP_ATTEMPTS = 10
BICUBIC = Image.Resampling.BICUBIC
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def random_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """Random resized crop: area uniform in `scale` x the image's, aspect log-uniform in 3/4..4/3.

    When no draw fits (very long images), the largest centred box whose aspect is in range.
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
    w = max(1, min(width, round(height * aspect)))
    h = max(1, min(height, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_square(width: int, height: int) -> Box:
    """The box that "resize the short side, then crop the centre" leaves."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


class VisionTransform:
    """Encoded image -> uint8 (C, S, S), mask (1, T) and fingerprint, as the configuration and mode say.

    Raises UserError when `vision`, `augment` or `mask` values cannot work; calling raises BadSample.
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
        _check(config)

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
            image = self._cropped(image, None)
        pixels_chw = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        mask = self._draw_mask(sample_id, epoch)
        print_ = blake2b(pixels_chw, digest_size=8)
        print_.update(mask)
        return Sample(torch.from_numpy(pixels_chw), torch.from_numpy(mask), print_.hexdigest())

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
        image = self._cropped(image, rng)
        if self._augment.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _jitter(image, self._augment, rng) if self._augment.jitter else image

    def _cropped(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        """Decode, cut a box (random, or without `rng` the central square) and resize it to (S, S)."""
        width, height = image.size
        if orientation(image) >= 5:  # stored on its side; boxes are in the frame that people see
            width, height = height, width
        augment = self._augment
        if rng is None:
            box = centre_square(width, height)
        else:
            box = random_box(width, height, (augment.crop_scale_min, augment.crop_scale_max), rng)
        _draft(image, box, self._size)
        rgb = upright_rgb(image)
        across, down = rgb.width / width, rgb.height / height
        scaled = (box[0] * across, box[1] * down, min(box[2] * across, rgb.width), min(box[3] * down, rgb.height))
        return rgb.resize((self._size, self._size), BICUBIC, box=scaled)


def _draft(image: Image.Image, box: Box, size: int) -> None:
    """Let libjpeg decode a photo at 1/2, 1/4 or 1/8 where the box keeps at least `size` pixels on both sides.

    Large photos decode several times faster and the crop loses no resolution that the output could show.
    """
    if image.format not in JPEG_FORMATS:
        return
    shrink = min(box[2] - box[0], box[3] - box[1]) / size
    if shrink >= 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pillow picks the largest of 1, 2, 4, 8 that leaves at least this size; the mode stays the file's own.
            image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))


def _jitter(image: Image.Image, augment: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation by factors in 1 +- jitter, in random order."""
    factors = [1 + augment.jitter * (2 * rng.random() - 1) for _ in ENHANCERS]
    order = sorted(range(len(ENHANCERS)), key=[rng.random() for _ in ENHANCERS].__getitem__)
    for which in order:
        image = ENHANCERS[which](image).enhance(max(0.0, factors[which]))
    return image


def _check(config: Config) -> None:
    """Refuse values that would fail, or quietly do something else, deep inside a worker."""
    vision, augment, mask = config.vision, config.augment, config.mask
    if vision.image_size < 1 or vision.patch_size < 1 or vision.image_size % vision.patch_size:
        raise UserError(
            f"vision.image_size: {vision.image_size} is not a multiple of vision.patch_size {vision.patch_size}"
        )
    if vision.channels != 3:
        raise UserError(f"vision.channels: images are read as RGB, expected 3, got {vision.channels}")
    if not 0 < augment.crop_scale_min <= augment.crop_scale_max <= 1:
        raise UserError(
            "augment.crop_scale_min, crop_scale_max: expected 0 < min <= max <= 1, "
            f"got {augment.crop_scale_min} and {augment.crop_scale_max}"
        )
    if augment.jitter < 0:
        raise UserError(f"augment.jitter: expected 0 or more, got {augment.jitter}")
    if not 0 <= mask.ratio <= 1:
        raise UserError(f"mask.ratio: expected 0 to 1, got {mask.ratio}")
    if not 0 < mask.min_aspect <= 1:
        raise UserError(f"mask.min_aspect: expected more than 0, at most 1, got {mask.min_aspect}")
    if mask.min_block < 1 or (mask.max_block is not None and mask.max_block < mask.min_block):
        raise UserError(
            f"mask.min_block, mask.max_block: expected 1 <= min <= max, got {mask.min_block}, {mask.max_block}"
        )
