"""The whole configuration of a run: a tree of frozen dataclasses.

Field docstrings are what ``--help`` prints, so they say what a key does, its unit, and where its default comes from.
Values come from here, then from recipes and YAML files (``--config``), then from the command line (``--a.b value``).
Sources: "fairseq" is its released configuration, "BEiT fork" the program that trained the published vision models;
"spec N" is section N of the numeric specification that this project was built from (docs/decisions.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megad2v.config.joint import JointConfig
from megad2v.config.modalities import (
    AugmentConfig,
    MaskConfig,
    MicroBatchConfig,
    SpeechConfig,
    TextConfig,
    VisionConfig,
)
from megad2v.config.objective import LossConfig, TargetsConfig


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer encoder that student and teacher share in shape, and the regression head of the student."""

    width: int = 192
    """Channels D of every token."""
    depth: int = 6
    """Number of Transformer blocks."""
    heads: int = 3
    """Attention heads; must divide width."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward network over width."""
    norm: Literal["pre", "post"] = "pre"
    """Layer norm before each residual branch (vision) or after each residual sum (speech, text)."""
    norm_eps: float = 1e-5
    """Epsilon of the affine layer norms (fairseq 1e-5; BEiT fork and data2vec 2.0 vision 1e-6)."""
    layer_scale: float | None = 1e-4
    """Initial value of the per-channel scale on each residual branch; null leaves it out."""
    qkv_bias: Literal["full", "no_key", "none"] = "no_key"
    """Biases of query, key and value; no_key (BEiT, data2vec vision) has none on the key."""
    relative_bias: bool = True
    """One table of relative position biases, shared by all blocks (data2vec vision)."""
    head_layers: int = 0
    """Layers of the regression head: 0 none (fairseq vision), 1 Linear D-D, 2 Linear D-2D, GELU, Linear 2D-D (text)."""
    dropout: float = 0.0
    """Dropout on embeddings and residual branches."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; earlier blocks ramp up to it linearly. Drawn per sample."""
    deep_norm: bool = False
    """DeepNorm (arXiv:2203.00555): post-norm residuals are scaled by (2 depth)^(1/4), and value, output and MLP weights
    start smaller by (8 depth)^(1/4). The paper's AudioSet models; fairseq's file only names it. Needs norm post."""
    init: Literal["fairseq", "bert", "beit"] = "fairseq"
    """Where weights start. fairseq: the encoder's from a normal of deviation 0.02, front end and head as torch starts
    them (speech, vision port). bert: the head from that normal too (text). beit: all from that normal cut at one
    deviation, biases 0, vision's tokens included (published vision)."""
    layer_drop: float = 0.0
    """Probability that a block of the student is passed over in an update (fairseq's encoder_layerdrop; speech 0.05).
    Drawn per block and update from (train.seed, step), the same for all micro-batches: fairseq draws per forward and
    rank, which could be equal neither across ranks nor across layouts. Teacher and validation run all blocks."""


