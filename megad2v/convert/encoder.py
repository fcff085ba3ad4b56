"""A pretrained encoder in Python: features of raw samples, and a module to fine-tune."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megad2v.config.schema import Config
from megad2v.convert.load import Weights, checkpoint_config, load_encoder, load_tokenizer, open_checkpoint
from megad2v.data.loader import TRANSFORMS
from megad2v.errors import UserError
from megad2v.metrics.probe import layer_outputs, mean_over_positions
from megad2v.modalities.batch import Batch
from megad2v.modalities.sample import BadSample
from megad2v.modalities.text.codecs import EOS
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.models.data2vec import FrontEnd
from megad2v.models.encoder import Encoder

Layer = int | None
"""A block's number, from 1; None: the encoder's own output (behind the final norm of a pre-norm model)."""


class Data2VecEncoder(nn.Module):
    """Front end and encoder of a checkpoint; the regression head, which only pretraining needs, is left out.

    B samples, T positions (patches, frames of 20 ms, tokens), D channels. Images have `prefix_tokens` = 1 position
    (CLS) in front, which pretraining gives no target. In eval mode, float32, on the CPU, with gradients, as
    `from_checkpoint` returns it: an ordinary module.

    Raw samples, one or a list of them:
        images   a file's path, its bytes, a PIL image, or uint8 pixels (H, W, 3); short side resized, centre cut out
        speech   a file's path, its bytes, or (waveform, rate): (samples,) or (samples, channels) in about [-1, 1];
                 resampled to 16 kHz and normalised; of more than `config.speech.max_seconds` the middle
        text     a string, or a tuple of strings, a document whose sentences are each ended by `</s>`, or a file's
                 Path, each line a sentence; of more than `config.text.max_tokens` ids the first
    """

    def __init__(
        self, config: Config, front_end: FrontEnd, encoder: Encoder, tokenizer: Tokenizer | None, step: int = 0
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.step = config, tokenizer, step
        self.front_end, self.encoder = front_end, encoder
        self.prefix_tokens: int = front_end.prefix_tokens
        self.width, self.depth = config.model.width, config.model.depth
        self.transform: Any = TRANSFORMS[config.modality](config, "probe")
        """What is done to a raw sample, by its bytes."""

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        weights: Weights = "student",
        *,
        modality: str | None = None,
        max_seconds: float | None = None,
    ) -> Data2VecEncoder:
        """Of a run's directory (its newest valid checkpoint) or of one checkpoints/step_XXXXXXXX.

        `weights`: "student", which the optimizer trained, or "teacher", its moving average (with the student's front
        end where the run shares that). `modality`: of a joint run, which one. `max_seconds`: of speech, how much of a
        recording is encoded; training's longest crop by default. Raises UserError.
        """
        checkpoint = open_checkpoint(Path(path), modality)
        config = checkpoint_config(checkpoint)
        if max_seconds is not None:
            if config.modality != "speech" or not max_seconds >= config.speech.min_seconds:
                raise UserError(f"max_seconds: of speech, {config.speech.min_seconds:g} or more; got {max_seconds}")
            config = replace(config, speech=replace(config.speech, max_seconds=max_seconds))
        student = load_encoder(checkpoint, weights)
        made = cls(config, student.front_end, student.encoder, load_tokenizer(checkpoint), checkpoint.index.step)
        return made.eval().requires_grad_(True)

    @property
    def modality(self) -> str:
        """vision, speech or text."""
        return self.config.modality

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def pads_matter(self) -> bool:
        """Whether padding behind a sample changes its last positions: of speech, since the second convolution of the
        positions sees what the first made of the zeros (as in fairseq and Hugging Face). `features`, `embed` and
        extract_features then pad nothing."""
        return self.encoder.positions is not None

    def forward(
        self, inputs: Tensor, padding_bt: Tensor | None = None, *, layer: Layer = None, mask_bt: Tensor | None = None
    ) -> Tensor:
        """Preprocessed inputs, on the model's device -> (B, prefix_tokens + T, D).

        `inputs`: uint8 (B, 3, S, S), or floats already normalised; float32 waveforms (B, samples); ids int64 (B, 1, T),
        `<s>` first. `padding_bt` bool (B, T): True where a position holds nothing. `mask_bt` bool (B, T): True where
        the mask token takes its place (images and speech). Raises ValueError for a layer that there is not.
        """
        return self.layers(inputs, padding_bt, [layer], mask_bt=mask_bt)[0]

    def layers(
        self,
        inputs: Tensor,
        padding_bt: Tensor | None = None,
        layers: Sequence[Layer] | None = None,
        *,
        mask_bt: Tensor | None = None,
    ) -> list[Tensor]:
        """The same of several layers from one pass; of all blocks by default."""
        wanted = list(range(1, self.depth + 1)) if layers is None else list(layers)
        for layer in wanted:
            if layer is not None and not 1 <= layer <= self.depth:
                raise ValueError(f"layer {layer}: expected 1 to {self.depth}, or None for the encoder's output")
        return layer_outputs(self, inputs, padding_bt, wanted, mask_bt)

    def prepare(self, samples: Any, ids: Sequence[str] | None = None) -> Batch:
        """One raw sample or a list of them as a padded batch: `.inputs`, `.padding_bt` (None: nothing is padded), ready
        for `forward` after `.to(device)`. Samples that cannot be used are in `.dropped`, with the reason, and not among
        `.sample_ids`. Raises UserError for what is no sample of this modality."""
        several = samples if isinstance(samples, list) else [samples]
        names = [str(number) for number in range(len(several))] if ids is None else list(ids)
        good: list[Any] = []
        kept: list[str] = []
        dropped: list[tuple[str, str]] = []
        for name, sample in zip(names, several, strict=True):
            try:
                good.append(self.prepare_one(sample, name))
                kept.append(name)
            except BadSample as error:
                dropped.append((name, str(error)))
        return self.transform.collate(good, kept, [-1] * len(good), dropped)

    def prepare_one(self, sample: Any, name: str) -> Any:
        """A raw sample as the transform's `collate` takes it. Raises BadSample and UserError."""
        if self.modality == "text" and not isinstance(sample, bytes):
            return self.transform.of_tokens(self._tokens(sample), name, 0)
        if isinstance(sample, (str, os.PathLike)):
            try:
                sample = Path(sample).read_bytes()
            except OSError as error:
                raise BadSample(f"not readable ({error.strerror})") from error
        if isinstance(sample, bytes):
            return self.transform(sample, name, 0)
        if self.modality == "vision":
            return self.transform.of_image(_image(sample), name, 0)
        return self.transform.of_waveform(_waveform(sample), name, 0)

    def _tokens(self, sample: Any) -> Any:
        sentences = (sample,) if isinstance(sample, str) else sample
        if isinstance(sample, os.PathLike):
            sentences = _lines(Path(sample))
        if not isinstance(sentences, tuple) or not all(isinstance(one, str) for one in sentences):
            raise UserError(f"a text is a string, a tuple of strings or a Path, not {type(sample).__name__}")
        if self.tokenizer is None:
            raise UserError("the checkpoint holds no tokenizer; resume its run for a step with this version")
        tokens = self.tokenizer.encode_document(sentences)
        return tokens if (tokens != EOS).any() else tokens[:0]

    @torch.no_grad()
    def features(self, samples: Any, layer: Layer = None) -> list[Tensor]:
        """Of each raw sample float32 (T, D), its positions without CLS and without padding, on the model's device; what
        it would be alone, to rounding. Raises UserError where a sample cannot be used."""
        found: list[Tensor] = []
        for batch, x_btd in self._evaluated(samples, layer):
            found += [x_td[:length].clone() for x_td, length in zip(x_btd, position_lengths(batch), strict=True)]
        return found

    @torch.no_grad()
    def embed(self, samples: Any, layer: Layer = None) -> Tensor:
        """float32 (B, D): the mean of `features` over positions, one for each raw sample. Raises UserError."""
        return torch.cat([mean_over_positions(x, batch.padding_bt) for batch, x in self._evaluated(samples, layer)])

    def _evaluated(self, samples: Any, layer: Layer) -> Iterator[tuple[Batch, Tensor]]:
        """Batches, and the layer without prefix, float32 (B, T, D)."""
        several = samples if isinstance(samples, list) else [samples]
        if not several:
            raise UserError("no sample was given")
        training = self.training
        self.eval()
        try:
            for first in range(0, len(several), 1 if self.pads_matter else len(several)):
                part = several[first:] if not self.pads_matter else several[first : first + 1]
                batch = self.prepare(part, [str(first + number) for number in range(len(part))]).to(self.device)
                if batch.dropped:
                    raise UserError(f"sample {batch.dropped[0][0]}: {batch.dropped[0][1]}")
                yield batch, self(batch.inputs, batch.padding_bt, layer=layer)[:, self.prefix_tokens :].float()
        finally:
            self.train(training)


