"""Fine-tuning on labels whose answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from megad2v.errors import UserError
from megad2v.metrics.fine_tune import (
    Dropped,
    FineTuneScores,
    FineTuneSettings,
    balanced_weights,
    fine_tune,
    rate,
    record,
    score,
    table,
)
from megad2v.metrics.probe import balanced_accuracy
from megad2v.modalities.batch import Batch
from megad2v.modalities.build import build_student
from megad2v.models.data2vec import Student
from megad2v.models.initialise import initialise_
from tests.checkpoints import small_config

SETTINGS = FineTuneSettings(lr=3e-3)


@dataclass
class Images:
    """Noise in which one patch, anywhere, is red (class 0) or blue (1)."""

    count: int
    seed: int
    epochs: int = 1
    learnable: bool = True

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.inputs = torch.randint(0, 200, (self.count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, 2, (self.count,), generator=generator)
        corners = 8 * torch.randint(0, 4, (self.count, 2), generator=generator)
        for image, label, (top, left) in zip(self.inputs, self.labels.tolist(), corners.tolist(), strict=True):
            image[:, top : top + 8, left : left + 8] = 0
            image[2 * label, top : top + 8, left : left + 8] = 255
        if not self.learnable:
            self.labels = self.labels[torch.randperm(self.count, generator=generator)]

    def __len__(self) -> int:
        return self.epochs * (self.count // 16)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.epochs):
            for start in range(0, self.count, 16):
                yield batch(self.inputs[start : start + 16], self.labels[start : start + 16])


def batch(inputs: Tensor, labels: Tensor) -> Batch:
    ids = tuple(f"a.tar/{number}" for number in range(len(labels)))
    return Batch("vision", inputs, torch.zeros(len(inputs), 1, 16, dtype=torch.bool), labels=labels, sample_ids=ids)


def model(seed: int = 0) -> Student:
    student = build_student(small_config(layer_scale=None, dropout=0.1)).eval().requires_grad_(False)
    initialise_(student, seed)
    return student


def accuracy(train: Images, *, seed: int = 0, weights: Tensor | None = None) -> float:
    weights = torch.ones(2) if weights is None else weights
    return fine_tune(model(), train, Images(128, 1), weights, settings=SETTINGS, seed=seed).accuracy


def test_a_planted_signal_is_learned_and_shuffled_labels_are_not() -> None:
    assert accuracy(Images(256, 0, epochs=4)) > 0.9
    assert abs(accuracy(Images(256, 0, epochs=4, learnable=False)) - 0.5) < 0.2


def test_same_seed_same_numbers() -> None:
    """And whatever the global generator has been used for; it is left as it was."""
    train = Images(64, 0)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    students = [model() for _ in range(3)]
    for student, seed in zip(students, (1, 1, 2), strict=True):
        fine_tune(student, train, Images(16, 1), torch.ones(2), settings=SETTINGS, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        torch.rand(3)
        before = torch.random.get_rng_state()
    first, second, other = (torch.cat([value.flatten() for value in student.parameters()]) for student in students)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_what_is_trained() -> None:
    """All parameters but those of the regression head; frozen ones, as checkpoints come, are thawed."""
    student = model()
    before = {name: value.clone() for name, value in student.named_parameters()}
    fine_tune(student, Images(32, 0), Images(16, 1), torch.ones(2), settings=SETTINGS, seed=0)
    unchanged = {name for name, value in student.named_parameters() if torch.equal(value, before[name])}
    mask_token = {name for name in before if "mask" in name}  # nothing is masked
    assert unchanged == {name for name in before if name.startswith("head.")} | mask_token
    assert mask_token


def test_batches_of_which_nothing_is_left() -> None:
    """The row of zeros of an empty micro-batch is neither learned from nor scored."""
    images = Images(32, 0)
    empty = replace(batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([-1])), sample_ids=())

    class WithEmpty(Images):
        def __iter__(self) -> Iterator[Batch]:
            yield from [empty, *super().__iter__()]

    found = [
        fine_tune(model(), train, test, torch.ones(2), settings=replace(SETTINGS, warmup=0.0), seed=0)
        for train, test in ((images, Images(16, 1)), (images, WithEmpty(16, 1)))
    ]
    assert found[0] == found[1]
    fine_tune(model(), WithEmpty(32, 0), Images(16, 1), torch.ones(2), settings=SETTINGS, seed=0)


def test_dropped_samples_are_counted_once() -> None:
    """However many epochs meet them; without anything left there is no score."""
    nothing = replace(
        batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([-1])),
        sample_ids=(),
        dropped=(("a.tar/x", "no picture"), ("a.tar/y", "no picture")),
    )

    class WithBad(Images):
        def __iter__(self) -> Iterator[Batch]:
            for one in super().__iter__():
                yield from [nothing, replace(one, dropped=(("a.tar/z", "no picture"),))]

    class AllBad(Images):
        def __iter__(self) -> Iterator[Batch]:
            yield nothing

    found = fine_tune(model(), WithBad(32, 0, 2), WithBad(16, 1), torch.ones(2), settings=SETTINGS, seed=0)
    assert found.dropped == Dropped(train=3, test=3)
    for name, train, test in (("train", AllBad(32, 0), Images(16, 1)), ("test", Images(32, 0), AllBad(16, 1))):
        with pytest.raises(UserError, match=f"--{name}: no sample could be decoded"):
            fine_tune(model(), train, test, torch.ones(2), settings=SETTINGS, seed=0)


def test_divergence_is_a_line() -> None:
    settings = FineTuneSettings(lr=1e30)
    with pytest.raises(UserError, match="lower --lr"):
        fine_tune(model(), Images(64, 0), Images(16, 1), torch.ones(2), settings=settings, seed=0)


def test_rate() -> None:
    factor = rate(20, 0.1)
    assert [factor(n) for n in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert factor(19) == pytest.approx(1 / 18) and factor(20) == 0.0
    assert [rate(1, 0.1)(n) for n in (0, 1)] == [1.0, 0.0]


def test_classes_weigh_the_same() -> None:
    labels = np.array([0, 0, 0, 2])
    weights = balanced_weights(labels, 4)
    assert weights.tolist() == pytest.approx([2 / 3, 0.0, 2.0, 0.0])
    assert weights[labels].sum() == pytest.approx(len(labels))


def test_balanced_accuracy_is_scikit_learns() -> None:
    from sklearn.metrics import balanced_accuracy_score

    rng = np.random.default_rng(0)
    labels, guesses = rng.choice(4, 200, p=[0.1, 0.2, 0.3, 0.4]), rng.choice(5, 200)
    with pytest.warns(UserWarning, match="not in y_true"):
        assert balanced_accuracy(labels, guesses) == pytest.approx(balanced_accuracy_score(labels, guesses))


def test_every_row_and_seed_starts_afresh() -> None:
    """Two names for one model score the same; random weights are other ones for each seed; the table says so."""
    made: list[int] = []

    def make(seed: int) -> Student:
        made.append(seed)
        return model(seed)

    arguments = {"settings": SETTINGS, "seeds": [4, 5]}
    rows = score({"a": make, "b": make}, lambda seed: Images(64, seed), Images(64, 1), torch.ones(2), **arguments)
    assert made == [4, 5, 4, 5]
    assert rows[0].accuracies == rows[1].accuracies
    known = FineTuneScores("x", (0.5, 0.7), Dropped(0, 0))
    assert (known.mean, known.deviation) == (pytest.approx(0.6), pytest.approx(0.1414, abs=1e-4))
    assert FineTuneScores("x", (0.5,), Dropped(0, 0)).deviation == 0.0
    assert table([known], 0.25)[1].split() == ["x", "60.00", "14.14"]
    written = record([known], 0.25, SETTINGS, [4, 5], 16)
    assert written["rows"][0]["accuracies"] == (0.5, 0.7) and written["fine_tuning"]["lr"] == 3e-3
