"""Vocabularies: exact round trips, no special from any text, ids equal to the libraries' and the exported files'."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megad2v.errors import UserError
from megad2v.modalities.text.byte_level import import_byte_level
from megad2v.modalities.text.export import export_hugging_face
from megad2v.modalities.text.reading import Lines, find_inputs
from megad2v.modalities.text.synthetic import demo_story
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.modalities.text.train import LONGEST, TrainingOptions, draw, pieces_of, train_tokenizer
from tests.unit.test_make_shards import tool

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

train_tool = tool("train_tokenizer")
NAMES = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
TRICKY = (
    *NAMES,
    "x <s> y<mask></s><pad> <unk>z <0x41>",
    "",
    " ",
    "  a  b ",
    "\n\t\r\n",
    "nul\0nul",
    "bell \x07 escape \x1b[0m c1 \x85",
    "é e\u0301 \u0301x",
    "😀 👩\u200d👩\u200d👧 \U0010ffff \ufeff \ufffd",
    "שלום עולם \u200fمرحبا\u200e",
    "日本語 ไทย ไม่มี",
    "....... ------- aaaaaaa ababababab",
    "the garden, the sea.",
)


def corpus() -> list[str]:
    """Stories, and lines that read like specials: they must not make a difference."""
    return [line for number in range(300) for line in demo_story(number, 1)] + [
        "a <s> b <mask> c </s> <pad> <unk>"
    ] * 50


def fuzz(count: int, seed: int = 0) -> Iterator[str]:
    """Unicode of all sorts, mixtures and repetitions."""
    rng = random.Random(seed)
    kinds: list[Callable[[], str]] = [
        lambda: chr(rng.randrange(32, 127)),
        lambda: chr(rng.randrange(32)),
        lambda: chr(rng.randrange(0x80, 0x2580)),
        lambda: chr(rng.choice([rng.randrange(0x2582, 0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: rng.choice([*NAMES, "<0x41>", " ", "\n", "aaa", "....", "the ", "garden", "\u0301", "\u200d", "😀"]),
    ]
    for _ in range(count):
        weights = [rng.random() ** 3 for _ in kinds]
        yield "".join(rng.choices(kinds, weights)[0]() for _ in range(rng.randrange(40)))
        yield rng.choice(["a", "ab", ".", "-", "ha", "the ", " ", "ss"]) * rng.randrange(30) + rng.choice(
            ["", "a", "b"]
        )


def roberta(folder: Path, corpus: list[str], *, special: bool = True) -> Path:
    """A byte-level BPE as RoBERTa's files have it, trained here; no file of theirs is at hand."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(NAMES[:4]),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(corpus, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    theirs.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["<mask>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    mask = tokenizers.AddedToken("<mask>", lstrip=True, special=special)
    theirs.add_special_tokens([mask]) if special else theirs.add_tokens([mask])
    theirs.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    theirs.enable_truncation(16)
    (folder / "json").mkdir(exist_ok=True)
    theirs.save(str(folder / "json/tokenizer.json"))
    return folder


KINDS = ("bpe", "unigram", "char", "byte", "byte_level", "bpe without bytes")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    lines = corpus()
    trained = {
        "bpe": TrainingOptions(900),
        "unigram": TrainingOptions(500, "unigram"),
        "char": TrainingOptions(400, "char"),
        "byte": TrainingOptions(0, "byte"),
        "bpe without bytes": TrainingOptions(500, byte_fallback=False),
    }
    found = {name: train_tokenizer(lines, options) for name, options in trained.items()}
    found["byte_level"] = import_byte_level(roberta(tmp_path_factory.mktemp("roberta"), lines) / "json")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_specials(kind: str, made: dict[str, Tokenizer], tmp_path: Path) -> None:
    """Texts come back exactly, none gives a special, and a saved vocabulary gives equal ids."""
    ours = made[kind]
    assert (ours.bos, ours.pad, ours.eos, ours.unk, ours.mask) == (0, 1, 2, 3, ours.vocabulary - 1)
    assert [ours.pieces[i] for i in (0, 1, 2, 3, ours.mask)] == list(NAMES)
    ours.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert (loaded.fingerprint, loaded.vocabulary) == (ours.fingerprint, ours.vocabulary)
    rows = (tmp_path / "saved/vocab.tsv").read_text().split("\n")
    assert len(rows) - 1 == ours.vocabulary
    assert rows[ours.mask] == f'{ours.mask}\t"<mask>"'
    lossless = kind != "bpe without bytes"
    for text in (*TRICKY, *fuzz(1_000)):
        ids = ours.encode(text)
        assert ids.dtype == np.uint16
        assert not np.isin(ids, (0, 1, 2, ours.mask)).any(), text
        assert np.array_equal(ids, loaded.encode(text))
        assert not lossless or (3 not in ids and ours.decode(ids) == text), repr(text)
    if not lossless:
        assert 3 in ours.encode("日本"), "what has no piece"
        assert 3 in ours.encode("\u0301")


