"""Text files in parts, streams and several processes: the same documents, in bounded memory; and files of tokens."""

from __future__ import annotations

import gzip
import io
import random
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megad2v.data import make as make_module
from megad2v.modalities.sample import BadSample
from megad2v.modalities.text import shards as shards_module
from megad2v.modalities.text.clean import fingerprint
from megad2v.modalities.text.decode import read_tokens, token_count, write_tokens
from megad2v.modalities.text.documents import TextOptions
from megad2v.modalities.text.lines import count_lines, lines, paragraphs
from megad2v.modalities.text.shards import text_corpus
from megad2v.modalities.text.tokenizer import Tokenizer
from tests.unit.test_make_shards import files
from tests.unit.text_corpora import make, texts


def test_large_vocabularies_take_four_bytes() -> None:
    for vocabulary, dtype in ((65_536, np.uint16), (65_537, np.uint32)):
        assert Tokenizer("bytes", vocabulary).dtype == dtype
        tokens = np.array([0, vocabulary - 1], dtype=dtype)
        data = write_tokens(tokens)
        assert np.array_equal(read_tokens(data), tokens)
        assert np.array_equal(np.load(io.BytesIO(data)), tokens)
        assert token_count(data) == token_count(data[:1024]) == 2
        with pytest.raises(BadSample, match="cut short: 1 of 2 tokens"):
            read_tokens(data[: -dtype().itemsize])
    for wrong in (np.zeros(3), np.zeros((2, 2), np.uint16)):
        stream = io.BytesIO()
        np.save(stream, wrong)
        with pytest.raises(BadSample, match="expected one dimension of uint16 or uint32"):
            read_tokens(stream.getvalue())
    with pytest.raises(BadSample, match=r"no \.npy"):
        read_tokens(b"junk")
    assert token_count(b"junk") == token_count(b"") == 0


def random_file(rng: random.Random) -> bytes:
    words = [b"a", b"bc def", "é😀".encode(), b"  ", b"\t", b"x" * 40, b"", b"%d"]
    ends = [b"\n", b"\n\n", b"\r\n", b"\n \n", b"\n\n\n"]
    numbered = (rng.choice(words).replace(b"%d", b"%d" % rng.randrange(10**6)) for _ in range(rng.randrange(1, 60)))
    return b"".join(word + rng.choice(ends) for word in numbered)[: rng.randrange(1, 900)]


def test_parts_of_a_file_are_the_file(tmp_path: Path) -> None:
    """Each line and paragraph belongs to one part, wherever the borders lie, with its own number and offset."""
    rng, path = random.Random(0), tmp_path / "a.txt"
    for _ in range(300):
        data = random_file(rng)
        path.write_bytes(data)
        step = rng.randrange(1, 200)
        starts = range(0, len(data), step)
        numbers = count_lines(path, starts)
        parts = [(start, start + step, number) for start, number in zip(starts, numbers)]
        whole = list(lines(path))
        assert [line.offset for line in whole] == [
            0,
            *(m.end() for m in re.finditer(b"\n", data) if m.end() < len(data)),
        ]
        assert [line.number for line in whole] == list(range(1, len(whole) + 1))
        assert [line for part in parts for line in lines(path, *part)] == whole
        longest = rng.choice([30, 10**6])
        whole = list(paragraphs(path, 0, None, 1, longest))
        assert [one for part in parts for one in paragraphs(path, *part, longest)] == whole
        joined = b"".join(line.data or b"" for paragraph in whole for line in paragraph.lines)
        assert joined == b"".join(line for line in re.split(b"\r?\n|\r$", data) if line.strip())


@pytest.mark.parametrize("options", [{}, {"sentence": "paragraph"}, {"document": "blank-lines"}, {"document": "line"}])
def test_any_division_gives_the_same_documents(
    options: dict, tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Big files in parts, with spooling, by any number of processes, and compressed: the same documents."""
    monkeypatch.setattr(make_module, "SPOOL_BYTES", 5_000)
    monkeypatch.setattr(shards_module, "PART_BYTES", 4_000)
    rng = random.Random(1)
    for name in "ab":
        (tmp_path / "in").mkdir(exist_ok=True)
        data = b"\n".join(random_file(rng) for _ in range(120))
        (tmp_path / f"in/{name}.txt").write_bytes(data)
        (tmp_path / "gz").mkdir(exist_ok=True)
        (tmp_path / f"gz/{name}.txt.gz").write_bytes(gzip.compress(data))
    options = {**options, "dedupe": True, "max_document_bytes": 2_000}
    assert len(text_corpus(tmp_path / "in", vocabulary, TextOptions(**options)).files) > 10
    for workers in (0, 1, 3):
        make(tmp_path / "in", tmp_path / str(workers), vocabulary, workers=workers, **options)
    assert files(tmp_path / "0") == files(tmp_path / "1") == files(tmp_path / "3")
    assert not (tmp_path / "3/.making").exists()
    make(tmp_path / "gz", tmp_path / "packed", vocabulary, workers=2, **options)
    # Which of two equal documents is kept depends on the order of the parts: their words do not.
    plain, packed = texts(tmp_path / "3"), texts(tmp_path / "packed")
    assert len(plain) == len(packed) > 20
    assert {fingerprint(one) for _, one in plain} == {fingerprint(one) for _, one in packed}
    assert len({fingerprint(one) for _, one in plain}) == len(plain)


@pytest.mark.parametrize("name", ("a.txt", "a.txt.gz"))
def test_memory_does_not_grow_with_the_file(
    name: str, tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 MB of text, 12 MB of tokens, within 4 MB: in a process, on the way out of it, and in the main one."""
    monkeypatch.setattr(make_module, "SPOOL_BYTES", 2**20)
    data = b"".join(b"%d " % i + b"x" * 600 + b"\n\n" for i in range(10_000))
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    corpus = text_corpus(tmp_path / name, vocabulary, TextOptions(document="blank-lines"))
    assert len(corpus.files) == 1
    tracemalloc.start()
    try:
        packed = make_module._several(corpus, corpus.files, tmp_path / "spool")
        assert isinstance(packed, Path)
        assert packed.stat().st_size > 12e6
        with packed.open("rb") as stream:
            count = sum(len(outcome.samples) for outcome in make_module._unpack(corpus.files, stream))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert peak < 4e6


def test_long_documents_are_cut_between_sentences(tmp_path: Path, vocabulary: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"Sentence number {i}." for i in range(500)))
    for document in ("file", "blank-lines"):
        out = tmp_path / document
        make(tmp_path / "a.txt", out, vocabulary, document=document, max_document_bytes=2_000)
        found = texts(out)
        assert [meta.get("part", 0) for meta, _ in found] == list(range(len(found)))
        assert 4 <= len(found) <= 6
        assert [one for _, sentences in found for one in sentences] == [f"Sentence number {i}." for i in range(500)]
