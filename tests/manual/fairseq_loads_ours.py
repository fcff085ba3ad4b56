"""fairseq itself loads what we export and computes the loss that we compute.

    python tests/manual/fairseq_loads_ours.py FAIRSEQ [--site FOLDER]... [--size base]

FAIRSEQ is a checkout of facebookresearch/fairseq (commit 3d262bb); README.md beside this file says what else it needs.
For each of data2vec_audio (both extractor modes), data2vec_text and data2vec_vision, with random weights in which no
bias, norm or table is at its start: our checkpoint, `tools/convert_checkpoint.py --to fairseq`, fairseq's own
`load_model_ensemble_and_task`, its own forward on the same input and mask, ours, and the two losses. Exit code 1 where
one differs by more than RTOL.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor

from megad2v.config.load import load_config
from megad2v.config.schema import Config
from megad2v.convert.fairseq import FILE, export_fairseq
from megad2v.convert.fairseq_run import import_fairseq, load_model, silent
from megad2v.convert.load import open_checkpoint
from megad2v.modalities.build import build_student, build_teacher
from megad2v.modalities.speech.geometry import samples_needed
from megad2v.modalities.text.codecs import PAD
from tests.checkpoints import perturb_, small_config, small_speech_config, small_text_config, write_small_checkpoint

RTOL = 1e-6
COMMIT = "3d262bb"


def shims() -> None:
    """What fairseq of 2022 misses in Python 3.11, numpy 2 and a torchvision without operators (spec 8.13)."""
    processed = dataclasses._process_class

    def hashable(cls: type, *rest: object, **more: object) -> type:
        made = processed(cls, *rest, **more)
        if made.__hash__ is None:  # Python 3.11 takes that for a mutable default
            made.__hash__ = object.__hash__
        return made

    dataclasses._process_class = hashable
    for name, kind in (("int", int), ("float", float), ("bool", bool)):
        if name not in np.__dict__:
            setattr(np, name, kind)
    six = types.ModuleType("torch._six")
    six.inf, six.container_abcs, six.string_classes = math.inf, __import__("collections.abc").abc, (str,)
    sys.modules["torch._six"] = six
    # A CUDA wheel of torchvision has no operators beside a CPU torch; none is called.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


Loss = Callable[..., tuple[float, int]]


def audio_inputs(config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(2, S) waveforms, and an odd number of frames, which fairseq pads by one."""
    frames, layers = (49 if config.model.width >= 768 else 39), config.speech.conv_layers
    waveforms = torch.randn(2, samples_needed(frames, layers), generator=generator)
    return waveforms, torch.rand(2, frames, generator=generator) < 0.5


def audio_loss(model: torch.nn.Module, inputs: Tensor, mask_bt: Tensor) -> tuple[float, int]:
    """fairseq's."""
    result = model(inputs, mask_indices=mask_bt)
    return float(result["losses"]["regression"]), int(result["sample_size"])