def test_lower_block_is_the_one_exception(made: dict[str, Tokenizer]) -> None:
    """U+2581 is sentencepiece's own sign for a space."""
    assert made["bpe"].decode(made["bpe"].encode("a\u2581b")) == "a b"
    assert made["byte_level"].decode(made["byte_level"].encode("a\u2581b")) == "a\u2581b"


@pytest.mark.parametrize("kind", ("bpe", "byte", "byte_level"))
def test_lone_surrogates_are_refused(kind: str, made: dict[str, Tokenizer]) -> None:
    with pytest.raises(UserError, match=r"character 2 .* half of a surrogate pair \(U\+D83D\)"):
        made[kind].encode("ab\ud83d")


def test_decode(made: dict[str, Tokenizer]) -> None:
    ours = made["bpe"]
    ids = ours.encode_document(["the sea", "a boat"])
    assert ids.tolist() == [*ours.encode("the sea"), 2, *ours.encode("a boat"), 2]
    assert ours.decode([0, *ours.encode("the sea"), ours.mask, 2, 1]) == "the sea"
    assert ours.decode([]) == ""
    for wrong in ([-1], [ours.vocabulary]):
        with pytest.raises(ValueError, match="this vocabulary has 900"):
            ours.decode(wrong)


@pytest.mark.parametrize("kind", ("bpe", "char", "byte", "byte_level", "bpe without bytes"))
def test_export_gives_equal_ids(kind: str, made: dict[str, Tokenizer], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = made[kind]
    export_hugging_face(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(theirs) == ours.vocabulary
    assert (theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id) == (0, 2, ours.mask)
    for text in (*TRICKY, "a\u2581b", *corpus()[:300], *fuzz(1_000, seed=1)):
        ids = theirs(text)["input_ids"]
        assert ids == [0, *ours.encode(text), 2], repr(text)
        assert kind == "bpe without bytes" or theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    both = theirs("the sea", "a boat")["input_ids"]
    assert both == [0, *ours.encode("the sea"), 2, 2, *ours.encode("a boat"), 2]
    assert theirs(["a", "the sea and the garden"], padding=True)["input_ids"][0][-1] == 1


def test_unigram_is_not_exported(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a unigram vocabulary cannot be exported"):
        export_hugging_face(made["unigram"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unigram_is_said_when_it_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not when a run with it has ended."""
    (tmp_path / "a.txt").write_text("\n".join(corpus()))
    lines = {}
    for model in ("unigram", "bpe"):
        words = ["--input", tmp_path / "a.txt", "--model", model, "--vocab-size", 400, "--output", tmp_path / model]
        assert train_tool.main([str(word) for word in words]) == 0
        lines[model] = capsys.readouterr().out.splitlines()
    assert len(lines["unigram"]) == 2 and len(lines["bpe"]) == 1
    assert "--to hf will refuse runs with it: a unigram vocabulary cannot be exported" in lines["unigram"][1]


def test_real_text_equals_the_libraries(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """All books and tables: ids are sentencepiece's and the tokenizers library's own, and texts come back."""
    transformers = pytest.importorskip("transformers")
    lines = list(Lines(find_inputs([str(shared("data/text"))])))
    assert len(lines) > 150_000
    ours = train_tokenizer(lines[::4], TrainingOptions(8_000))
    ours.save(tmp_path / "ours")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "ours/tokenizer.model"))
    assert [ours.encode(line).tolist() for line in lines] == theirs.encode(lines)
    assert all(ours.decode(ours.encode(line)) == line for line in lines[::10])
    folder = roberta(tmp_path / "roberta", lines[::40])
    level = import_byte_level(folder / "vocab.json")
    library = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    some = lines[::10]
    assert [level.encode(line).tolist() for line in some] == [found.ids for found in library.encode_batch(some)]
    assert all(level.decode(level.encode(line)) == line for line in some)
    export_hugging_face(ours, tmp_path / "hf")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert exported(some)["input_ids"] == [[0, *ours.encode(line), 2] for line in some]


def test_byte_level_import(tmp_path: Path) -> None:
    """From either set of files the ids are those of the file, also where texts name specials or the file truncates."""
    transformers = pytest.importorskip("transformers")
    folder = roberta(tmp_path / "r", corpus())
    from_json, from_vocab = import_byte_level(folder / "json/tokenizer.json"), import_byte_level(folder / "vocab.json")
    assert from_json.vocabulary == from_vocab.vocabulary == from_json.mask + 1
    known = json.loads((folder / "vocab.json").read_text())
    assert {piece: i for i, piece in enumerate(from_vocab.pieces)} == known
    theirs = transformers.RobertaTokenizer.from_pretrained(folder, local_files_only=True)
    text = "The garden and the sea: 12 été 😀. " * 5
    assert len(from_json.encode(text)) > 16
    assert theirs(text)["input_ids"] == [0, *from_vocab.encode(text), 2]
    for sample in (*TRICKY, *fuzz(300)):
        assert np.array_equal(from_json.encode(sample), from_vocab.encode(sample))
    loose = import_byte_level(roberta(tmp_path / "loose", corpus(), special=False) / "json")
    assert loose.mask not in loose.encode("a <mask> b"), "an added token that texts could name"


def test_training_is_deterministic(made: dict[str, Tokenizer]) -> None:
    assert train_tokenizer(iter(corpus()), TrainingOptions(900)) == made["bpe"]
    drawn = [train_tokenizer(corpus(), TrainingOptions(400, max_sentences=200, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    counts = np.zeros(50)
    for seed in range(2_000):
        sample = draw(map(str, range(50)), 5, seed)
        assert len(set(sample)) == 5
        counts[[int(one) for one in sample]] += 1
    assert 140 < counts.min() <= counts.max() < 265, "each of 50 lines is as likely: 200 of 2,000, deviation 13"
    assert draw(iter("abc"), 5, 0) == list("abc")


def test_long_lines_are_not_left_out() -> None:
    """sentencepiece drops lines of more than 4,192 bytes in silence."""
    line = "zebra " * 3_000 + "q" * 9_000 + "日" * 5_000
    parts = list(pieces_of(line))
    assert max(len(part.encode()) for part in parts) <= LONGEST
    assert "".join(parts).replace(" ", "") == line.replace(" ", "")
    assert any("zebra" in piece for piece in train_tokenizer([line], TrainingOptions(300)).pieces)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes("\n".join(corpus()).encode() + b"\nnot \xff UTF-8\n")
    (tmp_path / "in/b.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in corpus()[:100]) + '\n{"x":1}')
    out = tmp_path / "out"
    words = ["--input", str(tmp_path / "in/*"), "--vocab-size", "500", "--field", "body", "--output", str(out)]
    assert train_tool.main(words) == 0
    line = capsys.readouterr().out
    count = len(corpus()) + 100
    assert re.search(rf"bpe, 500 ids, fingerprint [0-9a-f]{{16}}, from {count:,} lines of 2 files .2 more could", line)
    assert sorted(path.name for path in out.iterdir()) == ["megad2v.json", "tokenizer.model", "vocab.tsv"]
    assert train_tool.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    folder = roberta(tmp_path / "r", corpus())
    assert train_tool.main(["--from", str(folder), "--output", str(out), "--overwrite"]) == 0
    assert Tokenizer.load(out).kind == "byte_level"
    assert not (out / "tokenizer.model").exists()
    assert train_tool.main(["--model", "byte", "--output", str(tmp_path / "b")]) == 0
    assert Tokenizer.load(tmp_path / "b").vocabulary == 261
    (out / "mine").touch()
    assert train_tool.main([*words, "--overwrite"]) == 2


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "give --input .* or --from"),
        (["--input", "{}/none*"], "none.: no .txt"),
        (["--input", "{}/a.txt", "--vocab-size", "200"], "--vocab-size: expected 262 or more"),
        (["--input", "{}/a.txt", "--vocab-size", "30000"], "--vocab-size 30000: this text gives at most .* ids"),
        (["--input", "{}/blank.txt"], "no line of text"),
        (["--input", "{}/a.tsv"], "line 1 has the columns x, y; expected"),
        (["--input", "{}/a.txt", "--coverage", "2"], "--coverage: more than 0"),
        (["--from", "{}/none.json"], "none.json: No such file"),
        (["--from", "{}/a.txt"], "not a tokenizer.json of the tokenizers library"),
        (["--from", "{}/other/tokenizer.json"], "<s> is not there, expected 0 .*RoBERTa's numbering"),
        (["--from", "{}/words/tokenizer.json"], "does not give back a text|special's id"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(corpus()))
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "a.tsv").write_text("x\ty\n1\t2\n")
    (tmp_path / "other").mkdir()
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "other/tokenizer.json"))
    (tmp_path / "words").mkdir()
    words = {**{piece: i for i, piece in enumerate(NAMES[:4])}, "a": 4, "<mask>": 5}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>")).save(str(tmp_path / "words/tokenizer.json"))
    code = train_tool.main([*(word.format(tmp_path) for word in arguments), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_damaged_folders(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; a tokenizer is a folder"):
        Tokenizer.load(tmp_path)
    made["bpe"].save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(made["unigram"].model)
    with pytest.raises(UserError, match=r"tokenizer\.model is not the file that was written with it"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model: no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "megad2v.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="format 9, newer than 1"):
        Tokenizer.load(tmp_path)
    (tmp_path / "megad2v.json").write_text("[]")
    with pytest.raises(UserError, match="not a tokenizer of megad2v"):
        Tokenizer.load(tmp_path)
