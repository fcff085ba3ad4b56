"""make_shards text: documents, sentences and labels as tokens, from files of any form, size and condition."""

from __future__ import annotations

import gzip
import json
import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from megad2v.data.format import read_dataset
from megad2v.data.index import load_or_build
from megad2v.data.make import make_shards
from megad2v.data.shardset import ShardSet
from megad2v.errors import UserError
from megad2v.modalities.text import lines as lines_module
from megad2v.modalities.text.clean import clean
from megad2v.modalities.text.decode import read_tokens
from megad2v.modalities.text.documents import TextOptions
from megad2v.modalities.text.shards import text_corpus
from megad2v.modalities.text.synthetic import PEOPLE, TOPICS, demo_story
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.modalities.text.train import TrainingOptions, train_tokenizer
from tests.unit.test_make_shards import files, make_demo_data
from tests.unit.test_make_shards import make_shards as tool
from tests.unit.text_corpora import make, report, texts

PLAIN = TextOptions()

STORY = "One.\nTwo  two.\n\n\nThree.\r\n  \nFour.\nFive."


@pytest.mark.parametrize(
    "options,expected",
    [
        ({}, [["One.", "Two  two.", "Three.", "Four.", "Five."]]),
        ({"sentence": "paragraph"}, [["One.\nTwo  two.", "Three.", "Four.\nFive."]]),
        ({"sentence": "paragraph", "clean": True}, [["One. Two two.", "Three.", "Four. Five."]]),
        ({"sentence": "document"}, [["One.\nTwo  two.\n\n\nThree.\n  \nFour.\nFive."]]),
        ({"document": "blank-lines"}, [["One.", "Two  two."], ["Three."], ["Four.", "Five."]]),
        ({"document": "blank-lines", "sentence": "paragraph"}, [["One.\nTwo  two."], ["Three."], ["Four.\nFive."]]),
        ({"document": "line"}, [["One."], ["Two  two."], ["Three."], ["Four."], ["Five."]]),
    ],
)
def test_documents_and_sentences(options: dict, expected: list, tmp_path: Path, vocabulary: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(b"\xef\xbb\xbf" + STORY.encode())
    made = make(tmp_path / "in", tmp_path / "out", vocabulary, **options)
    found = texts(tmp_path / "out")
    assert [sentences for _, sentences in found] == expected
    starts = {"One.": 1, "Two  two.": 2, "Three.": 5, "Four.": 7, "Five.": 8}
    for meta, sentences in found:
        assert meta == {"path": "a.txt", "line": starts[re.split("\n|(?<=One.) ", sentences[0])[0]]}
    count = sum(len(one.encode()) + 1 for document in expected for one in document)
    assert made.info.totals == {"tokens": count}
    assert made.info.samples == len(expected)


def test_folder_describes_itself(tmp_path: Path, vocabulary: Path) -> None:
    """dataset.json, tokenizer/ and index say what the shards hold; --overwrite leaves nothing of another vocabulary."""
    pytest.importorskip("sentencepiece")
    (tmp_path / "in/deep").mkdir(parents=True)
    stories = [demo_story(number, 1) for number in range(300)]
    (tmp_path / "in/deep/a.txt").write_text("\n\n".join("\n".join(story) for story in stories))
    (tmp_path / "in/notes.md").touch()
    ours = train_tokenizer((line for story in stories for line in story), TrainingOptions(600))
    ours.save(tmp_path / "bpe")
    out = tmp_path / "out"
    made = make(tmp_path / "in", out, tmp_path / "bpe", document="blank-lines")
    info = read_dataset(out)
    assert info == made.info
    assert info.tokenizer == {
        "name": "bpe",
        "kind": "sentencepiece",
        "vocabulary": 600,
        "fingerprint": ours.fingerprint,
        "dtype": "uint16",
    }
    assert Tokenizer.load(out / "tokenizer") == ours
    assert len(info.shards) > 1
    shards = ShardSet(str(out), "text")
    documents = [read_tokens(shards.read(i).data) for i in range(len(shards))]
    assert [d.tolist() for d in documents] == [ours.encode_document(story).tolist() for story in stories]
    assert info.totals == {"tokens": sum(map(len, documents))}
    lengths = [n for tar in sorted(out.glob("*.tar")) for n in load_or_build(tar, "text").lengths.tolist()]
    assert lengths == [len(document) for document in documents]
    assert report(out) == [("notes.md", 0, "no .txt, .jsonl or .tsv by its name, or hidden")]
    corpus = text_corpus(tmp_path / "in", vocabulary, PLAIN)
    make_shards(corpus, out, workers=0, max_shard_bytes=10**6, overwrite=True, progress=False)
    assert sorted(path.name for path in (out / "tokenizer").iterdir()) == ["megad2v.json", "vocab.tsv"]


def test_records(tmp_path: Path, vocabulary: Path) -> None:
    """JSON lines and tables, compressed and not, with the field named; labels of the tables."""
    zstandard = pytest.importorskip("zstandard")
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [
        {"body": "One.\n\nTwo.", "n": 1},
        {"body": "Trois été"},
        {"text": "x"},
        ["body"],
        {"body": 3},
        {"body": " "},
    ]
    broken = '{"body": "half \\ud83d"}\n{"body": \n'
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n" + broken)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"body": "gz 1"}\n') + gzip.compress(b'{"body": "gz 2"}'))
    pack = zstandard.ZstdCompressor().compress
    (folder / "c.JSONL.zst").write_bytes(pack(b'{"body": "zst 1"}\n') + pack(b'{"body": "zst 2"}'))
    (folder / "d.tsv").write_bytes('label\tid\tbody\npro\t1\t"Quoted" text\ncon\t2\tbad\x85row\ncon\t3\r\n'.encode())
    (folder / "e.tsv.gz").write_bytes(gzip.compress(b"body\tlabel\nfifth\tpro\n"))
    made = make(folder, tmp_path / "out", vocabulary, field="body")
    assert [(meta["path"], meta["line"], meta.get("label"), one) for meta, one in texts(tmp_path / "out")] == [
        ("a.jsonl", 1, None, ["One.", "Two."]),
        ("a.jsonl", 2, None, ["Trois été"]),
        ("b.jsonl.gz", 1, None, ["gz 1"]),
        ("b.jsonl.gz", 2, None, ["gz 2"]),
        ("c.JSONL.zst", 1, None, ["zst 1"]),
        ("c.JSONL.zst", 2, None, ["zst 2"]),
        ("d.tsv", 2, 1, ['"Quoted" text']),
        ("d.tsv", 3, 0, ["bad\x85row"]),
        ("e.tsv.gz", 2, 1, ["fifth"]),
    ]
    assert made.info.classes == ("con", "pro")
    assert made.info.class_counts == (1, 2)
    reasons = report(tmp_path / "out")
    assert [(path, line) for path, line, _ in reasons] == [("a.jsonl", i) for i in range(3, 9)] + [("d.tsv", 4)]
    for (_, _, reason), start in zip(
        reasons,
        (
            "no text in a field 'body' (it has text); see --field",
            "no text in a field 'body' (no object)",
            "no text in a field 'body' (it has body)",
            "empty",
            "character 5 of a text is half of a surrogate pair (U+D83D)",
            "no JSON",
            "2 columns, the header has 3",
        ),
    ):
        assert reason.startswith(start)
    assert make(folder, tmp_path / "none", vocabulary, field="body", labels="none").info.classes == ()


def test_what_cannot_be_read_is_named(tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad UTF-8 and endless lines cost their line, damaged archives what comes after the damage."""
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(lines_module, "LONGEST_LINE", 1_000)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"good\nb\xe4d\nalso good\n" + b"x" * 5_000 + b"\nlast\n")
    (folder / "blank.txt").write_bytes(b"\n \n")
    (folder / "utf16.txt").write_text("wide", encoding="utf-16")
    body = "".join(f"line {i} {random.Random(i).random()}\n" for i in range(20_000)).encode()
    (folder / "cut.txt.gz").write_bytes(gzip.compress(body)[:-50_000])
    (folder / "cut.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(body)[:-50_000])
    (folder / "junk.txt.zst").write_bytes(b"junk")
    (folder / "junk.txt.gz").write_bytes(b"junk")
    make(folder, tmp_path / "out", vocabulary, document="line")
    found: dict[str, list[str]] = {}
    for meta, (sentence,) in texts(tmp_path / "out"):
        found.setdefault(meta["path"], []).append(sentence)
    assert found["a.txt"] == ["good", "also good", "last"]
    assert set(found) == {"a.txt", "cut.txt.gz", "cut.txt.zst"}
    for name in ("cut.txt.gz", "cut.txt.zst"):
        assert 1_000 < len(found[name]) < 20_000
        assert found[name][:-1] == body.decode().split("\n")[: len(found[name]) - 1]
    reasons = report(tmp_path / "out")
    assert [(path, line) for path, line, _ in reasons] == [
        ("a.txt", 2),
        ("a.txt", 4),
        *((name, 0) for name in ("cut.txt.gz", "cut.txt.zst", "junk.txt.gz", "junk.txt.zst")),
        ("utf16.txt", 1),
    ]
    assert reasons[0][2] == "not UTF-8 (byte 2 of the line)"
    assert all(reason.startswith("damaged or cut short") for _, line, reason in reasons if line == 0)
    make(folder / "a.txt", tmp_path / "file", vocabulary)
    assert [one for _, one in texts(tmp_path / "file")] == [["good", "also good", "last"]]
    assert len(report(tmp_path / "file")) == 2


def test_clean_and_duplicates(tmp_path: Path, vocabulary: Path) -> None:
    assert clean(" a\t b\u00a0c\x00\ufeff\x07 ") == "a b c"
    assert clean("e\u0301") == "é"
    assert clean("* * * 12 ---") == ""
    assert clean("👩\u200d👧 a\u200fb") == "👩\u200d👧 a\u200fb", "joiners and direction marks are spelling"
    decomposed = unicodedata.normalize("NFD", "Éte\u0301 two")
    lines_of = ["Éte\u0301  two", "12 34", decomposed, "Other", "été two", "Other ", "***"]
    (tmp_path / "a.txt").write_text("\n".join(lines_of))
    plain = make(tmp_path / "a.txt", tmp_path / "plain", vocabulary, document="line")
    assert plain.info.samples == 7
    made = make(tmp_path / "a.txt", tmp_path / "out", vocabulary, document="line", clean=True, dedupe=True)
    found = texts(tmp_path / "out")
    assert [one for _, (one,) in found] == ["Été two", "Other", "été two"]
    same, nothing = "the same as an earlier one", "nothing is left of it"
    assert report(tmp_path / "out") == [("a.txt", n, r) for n, r in ((2, nothing), (3, same), (6, same), (7, nothing))]
    assert made.counts == {"converted": 3, "skipped": 4}
    assert made.info.totals == {"tokens": sum(len(one.encode()) + 1 for _, (one,) in found)}


def test_label_folders(tmp_path: Path, vocabulary: Path) -> None:
    for name in ("neg/1.txt", "neg/x/2.txt", "pos/3.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    assert make(tmp_path / "in", tmp_path / "auto", vocabulary).info.classes == ()
    assert make(tmp_path / "in", tmp_path / "out", vocabulary, labels="folders").info.classes == ("neg", "pos")
    assert {one[0]: meta["label"] for meta, one in texts(tmp_path / "out")} == {
        "neg/1.txt": 0,
        "neg/x/2.txt": 0,
        "pos/3.txt": 1,
    }
    corpus = text_corpus(tmp_path / "in", vocabulary, PLAIN, labels="folders", classes=("pos", "neg", "new"))
    assert corpus.classes == ["pos", "neg", "new"]
    with pytest.raises(UserError, match="not among the 1 classes"):
        text_corpus(tmp_path / "in", vocabulary, PLAIN, labels="folders", classes=("pos",))


def test_real_tables(shared: Callable[[str], Path], tmp_path: Path, vocabulary: Path) -> None:
    """Every row of banking77 with its label; the test set by the ids of train."""
    folder = shared("data/text/banking77")
    with pytest.raises(UserError, match=r"test\.tsv, train\.tsv look like splits; give one: .*train\.tsv"):
        text_corpus(folder, vocabulary, PLAIN)
    made = make(folder / "train.tsv", tmp_path / "train", vocabulary, workers=2)
    rows = [line.split("\t") for line in (folder / "train.tsv").read_text().splitlines()[1:]]
    assert len(made.info.classes) == 77
    assert [(made.info.classes[meta["label"]], *one) for meta, one in texts(tmp_path / "train")] == list(
        map(tuple, rows)
    )
    test = text_corpus(folder / "test.tsv", vocabulary, PLAIN, classes=made.info.classes)
    assert tuple(test.classes) == made.info.classes


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--input", "{}/missing"], "missing: no such file or folder; check --input"),
        (["--input", "{}/empty"], "no text"),
        (["--input", "{}/b.md"], "b.md: no .txt, .jsonl, .tsv"),
        (["--input", "{}/junk"], "none of the 1 documents can be used .last: not UTF-8"),
        (["--input", "{}/blank"], "none of the 1 documents can be used"),
        (["--input", "{}/in", "--tokenizer", "{}/empty"], "no such file; a tokenizer is a folder"),
        (["--input", "{}/in", "--max-document-size", "10"], "--max-document-size: expected 1024 bytes or more"),
        (["--input", "{}/in", "--max-document-size", "big"], "--max-document-size: 'big' is not a size"),
        (["--input", "{}/t.tsv"], "t.tsv: line 1 has the columns id, body; expected a header line .* 'text'"),
        (["--input", "{}/in", "--classes", "{}/empty"], "no dataset.json"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, vocabulary: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in (("in/a.txt", b"text"), ("junk/a.txt", b"\xff"), ("blank/a.txt", b"\n"), ("empty/.x", b"")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
    (tmp_path / "b.md").touch()
    (tmp_path / "t.tsv").write_text("id\tbody\n")
    words = [argument.format(tmp_path) for argument in arguments]
    defaults = ["--tokenizer", str(vocabulary), "--output", str(tmp_path / "o"), "--workers", "0"]
    code = tool.main(["text", *defaults, *words])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not list(tmp_path.glob("o/*"))


def test_zstandard_is_asked_for(tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").touch()
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(UserError, match=r"\*\.zst needs zstandard .*pip install zstandard"):
        text_corpus(tmp_path, vocabulary, PLAIN)


def test_demo_text(tmp_path: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stories: the same for a seed, each with its own two people and topic, and every one a document."""
    command = ["--only", "text", "--stories", "500"]
    assert make_demo_data.main([str(tmp_path / "a"), *command, "--workers", "2"]) == 0
    assert "500 stories (0.3 MB)" in capsys.readouterr().out
    folder = tmp_path / "a/text"
    assert sorted(path.name for path in folder.iterdir()) == [f"stories_{i:03d}.txt" for i in range(3)]
    make_demo_data.main([str(tmp_path / "b"), *command, "--workers", "1"])
    assert files(folder) == files(tmp_path / "b/text"), "same seed, same files"
    make_demo_data.main([str(tmp_path / "b"), "--only", "text", "--stories", "100", "--seed", "2", "--overwrite"])
    assert [path.name for path in (tmp_path / "b/text").iterdir()] == ["stories_000.txt"]
    assert (tmp_path / "b/text/stories_000.txt").read_bytes() != (folder / "stories_000.txt").read_bytes()
    make(folder, tmp_path / "out", vocabulary, document="blank-lines")
    found = [sentences for _, sentences in texts(tmp_path / "out")]
    assert found == [demo_story(number, 1) for number in range(500)]
    assert len({tuple(story) for story in found}) == 500
    names = {name for some in PEOPLE.values() for name in some}
    for story in found:
        words = set(re.findall(r"\w+", " ".join(story)))
        assert len(words & names) == 2
        assert 5 <= len(story) <= 16
        of_topic = {name for name, topic in TOPICS.items() if words & {*topic.things, *topic.places}}
        assert len(of_topic) == 1
    assert make_demo_data.main([str(tmp_path / "c"), "--stories", "0"]) == 2


def test_command_line(tmp_path: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(STORY)
    words = ["text", "--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"), "--workers", "1"]
    options = ["--document", "blank-lines", "--sentence", "paragraph", "--clean", "--dedupe"]
    assert tool.main([*words, "--tokenizer", str(vocabulary), *options]) == 0
    line = capsys.readouterr().out
    assert "3 documents, 33 tokens in 1 shards (no labels): 0 copied, 3 converted, 0 skipped" in line
    settings = read_dataset(tmp_path / "out").settings
    assert settings["document"] == "blank-lines"
    assert str(tmp_path) not in json.dumps(settings)
