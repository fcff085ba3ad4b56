"""Text on the worker's side: rows, windows, what teacher and student see, padding; what each is a function of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megad2v.config.modalities import MaskConfig
from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.sample import BadSample, Mode
from megad2v.modalities.text.decode import write_tokens
from megad2v.modalities.text.tokenizer import Tokens
from megad2v.modalities.text.transforms import TextTransform
from tests.unit.text_helpers import MASK, VOCABULARY, document, story, text_config

CONFIG = text_config()


def batch(
    documents: list[Tokens], mode: Mode = "train", *, config: Config = CONFIG, epoch: int = 0, first: int = 0
) -> Batch:
    transform = TextTransform(config, mode)
    ids = [f"a.tar/{first + number}" for number in range(len(documents))]
    samples = [transform(write_tokens(tokens), name, epoch) for name, tokens in zip(ids, documents, strict=True)]
    return transform.collate(samples, ids, [-1] * len(ids), [])


def with_text(mask: MaskConfig | None = None, **text: Any) -> Config:
    config = text_config(text=text)
    return config if mask is None else replace(config, mask=mask)


def row_of(tokens: Tokens) -> list[int]:
    return [0, *tokens.tolist()]


def test_rows_and_views() -> None:
    documents = [story(40, 1), story(25, 2), story(63, 3)]
    made = batch(documents)
    assert (made.modality, made.inputs.dtype, made.inputs.shape) == ("text", torch.int64, (3, 2, 64))
    assert made.mask_bmt.shape == (3, 1, 64) and made.mask_bmt.dtype == torch.bool
    assert made.padding_bt is not None and (~made.padding_bt).sum(dim=1).tolist() == [41, 26, 64]
    for row, tokens in enumerate(documents):
        teacher, student, chosen = made.inputs[row, 0], made.inputs[row, 1], made.mask_bmt[row, 0]
        size = len(tokens) + 1
        assert teacher[:size].tolist() == row_of(tokens)
        assert (teacher[size:] == 1).all() and (student[size:] == 1).all() and not chosen[size:].any()
        assert not made.padding_bt[row, :size].any() and made.padding_bt[row, size:].all()
        assert chosen.any() and (student[chosen] == MASK).all()
        assert torch.equal(student[:size][~chosen[:size]], teacher[:size][~chosen[:size]])


def test_rows_of_one_length_have_no_padding() -> None:
    assert batch([story(30, 1), story(30, 2)]).padding_bt is None


def test_wide_ids() -> None:
    tokens = document([5, 4], dtype="<u4") + np.uint32(100_000)
    tokens[[4, 8]] = 2
    config = with_text(vocabulary=200_000)
    assert batch([tokens], config=config).inputs[0, 0].tolist() == row_of(tokens)


def test_teacher_that_sees_chosen_tokens_alone() -> None:
    documents = [story(50, seed) for seed in range(20)]
    full, alone = batch(documents), batch(documents, config=with_text(teacher_sees="masked_only"))
    assert torch.equal(full.mask_bmt, alone.mask_bmt) and torch.equal(full.inputs[:, 1], alone.inputs[:, 1])
    chosen = alone.mask_bmt[:, 0]
    assert torch.equal(alone.inputs[:, 0][chosen], full.inputs[:, 0][chosen])
    assert (alone.inputs[:, 0][~chosen] == 1).all()
    assert full.fingerprints == alone.fingerprints


def test_row_of_which_nothing_was_chosen_stays_whole() -> None:
    """Also with the program's teacher: attention over nothing is NaN."""
    tokens = document([2])
    config = with_text(teacher_sees="masked_only")
    rows = [batch([tokens], config=config, first=number) for number in range(40)]
    none = [made for made in rows if not made.mask_bmt.any()]
    assert 20 < len(none) < 40, "0.26 spans in 3 positions"
    assert all(made.inputs[0].tolist() == [row_of(tokens)] * 2 for made in none)
    control = batch([tokens], config=replace(config, mask=MaskConfig(ratio=0.0, span=4)))
    assert control.inputs[0].tolist() == [row_of(tokens)] * 2 and control.masked_count() == 0


def test_where_the_loss_is() -> None:
    """BERT's masks: all chosen positions, or those alone that show `<mask>`; 10 % of the chosen stay, 10 % change."""
    mask = MaskConfig(ratio=0.15, span=1, random=0.1, kept=0.1)
    documents = [story(63, seed) for seed in range(200)]
    every = batch(documents, config=with_text(mask))
    masked = batch(documents, config=with_text(mask, loss_on="mask"))
    assert torch.equal(every.inputs, masked.inputs)
    shows_mask = every.inputs[:, 1] == MASK
    assert torch.equal(masked.mask_bmt[:, 0], shows_mask)
    assert (every.mask_bmt[:, 0] & shows_mask).sum() == shows_mask.sum() < every.masked_count()
    assert every.masked_count() / (200 * 64) == pytest.approx(0.15, abs=0.01)
    assert masked.masked_count() / every.masked_count() == pytest.approx(0.8, abs=0.03)
    seen = every.inputs[:, 1][every.mask_bmt[:, 0] & ~shows_mask]
    assert not set(seen.tolist()) & {1, 3, MASK}


def test_teacher_sees_kept_and_replaced_tokens_too() -> None:
    mask = MaskConfig(ratio=0.3, span=1, random=0.3, kept=0.3)
    made = batch([story(63, 1)] * 10, config=with_text(mask, teacher_sees="masked_only", loss_on="mask"))
    seen = (made.inputs[:, 0] != 1).sum()
    assert seen == batch([story(63, 1)] * 10, config=with_text(mask)).masked_count() > made.masked_count()


