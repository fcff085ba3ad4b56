"""make_shards speech: what gets into shards, transcripts, labels, errors."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megad2v.data import make as make_module
from megad2v.data.index import load_or_build
from megad2v.data.make import Made, make_shards
from megad2v.data.shardset import ShardSet
from megad2v.errors import UserError
from megad2v.modalities.speech.decode import read_waveform, resampled_length
from megad2v.modalities.speech.shards import SpeechOptions, speech_corpus
from megad2v.modalities.speech.synthetic import demo_clip
from tests.unit.test_make_shards import files
from tests.unit.test_make_shards import make_shards as tool
from tests.unit.test_speech_recordings import write

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

REPOSITORY = Path(__file__).resolve().parents[2]
PLAIN = SpeechOptions()


def make(folder: Path, out: Path, options: SpeechOptions = PLAIN, *, workers: int = 0, **corpus: object) -> Made:
    found = speech_corpus(folder, options, **corpus)
    return make_shards(found, out, workers=workers, max_shard_bytes=200_000, progress=False)


def report(out: Path) -> dict[str, tuple[str, str]]:
    rows = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    return {row["path"]: (row["action"], row["reason"]) for row in rows}


def samples_of(out: Path) -> dict[str, list[dict]]:
    """Path of the source -> its samples, in order."""
    urls = sorted(str(path) for path in out.glob("*.tar"))
    found: dict[str, list[dict]] = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None):
        found.setdefault(json.loads(sample["json"])["path"], []).append(sample)
    return found


def pcm(sample: dict) -> np.ndarray:
    return soundfile.read(io.BytesIO(sample["flac"]), dtype="int16")[0]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two speakers; FLACs to copy, WAVs to convert, with transcripts, and a recording to cut."""
    folder = tmp_path / "corpus"
    for number in range(6):
        for speaker in ("alma", "boris"):
            kind = "flac" if number % 2 else "wav"
            write(folder / f"{speaker}/{number}.v1.{kind}", demo_clip(speaker, number, 3))
    (folder / "alma" / "1.v1.txt").write_text("  yo dufa\n moki ")
    write(folder / "boris/long.wav", np.concatenate([demo_clip("boris", i, 4) for i in range(8)]))
    (folder / "boris" / "notes.md").write_text("hello")
    return folder


def test_webdataset_reads_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = make(corpus, out, SpeechOptions(max_seconds=10))
    info = made.info
    assert len(info.shards) >= 2
    assert info.classes == ("alma", "boris")
    assert made.counts == {"copied": 6, "converted": 7, "skipped": 1}
    urls = [str(out / shard.name) for shard in info.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None))
    ours = ShardSet(str(out), "speech")
    assert len(theirs) == len(ours) == info.samples
    hours = 0.0
    for i, sample in enumerate(theirs):
        mine, meta = ours.read(i), json.loads(sample["json"])
        assert mine.id == f"{Path(sample['__url__']).name}/{sample['__key__']}"
        assert mine.data == sample["flac"]
        assert mine.label == int(sample["cls"]) == info.classes.index(meta["path"].split("/")[0])
        source = corpus / meta["path"]
        length = len(read_waveform(mine.data))
        assert meta["seconds"] == length / 16_000
        assert (meta["rate"], meta["channels"]) == (16_000, 1)
        hours += length / 16_000 / 3600
        if source.suffix == ".flac":
            assert mine.data == source.read_bytes(), "16 kHz mono FLACs are copied byte for byte"
        elif source.name != "long.wav":
            assert np.array_equal(pcm(sample), soundfile.read(source, dtype="int16")[0]), "16 bits stay as they are"
        assert sample.get("txt") == (b"yo dufa moki" if meta["path"] == "alma/1.v1.flac" else None)
    assert info.totals == {"hours": pytest.approx(hours, abs=1e-6)}
    assert report(out)["boris/notes.md"] == ("skipped", "no audio file by its name, or hidden")
    assert "alma/1.v1.txt" not in report(out), "a transcript is no stranger"


def test_index_has_lengths(corpus: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path / "out")
    shards = ShardSet(str(tmp_path / "out"), "speech")
    lengths = [
        int(length)
        for tar in sorted((tmp_path / "out").glob("*.tar"))
        for length in load_or_build(tar, "speech").lengths
    ]
    assert lengths == [len(read_waveform(shards.read(i).data)) for i in range(len(shards))]


def test_same_bytes_for_any_number_of_workers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_module, "SPOOL_BYTES", 100_000)  # the long recording goes through a file
    options = SpeechOptions(max_seconds=5)
    for workers in (0, 1, 3):
        make(corpus, tmp_path / str(workers), options, workers=workers)
    assert files(tmp_path / "0") == files(tmp_path / "1") == files(tmp_path / "3")
    assert not (tmp_path / "3/.making").exists()


