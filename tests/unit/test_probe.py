"""The probe on features whose answer is known."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from megad2v.errors import UserError
from megad2v.metrics.probe import LabelledFeatures, chance_level, check_labels, extract, record, score, table
from megad2v.modalities.batch import Batch
from megad2v.modalities.build import build_student
from tests.checkpoints import perturb_, small_config


def clusters(samples: int, noise: float, seed: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Points around one centre per class, all far from zero; classes of unequal size."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, size=samples, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    labels[: 2 * classes] = np.arange(2 * classes) % classes
    centres = np.random.default_rng(0).normal(size=(classes, 8)) + 100.0
    return (centres[labels] + noise * rng.normal(size=(samples, 8))).astype(np.float32), labels


def features(noise: float, seed: int, samples: int = 200) -> LabelledFeatures:
    informative, labels = clusters(samples, noise, seed)
    blind = np.random.default_rng(seed + 9).normal(size=informative.shape).astype(np.float32)
    return LabelledFeatures({"sees": informative, "blind": blind}, labels, 0)


def test_scores_of_what_is_known() -> None:
    """Separate clusters: all right; noise: near chance. The common offset of 100 would blind a raw cosine."""
    rows = score(features(0.05, 1), features(0.05, 2), seed=0)
    assert [row.weights for row in rows] == ["sees", "blind"]
    assert rows[0].knn == rows[0].linear == 1.0
    assert abs(rows[1].knn - 0.25) < 0.12
    assert abs(rows[1].linear - 0.25) < 0.12


def test_scores_are_balanced_and_repeatable() -> None:
    train, test = features(0.8, 1), features(0.8, 2)
    first = score(train, test, seed=3)
    assert first == score(train, test, seed=3)
    largest = np.flatnonzero(test.labels == 3)
    more = np.concatenate([np.arange(len(test.labels)), *[largest] * 5])  # the same classes, other sizes
    weighted = LabelledFeatures({n: f[more] for n, f in test.by_model.items()}, test.labels[more], 0)
    for a, b in zip(first, score(train, weighted, seed=3), strict=True):
        assert (a.knn, a.linear) == (pytest.approx(b.knn), pytest.approx(b.linear))


def test_the_test_set_does_not_choose() -> None:
    """The strength depends on training features alone."""
    train = features(0.8, 1)
    chosen = [[row.strength for row in score(train, features(0.8, seed), seed=0)] for seed in (2, 3, 4)]
    assert chosen[0] == chosen[1] == chosen[2]


def test_a_class_of_one_sample() -> None:
    """Rarer than the folds: still scored, without a failure or a screenful of warnings."""
    train = features(0.05, 1)
    keep = np.concatenate([np.flatnonzero(train.labels != 0), np.flatnonzero(train.labels == 0)[:1]])
    rare = LabelledFeatures({n: f[keep] for n, f in train.by_model.items()}, train.labels[keep], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = score(rare, features(0.05, 2), seed=0)
    assert rows[0].linear > 0.7


def batch(config, samples: int, seed: int, real: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    real = samples if real is None else real
    return Batch(
        modality="vision",
        inputs=torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=generator),
        mask_bmt=torch.zeros(samples, 1, 16, dtype=torch.bool),
        labels=torch.arange(samples) if real else torch.tensor([-1] * samples),
        sample_ids=tuple(f"a.tar/{i}" for i in range(real)),
        dropped=() if real else (("a.tar/9", "broken"),),
    )


def test_features_are_means_over_patches() -> None:
    config = small_config()
    models = {name: perturb_(build_student(config), seed) for seed, name in enumerate("ab")}
    batches = [batch(config, 3, 0), batch(config, 1, 1, real=0), batch(config, 2, 2)]
    found = extract(models, batches)
    assert found.labels.tolist() == [0, 1, 2, 0, 1]
    assert found.dropped == 1
    images = torch.cat([batches[0].inputs, batches[2].inputs])
    for name, model in models.items():
        with torch.no_grad():
            tokens = model.features(images)
            _, blocks = model.encoder(model.front_end(images, None)[1], last=3, tensor="block")
        assert np.allclose(found.by_model[name], tokens[:, 1:].mean(1), atol=1e-6)
        for number, block in enumerate(blocks, start=1):
            layer = extract(models, batches, layer=number).by_model[name]
            assert np.allclose(layer, block[:, 1:].mean(1), atol=1e-5)
    assert not np.allclose(found.by_model["a"], found.by_model["b"], atol=0.1)


def test_what_cannot_be_probed() -> None:
    config = small_config()
    model = perturb_(build_student(config), 0)
    with pytest.raises(UserError, match="no sample could be decoded"):
        extract({"a": model}, [batch(config, 1, 0, real=0)])
    model.encoder.norm.bias[3] = float("nan")
    with pytest.raises(UserError, match="a: features are not finite"):
        extract({"a": model}, [batch(config, 2, 0)])
    with pytest.raises(UserError, match="one class only"):
        check_labels(np.array([1, 1]), np.array([1]), ("cat", "dog"))
    with pytest.raises(UserError, match="no sample of class owl of the test"):
        check_labels(np.array([0, 1]), np.array([1, 2]), ("cat", "dog", "owl"))


def test_table_and_record() -> None:
    rows = score(features(0.05, 1, 60), features(0.05, 2, 60), seed=0)
    assert chance_level(np.array([0, 0, 0, 2])) == 0.5
    lines = table(rows, 0.25)
    assert len(lines) == 4
    assert lines[1].split() == ["sees", "100.00", "100.00"]
    assert lines[-1].split() == ["chance", "25.00", "25.00"]
    assert record(rows, 0.25, None)["rows"][0]["knn"] == 1.0
    assert "block 2" in record(rows, 0.25, 2)["features"]
