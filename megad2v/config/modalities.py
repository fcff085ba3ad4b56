"""Sections of the configuration that belong to a modality: front ends, augmentation, masks, budgets. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class VisionConfig:
    """The image front end: patches, CLS token, mask token."""

    image_size: int = 64
    """Side of the square input in pixels; must be a multiple of patch_size."""
    patch_size: int = 8
    """Side of a square patch in pixels."""
    channels: int = 3
    """Colour channels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel mean taken off pixels in [0, 1], on the device."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel standard deviation that pixels are divided by."""


@dataclass(frozen=True)
class SpeechConfig:
    """The audio front end: convolutions over the waveform, then convolutional positions inside the encoder."""

    conv_layers: tuple[tuple[int, int, int], ...] = (
        (512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2), (512, 2, 2),
    )  # fmt: skip
    """(channels, kernel, stride) of each convolution; the strides' product, 320, makes 50 frames of 16,000 samples."""
    conv_bias: bool = False
    """Biases in these convolutions (all released data2vec models: none)."""
    extractor_norm: Literal["layer", "group"] = "layer"
    """layer: a layer norm behind every convolution (data2vec); group: one group norm behind the first (wav2vec 2.0)."""
    position_depth: int = 5
    """Layers of the convolutional positions (fairseq pos_conv_depth)."""
    position_kernel: int = 19
    """Their kernel (fairseq conv_pos 95 over 5 layers)."""
    position_groups: int = 16
    """Their groups; must divide model.width."""
    normalise: bool = True
    """Every waveform to mean 0 and variance 1 over its whole length, before it is cropped."""
    min_seconds: float = 2.0
    """Shorter recordings are left out (fairseq min_sample_size 32,000)."""
    max_seconds: float = 20.0
    """Longer ones are cropped, at random in training, to the middle elsewhere (fairseq max_sample_size 320,000)."""


@dataclass(frozen=True)
class TextConfig:
    """The text front end: token and position embeddings; rows of tokens; what the loss and the teacher see."""

    tokenizer: str | None = None
    """Folder of the tokenizer that made the shards; null: `tokenizer` beside them, where make_shards puts it."""
    vocabulary: int | None = None
    """Number of ids, `<mask>`, the last one, included; null: the tokenizer's (released model: 50,265)."""
    max_tokens: int = 512
    """Longest row of tokens, its leading `<s>` included: as many positions are learned (fairseq tokens_per_sample)."""
    blocks: Literal["complete_doc", "document"] = "complete_doc"
    """What a row is. complete_doc: as many whole sentences of one document as fit (fairseq sample_break_mode); a longer
    sentence is cut. document: one document, of which longer ones give a window, at random in training."""
    loss_on: Literal["all", "mask"] = "all"
    """all: every position that was chosen counts; mask: those only where the student sees `<mask>` (fairseq). They
    differ where mask.random or mask.kept is above 0."""
    teacher_sees: Literal["full", "masked_only"] = "full"
    """full: the whole row (paper). masked_only: the chosen tokens alone, closed up to positions 0, 1, ... (what
    fairseq's program and so the released model does; spec 2.4)."""


@dataclass(frozen=True)
class AugmentConfig:
    """Image augmentation, in the published order: colours of the whole image, flip, crop (BEiT fork, datasets.py).

    One view per sample, which goes to teacher and student alike; pure in (train.seed, epoch, sample id).
    """

    crop_scale_min: float = 0.08
    """Smallest area of the random resized crop over the image's area (published: 0.08); aspect ratio 3/4 to 4/3."""
    crop_scale_max: float = 1.0
    """Largest area of the random resized crop over the image's area (published: 1)."""
    flip: bool = True
    """Horizontal flip with probability one half."""
    jitter: float = 0.4
    """Brightness, contrast and saturation, in random order, each by a factor uniform in max(0, 1 - jitter) to
    1 + jitter (published: 0.4); 0 switches it off."""
    draft: bool = True
    """Let libjpeg decode a large photo at 1/2, 1/4 or 1/8 where the crop keeps at least image_size pixels in both
    directions: faster, pixels differ by about as much as another resizing filter would (docs/images.md).
    false: byte-equal to the published operations on the full image. Holds for validation and probes too."""


@dataclass(frozen=True)
class MaskConfig:
    """Which positions are hidden from the student. Pure in (train.seed, epoch, sample id).

    Images: rectangular blocks of patches (BEiT's generator), placed until the budget is reached or ten draws in a row
    do not fit (spec 3.3), so the count differs from image to image. Speech: spans of frames (spec 6.1). Text: spans of
    tokens, `<s>` and `</s>` among them (spec 2.2); BERT's masks are spans of 1.
    """

    ratio: float = 0.5
    """Hidden fraction of the positions. For images an upper bound: round(ratio x patches) is the generator's budget
    (published: 120 of 196, 0.6122; fairseq: 75 of 196, 0.3827). For speech, ratio x frames / span spans are drawn,
    which overlap (0.65 hides about 0.49), for text likewise (0.35 hides about 0.31; BERT: 0.15). 0 hides nothing, so
    nothing is learned: a control."""
    min_block: int = 4
    """Images: smallest block in patches (BEiT fork and fairseq: 16 of 196). Where less than that is left of the budget,
    areas between the two are drawn."""
    max_block: int | None = None
    """Images: largest block in patches, and most patches that one block may newly hide; null: no limit, which is what
    the published 196 of 196 comes to."""
    min_aspect: float = 0.3
    """Images: smallest height over width of a block; the largest its inverse; log-uniform between (published 0.3)."""
    span: int = 10
    """Speech: frames of a span (fairseq mask_length, 10). Text: tokens (fairseq mask_multiple_length, 4; BERT 1)."""
    min_spans: int = 1
    """Speech: spans drawn at least (fairseq min_masks)."""
    equal_counts: bool = True
    """Speech: every sample of a micro-batch hides as many frames as the one that hides fewest: random others are
    shown again (fairseq require_same_masks)."""
    random: float = 0.0
    """Text: fraction of the chosen positions that show the student a random token (BERT 0.1)."""
    kept: float = 0.0
    """Text: fraction of the chosen positions that show the student their own token (BERT 0.1)."""


@dataclass(frozen=True)
class MicroBatchConfig:
    """Budget of one micro-batch: give exactly one."""

    samples: int | None = None
    """Images, recordings, or rows of text, in a micro-batch."""
    tokens: int | None = None
    """Text tokens in a micro-batch, padding and `<s>` included."""
    seconds: float | None = None
    """Seconds of audio in a micro-batch."""
