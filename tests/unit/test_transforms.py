"""Worker side of images: odd files, shapes, and purity in (seed, epoch, sample id). What is drawn: test_augment.py."""

from __future__ import annotations

import csv
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megad2v.config.modalities import AugmentConfig, MaskConfig
from megad2v.config.schema import TrainConfig
from megad2v.modalities.sample import BadSample
from megad2v.modalities.vision import transforms
from megad2v.modalities.vision.decode import open_image, pixel_count, upright_rgb
from megad2v.modalities.vision.transforms import VisionTransform, centre_square
from tests.unit.data_helpers import config, encoded, jpeg, picture, turned

CONFIG = config(None)
PLAIN = replace(CONFIG, augment=AugmentConfig(crop_scale_min=1.0, flip=False, jitter=0.0))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(upright_rgb(open_image(data))).astype(int)


def distance(one: bytes, other: bytes) -> float:
    return float(np.abs(pixels(one) - pixels(other)).mean())


def test_odd_files(shared: Callable[[str], Path]) -> None:
    folder = shared("data/image/odd_files")
    with (folder / "files.tsv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    assert len(rows) > 10
    for row in rows:
        data = (folder / row["path"]).read_bytes()
        for mode in ("train", "valid"):
            transform = VisionTransform(CONFIG, mode)
            if row["pillow_result"].startswith("ERROR"):
                with pytest.raises(BadSample, match="truncated"):
                    transform(data, row["path"], 0)
            else:
                sample = transform(data, row["path"], 0)
                assert sample.inputs.shape == (3, 32, 32)
                assert mode == "train" or sample.inputs.float().std() > 5, f"{row['path']} has lost its content"


def test_orientation_is_applied(shared: Callable[[str], Path]) -> None:
    folder = shared("data/image/odd_files")
    upright = (folder / "hopper.jpg").read_bytes()
    for turn in range(2, 9):
        turned = (folder / f"hopper_orientation_{turn}.jpg").read_bytes()
        assert distance(turned, upright) < 12, turn
        assert VisionTransform(PLAIN, "valid")(turned, "x", 0).inputs.shape == (3, 32, 32)


@pytest.mark.parametrize("turn", range(1, 9))
def test_crop_of_a_turned_image(turn: int) -> None:
    """The box is drawn in the upright frame: a turned file gives the crop that the upright file gives."""
    upright = picture(3, 90, 60)
    transform = VisionTransform(CONFIG, "train")
    expected = transform(encoded(upright, "PNG"), "id", 0).inputs.int()
    given = transform(turned(upright, turn, "PNG"), "id", 0).inputs.int()
    assert (given == expected).all()


def test_cmyk_twin(shared: Callable[[str], Path]) -> None:
    folder = shared("data/image/odd_files")
    files = [(folder / f"pil_sample_{mode}.jpg").read_bytes() for mode in ("cmyk", "rgb")]
    assert distance(*files) < 25, "inverted CMYK would be further away"


def test_modes_become_rgb() -> None:
    gray16 = Image.fromarray(np.full((20, 20), 32_768 + 255, dtype=np.uint16))
    assert (pixels(encoded(gray16, "PNG")) == 128).all(), "16 bits are scaled, not clipped"
    half = Image.new("RGBA", (20, 20), (200, 0, 0, 0))
    assert (pixels(encoded(half, "PNG")) == 255).all(), "transparent is white, not the hidden colour"
    assert (pixels(encoded(half, "WEBP", lossless=True)) == 255).all()
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (pixels(encoded(palette, "PNG")) == [10, 20, 30]).all()
    assert (pixels(encoded(palette, "PNG", transparency=1)) == 255).all()
    for mode, value in (("1", 1), ("L", 255), ("LA", (255, 255))):
        assert (pixels(encoded(Image.new(mode, (20, 20), value), "PNG")) == 255).all(), mode
    assert np.abs(pixels(encoded(Image.new("CMYK", (20, 20), (0, 0, 0, 0)))) - 255).max() <= 2


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT" + bytes(13)


@pytest.mark.parametrize(
    "data,reason",
    [
        (b"", "not a JPEG, PNG or WebP"),
        (b"hello", "not a JPEG, PNG or WebP"),
        (encoded(picture(1), "GIF"), "not a JPEG, PNG or WebP"),
        (encoded(picture(1), "TIFF"), "not a JPEG, PNG or WebP"),
        (jpeg(1)[:400], "[Tt]runcated|broken|not a JPEG"),
        (encoded(picture(1), "PNG")[:-700], "truncated|broken"),
        (encoded(picture(1), "WEBP")[:-100], "."),
        (png_header(10_000, 9_000), "90000000|10000 x 9000"),
        (png_header(60_000, 60_000), "Decompression|60000 x 60000"),
    ],
    ids=["empty", "text", "gif", "tiff", "cut-jpeg", "cut-png", "cut-webp", "large", "bomb"],
)
def test_bad_samples(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason) as caught:
        VisionTransform(CONFIG, "train")(data, "id", 0)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert "0x" not in message, "an address would differ from run to run"


def test_random_bytes_never_raise_anything_else() -> None:
    """Bits flipped anywhere in a file give a sample or a reason, never a crash of the worker."""
    rng = np.random.default_rng(0)
    transform = VisionTransform(CONFIG, "train")
    outcomes = {"sample": 0, "bad": 0}
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(picture(5), kind)
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(0, 256)
            try:
                transform(bytes(data), "id", 0)
                outcomes["sample"] += 1
            except BadSample:
                outcomes["bad"] += 1
    assert min(outcomes.values()) > 10, outcomes


def test_pure_in_seed_epoch_and_id() -> None:
    data = jpeg(1)

    def prints(seed: int = 3, epoch: int = 0, sample_id: str = "a.tar/0", mode: transforms.Mode = "train") -> str:
        return VisionTransform(replace(CONFIG, train=TrainConfig(seed=seed)), mode)(data, sample_id, epoch).fingerprint

    assert len({prints(), prints(seed=4), prints(epoch=1), prints(sample_id="a.tar/1")}) == 4
    torch.manual_seed(1)
    first = prints()
    torch.manual_seed(2)
    assert prints() == first
    transform = VisionTransform(CONFIG, "train")
    forward = [transform(data, str(i), 0).fingerprint for i in range(6)]
    assert [transform(data, str(i), 0).fingerprint for i in reversed(range(6))] == forward[::-1]
    assert prints(mode="valid") == prints(mode="valid", epoch=5), "validation does not follow the epoch"
    assert prints(mode="valid") != prints(mode="valid", sample_id="a.tar/1"), "but masks differ from image to image"


def test_fingerprint_tells_crop_and_mask() -> None:
    sample = VisionTransform(CONFIG, "train")(jpeg(1), "id", 0)
    other_mask = VisionTransform(replace(CONFIG, mask=MaskConfig(ratio=0.3)), "train")(jpeg(1), "id", 0)
    other_crop = VisionTransform(replace(CONFIG, augment=AugmentConfig(jitter=0.1)), "train")(jpeg(1), "id", 0)
    assert (sample.inputs == other_mask.inputs).all(), "mask settings leave the crop alone"
    assert (sample.mask_mt == other_crop.mask_mt).all(), "augmentation settings leave the mask alone"
    assert len({sample.fingerprint, other_mask.fingerprint, other_crop.fingerprint}) == 3


def test_shapes_and_masks() -> None:
    for mode, hidden in (("train", True), ("valid", True), ("probe", False)):
        sample = VisionTransform(CONFIG, mode)(jpeg(1), "id", 0)
        assert (sample.inputs.dtype, sample.inputs.shape) == (torch.uint8, (3, 32, 32))
        assert (sample.mask_mt.dtype, sample.mask_mt.shape) == (torch.bool, (1, 16))
        assert sample.inputs.is_contiguous()
        assert 0 < sample.mask_mt.sum() <= 8 if hidden else not sample.mask_mt.any()
    control = VisionTransform(replace(CONFIG, mask=MaskConfig(ratio=0.0)), "train")
    assert not control(jpeg(1), "id", 0).mask_mt.any()


def test_without_augmentation_the_crop_is_the_image() -> None:
    image = picture(2, 32, 32)
    for mode in ("train", "valid", "probe"):
        given = VisionTransform(PLAIN, mode)(encoded(image, "PNG"), "id", 3).inputs
        assert (given.numpy() == np.asarray(image).transpose(2, 0, 1)).all(), mode


def test_validation_crops_the_centre() -> None:
    image = Image.new("RGB", (96, 32))
    image.paste((9, 99, 199), (32, 0, 64, 32))
    given = VisionTransform(CONFIG, "valid")(encoded(image, "PNG"), "id", 0).inputs
    assert (given == torch.tensor([9, 99, 199], dtype=torch.uint8)[:, None, None]).all()
    assert centre_square(96, 32) == (32, 0, 64, 32)
    assert VisionTransform(CONFIG, "valid")(jpeg(1, 5, 3), "id", 0).inputs.shape == (3, 32, 32), "small ones grow"


def test_pixel_count() -> None:
    assert pixel_count(jpeg(1, 40, 36)[:700]) == 40 * 36
    assert pixel_count(b"junk") == 0
