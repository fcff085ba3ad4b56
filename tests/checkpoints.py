"""Small models and checkpoints for tests, without a training run or a process group."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megad2v.checkpoint.catalog import step_directory
from megad2v.checkpoint.layout import INDEX, ExtraRecord, FileRecord, Index, Piece, fragments_of
from megad2v.checkpoint.stream import checksum_of
from megad2v.config.load import load_config
from megad2v.config.modalities import SpeechConfig, TextConfig, VisionConfig
from megad2v.config.schema import Config, LossConfig, ModelConfig, TargetsConfig, TeacherConfig, TrainConfig
from megad2v.modalities.build import build_student, build_teacher
from megad2v.models.initialise import initialise_


def small_config(*, scope: str = "encoder", seed: int = 3, **model: Any) -> Config:
    """A vision model of 20,000 parameters whose tensors have odd sizes."""
    shape = {"width": 24, "depth": 3, "heads": 3, "mlp_ratio": 2.0, **model}
    return Config(
        model=ModelConfig(**shape),
        vision=VisionConfig(image_size=32, patch_size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
        teacher=TeacherConfig(scope=scope),
        train=TrainConfig(seed=seed),
    )


def small_speech_config(
    *, scope: str = "encoder", seed: int = 3, speech: Mapping[str, Any] | None = None, **model: Any
) -> Config:
    """A speech model of 18,000 parameters: 20 samples a frame, and the recipe's norms, targets and loss."""
    shape = {
        "width": 24,
        "depth": 3,
        "heads": 3,
        "mlp_ratio": 2.0,
        "norm": "post",
        "layer_scale": None,
        "qkv_bias": "full",
        "relative_bias": False,
        "head_layers": 1,
        **model,
    }
    geometry = {"conv_layers": ((16, 10, 5), (12, 3, 2), (16, 2, 2)), "position_depth": 2, "position_kernel": 5}
    return Config(
        modality="speech",
        model=ModelConfig(**shape),
        speech=SpeechConfig(**{**geometry, "position_groups": 4, "max_seconds": 0.1, **(speech or {})}),
        targets=TargetsConfig(layers=2, tensor="ffn", layer_norm="instance", average_norm="none", padding="include"),
        loss=LossConfig(kind="mse", beta=0.0),
        teacher=TeacherConfig(scope=scope, copied=("positions",)),
        train=TrainConfig(seed=seed),
    )


def small_text_config(
    *, scope: str = "encoder", seed: int = 3, text: Mapping[str, Any] | None = None, **model: Any
) -> Config:
    """A text model of 21,000 parameters, with the recipe's norms, targets, loss and what the teacher copies."""
    shape = {
        "width": 24,
        "depth": 3,
        "heads": 3,
        "mlp_ratio": 2.0,
        "norm": "post",
        "layer_scale": None,
        "qkv_bias": "full",
        "relative_bias": False,
        "head_layers": 2,
        "init": "bert",
        **model,
    }
    return Config(
        modality="text",
        model=ModelConfig(**shape),
        text=TextConfig(**{"vocabulary": 101, "max_tokens": 32, **(text or {})}),
        targets=TargetsConfig(layers=2, tensor="ffn", layer_norm="layer", average_norm="none"),
        loss=LossConfig(kind="smooth_l1", beta=4.0, scale="sum"),
        teacher=TeacherConfig(scope=scope, copied=("norm",)),
        train=TrainConfig(seed=seed),
    )


def small_joint_config(**changes: Any) -> Config:
    """joint_tiny at 49,000 parameters: what its modalities differ in is the recipe's. Text has the 261 ids of bytes."""
    shape = {
        "model__width": 24,
        "model__depth": 4,
        "model__mlp_ratio": 2.0,
        "vision__image_size": 32,
        "speech__conv_layers": [[16, 10, 5], [12, 3, 2], [16, 2, 2]],
        "speech__position_depth": 2,
        "speech__position_kernel": 5,
        "speech__position_groups": 4,
        "speech__min_seconds": 0.01,
        "speech__max_seconds": 0.1,
        "text__vocabulary": 261,
        "text__max_tokens": 32,
        "train__seed": 3,
    }
    return load_config("joint_tiny", **{**shape, **changes})


def perturb_(model: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    """Move every parameter off its initial value: a norm of ones, a bias of zeros hide mistakes. In eval mode. Wide
    models want a smaller `size`, or attention becomes a choice of one and rounding grows."""
    initialise_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model.eval().requires_grad_(False)


def small_state(config: Config) -> dict[str, dict[str, Tensor]]:
    """Tensors by kind and name, student and teacher different everywhere."""
    kinds = {"student": perturb_(build_student(config), 1), "teacher": perturb_(build_teacher(config), 2)}
    return {kind: {name: p.clone() for name, p in model.named_parameters()} for kind, model in kinds.items()}


def cut(state: Mapping[str, Mapping[str, Tensor]], ranks: int, seed: int = 0) -> list[list[Piece]]:
    """Every tensor flattened and cut at random places into at most `ranks` pieces, one rank each."""
    generator = torch.Generator().manual_seed(seed)
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for kind, tensors in state.items():
        for name, value in tensors.items():
            inner = torch.randint(0, value.numel() + 1, (ranks - 1,), generator=generator).sort().values.tolist()
            for rank, (start, end) in enumerate(zip([0, *inner], [*inner, value.numel()], strict=True)):
                if start < end:
                    pieces[rank].append(Piece(kind, name, start, value.flatten()[start:end].clone()))
    return pieces


def index_fields(config: Config, shapes: Mapping[str, Iterable[int]], step: int) -> dict[str, Any]:
    """The fields of an Index besides its files."""
    return {
        "step": step,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "state": {},
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "layout": {"ranks": 3, "stage": 3},
        "code": {"megad2v": "test"},
    }


def write_small_checkpoint(
    run: Path,
    config: Config,
    state: Mapping[str, Mapping[str, Tensor]],
    *,
    step: int = 7,
    ranks: int = 3,
    extras: Mapping[str, bytes] | None = None,
) -> Path:
    """A checkpoint as `ranks` ranks would have left it, written by this process alone. Returns its directory."""
    directory = step_directory(run, step)
    directory.mkdir(parents=True)
    records = []
    for rank, pieces in enumerate(cut(state, ranks, seed=step)):
        path = directory / f"rank{rank:05d}.safetensors"
        save_file({piece.key: piece.values for piece in pieces}, path)
        records.append(FileRecord(path.name, path.stat().st_size, checksum_of(path), fragments_of(pieces)))
    shapes = {name: tuple(value.shape) for name, value in state["student"].items()}
    listed = []
    for name, content in (extras or {}).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
        listed.append(ExtraRecord(name, len(content), checksum_of(directory / name)))
    index = Index(files=records, extras=listed, **index_fields(config, shapes, step))
    (directory / INDEX).write_text(index.dumps())
    (run / "checkpoints" / "latest").write_text(directory.name + "\n")
    return directory