@dataclass(frozen=True)
class TeacherConfig:
    """The exponential moving average of the student."""

    scope: Literal["encoder", "model"] = "encoder"
    """encoder: the front end is the student's own (fairseq); model: front end and tokens are averaged (BEiT fork)."""
    decay_start: float = 0.999
    """Decay after the first update."""
    decay_end: float = 0.9998
    """Decay from decay_steps on."""
    decay_steps: int | None = None
    """Updates over which the decay rises linearly; null: train.steps."""
    copied: tuple[Literal["positions", "norm"], ...] = ()
    """Parts of the encoder that are the student's as they are, rather than averaged: convolutional positions (speech,
    fairseq ema_layers_only), the norm before the first block."""
    context: float = 1.0
    """Ablation: in each block the teacher's positions attend to the nearest fraction of the input only (paper, section
    5). What reaches a position over several blocks is more than that."""
    resident: bool = False
    """ZeRO-3 only: keep the teacher's forward weights whole on every rank. They are then gathered once per step, not by
    every micro-batch; worth the memory where a rank computes several micro-batches per step."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with one learning rate for all parameters."""

    lr: float = 5e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    decay_all: bool = True
    """Decay norms, biases and tokens too, as fairseq's released runs do; false: matrices (the bias table is one) and
    the mask token only, as the BEiT fork does."""
    clip: float = 3.0
    """Largest global gradient norm; 0: no clipping."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over updates."""

    kind: Literal["cosine", "tri_stage", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_steps: int = 0
    """Updates of linear warm-up."""
    peak_in_warmup: bool = False
    """The last update of the warm-up has the peak rate already, as has the one after it (BEiT fork; cosine, constant);
    false: the first update after the warm-up is the first with it (fairseq)."""
    start_lr: float = 0.0
    """Learning rate before the first update (cosine, constant)."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    hold_fraction: float = 0.9
    """tri_stage: fraction of train.steps at the peak, after warm-up."""
    final_scale: float = 0.01
    """tri_stage: first and last learning rate over the peak."""


@dataclass(frozen=True)
class VerdictConfig:
    """Which steps are not taken, and when the run stops (exit code 3). A step that is not finite never is."""

    spike_z: float = 20.0
    """A step is refused when its loss or gradient norm lies this many robust standard deviations above the median of
    recent steps, in the logarithm: 20 is 7.4 times the median or more. 0 switches the test off."""
    window: int = 128
    """Taken steps that median and spread are of; the test begins when half of them (at least 16) are there."""
    max_bad_steps: int = 10
    """The run stops after so many refused steps in a row, with its state saved. 0: never."""
    min_target_std: float = 0.1
    """The run stops when the targets' standard deviation, as logged, falls below (fairseq audio 0.1). 0: never."""
    min_pred_std: float = 0.01
    """The same for predictions (fairseq audio 0.01)."""
    std_after: int = 5000
    """Updates before these two floors hold (fairseq 5000)."""


@dataclass(frozen=True)
class MixConfig:
    """One data set of a mix."""

    shards: str | dict[str, str]
    """As data.shards."""
    weight: float = 1.0
    """Micro-batches of this set over those of the others. Only ratios count, and no set's size does: a small one with a
    large weight goes through more epochs."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are batched."""

    shards: str | dict[str, str] | None = None
    """Training shards: a path, folder, glob or brace pattern of WebDataset tars, or a map modality: pattern."""
    mix: dict[str, MixConfig] | None = None
    """Instead of data.shards, several data sets by weight: NAME: {shards: PATTERN, weight: NUMBER}. Every micro-batch
    is of one set, and each set has its own epochs (docs/data.md)."""
    valid: str | dict[str, str] | None = None
    """Held-out shards for validation, same forms; null: no validation."""
    micro_batch: MicroBatchConfig = field(default_factory=lambda: MicroBatchConfig(samples=16))
    """Budget of one micro-batch."""
    workers: int = 1
    """Decoding processes per rank; 0 decodes in the training process."""
    bucket_ratio: float = 1.1
    """Speech, text: samples of a micro-batch come from one length bucket, whose longest is at most this much longer
    than its shortest. Recordings are cropped to the micro-batch's shortest, texts padded to its longest."""
    window: int = 8
    """Shards that are shuffled together: larger mixes better, smaller reads more sequentially."""
    trace: bool = False
    """Write trace/rank*.jsonl: sample ids, crop and mask hashes of every micro-batch as consumed."""
    max_bad_fraction: float = 0.001
    """The run stops when more than this fraction of the samples seen could not be used (after the first 1,000)."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases; logged to when a project is named and the package is installed."""

    project: str | None = None
    """Project; null switches W&B off."""
    entity: str | None = None
    """User or team."""
    name: str | None = None
    """Name of the run; null: the output directory's."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to disk for a later `wandb sync`."""


@dataclass(frozen=True)
class TrainConfig:
    """The run itself."""

    steps: int = 1000
    """Optimizer steps in all, with those that the verdict refuses."""
    micro_batches_per_step: int = 2
    """M: micro-batches of one update over all data-parallel ranks. The data-parallel size must divide it;
    DeepSpeed's gradient accumulation is M / data-parallel size, so results do not depend on the number of ranks."""
    output_dir: str = "runs/default"
    """Run directory."""
    seed: int = 1
    """Seed of initialisation, order, masks, augmentation and dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, else fp32. fp16 is refused."""
    compile: bool = False
    """torch.compile every block into one graph. Needs a C++ compiler; the first steps take minutes."""
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end. 0: only then."""
    keep_last: int = 3
    """Checkpoints kept; older ones are deleted after a new one is complete. 0 keeps all. With 1, nothing is left to
    fall back on should that one be damaged later."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps are never deleted. 0: none of them is special."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy in host memory (as large as the rank's share: 16 bytes per
    parameter it owns), while training goes on."""
    log_every: int = 10
    """Steps between metric lines."""
    eval_every: int = 0
    """Steps between validations (data.valid); one is always run at the end. 0: only then."""
    resume: str = "auto"
    """auto: from the newest valid checkpoint in output_dir; never: refuse a directory that has one; or a path to start
    from (once: the same command, repeated, goes on from what it saved since)."""
    init: str | None = None
    """Checkpoint whose student and teacher weights start a new schedule (step 0, fresh optimizer)."""
    init_teacher: Literal["teacher", "student"] = "teacher"
    """With train.init, what the teacher starts from: the checkpoint's teacher, or its student (the BEiT fork)."""
    max_minutes: float | None = None
    """Save and exit with code 75 at the first step that begins this long after a process was started (start-up counts);
    null: never. Choose what a job may take, less one step, one validation and one save (docs/checkpoints.md)."""
    rendezvous_timeout: float = 300.0
    """Seconds that the ranks wait for each other at the start, before each says which host and port it tried."""
    tensorboard: bool = True
    """Write tensorboard/ in the run directory (where the tensorboard package is installed)."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    hang_timeout: float = 600.0
    """Seconds without a sign of life from one rank, or without progress of the whole run, after which every rank writes
    where it stands to hang/ in the run directory and exits with code 1. Start-up, the first step and checkpoints may
    take three times as long, and at least 10 minutes. 0 switches the watchdog off."""


@dataclass(frozen=True)
class ParallelConfig:
    """How layers are split over ranks."""

    tensor: int = 1
    """Tensor-parallel size: ranks that share every attention (by heads) and MLP (by hidden units). It must divide the
    number of ranks, model.heads and the hidden width; keep it within a node. Data-parallel size = ranks / tensor."""
    sequence: bool = False
    """Megatron sequence parallelism: norms, dropouts and the residual stream between layers are split over the
    tensor-parallel ranks too. Activation memory shrinks; a quarter more bytes are sent (inputs are gathered again in
    backward rather than kept)."""


@dataclass(frozen=True)
class Config:
    """megad2v: data2vec pretraining."""

    modality: Literal["vision", "speech", "text", "joint"] = "vision"
    """What is learned from. joint: two or all three of them in one run, one to an update (section joint)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    speech: SpeechConfig = field(default_factory=SpeechConfig)
    text: TextConfig = field(default_factory=TextConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    verdict: VerdictConfig = field(default_factory=VerdictConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    joint: JointConfig = field(default_factory=JointConfig)
