"""tools/probe.py on a checkpoint and shards, as a person calls it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megad2v.data.format import DatasetInfo, ShardInfo, write_dataset
from tests.checkpoints import small_config, small_state, write_small_checkpoint
from tools import probe


def shards(
    folder: Path, samples: int, *, label: bool = True, classes: tuple[str, ...] = (), readable: bool = True
) -> Path:
    """Images of one colour per class, with noise: any encoder should tell them apart. One cannot be decoded."""
    rng = np.random.default_rng(samples)
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(samples):
            pixels = np.full((40, 40, 3), 40, dtype=np.int64)
            pixels[..., number % 3] += 150
            buffer = io.BytesIO()
            Image.fromarray((pixels + rng.integers(-30, 30, pixels.shape)).astype(np.uint8)).save(buffer, "PNG")
            data = b"no picture" if number == 5 or not readable else buffer.getvalue()
            members = [("png", data), ("cls", str(number % 3).encode())] if label else [("png", data)]
            for extension, content in members:
                info = tarfile.TarInfo(f"{number:03d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    if classes:
        info = ShardInfo("a.tar", samples, (folder / "a.tar").stat().st_size, "")
        write_dataset(folder, DatasetInfo(("vision",), samples, (info,), classes))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("probe")
    config = small_config()
    write_small_checkpoint(place / "run", config, small_state(config))
    shards(place / "train", 40)
    shards(place / "test", 13)
    return place


def call(place: Path, *more: object, train: str = "train", test: str = "test") -> int:
    arguments = ["--checkpoint", place / "run", "--train", place / train, "--test", place / test, "--workers", 0, *more]
    return probe.main([str(argument) for argument in arguments])


def test_table_and_json(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(place, "--output", tmp_path / "probe.json", "--batch-size", 7) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 7  train 39 test 12 classes 3 dropped 2"
    assert [line.split()[0] for line in lines[1:]] == ["weights", "random", "student", "teacher", "chance"]
    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["chance"] == pytest.approx(1 / 3)
    assert written["seed"] == 3  # the run's
    assert written["train"] == {"shards": str(place / "train"), "samples": 39, "dropped": 1}
    rows = {row["weights"]: row for row in written["rows"]}
    assert list(rows) == ["random", "student", "teacher"]
    assert all(row["knn"] == row["linear"] == 1.0 for row in rows.values())
    assert call(place, "--output", tmp_path / "again.json", "--workers", 1, "--layer", 2, "--weights", "teacher") == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert [row["weights"] for row in again["rows"]] == ["teacher"]
    assert "block 2" in again["features"]
    assert {path.name for path in tmp_path.iterdir()} == {"probe.json", "again.json"}


@pytest.mark.slow  # test_readme.py fine-tunes, too
def test_fine_tuning(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows and settings as asked for; one colour per class is learned by all; same seed, same numbers."""
    arguments = ["--fine-tune", "--seeds", 2, "--epochs", 4, "--lr", 0.01, "--batch-size", 8]
    assert call(place, *arguments, "--output", tmp_path / "a.json", "--weights", "random", "student") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 7  train 39 test 12 classes 3 dropped 2 seeds 2"
    assert [line.split()[0] for line in lines[1:]] == ["weights", "random", "student", "chance"]
    first = json.loads((tmp_path / "a.json").read_text())
    assert first["seeds"] == [3, 4]  # from the run's on
    assert [(first[name]["samples"], first[name]["dropped"]) for name in ("train", "test")] == [(39, 1), (12, 1)]
    settings = first["fine_tuning"]
    assert (settings["epochs"], settings["lr"], settings["batch_size"]) == (4, 0.01, 8)
    random, student = first["rows"]
    assert len(student["accuracies"]) == 2
    assert min(random["mean"], student["mean"]) > 0.9
    again = ["--output", tmp_path / "b.json", "--weights", "student", "--workers", 1, "--seed", 4, "--seeds", 1]
    assert call(place, *arguments, *again) == 0
    assert json.loads((tmp_path / "b.json").read_text())["rows"][0]["accuracies"] == student["accuracies"][1:]


def test_bad_input_is_one_line_and_exit_2(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards(tmp_path / "unlabelled", 6, label=False)
    shards(tmp_path / "others", 12, classes=("0", "2", "1"))  # without names, an id is its own
    shards(tmp_path / "unreadable", 12, readable=False)
    for arguments, keywords, expected in (
        (["--weights", "best"], {}, "--weights best: expected any of random student teacher"),
        (["--layer", 0], {}, "--layer: expected 1 to 3, got 0"),
        (["--layer", 4], {}, "--layer: expected 1 to 3, got 4"),
        (["--fine-tune", "--layer", 2], {}, "--layer: is for frozen features"),
        (["--fine-tune", "--seeds", 0], {}, "--seeds and --epochs: expected at least 1"),
        (["--fine-tune", "--lr", "nan"], {}, "--lr more than 0"),
        (["--fine-tune", "--lr", 1e30], {}, "fine-tuning diverged"),
        (["--fine-tune", "--lr", 0.01], {"train": tmp_path / "unreadable"}, "--train: no sample could be decoded"),
        (["--fine-tune", "--lr", 0.01], {"test": tmp_path / "unreadable"}, "--test: no sample could be decoded"),
        (["--device", "abacus"], {}, "--device abacus: not usable here"),
        (["--batch-size", 0], {}, "expected at least 1"),
        (["--workers", -1], {}, "expected 0 or more"),
        (["--output", tmp_path / "none" / "x.json"], {}, "in an existing folder"),
        (["--output", tmp_path], {}, "in an existing folder"),
        (["--checkpoint", tmp_path], {}, "no checkpoint here"),
        ([], {"train": "nowhere"}, "no such file"),
        ([], {"test": tmp_path / "unlabelled"}, "has no class id"),
        ([], {"test": tmp_path / "others"}, "different class names"),
    ):
        assert call(place, *arguments, **keywords) == 2, arguments
        captured = capsys.readouterr()
        assert expected in captured.err, captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out
