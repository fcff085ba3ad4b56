"""How well an encoder learns labels when all of it is trained, with a linear layer on the mean of its output.

One small recipe for every row of the table, random weights included, with nothing chosen on the test set: AdamW, linear
warm-up over a tenth of the updates, then linearly to 0; cross-entropy with classes balanced; neither masks nor
augmentation; the run's own dropout. Scores are balanced accuracies behind the last update, as the probe's are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megad2v.errors import UserError
from megad2v.metrics.probe import balanced_accuracy, pooled
from megad2v.modalities.batch import Batch
from megad2v.models.data2vec import Student


@dataclass(frozen=True)
class FineTuneSettings:
    """The recipe. The rate suits encoders some hundred channels wide; the paper's for Base are 1e-5 to 4e-5 (4.3)."""

    epochs: int = 5
    lr: float = 5e-4
    """Peak, of encoder and linear layer."""
    warmup: float = 0.1
    """Fraction of the updates."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm."""


class SizedBatches(Protocol):
    """Labelled micro-batches whose number is known."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Dropped:
    """How many samples could not be decoded."""

    train: int
    """In one epoch; each counts once, however often it is met."""
    test: int


@dataclass(frozen=True)
class FineTuned:
    """What became of one model and seed."""

    accuracy: float
    """Balanced, on what of the test set could be decoded."""
    dropped: Dropped


@dataclass(frozen=True)
class FineTuneScores:
    """One row of the table."""

    weights: str
    accuracies: tuple[float, ...]
    """Balanced accuracy on the test set, by seed."""
    dropped: Dropped
    """The same for all rows and seeds."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def deviation(self) -> float:
        """Between seeds (n - 1); 0 with one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0


class Classifier(nn.Module):
    """Student without its head, mean over positions, one linear layer."""

    def __init__(self, student: Student, classes: int) -> None:
        """The layer starts from normal(0.02), of torch's default generator, and zeros."""
        super().__init__()
        self.student = student
        self.linear = nn.Linear(student.encoder.norm.weight.numel(), classes)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, classes)."""
        return self.linear(pooled(self.student, batch))

    def trained(self) -> list[nn.Parameter]:
        """Front end, encoder and linear layer; not the regression head, which nothing of this passes through."""
        parts = (self.student.front_end, self.student.encoder, self.linear)
        return [parameter.requires_grad_(True) for part in parts for parameter in part.parameters()]


def fine_tune(
    student: Student,
    train: SizedBatches,
    test: Iterable[Batch],
    class_weights: Tensor,
    *,
    settings: FineTuneSettings,
    seed: int,
) -> FineTuned:
    """Train `student` in place on all of `train` (every epoch of it) and score it on `test`.

    `class_weights` float32 (classes,) weigh the cross-entropy. `seed` draws the linear layer and dropout. The result
    is a function of the arguments, on one machine. Raises UserError when the loss is not finite, or when no sample of
    either set can be decoded.
    """
    device = next(student.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        classifier = Classifier(student, len(class_weights)).to(device).train()
        parameters, class_weights = classifier.trained(), class_weights.to(device)
        optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
        factor = rate(len(train), settings.warmup)
        dropped: set[str] = set()
        updates = 0
        for number, batch in enumerate(train):
            dropped.update(sample_id for sample_id, _ in batch.dropped)
            if not batch.sample_ids:  # none of its samples could be decoded
                continue
            batch = batch.to(device)
            loss = F.cross_entropy(classifier(batch), batch.labels, class_weights)
            if not torch.isfinite(loss):
                raise UserError("fine-tuning diverged: the loss is not finite; lower --lr")
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * factor(number)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
    if not updates:
        raise UserError("--train: no sample could be decoded; the shards' index and quarantine say more")
    accuracy, test_dropped = _accuracy(classifier.eval(), test, device)
    return FineTuned(accuracy, Dropped(len(dropped), test_dropped))


def rate(updates: int, warmup: float) -> Callable[[int], float]:
    """Factor on the learning rate of update n, from 0: up to 1 over `warmup` of the `updates`, then down to 0."""
    rising = max(1, round(warmup * updates))
    return lambda n: (n + 1) / rising if n < rising else max(0.0, (updates - n) / max(1, updates - rising))


@torch.inference_mode()
def _accuracy(classifier: Classifier, batches: Iterable[Batch], device: torch.device) -> tuple[float, int]:
    """(balanced accuracy, samples that could not be decoded)"""
    dropped = 0
    labels: list[Tensor] = []
    guesses: list[Tensor] = []
    for batch in batches:
        dropped += len(batch.dropped)
        real = len(batch.sample_ids)
        assert batch.labels is not None
        labels.append(batch.labels[:real])
        guesses.append(classifier(batch.to(device)).argmax(1)[:real].cpu())
    if not sum(map(len, labels)):
        raise UserError("--test: no sample could be decoded; the shards' index and quarantine say more")
    return balanced_accuracy(torch.cat(labels).numpy(), torch.cat(guesses).numpy()), dropped


def balanced_weights(labels: np.ndarray, classes: int) -> Tensor:
    """float32 (classes,): inverse to how often a label occurs, 1 on average over samples; 0 for absent classes."""
    counts = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(counts)
    weights = np.divide(len(labels), present * counts, out=np.zeros(classes), where=counts > 0)
    return torch.from_numpy(weights.astype(np.float32))


def score(
    models: Mapping[str, Callable[[int], Student]],
    train: Callable[[int], SizedBatches],
    test: Iterable[Batch],
    class_weights: Tensor,
    *,
    settings: FineTuneSettings,
    seeds: Sequence[int],
) -> list[FineTuneScores]:
    """One row per model. `models` gives a fresh copy for a seed (random weights are other ones for each), `train` the
    batches of all epochs in the seed's order: the same for all rows."""
    rows = []
    for name, make in models.items():
        found = [
            fine_tune(make(seed), train(seed), test, class_weights, settings=settings, seed=seed) for seed in seeds
        ]
        rows.append(FineTuneScores(name, tuple(one.accuracy for one in found), found[0].dropped))
    return rows


def table(rows: Sequence[FineTuneScores], chance: float) -> list[str]:
    """Lines for people, in per cent."""
    lines = [f"{'weights':<10} {'mean':>7} {'+-':>6}   balanced accuracy, fine-tuned, %"]
    lines += [f"{row.weights:<10} {100 * row.mean:7.2f} {100 * row.deviation:6.2f}" for row in rows]
    return [*lines, f"{'chance':<10} {100 * chance:7.2f}"]


def record(
    rows: Sequence[FineTuneScores], chance: float, settings: FineTuneSettings, seeds: Sequence[int], batch_size: int
) -> dict[str, Any]:
    """The table as JSON, with what was computed."""
    return {
        "metric": "balanced accuracy",
        "fine_tuning": {
            "what": "front end, encoder and a linear layer on the mean over positions; AdamW, linear warm-up and decay",
            "batch_size": batch_size,
            **asdict(settings),
        },
        "seeds": list(seeds),
        "chance": chance,
        "rows": [
            {"weights": row.weights, "accuracies": row.accuracies, "mean": row.mean, "deviation": row.deviation}
            for row in rows
        ],
    }
