"""What counting words says of labels: TF-IDF and logistic regression, a reference beside the probes of text encoders.

    python benchmarks/bag_of_words.py TRAIN.tsv TEST.tsv OUTPUT.json      # columns: label, text

Words of the raw texts; one strength, nothing is chosen.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

STRENGTH = 10.0


def read(path: Path) -> tuple[list[str], list[str]]:
    """(labels, texts)"""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["label"] for row in rows], [row["text"] for row in rows]


def main(train: Path, test: Path, output: Path) -> None:
    """Fit, score, write."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline

    labels, texts = read(train)
    linear = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000)
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), linear).fit(texts, labels)
    truth, unseen = read(test)
    content = {
        "features": "TF-IDF of words",
        "metric": "balanced accuracy",
        "strength": STRENGTH,
        "accuracy": float(balanced_accuracy_score(truth, model.predict(unseen))),
    }
    output.write_text(json.dumps(content) + "\n")
    print(f"{output}: {content['accuracy']:.4f}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
