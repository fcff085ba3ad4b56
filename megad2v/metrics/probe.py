"""How much a frozen encoder's features say about labels it never saw: k nearest neighbours and a linear classifier.

A feature is the mean over a sample's positions (prefix tokens such as CLS left out: they have no target of their own)
of the encoder's output behind its final norm, or of a chosen block's output before it. Features are standardised with
the training set's mean and deviation, for both classifiers: what all samples share would drown a cosine.
Scores are balanced accuracies (the mean over classes of each class's accuracy), so that class sizes do not matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.models.data2vec import Student

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""A neighbour of cosine c votes with weight exp(c / 0.07)."""
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse regularisation of the linear classifier; cross-validation on the training set picks one."""
FOLDS = 5


class Encoding(Protocol):
    """What a Student is here: a front end and an encoder."""

    front_end: Any
    encoder: Any
    prefix_tokens: int


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of one data set by model name, each float32 (N, D), and int64 labels (N,)."""

    by_model: dict[str, np.ndarray]
    labels: np.ndarray
    dropped: int
    """Samples that could not be decoded."""


@dataclass(frozen=True)
class ProbeScores:
    """One row of the table."""

    weights: str
    knn: float
    """Balanced accuracy of the nearest neighbours."""
    linear: float
    """Balanced accuracy of the linear classifier."""
    strength: float
    """Its inverse regularisation, as cross-validation chose it."""


@torch.inference_mode()
def extract(models: Mapping[str, Student], batches: Iterable[Batch], *, layer: int | None = None) -> LabelledFeatures:
    """Features of all models in one pass over labelled, unmasked batches, on the device where each model is.

    `layer` None: behind the final norm; n from 1: the output of block n. Raises UserError when nothing is left or
    features are not finite.
    """
    collected: dict[str, list[Tensor]] = {name: [] for name in models}
    labels: list[Tensor] = []
    dropped = 0
    for batch in batches:
        real = len(batch.sample_ids)  # what is beyond is the row of zeros of an empty batch
        dropped += len(batch.dropped)
        labels.append(batch.labels[:real])
        for name, model in models.items():
            on_device = batch.to(next(model.parameters()).device)
            collected[name].append(pooled(model.eval(), on_device, layer)[:real].cpu())
    if not sum(len(part) for part in labels):
        raise UserError("no sample could be decoded; the shards' index and quarantine say more")
    by_model = {name: torch.cat(parts).numpy() for name, parts in collected.items()}
    for name, features in by_model.items():
        if not np.isfinite(features).all():
            raise UserError(f"{name}: features are not finite; this checkpoint's run has diverged")
    return LabelledFeatures(by_model, torch.cat(labels).numpy(), dropped)


def pooled(model: Student, batch: Batch, layer: int | None = None) -> Tensor:
    """float32 (B, D): the mean over positions that are not padding, of the output or of block `layer`."""
    (x_btd,) = layer_outputs(model, batch.inputs, batch.padding_bt, [layer])
    return mean_over_positions(x_btd[:, model.prefix_tokens :], batch.padding_bt)


def layer_outputs(
    model: Encoding,
    inputs: Tensor,
    padding_bt: Tensor | None,
    layers: Sequence[int | None],
    mask_bt: Tensor | None = None,
) -> list[Tensor]:
    """The outputs (B, prefix + T, D) of `layers`, from one pass: blocks from 1, None for the encoder's own output.
    `mask_bt` bool (B, T): what the front end hides."""
    prefixed_bt = None if padding_bt is None else F.pad(padding_bt, (model.prefix_tokens, 0))
    depth = len(model.encoder.blocks)
    last = max((depth - layer + 1 for layer in layers if layer is not None), default=0)
    view_btd = model.front_end(inputs, mask_bt)[0]
    output_btd, blocks_btd = model.encoder(view_btd, prefixed_bt, last=last, tensor="block")
    return [output_btd if layer is None else blocks_btd[layer - 1 - depth + last] for layer in layers]


