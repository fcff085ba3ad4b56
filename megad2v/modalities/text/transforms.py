"""Worker side of text: rows of ids, and what teacher and student see of them. Everything random is pure in (seed,
epoch, sample id)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.draws import generator
from megad2v.modalities.sample import BadSample, Mode, fingerprint
from megad2v.modalities.text.codecs import BOS, EOS, PAD
from megad2v.modalities.text.decode import read_tokens
from megad2v.modalities.text.masking import BoolTokens, Ids, span_mask, student_view
from megad2v.modalities.text.tokenizer import Tokens

SHORTEST_ROW = 2
"""`<s>` and one token."""


class TextRow(NamedTuple):
    """One row, waiting for its micro-batch; all arrays are (tokens,)."""

    teacher: Ids
    """`<pad>` where the teacher sees nothing."""
    student: Ids
    loss: BoolTokens
    """True at the positions that carry loss."""
    fingerprint: str
    """Hex hash of tokens, student's view and mask."""


class TextTransform:
    """KEY.tokens.npy -> ids that teacher and student see (spec 2.1 to 2.4), as the configuration and mode say.

    A row is `<s>` and the tokens; of more than text.max_tokens it is a window, at random in training, else from the
    start. train: masked anew each epoch; valid: one fixed mask; probe: no mask, and one row of ids for each sample.
    Raises UserError where text.vocabulary is not known; calling raises BadSample.
    """

    modality = "text"

    def __init__(self, config: Config, mode: Mode) -> None:
        if config.text.vocabulary is None:
            raise UserError("text.vocabulary: not known; name the tokenizer's folder (text.tokenizer), or give it")
        self._vocabulary = config.text.vocabulary
        self._text = config.text
        self._mask = config.mask
        self._seed = config.train.seed
        self._mode = mode

    def __call__(self, data: bytes, sample_id: str, epoch: int) -> TextRow:
        """One row. Raises BadSample when the bytes are no tokens, or none of this vocabulary."""
        tokens = read_tokens(data)
        self._check(tokens)
        # Validation is compared over time, so its masks must not follow the epoch.
        key = (self._seed, epoch if self._mode == "train" else self._mode, sample_id)
        room = self._text.max_tokens - 1
        if len(tokens) > room:
            place = generator(*key, "window").random() if self._mode == "train" else 0.0
            start = int(place * (len(tokens) - room + 1))
            tokens = tokens[start : start + room]
        ids = np.empty(len(tokens) + 1, dtype=np.int64)
        ids[0], ids[1:] = BOS, tokens
        if self._mode == "probe":
            return _row(ids, ids, ids, np.zeros(len(ids), dtype=np.bool_))
        mask, text = self._mask, self._text
        chosen = span_mask(len(ids), mask.ratio, mask.span, generator(*key, "mask"))
        student = student_view(ids, chosen, self._vocabulary, mask.random, mask.kept, generator(*key, "replace"))
        # A row of which nothing was chosen stays whole: attention over nothing would be NaN.
        alone = text.teacher_sees == "masked_only" and chosen.any()
        teacher = np.where(chosen, ids, PAD) if alone else ids
        loss = chosen & (student == self._vocabulary - 1) if text.loss_on == "mask" else chosen
        return _row(ids, teacher, student, loss)

    def collate(
        self, samples: list[TextRow], sample_ids: list[str], labels: list[int], dropped: list[tuple[str, str]]
    ) -> Batch:
        """inputs int64 (B, V, T), V = 1 for probes and else 2, mask_bmt (B, 1, T), T tokens of the longest row; without
        samples one row of zeros (`<s>`) that hides nothing."""
        lengths = [len(sample.student) for sample in samples] or [SHORTEST_ROW]
        rows, longest, views = len(lengths), max(lengths), 1 if self._mode == "probe" else 2
        inputs_bvt = np.full((rows, views, longest), PAD if samples else 0, dtype=np.int64)
        mask_bmt = np.zeros((rows, 1, longest), dtype=np.bool_)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=False)):
            inputs_bvt[row, 0, :length] = sample.teacher
            inputs_bvt[row, -1, :length] = sample.student
            mask_bmt[row, 0, :length] = sample.loss
        padding_bt = None
        if min(lengths) < longest:
            padding_bt = torch.arange(longest) >= torch.tensor(lengths)[:, None]
        return Batch(
            modality=self.modality,
            inputs=torch.from_numpy(inputs_bvt),
            mask_bmt=torch.from_numpy(mask_bmt),
            padding_bt=padding_bt,
            labels=torch.tensor(labels if samples else [-1], dtype=torch.int64),
            sample_ids=tuple(sample_ids),
            fingerprints=tuple(sample.fingerprint for sample in samples),
            dropped=tuple(dropped),
        )

    def _check(self, tokens: Tokens) -> None:
        """Raises BadSample where a document cannot be used."""
        if not len(tokens):
            raise BadSample("no token")
        largest = int(tokens.max())
        if largest >= self._vocabulary:
            raise BadSample(f"token id {largest}, but the vocabulary has {self._vocabulary} ids")
        if largest == self._vocabulary - 1:
            raise BadSample(f"token id {largest}, <mask>, inside a document")
        if tokens.min() < EOS:
            raise BadSample(f"token id {tokens.min()}, {('<s>', '<pad>')[tokens.min()]}, inside a document")


def _row(ids: Ids, teacher: Ids, student: Ids, loss: BoolTokens) -> TextRow:
    return TextRow(teacher, student, loss, fingerprint(ids, student, loss))