def text_inputs(config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(2, 2, T): what the teacher sees and what the student sees; the second row has padding behind."""
    vocabulary, length = config.text.vocabulary, min(config.text.max_tokens, 64)
    ids = torch.randint(4, vocabulary - 1, (2, length), generator=generator)
    padding = torch.arange(length)[None] >= torch.tensor([length, length - 9])[:, None]
    mask = (torch.rand(2, length, generator=generator) < 0.4) & ~padding
    student = ids.masked_fill(mask, vocabulary - 1).masked_fill(padding, PAD)
    seen = ids if config.text.teacher_sees == "full" else ids.masked_fill(~mask, PAD)
    return torch.stack((seen.masked_fill(padding, PAD), student), dim=1), mask


def text_loss(model: torch.nn.Module, inputs: Tensor, mask_bt: Tensor) -> tuple[float, int]:
    """fairseq's."""
    result = model(inputs[:, 1], target_tokens=inputs[:, 0])
    return float(result["losses"]["main"]), int(result["sample_size"])


def vision_inputs(config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(2, 3, H, W), and different numbers of hidden patches."""
    size = config.vision.image_size
    mask = torch.rand(2, (size // config.vision.patch_size) ** 2, generator=generator) < 0.4
    return torch.randn(2, 3, size, size, generator=generator), mask


def vision_loss(model: torch.nn.Module, inputs: Tensor, mask_bt: Tensor) -> tuple[float, int]:
    """fairseq's, which draws its own mask: given ours."""
    grid = round(mask_bt.shape[1] ** 0.5)
    model.make_mask = lambda *_: mask_bt.view(-1, grid, grid).long()
    result = model(inputs)
    return float(result["losses"]["regression"]), int(result["sample_size"])


def tiny() -> dict[str, Config]:
    """Some 20,000 parameters each."""
    speech, text = small_speech_config(), small_text_config()
    group = replace(speech, speech=replace(speech.speech, extractor_norm="group", conv_bias=True))
    return {
        "audio, layer norms": speech,
        "audio, one group norm": group,
        "text, teacher sees all": text,
        "text, teacher sees masked": replace(text, text=replace(text.text, teacher_sees="masked_only")),
        "vision, fairseq's port": small_config(mlp_ratio=4.0),
    }


def base() -> dict[str, Config]:
    """The released recipes."""
    text = load_config("text_base_fairseq")
    return {
        "audio base": load_config("speech_base"),
        "text base": replace(text, text=replace(text.text, vocabulary=50_265)),
        "vision base, fairseq's port": load_config("vision_base_d2v1"),
    }


PROGRAMS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Loss]] = {
    "speech": (audio_inputs, audio_loss),
    "text": (text_inputs, text_loss),
    "vision": (vision_inputs, vision_loss),
}


@torch.no_grad()
def compare(name: str, config: Config, folder: Path) -> bool:
    """One line: both losses. True where they agree."""
    size = 0.1 if config.model.width < 100 else 0.01
    student, teacher = perturb_(build_student(config), 1, size), perturb_(build_teacher(config), 2, size)
    state = {kind: dict(model.named_parameters()) for kind, model in (("student", student), ("teacher", teacher))}
    write_small_checkpoint(folder / "run", config, state, step=7, ranks=2)
    parity = export_fairseq(open_checkpoint(folder / "run"), folder / "export")
    assert parity["fairseq"]["run"], parity["fairseq"]
    draw, their_loss = PROGRAMS[config.modality]
    inputs, mask_bt = draw(config, torch.Generator().manual_seed(3))
    padding = inputs[:, 1] == PAD if config.modality == "text" else None
    ours, _, _ = student(inputs, mask_bt[:, None], teacher, padding)
    model = load_model(folder / "export" / FILE)
    with silent():
        theirs, count = their_loss(model, inputs, mask_bt)
    parameters = sum(p.numel() for p in model.parameters())
    relative = abs(float(ours) - theirs) / abs(theirs)
    agree = relative <= RTOL and count == int(mask_bt.sum())
    print(
        f"{name:28s} {parameters:11,d} parameters  positions {count:3d}  loss of fairseq {theirs:.9g}  ours "
        f"{float(ours):.9g}  relative {relative:.1e}  hidden states {parity['fairseq']['relative']:.1e}"
        f"{'' if agree else '  DIFFERS'}",
        flush=True,
    )
    return agree


def main() -> int:
    """Exit code 0 where all agree."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("fairseq", type=Path, help="checkout of facebookresearch/fairseq")
    top.add_argument("--site", type=Path, action="append", default=[], help="folder of packages for it alone")
    top.add_argument("--size", choices=("tiny", "base", "both"), default="both")
    arguments = top.parse_args()
    warnings.filterwarnings("ignore")  # of 2022's code under today's torch
    shims()
    sys.path[:0] = [str(path.resolve()) for path in (arguments.fairseq, *arguments.site)]
    fairseq, why = import_fairseq()
    logging.disable(logging.WARNING)
    if fairseq is None:
        print(f"{why}; see tests/manual/README.md", file=sys.stderr)
        return 2
    revision = subprocess.run(
        ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    print(
        f"fairseq {fairseq.__version__} ({COMMIT}), megad2v at {revision.stdout.strip()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}; float32 on a CPU, eval mode, "
        f"rtol {RTOL:g}"
    )
    configs = {**(tiny() if arguments.size != "base" else {}), **(base() if arguments.size != "tiny" else {})}
    agree = []
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            agree.append(compare(name, config, Path(folder)))
    print("all agree" if all(agree) else "NOT ALL AGREE")
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