def mean_over_positions(x_btd: Tensor, padding_bt: Tensor | None) -> Tensor:
    """float32 (B, D) of (B, T, D); what is padding is left out."""
    x_btd = x_btd.float()
    if padding_bt is None:
        return x_btd.mean(dim=1)
    kept_bt1 = (~padding_bt).unsqueeze(-1)
    return (x_btd * kept_bt1).sum(dim=1) / kept_bt1.sum(dim=1).clamp(min=1)


def check_labels(train: np.ndarray, test: np.ndarray, classes: Sequence[str]) -> None:
    """Raises UserError unless there are at least two classes and the training set has all of the test set's."""
    names = {label: classes[label] if label < len(classes) else str(label) for label in {*train, *test}}
    if len(set(train)) < 2:
        raise UserError("the training shards hold samples of one class only; a probe needs at least two")
    missing = sorted(names[label] for label in set(test) - set(train))
    if missing:
        raise UserError(f"the training shards have no sample of class {', '.join(missing[:5])} of the test shards")


def score(train: LabelledFeatures, test: LabelledFeatures, *, seed: int) -> list[ProbeScores]:
    """One row per model. `seed` draws the folds of the cross-validation, which sees the training set alone."""
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    # Threads only wait for each other in products as small as these (seen 20 times slower with two than with one).
    # The warnings are of classes rarer than the folds and of fits stopped early: both still give a fair score.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return [
            _score_one(name, features, train.labels, test.by_model[name], test.labels, seed)
            for name, features in train.by_model.items()
        ]


def _score_one(
    name: str, train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, seed: int
) -> ProbeScores:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    nearest = KNeighborsClassifier(
        min(NEIGHBOURS, len(train)),
        metric="cosine",
        weights=lambda cosine_distance: np.exp((1.0 - cosine_distance) / TEMPERATURE),
    )
    knn = make_pipeline(StandardScaler(), nearest).fit(train, train_labels)
    # "balanced": rare classes count as much in training as they do in the score.
    linear = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000, tol=1e-3))
    # As many as the rarest class can fill; classes of one sample are absent from some.
    folds = int(np.clip(np.bincount(train_labels)[np.unique(train_labels)].min(), 2, FOLDS))
    search = GridSearchCV(
        linear,
        {"logisticregression__C": STRENGTHS},
        scoring="balanced_accuracy",
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    ).fit(train, train_labels)
    return ProbeScores(
        name,
        knn=balanced_accuracy(test_labels, knn.predict(test)),
        linear=balanced_accuracy(test_labels, search.predict(test)),
        strength=float(search.best_params_["logisticregression__C"]),
    )


def balanced_accuracy(labels: np.ndarray, guesses: np.ndarray) -> float:
    """The mean over the classes present of each one's accuracy."""
    right = labels == guesses
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def chance_level(labels: np.ndarray) -> float:
    """Balanced accuracy of guessing: one over the number of classes present."""
    return 1.0 / len(np.unique(labels))


def table(rows: Sequence[ProbeScores], chance: float) -> list[str]:
    """Lines for people, in per cent."""
    lines = [f"{'weights':<10} {'k-NN':>7} {'linear':>7}   balanced accuracy, %"]
    lines += [f"{row.weights:<10} {100 * row.knn:7.2f} {100 * row.linear:7.2f}" for row in rows]
    return [*lines, f"{'chance':<10} {100 * chance:7.2f} {100 * chance:7.2f}"]


def record(rows: Sequence[ProbeScores], chance: float, layer: int | None) -> dict[str, Any]:
    """The table as JSON, with what was computed."""
    where = "the encoder's output behind its final norm" if layer is None else f"the output of block {layer}"
    return {
        "metric": "balanced accuracy",
        "features": f"mean over positions, prefix tokens left out, of {where}; standardised with the training set",
        "knn": {"k": NEIGHBOURS, "similarity": "cosine", "weight": f"exp(cosine / {TEMPERATURE})"},
        "linear": {"classifier": "multinomial logistic regression, classes balanced", "strengths": list(STRENGTHS)},
        "chance": chance,
        "rows": [asdict(row) for row in rows],
    }
