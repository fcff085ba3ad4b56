"""What the layout tests train: a tiny model on synthetic micro-batches that are pure in (step, micro-batch).

`plain_run` is the independent reference: vanilla modules, torch's AdamW, one process, no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megad2v.config.deepspeed_json import fill_deepspeed, read_deepspeed_json
from megad2v.config.joint import JointConfig, JointPartConfig
from megad2v.config.modalities import SpeechConfig, TextConfig, VisionConfig
from megad2v.config.schema import (
    Config,
    DataConfig,
    LossConfig,
    MicroBatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TargetsConfig,
    TeacherConfig,
    TrainConfig,
)
from megad2v.modalities.batch import Batch
from megad2v.modalities.build import build_student, build_teacher
from megad2v.modalities.speech.geometry import frame_count, samples_needed
from megad2v.models.initialise import initialise_
from megad2v.teacher.schedule import decay_at
from megad2v.training.layer_drop import kept_blocks

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES, PIXELS, PATCH = 3, 24, 8
GRID = PIXELS // PATCH
VOCABULARY, LONGEST = 23, 13
CONV_LAYERS = ((16, 10, 5), (12, 3, 2), (16, 2, 2))
TURNS = ("vision", "speech", "text", "text", "vision", "speech", "speech", "vision", "text")
"""Whose step it is, over and over: every modality comes back after itself, and after each of the others."""
LOSS_WEIGHTS = {"vision": 1.0, "speech": 0.5, "text": 2.0}


@dataclass(frozen=True)
class Layout:
    """How one training is spread over ranks; its name is what tests are called by."""

    zero: str
    """A file of ds_configs/, without .json."""
    data: int = 1
    tensor: int = 1
    sequence: bool = False
    resident: bool = False
    compiled: bool = False
    persistence: int | None = None
    scope: str = "encoder"
    precision: str = "fp32"
    modality: str = "vision"
    teacher_sees: str = "full"
    norms: str = "own"
    """joint.norms."""

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.data * self.tensor

    def __str__(self) -> str:
        """Such as zero3_tp2_dp2_sequence."""
        words = [] if self.modality == "vision" else [self.modality]
        words += [self.teacher_sees] if self.teacher_sees != "full" else []
        words += [f"{self.norms}_norms"] if self.norms != "own" else []
        words += [self.zero, *([f"tp{self.tensor}"] if self.tensor > 1 else []), f"dp{self.data}"]
        words += [word for word in ("sequence", "resident", "compiled") if getattr(self, word)]
        words += [f"persist_{self.persistence}"] if self.persistence is not None else []
        words += [self.precision] if self.precision != "fp32" else []
        return "_".join([*words, *([f"scope_{self.scope}"] if self.scope != "encoder" else [])])

    def apply(self, config: Config) -> Config:
        """`config` on this layout."""
        return replace(
            config,
            parallel=ParallelConfig(tensor=self.tensor, sequence=self.sequence),
            teacher=replace(config.teacher, resident=self.resident, scope=self.scope),
            train=replace(config.train, compile=self.compiled),
        )


def tiny_config(
    *,
    micro_batches: int = 4,
    decay: float = 0.9,
    steps: int = 20,
    scope: str = "encoder",
    modality: str = "vision",
    teacher_sees: str = "full",
    norms: str = "own",
) -> Config:
    """Two narrow blocks; layer scale 0.5 and Adam's eps 1e-6, so that gradients are not lost in rounding. Speech: its
    recipe's norms, targets and loss, copied positions, and three blocks with layer drop. Text: the same, a copied norm,
    and a vocabulary that no number of ranks divides. Joint: the three of them on two blocks without layer drop, vision
    with a front end of the teacher's own; `norms` is joint.norms."""
    config = Config(
        model=ModelConfig(width=24, depth=2, heads=4, layer_scale=0.5, head_layers=1),
        vision=VisionConfig(image_size=PIXELS, patch_size=PATCH),
        targets=TargetsConfig(layers=2),
        teacher=TeacherConfig(decay_start=decay, decay_end=0.99, decay_steps=steps, scope=scope),
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-6, clip=0.5),
        data=DataConfig(micro_batch=MicroBatchConfig(samples=SAMPLES)),
        train=TrainConfig(micro_batches_per_step=micro_batches, steps=steps),
    )
    if modality == "joint":
        return _as_joint(config, norms)
    if modality == "text":
        return _as_text(config, teacher_sees)
    return config if modality == "vision" else _as_speech(config)


