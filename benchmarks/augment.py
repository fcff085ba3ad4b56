"""What a training image costs a worker: decoding, colours, crop and resizing, mask; CPU milliseconds per image.

    python benchmarks/augment.py ../shared/data/image/clothing_fullsize [--size 224] [--images 200] [--output FILE]

Colours, three ways: `whole`, the published operations on the whole image, one after the other; `ours`, the same bytes
with less work (`transforms.jittered_crop`); `resized`, on the finished crop, which gives other pixels and is here only
to show what the published order costs. Totals are of whole samples, with and without `augment.draft`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import PIL
from PIL import Image, ImageEnhance

from megad2v.config.load import load_config
from megad2v.config.schema import Config
from megad2v.modalities.draws import generator
from megad2v.modalities.vision.decode import open_image, upright_rgb, upright_size
from megad2v.modalities.vision.transforms import BICUBIC, VisionTransform, draw_view, jittered_crop

REPEATS = 5
ENHANCE = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}


def milliseconds(action: Callable[[], Any]) -> float:
    """CPU time of the fastest of a few calls: what else runs on the machine can only make a call slower."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        action()
        best = min(best, time.process_time() - start)
    return best * 1e3


def enhanced(image: Image.Image, colour: tuple[tuple[str, float], ...]) -> Image.Image:
    """The published operations, one after the other."""
    for name, factor in colour:
        image = ENHANCE[name](image).enhance(factor)
    return image


def measure(data: bytes, name: str, config: Config) -> dict[str, float]:
    """One image, every stage."""
    size = (config.vision.image_size,) * 2
    exact = replace(config, augment=replace(config.augment, draft=False))
    view = draw_view(*upright_size(open_image(data)), config.augment, generator(0, 0, name, "augment"))
    rgb = upright_rgb(open_image(data))
    resized = rgb.resize(size, BICUBIC, box=view.box)
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    samplers = {draft: VisionTransform(c, "train") for draft, c in (("draft", config), ("full", exact))}
    masks = samplers["full"]
    return {
        "decode": milliseconds(lambda: upright_rgb(open_image(data))),
        "colour_whole": milliseconds(lambda: enhanced(rgb, view.colour)),
        "colour_ours": milliseconds(lambda: jittered_crop(rgb, view.box, view.colour)),
        "colour_resized": milliseconds(lambda: enhanced(resized, view.colour)),
        "crop_flip_resize": milliseconds(lambda: rgb.crop(view.box).transpose(flip).resize(size, BICUBIC)),
        "mask": milliseconds(lambda: masks._draw_mask(name, 0)),
        "sample_full": milliseconds(lambda: samplers["full"](data, name, 0)),
        "sample_draft": milliseconds(lambda: samplers["draft"](data, name, 0)),
    }


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="searched for *.jpg")
    parser.add_argument("--size", type=int, default=224, help="vision.image_size; patches of a 14th")
    parser.add_argument("--images", type=int, default=200, help="at most so many, evenly over the folder")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, help="append one JSON line")
    arguments = parser.parse_args()
    paths = sorted(arguments.folder.rglob("*.jpg"))
    if not paths:
        parser.error(f"{arguments.folder}: holds no *.jpg")
    paths = paths[:: max(1, len(paths) // arguments.images)][: arguments.images]
    config = load_config(
        "vision_tiny",
        vision__image_size=arguments.size,
        vision__patch_size=arguments.size // 14,
        mask__ratio=120 / 196,
        mask__min_block=16,
        augment__crop_scale_min=0.08,
    )
    rows = [measure(path.read_bytes(), path.name, config) for path in paths]
    sizes = [open_image(path.read_bytes()).size for path in paths]
    result = {
        "folder": arguments.folder.name,
        "images": len(rows),
        "mean_pixels": round(mean(width * height for width, height in sizes)),
        "image_size": arguments.size,
        "pillow": PIL.__version__,
        "milliseconds": {name: round(mean(row[name] for row in rows), 4) for name in rows[0]},
        "note": arguments.note,
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