# --- windows


def test_long_documents_give_windows() -> None:
    tokens, starts = story(300, 1), []
    for epoch in range(400):
        row = batch([tokens], epoch=epoch).inputs[0, 0].numpy()
        assert row[0] == 0 and len(row) == 64
        places = [start for start in range(300 - 63 + 1) if (tokens[start : start + 63] == row[1:]).all()]
        starts += places
    assert len(starts) == 400 and len(set(starts)) > 180
    assert min(starts) < 5 and max(starts) > 232 and abs(np.mean(starts) - 118.5) < 11


def test_windows_reach_both_ends() -> None:
    tokens = document([64], seed=3)
    seen = {tuple(batch([tokens], epoch=epoch).inputs[0, 0].tolist()) for epoch in range(40)}
    assert seen == {(0, *tokens[:63].tolist()), (0, *tokens[1:].tolist())}


@pytest.mark.parametrize("mode", ["valid", "probe"])
def test_windows_are_the_beginning_elsewhere(mode: Mode) -> None:
    tokens = story(300, 1)
    assert all(batch([tokens], mode, epoch=epoch).inputs[0, 0].tolist() == row_of(tokens[:63]) for epoch in range(3))


# --- what each is a function of


def test_mask_and_window_follow_seed_epoch_and_sample() -> None:
    tokens = story(200, 1)
    base = batch([tokens])
    again = batch([tokens])
    assert base.fingerprints == again.fingerprints and torch.equal(base.inputs, again.inputs)
    other_seed = replace(CONFIG, train=replace(CONFIG.train, seed=4))
    for other in (batch([tokens], epoch=1), batch([tokens], first=1), batch([tokens], config=other_seed)):
        assert other.fingerprints != base.fingerprints
        assert not torch.equal(other.inputs[:, 0], base.inputs[:, 0]), "window"
        assert not torch.equal(other.mask_bmt, base.mask_bmt), "mask"


def test_masks_do_not_follow_the_micro_batch() -> None:
    documents = [story(length, length) for length in (10, 30, 60)]
    together = batch(documents, "valid")
    for row, tokens in enumerate(documents):
        alone = batch([tokens], "valid", first=row)
        assert alone.fingerprints[0] == together.fingerprints[row]
        assert torch.equal(alone.inputs[0], together.inputs[row, :, : len(tokens) + 1])


def test_validation_is_fixed() -> None:
    tokens = story(50, 1)
    assert batch([tokens], "valid").fingerprints == batch([tokens], "valid", epoch=7).fingerprints
    assert batch([tokens], "valid").fingerprints != batch([tokens], "train").fingerprints


def test_random_tokens_are_in_the_fingerprint() -> None:
    tokens = story(63, 1)
    prints = {
        batch([tokens], config=with_text(MaskConfig(ratio=0.5, span=1, random=random, kept=0.5 - random))).fingerprints
        for random in (0.0, 0.25, 0.5)
    }
    assert len(prints) == 3


# --- probes, nothing left, what cannot be used


def test_probe_is_unmasked() -> None:
    documents = [story(10, 1), story(20, 2)]
    made = batch(documents, "probe")
    assert made.inputs.shape == (2, 1, 21) and not made.mask_bmt.any() and made.mask_bmt.shape == (2, 1, 21)
    assert made.inputs[1, 0].tolist() == row_of(documents[1])
    assert made.padding_bt is not None and made.padding_bt.sum(dim=1).tolist() == [10, 0]


@pytest.mark.parametrize("mode,views", [("train", 2), ("valid", 2), ("probe", 1)])
def test_nothing_left(mode: Mode, views: int) -> None:
    made = TextTransform(CONFIG, mode).collate([], [], [], [("a.tar/1", "broken")])
    assert made.inputs.shape == (1, views, 2) and not made.inputs.any()
    assert made.mask_bmt.shape == (1, 1, 2) and not made.mask_bmt.any()
    assert made.padding_bt is None and made.labels is not None and made.labels.tolist() == [-1]
    assert made.sample_ids == () and made.dropped == (("a.tar/1", "broken"),)
    assert made.position_counts() == (0, 0)


def test_positions_that_count() -> None:
    made = batch([story(10, 1), story(20, 2)])
    assert made.position_counts() == (11 + 21, 11**2 + 21**2)


@pytest.mark.parametrize(
    "tokens,reason",
    [
        ([5, 0, 2], "token id 0, <s>, inside a document"),
        ([5, 1, 2], "token id 1, <pad>, inside a document"),
        ([5, MASK, 2], f"token id {MASK}, <mask>, inside a document"),
        ([5, VOCABULARY, 2], f"token id {VOCABULARY}, but the vocabulary has {VOCABULARY} ids"),
        ([], "no token"),
    ],
)
def test_ids_that_cannot_be(tokens: list[int], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        batch([np.array(tokens, dtype="<u2")])
    assert str(caught.value) == reason


def test_unknown_tokens_can_be() -> None:
    assert batch([np.array([5, 3, 2], dtype="<u2")]).inputs[0, 0].tolist() == [0, 5, 3, 2]


def test_damaged_bytes() -> None:
    data = write_tokens(story(30, 1))
    for broken, reason in ((data[:-7], "cut short|no .npy"), (b"no numpy", "no .npy"), (b"", "no .npy")):
        with pytest.raises(BadSample, match=reason):
            TextTransform(CONFIG, "train")(broken, "a", 0)


def test_vocabulary_has_to_be_known() -> None:
    with pytest.raises(UserError, match=r"^text\.vocabulary: not known"):
        TextTransform(with_text(vocabulary=None), "train")