def matrix_config() -> Config:
    """Sizes that neither 2 nor 4 ranks share evenly: width 18 in heads of 9, MLPs of 70, so that every kind of fragment
    ends in padding somewhere."""
    config = tiny_config(steps=10)
    return replace(config, model=replace(config.model, width=18, heads=2, mlp_ratio=3.9))


def _as_speech(config: Config) -> Config:
    model = ModelConfig(
        width=24,
        depth=3,
        heads=4,
        norm="post",
        layer_scale=None,
        qkv_bias="full",
        relative_bias=False,
        head_layers=1,
        layer_drop=0.3,
    )
    return replace(
        config,
        modality="speech",
        model=model,
        speech=SpeechConfig(conv_layers=CONV_LAYERS, position_depth=2, position_kernel=5, position_groups=4),
        targets=TargetsConfig(layers=2, tensor="ffn", layer_norm="instance", average_norm="none", padding="include"),
        loss=LossConfig(kind="mse"),
        teacher=replace(config.teacher, copied=("positions",)),
    )


def _as_text(config: Config, teacher_sees: str) -> Config:
    model = ModelConfig(
        width=24,
        depth=2,
        heads=4,
        norm="post",
        layer_scale=None,
        qkv_bias="full",
        relative_bias=False,
        head_layers=2,
        init="bert",
    )
    return replace(
        config,
        modality="text",
        model=model,
        text=TextConfig(vocabulary=VOCABULARY, max_tokens=LONGEST, teacher_sees=teacher_sees),
        targets=TargetsConfig(layers=2, tensor="ffn", layer_norm="layer", average_norm="none"),
        loss=LossConfig(kind="smooth_l1", beta=4.0, scale="sum"),
        teacher=replace(config.teacher, copied=("norm",)),
    )


def _as_joint(config: Config, norms: str) -> Config:
    parts = {}
    for name, alone in (("vision", config), ("speech", _as_speech(config)), ("text", _as_text(config, "full"))):
        copied = alone.teacher.copied if norms == "own" or name != "text" else ()  # shared ones are pre-norm
        parts[name] = JointPartConfig(
            weight=1.0,
            loss_weight=LOSS_WEIGHTS[name],
            norm=alone.model.norm,
            layer_scale=alone.model.layer_scale,
            relative_bias=alone.model.relative_bias,
            head_layers=alone.model.head_layers,
            scope="model" if name == "vision" else "encoder",
            copied=copied,
            targets=alone.targets,
            loss=alone.loss,
            micro_batch=MicroBatchConfig(samples=SAMPLES),
        )
    return replace(
        config,
        modality="joint",
        speech=_as_speech(config).speech,
        text=_as_text(config, "full").text,
        optimizer=replace(config.optimizer, clip=3.0),  # some steps are clipped, some are not
        joint=JointConfig(norms=norms, **parts),
    )


def modality_in(config: Config, step: int) -> str:
    """Whose step it is."""
    return TURNS[step % len(TURNS)] if config.modality == "joint" else config.modality


def kept_in(config: Config, step: int) -> tuple[int, ...] | None:
    """Blocks of the student that run in a step, as the trainer draws them."""
    return kept_blocks(config.train.seed, step, depth=config.model.depth, rate=config.model.layer_drop)


def micro_batch(step: int, m: int, modality: str = "vision", teacher_sees: str = "full") -> Batch:
    """A micro-batch of any modality, pure in its arguments; `teacher_sees` is text's."""
    if modality == "text":
        return _tokens(step, m, teacher_sees)
    return _waveforms(step, m) if modality == "speech" else _images(step, m)


def micro_batch_of(config: Config, step: int, m: int) -> Batch:
    """`micro_batch` of the step's modality."""
    return micro_batch(step, m, modality_in(config, step), config.text.teacher_sees)


