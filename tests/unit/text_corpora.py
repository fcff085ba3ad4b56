"""Raw text made into shards, and read back, for the tests of make_shards text."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import webdataset

from megad2v.data.make import Made, make_shards
from megad2v.modalities.text.documents import TextOptions
from megad2v.modalities.text.shards import text_corpus
from megad2v.modalities.text.train import TrainingOptions, train_tokenizer

BYTES = train_tokenizer((), TrainingOptions(0, "byte"))


def make(source: Path, out: Path, vocabulary: Path, *, workers: int = 0, labels: str = "auto", **options) -> Made:
    corpus = text_corpus(source, vocabulary, TextOptions(**options), labels=labels)
    return make_shards(corpus, out, workers=workers, max_shard_bytes=200_000, progress=False)


def texts(out: Path) -> list[tuple[dict, list[str]]]:
    """(KEY.json, sentences) of all samples, sorted by their place in the sources; labels are in "label"."""
    found = []
    urls = sorted(map(str, out.glob("*.tar")))
    for sample in webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None):
        tokens = np.load(io.BytesIO(sample["tokens.npy"]))
        assert tokens.dtype == np.uint16
        assert tokens[-1] == BYTES.eos, "each sentence ends with </s>"
        ends = np.flatnonzero(tokens == BYTES.eos)
        sentences = [BYTES.decode(part) for part in np.split(tokens, ends + 1)[:-1]]
        meta = json.loads(sample["json"])
        if "cls" in sample:
            meta["label"] = int(sample["cls"])
        found.append((meta, sentences))
    return sorted(found, key=lambda one: (one[0]["path"], one[0]["line"], one[0].get("part", 0)))


def report(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    return sorted((row["path"], row.get("line", 0), row["reason"]) for row in rows)