def test_real_formats(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """OGG, MP3, Opus, SPHERE of other people: rate, channels and length as files.tsv says."""
    folder = shared("data/speech/formats")
    made = make(folder, tmp_path / "out", workers=2)
    found = samples_of(tmp_path / "out")
    rows = [line.split("\t") for line in (folder / "files.tsv").read_text().splitlines()[1:]]
    assert made.counts == {"converted": len(rows), "skipped": 1}
    for name, result, *_ in rows:
        rate, channels, count = (int(word) for word in re.findall(r"(\d+) (?:Hz|ch|samples)", result))
        (sample,) = found[name]
        meta = json.loads(sample["json"])
        assert (meta["rate"], meta["channels"]) == (rate, channels)
        assert len(pcm(sample)) == resampled_length(count, rate)


def test_real_speech(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """LibriSpeech's FLACs come out byte for byte; class folders of digits become labels."""
    folder = shared("data/speech/librispeech_140spk")
    made = make(folder, tmp_path / "libri", workers=2)
    assert made.counts == {"copied": 140, "skipped": 1}
    assert made.info.classes == (), "a flat folder has no labels"
    for name, (sample,) in samples_of(tmp_path / "libri").items():
        assert sample["flac"] == (folder / name).read_bytes()
    assert made.info.totals["hours"] == pytest.approx(29.4 / 60, abs=0.002)
    digits = shared("data/speech/fsdd")
    found = speech_corpus(digits, PLAIN)
    assert found.classes == list("0123456789")
    assert len(found.files) == 3_000
    assert found.others == ["metadata.tsv"]


def test_transcripts(tmp_path: Path) -> None:
    """LibriSpeech's lists, sidecars and a table, the later before the earlier."""
    folder = tmp_path / "in"
    for name in ("19/198/19-198-0000.flac", "19/198/19-198-0001.flac", "26/495/26-495-0000.flac"):
        write(folder / name)
    write(folder / "26/495/26-495-0001.wav")
    (folder / "19/198/19-198.trans.txt").write_text("19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK\n")
    (folder / "26/495/26-495.trans.txt").write_text("26-495-0000 FROM THE LIST\n26-495-0001 FROM THE LIST\n")
    (folder / "26/495/26-495-0001.txt").write_text("\ufefffrom the sidecar\n")
    made = make(folder, tmp_path / "out")
    assert made.counts["skipped"] == 0
    assert made.info.classes == (), "speakers and chapters are no classes"
    texts = {path: sample["txt"].decode() for path, (sample,) in samples_of(tmp_path / "out").items()}
    expected = {
        "19/198/19-198-0000.flac": "NORTHANGER ABBEY",
        "19/198/19-198-0001.flac": "THIS LITTLE WORK",
        "26/495/26-495-0000.flac": "FROM THE LIST",
        "26/495/26-495-0001.wav": "from the sidecar",
    }
    assert texts == expected
    table = tmp_path / "table.tsv"
    rows = ['26\t"Oh," he said\t26/495/26-495-0001.wav', f"19\tß\t{folder}/19/198/19-198-0001.flac"]
    table.write_text("\n".join(["speaker\tsentence\tfile", *rows]))
    make(folder, tmp_path / "table", transcripts=table, labels="folders")
    found = samples_of(tmp_path / "table")
    texts = {path: sample["txt"].decode() for path, (sample,) in found.items()}
    assert texts == {**expected, "26/495/26-495-0001.wav": '"Oh," he said', "19/198/19-198-0001.flac": "ß"}
    assert {path[:2]: sample["cls"] for path, (sample,) in found.items()} == {"19": b"0", "26": b"1"}
    (folder / "transcripts.tsv").write_text("path\ttext\n19/198/19-198-0000.flac\tfound by its name\n")
    (folder / "26/495/26-495-0001.txt").write_bytes(b"\xff\xfe\x00")
    made = make(folder, tmp_path / "named")
    found = samples_of(tmp_path / "named")
    assert found["19/198/19-198-0000.flac"][0]["txt"] == b"found by its name"
    assert "txt" not in found["26/495/26-495-0001.wav"][0]
    assert "transcript left out: not UTF-8" in report(tmp_path / "named")["26/495/26-495-0001.wav"][1]
    assert made.counts["skipped"] == 0


def test_labels(tmp_path: Path) -> None:
    def classes(*names: str, **how: object) -> list[str]:
        folder = tmp_path / sha256(repr(names).encode()).hexdigest()[:8]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return list(speech_corpus(folder, PLAIN, **how).classes)

    assert classes("a/1.wav", "b/1.wav") == ["a", "b"]
    assert classes("a/1.wav", "b/1.wav", labels="none") == []
    assert classes("a/1.wav", "a/2.wav") == [], "one class says nothing"
    assert classes("a/1.wav", "a/2.wav", labels="folders") == ["a"]
    assert classes("1.wav", "a/1.wav", "b/2.wav") == []
    assert classes("a/x/1.wav", "b/y/1.wav") == []
    assert classes("a/x/1.wav", "b/y/1.wav", labels="folders") == ["a", "b"]
    assert classes("a/x/1.wav", "b/y/1.wav", classes=("c", "b", "a")) == ["c", "b", "a"]
    assert classes("train-clean-100/1/2/a.flac", "train-other-500/3/4/b.flac") == [], "one split in two parts"
    with pytest.raises(UserError, match="look like splits"):
        classes("train-clean-100/1/2/a.flac", "dev-clean/3/4/b.flac")
    assert classes("train-clean-100/1/2/a.flac", "dev-clean/3/4/b.flac", labels="none") == []


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--input", "{}/missing"], "missing: no such file or folder; check --input"),
        (["--input", "{}/empty"], "no recording"),
        (
            ["--input", "{}/junk"],
            "none of the 1 recordings can be used .last: cannot be decoded: Format",
        ),
        (["--input", "{}/corpus", "--max-seconds", "0.5"], "--max-seconds: expected 0 .no cutting., or 1 or more"),
        (["--input", "{}/corpus", "--max-seconds", "nan"], "--max-seconds"),
        (["--input", "{}/corpus", "--max-seconds", "5", "--min-seconds", "2"], "6 or more.*got 5"),
        (["--input", "{}/corpus", "--min-seconds", "-1"], "--min-seconds: expected 0 or more"),
        (["--input", "{}/corpus", "--transcripts", "{}/none.tsv"], "none.tsv: no such file"),
        (["--input", "{}/corpus", "--transcripts", "{}/columns.tsv"], "line 1 has the columns path, words; expected"),
        (["--input", "{}/corpus", "--transcripts", "{}/strangers.tsv"], "none of its 1 paths is a recording"),
        (["--input", "{}/corpus", "--transcripts", "{}/ragged.tsv"], "line 2 has 1 columns, the header 2"),
        (["--input", "{}/corpus", "--transcripts", "{}/twice.tsv"], "line 3 names alma/0.v1.wav once more"),
        (["--input", "{}/corpus", "--transcripts", "{}/latin.tsv"], "not UTF-8"),
        (["--input", "{}/corpus", "--classes", "{}/empty"], "no dataset.json"),
    ],
)
def test_errors_are_one_line(
    corpus: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/x.wav").write_text("junk")
    (tmp_path / "columns.tsv").write_text("path\twords\n")
    (tmp_path / "strangers.tsv").write_text("path\ttext\nx.wav\ta\n")
    (tmp_path / "ragged.tsv").write_text("path\ttext\nalma/0.v1.wav\n")
    (tmp_path / "twice.tsv").write_text("path\ttext\nalma/0.v1.wav\ta\nalma/0.v1.wav\tb\n")
    (tmp_path / "latin.tsv").write_bytes(b"path\ttext\nalma/0.v1.wav\t\xe4\n")
    words = [argument.format(tmp_path) for argument in arguments]
    code = tool.main(["speech", *words, "--output", str(tmp_path / "o"), "--workers", "0"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not list(tmp_path.glob("o/*")) or not (tmp_path / "o/.making").exists()


def test_command_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["speech", "--input", str(corpus), "--output", str(out), "--workers", "1", "--max-shard-size", "200kB"]
    assert tool.main([*words, "--max-seconds", "10"]) == 0
    line = capsys.readouterr().out
    assert re.search(r"16 samples of 13 recordings, 0\.02\d+ hours in \d+ shards \(2 classes\): 6 copied, 7 con", line)
    make(corpus, tmp_path / "same", SpeechOptions(max_seconds=10.0))
    assert files(out) == files(tmp_path / "same")


def test_torchaudio_is_imported_only_when_chosen(corpus: Path, tmp_path: Path) -> None:
    """Here it is made to fail as a CUDA build does beside a CPU torch."""
    program = (
        "import runpy, sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torchaudio': raise OSError('libcudart.so.13: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken()); sys.argv[:] = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = ["tools/make_shards.py", "speech", "--input", str(corpus), "--workers", "0", "--output"]
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run([*command, str(tmp_path / "a")], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen = [*command, str(tmp_path / "b"), "--decoder", "torchaudio"]
    done = subprocess.run(chosen, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "does not import here (libcudart.so.13" in done.stderr
    assert not (tmp_path / "b").exists()