def position_lengths(batch: Batch) -> list[int]:
    """T of each real row: its positions that are not padding."""
    rows = len(batch.sample_ids)
    if batch.padding_bt is None:
        return [batch.mask_bmt.shape[2]] * rows
    return (~batch.padding_bt[:rows]).sum(dim=1).tolist()


def _lines(path: Path) -> tuple[str, ...]:
    """A text file's lines but the empty ones. Raises BadSample."""
    try:
        return tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except OSError as error:
        raise BadSample(f"not readable ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadSample(f"not UTF-8 (byte {error.start + 1})") from error


def _image(sample: Any) -> Any:
    from PIL import Image

    if isinstance(sample, Image.Image):
        return sample
    pixels = np.asarray(sample)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UserError(
            f"an image is a path, bytes, a PIL image, or uint8 (H, W, 3); not {pixels.dtype} {pixels.shape}"
        )
    return Image.fromarray(pixels)


def _waveform(sample: Any) -> Any:
    from megad2v.modalities.speech.decode import resampled

    if not (isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[1], (int, np.integer))):
        raise UserError("a recording is a path, bytes, or (waveform, samples a second)")
    waveform, rate = np.asarray(sample[0]), int(sample[1])
    if waveform.ndim not in (1, 2) or not np.issubdtype(waveform.dtype, np.floating):
        raise UserError(
            f"a waveform is floating-point, (samples,) or (samples, channels), not {waveform.dtype} {waveform.shape}"
        )
    samples_tc = waveform.astype(np.float32).reshape(len(waveform), -1)
    if not samples_tc.size:
        raise BadSample("no samples")
    return resampled(samples_tc, rate)