def _tokens(step: int, m: int, teacher_sees: str) -> Batch:
    """Rows of ids of which lengths and counts of chosen tokens differ, some rows without any; now and then a
    micro-batch that lost its samples, so that a row of zeros is left."""
    generator = torch.Generator().manual_seed(1000 * step + m)
    longest = 8 + (3 * step + 5 * m) % (LONGEST - 7)
    if (step + m) % 7 == 3:
        zeros = torch.zeros(1, 2, longest, dtype=torch.int64)
        return Batch("text", zeros, torch.zeros(1, 1, longest, dtype=torch.bool))
    ids = torch.randint(4, VOCABULARY - 1, (SAMPLES, longest), generator=generator)
    real = torch.tensor([longest - (row * (step + m)) % 5 for row in range(SAMPLES)])
    ids[:, 0] = 0
    ids[torch.arange(SAMPLES), real - 1] = 2
    padding = torch.arange(longest)[None] >= real[:, None]
    ids[padding] = 1
    mask = torch.zeros(SAMPLES, longest, dtype=torch.bool)
    for row, count in enumerate(real.tolist()):
        mask[row, torch.randperm(count, generator=generator)[: (step + 2 * m + row) % (count - 1)]] = True
    seen = ids
    if teacher_sees == "masked_only":
        seen = ids.masked_fill(~mask & mask.any(1, keepdim=True), 1)
    return Batch(
        "text",
        torch.stack([seen, ids.masked_fill(mask, VOCABULARY - 1)], dim=1),
        mask[:, None],
        padding_bt=padding if padding.any() else None,
        sample_ids=tuple(f"s{step}-{m}-{row}" for row in range(SAMPLES)),
    )


def _waveforms(step: int, m: int) -> Batch:
    """Waveforms whose length differs between micro-batches, some with padding; counts of hidden frames differ too."""
    generator = torch.Generator().manual_seed(1000 * step + m)
    frames = 9 + (3 * step + 5 * m) % 11
    real = [frames - (row * (step + m)) % 4 for row in range(SAMPLES)]
    waveforms = torch.randn(SAMPLES, samples_needed(frames, CONV_LAYERS) + m, generator=generator)
    mask = torch.zeros(SAMPLES, 1, frame_count(waveforms.shape[1], CONV_LAYERS), dtype=torch.bool)
    padding = torch.arange(mask.shape[2])[None] >= torch.tensor(real)[:, None]
    for row, count in enumerate(real):
        waveforms[row, samples_needed(count, CONV_LAYERS) :] = 0.0
        mask[row, 0, torch.randperm(count, generator=generator)[: 1 + (step + 2 * m + row) % (count - 2)]] = True
    return Batch(
        "speech",
        waveforms,
        mask,
        padding_bt=padding if padding.any() else None,
        sample_ids=tuple(f"s{step}-{m}-{row}" for row in range(SAMPLES)),
    )


def _images(step: int, m: int) -> Batch:
    """Images and masks whose counts of hidden patches differ between micro-batches."""
    generator = torch.Generator().manual_seed(1000 * step + m)
    images = torch.randint(0, 256, (SAMPLES, 3, PIXELS, PIXELS), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(SAMPLES, 1, GRID * GRID, dtype=torch.bool)
    for row in range(SAMPLES):
        count = 1 + (step + 2 * m + row) % (GRID * GRID - 2)
        mask[row, 0, torch.randperm(GRID * GRID, generator=generator)[:count]] = True
    return Batch("vision", images, mask, sample_ids=tuple(f"s{step}-{m}-{row}" for row in range(SAMPLES)))


def deepspeed_config(
    config: Config,
    layout: str,
    world: int,
    persistence: int | None = None,
    precision: str = "fp32",
    prefetch: int | None = None,
) -> dict[str, Any]:
    """The filled JSON of ds_configs/`layout`.json."""
    ds = read_deepspeed_json(REPOSITORY / "ds_configs" / f"{layout}.json")
    if persistence is not None:
        ds["zero_optimization"]["stage3_param_persistence_threshold"] = persistence
    if prefetch is not None:
        ds["zero_optimization"]["stage3_prefetch_bucket_size"] = prefetch
    return fill_deepspeed(ds, config, precision=precision, data_parallel=world)


def plain_run(
    config: Config,
    steps: int,
    *,
    student: Any = None,
    prepare: Callable[[Any, int], None] = lambda student, step: None,
) -> dict[str, Any]:
    """Step-1 gradients (before clipping), loss and gradient norm per step, final student and teacher; float64.

    `prepare` is called before each step. What a step does not use (blocks that layer drop leaves out, parts of other
    modalities) has a gradient of zeros: moments decay and weight decay goes on. One thread: the tensors have hundreds
    of elements, and threads would only wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    student, teacher = student if student is not None else build_student(config), build_teacher(config)
    initialise_(student, config.train.seed)
    student, teacher = student.double(), teacher.double()
    names = dict(teacher.named_parameters())
    teacher.load_state_dict({n: p for n, p in student.state_dict().items() if n in names}, strict=False)
    o = config.optimizer
    adamw = torch.optim.AdamW(student.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    copied = tuple(f"encoder.{part}." for part in config.teacher.copied)
    if config.modality == "joint":
        own = {name: getattr(config.joint, name).copied for name in LOSS_WEIGHTS}
        copied = tuple(f"encoder.parts.{name}.{part}." for name, parts in own.items() for part in parts)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        prepare(student, step)
        batches = [micro_batch_of(config, step, m) for m in range(config.train.micro_batches_per_step)]
        run = kept_in(config, step)
        count = sum(batch.masked_count() for batch in batches)
        total = 0.0
        for batch in batches:
            loss = _forward_double(student, batch, teacher, run) / count
            (loss * (LOSS_WEIGHTS[batch.modality] if config.modality == "joint" else 1.0)).backward()
            total += float(loss.detach())
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in student.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), o.clip)))
        losses.append(total)
        adamw.step()
        adamw.zero_grad(set_to_none=False)
        t = config.teacher
        decay = decay_at(step + 1, start=t.decay_start, end=t.decay_end, steps=t.decay_steps)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if name.startswith(copied):
                    names[name].copy_(parameter)
                elif name in names:
                    names[name].mul_(decay).add_(parameter, alpha=1 - decay)
    torch.set_num_threads(threads)
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "student": {n: p.detach().clone() for n, p in student.named_parameters()},
        "teacher": {n: p.detach().clone() for n, p in names.items()},
    }


def _forward_double(student: Any, batch: Batch, teacher: Any, run: Any = None) -> torch.Tensor:
    """The objective in float64 throughout: the model's own forward casts targets and loss to float32."""
    encode, encode_clean = student.encoder, teacher.encoder
    if hasattr(student, "parts"):
        encode, encode_clean = partial(encode, part=batch.modality), partial(encode_clean, part=batch.modality)
        student, teacher = student.parts[batch.modality], teacher.parts[batch.modality]
    functional, mask_bt, prefix = torch.nn.functional, batch.mask_bmt[:, 0], student.prefix_tokens
    padding_bt, spec = batch.padding_bt, student.spec
    inputs = {"vision": (batch.inputs.double() / 255 - 0.5) / 0.5, "speech": batch.inputs.double()}
    inputs, unseen_bt = inputs.get(batch.modality, batch.inputs), padding_bt
    if batch.modality == "text":
        unseen_bt = batch.inputs[:, 0] == 1
    masked, clean = student.front_end(inputs, mask_bt)
    with torch.no_grad():
        if teacher.front_end is not None:
            clean = teacher.front_end(inputs, None)[1]
        _, layers = encode_clean(clean.detach(), unseen_bt, last=spec.layers, tensor=spec.tensor)
        if batch.modality == "speech":  # over time, padding included
            layers = [(x - x.mean(1, True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt() for x in layers]
        if batch.modality == "text":
            layers = [functional.layer_norm(x, x.shape[-1:], eps=1e-5) for x in layers]
        targets = sum(layer[:, prefix:] for layer in layers) / len(layers)
        if batch.modality == "vision":
            targets = functional.layer_norm(targets, targets.shape[-1:], eps=1e-5)
    predictions = student.head(encode(masked, padding_bt, run=run)[0][:, prefix:][mask_bt])
    if batch.modality == "text":
        return functional.smooth_l1_loss(predictions, targets[mask_bt], beta=4.0, reduction="sum")
    if batch.modality == "speech":
        error = (predictions - targets[mask_bt]).square().sum()
    else:
        error = functional.smooth_l1_loss(predictions, targets[mask_bt], beta=2.0, reduction="sum")
    return error / predictions.shape[-1] ** 0.5


def with_steps(config: Config, steps: int) -> Config:
    """The same configuration over another number of steps."""
    return replace(config, train=replace(config.train, steps=steps))
