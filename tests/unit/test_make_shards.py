"""make_shards and make_demo_data: what gets into shards, determinism, interruptions, errors of one line."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import webdataset
from PIL import Image

from megad2v.data import index, writer
from megad2v.data.format import DatasetInfo, read_dataset
from megad2v.data.make import classes_of, parse_size
from megad2v.data.make import make_shards as make_corpus
from megad2v.data.shardset import ShardSet
from megad2v.errors import UserError
from megad2v.modalities.corpus import SourceFile
from megad2v.modalities.vision.decode import open_image, upright_rgb
from megad2v.modalities.vision.shards import ImageOptions, image_corpus, make_sample
from megad2v.modalities.vision.synthetic import CLASSES, demo_image
from tests.unit.data_helpers import encoded, jpeg, picture

REPOSITORY = Path(__file__).resolve().parents[2]
PLAIN = ImageOptions()


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_shards = tool("make_shards")
make_demo_data = tool("make_demo_data")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two classes of 30 images each, some nested, and a file that is no image."""
    folder = tmp_path / "corpus"
    for number in range(60):
        name = f"dog/{number:02d}.jpg" if number % 2 else f"cat/sub/{number:02d}.v1.JPG"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, 30 + number % 5))
    (folder / "cat" / "notes.txt").write_text("hello")
    return folder


def make(folder: Path, out: Path, **options: object) -> DatasetInfo:
    settings = {
        "options": PLAIN,
        "classes": None,
        "workers": 0,
        "max_shard_bytes": 40_960,
        "progress": False,
        **options,
    }
    corpus = image_corpus(folder, settings.pop("options"), settings.pop("classes"))
    return make_corpus(corpus, out, **settings).info


def files(folder: Path) -> dict[str, str]:
    """Relative path -> hash of everything but the index, whose stamp has the time of the tar."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "index"]
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in paths}


def test_webdataset_reads_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    info = make(corpus, out)
    assert len(info.shards) >= 2
    assert info.classes == ("cat", "dog")
    assert info.class_counts == (30, 30)
    urls = [str(out / shard.name) for shard in info.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None))
    ours = ShardSet(str(out), "vision")
    assert len(samples) == len(ours) == info.samples == 60
    sources = set()
    for i, sample in enumerate(samples):
        mine, meta = ours.read(i), json.loads(sample["json"])
        assert mine.id == f"{Path(sample['__url__']).name}/{sample['__key__']}"
        source = (corpus / meta["path"]).read_bytes()
        assert mine.data == sample["jpg"] == source, "upright RGB JPEGs are copied byte for byte"
        assert mine.label == int(sample["cls"]) == ("cat", "dog").index(meta["path"].split("/")[0])
        assert (meta["width"], meta["height"]) == Image.open(io.BytesIO(source)).size
        sources.add(meta["path"])
    assert len(sources) == 60
    assert [len({s["cls"] for s in samples[a : a + 15]}) for a in (0, 15, 30)] == [2, 2, 2], "classes are mixed"


def test_dataset_json_and_index(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    info = make(corpus, out)
    assert read_dataset(out) == info
    assert sum(shard.samples for shard in info.shards) == info.samples
    for shard in info.shards:
        data = (out / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), sha256(data).hexdigest())
        assert shard.bytes <= 40_960
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["dataset.json", "index", "report.jsonl", *(shard.name for shard in info.shards)]
    )
    monkeypatch.setattr(index, "build", lambda *_: pytest.fail("make_shards has written the index"))
    assert ShardSet(str(out), "vision").shard_sizes == tuple(shard.samples for shard in info.shards)


def test_same_bytes_for_any_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    for workers in (0, 1, 3):
        make(corpus, tmp_path / str(workers), workers=workers)
    assert files(tmp_path / "0") == files(tmp_path / "1") == files(tmp_path / "3")
    make(corpus, tmp_path / "seed", seed=1)
    assert files(tmp_path / "seed") != files(tmp_path / "0")


def test_odd_files(shared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared("data/image/odd_files")
    made = make_corpus(image_corpus(folder, PLAIN), tmp_path / "out", workers=2, max_shard_bytes=10**8)
    report = [json.loads(line) for line in (tmp_path / "out/report.jsonl").read_text().splitlines()]
    reasons = {row["path"]: (row["action"], row["reason"]) for row in report}
    assert reasons["truncated_jpeg.jpg"][0] == reasons["files.tsv"][0] == "skipped"
    assert "truncated" in reasons["truncated_jpeg.jpg"][1]
    assert reasons["hopper_gray.jpg"] == ("converted", "mode L")
    assert reasons["pil_sample_cmyk.jpg"] == ("converted", "mode CMYK")
    assert all(reasons[f"hopper_orientation_{i}.jpg"] == ("converted", f"EXIF orientation {i}") for i in range(2, 9))
    assert made.counts == {"copied": 7, "converted": 9, "skipped": 2}
    assert "7 copied, 9 converted, 2 skipped; see report.jsonl" in made.summary
    assert made.info.classes == (), "a flat folder has no labels"
    shards = ShardSet(str(tmp_path / "out"), "vision")
    assert len(shards) == 16
    for i in range(16):
        sample = shards.read(i)
        image = Image.open(io.BytesIO(sample.data))
        assert (image.mode, sample.label) == ("RGB", -1)
        assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    "data,action,kind",
    [
        (encoded(picture(1), "PNG"), "copied", "png"),
        (encoded(picture(1), "WEBP"), "copied", "webp"),
        (encoded(picture(1).convert("RGBA"), "PNG"), "converted", "png"),
        (encoded(picture(1).convert("P"), "PNG"), "converted", "png"),
        (encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"), "converted", "png"),
        (encoded(Image.new("RGBA", (9, 9), (200, 0, 0, 90)), "WEBP"), "converted", "jpg"),
        (encoded(picture(1).convert("CMYK")), "converted", "jpg"),
        (jpeg(1)[:500], "skipped", None),
        (b"junk", "skipped", None),
        (b"", "skipped", None),
        (encoded(picture(1), "GIF"), "skipped", None),
    ],
)
def test_kinds_follow_content(tmp_path: Path, data: bytes, action: str, kind: str | None) -> None:
    """The name says .jpg throughout: what a file is, its bytes tell."""
    (tmp_path / "x.jpg").write_bytes(data)
    outcome = make_sample(tmp_path, SourceFile("x.jpg", -1), PLAIN)
    parts = outcome.samples[0] if outcome.samples else {}
    assert outcome.action == action
    assert bool(outcome.reason) == (action != "copied")
    assert set(parts) == ({kind, "json"} if kind else set())
    if kind:
        stored = open_image(parts[kind])
        assert stored.mode == "RGB" or action == "copied"
        difference = np.asarray(upright_rgb(stored)).astype(int) - np.asarray(upright_rgb(open_image(data))).astype(int)
        assert np.abs(difference).mean() < 3


def test_unreadable_file_is_skipped(tmp_path: Path) -> None:
    outcome = make_sample(tmp_path, SourceFile("gone.jpg", -1), PLAIN)
    assert (outcome.action, outcome.reason) == ("skipped", "cannot be read: No such file or directory")


def test_resize_short(corpus: Path, tmp_path: Path) -> None:
    (corpus / "dog" / "wide.jpg").write_bytes(jpeg(1, 200, 50))
    make(corpus, tmp_path / "out", options=ImageOptions(resize_short=20))
    shards = ShardSet(str(tmp_path / "out"), "vision")
    sizes = [Image.open(io.BytesIO(shards.read(i).data)).size for i in range(len(shards))]
    assert all(min(size) == 20 for size in sizes)
    assert (80, 20) in sizes
    make(corpus, tmp_path / "same", options=ImageOptions(resize_short=400))
    assert "converted" not in (tmp_path / "same/report.jsonl").read_text(), "nothing is enlarged"


def test_classes_of_another_data_set(corpus: Path, tmp_path: Path) -> None:
    train = make(corpus, tmp_path / "train")
    (corpus / "cat").rename(tmp_path / "cats")
    test = make(corpus, tmp_path / "test", classes=classes_of(tmp_path / "train"))
    assert test.classes == train.classes
    assert test.class_counts == (0, 30), "dog keeps its id although cat is missing"
    (corpus / "dog").rename(corpus / "fox")
    with pytest.raises(UserError, match="fox is not among the 2 classes"):
        make(corpus, tmp_path / "fox", classes=classes_of(tmp_path / "train"))


def test_failure_leaves_nothing_behind(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    make(corpus, out, seed=7)
    before = files(out)
    monkeypatch.setattr(writer, "_checksum", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        make(corpus, out, overwrite=True)
    assert files(out) == before, "the old shards are still there, whole"
    assert len(ShardSet(str(out), "vision")) == 60


def test_killed_run(corpus: Path, tmp_path: Path) -> None:
    """kill -9 in the middle: no reader takes what is there for a data set, and the next run just works."""
    out = tmp_path / "out"
    program = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, '.'); from megad2v.data import writer, make\n"
        "from megad2v.modalities.vision.shards import ImageOptions, image_corpus\n"
        "def slow(path): print('a shard', flush=True); time.sleep(30)\n"
        "writer._checksum = slow\n"
        "corpus, out = map(Path, sys.argv[1:])\n"
        "make.make_shards(image_corpus(corpus, ImageOptions()), out, workers=0, max_shard_bytes=40960)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(corpus), str(out)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "a shard\n"
        with pytest.raises(UserError, match="another make_shards is writing there"):
            make(corpus, out)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not list(out.glob("*.tar"))
    with pytest.raises(UserError, match="make_shards has not finished there"):
        ShardSet(str(out), "vision")
    assert make(corpus, out).samples == 60
    assert not (out / ".making").exists()
    assert len(ShardSet(str(out), "vision")) == 60


def test_overwrite_takes_only_what_is_ours(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    many = make(corpus, out, max_shard_bytes=20_480)
    (out / "README").write_text("mine")
    with pytest.raises(UserError, match=r"not empty.*--overwrite"):
        make(corpus, out)
    few = make(corpus, out, max_shard_bytes=10**8, overwrite=True)
    assert len(many.shards) > len(few.shards) == 1
    assert sorted(path.name for path in out.iterdir()) == [
        "README", "dataset.json", "image-000000.tar", "index", "report.jsonl"
    ]  # fmt: skip
    assert [path.name for path in (out / "index").iterdir()] == ["image-000000.vision.npy"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "image-000000.tar").write_text("somebody's")
    with pytest.raises(UserError, match="not made by make_shards"):
        make(corpus, precious, overwrite=True)
    assert (precious / "image-000000.tar").read_text() == "somebody's"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--input", "{}/missing", "--output", "{}/o"], "missing: no such file or folder; check --input"),
        (["--input", "{}/empty", "--output", "{}/o"], "no image"),
        (["--input", "{}/junk", "--output", "{}/o"], "none of the 1 images can be used"),
        (["--input", "{}/splits", "--output", "{}/o"], "look like splits.*--input .*splits/test"),
        (["--input", "{}/corpus", "--output", "{}/corpus"], "not empty"),
        (["--input", "{}/corpus", "--output", "{}/file"], "is a file"),
        (["--input", "{}/corpus", "--output", "{}/o", "--max-shard-size", "big"], "'big' is not a size"),
        (["--input", "{}/corpus", "--output", "{}/o", "--workers", "-1"], "--workers"),
        (["--input", "{}/corpus", "--output", "{}/o", "--resize-short", "0"], "--resize-short"),
        (["--input", "{}/corpus", "--output", "{}/o", "--classes", "{}/empty"], "no dataset.json"),
    ],
)
def test_errors_are_one_line(
    corpus: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("empty", "junk", "splits/train/cat", "splits/test/cat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "junk/x.jpg").write_text("junk")
    (tmp_path / "file").write_text("")
    for split in ("train", "test"):
        (tmp_path / f"splits/{split}/cat/0.jpg").write_bytes(jpeg(0))
    code = make_shards.main(["image", *(argument.format(tmp_path) for argument in arguments), "--seed", "0"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "o" / ".making").exists()


def test_command_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["image", "--input", str(corpus), "--output", str(out), "--workers", "1", "--max-shard-size", "40KiB"]
    assert make_shards.main(arguments) == 0
    assert "60 images in" in capsys.readouterr().out
    make(corpus, tmp_path / "same", max_shard_bytes=40_960)
    assert files(out) == files(tmp_path / "same")
    with pytest.raises(SystemExit) as caught:
        make_shards.main(["image", "--help"])
    assert caught.value.code == 0
    assert "INPUT/cat/001.jpg" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        make_shards.main(["speech"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "text,size", [("512MB", 512_000_000), ("1GiB", 2**30), ("1.5 kB", 1500), ("10", 10), ("4M", 4_000_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_demo_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ("--only", "image")
    assert make_demo_data.main([str(tmp_path / "a"), "--images-per-class", "3", "--workers", "2", *only]) == 0
    folder = tmp_path / "a" / "image"
    assert sorted(path.name for path in folder.iterdir()) == list(CLASSES)
    assert len(CLASSES) == 8
    pictures = sorted(folder.rglob("*.jpg"))
    assert len({path.read_bytes() for path in pictures}) == 24
    for path in pictures:
        with Image.open(path) as image:
            assert 96 <= min(image.size) <= max(image.size) <= 128
            assert np.asarray(image).std() > 10
    make_demo_data.main([str(tmp_path / "b"), "--images-per-class", "3", "--workers", "1", *only])
    assert files(folder) == files(tmp_path / "b" / "image"), "same seed, same files"
    assert demo_image("disc", 0, 1) != demo_image("disc", 0, 2)
    assert make_demo_data.main([str(tmp_path / "a"), "--images-per-class", "1", *only]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert make_demo_data.main([str(tmp_path / "a"), "--images-per-class", "1", "--overwrite", *only]) == 0
    assert len(list(folder.rglob("*.jpg"))) == 8
    (folder / "mine.txt").write_text("")
    assert make_demo_data.main([str(tmp_path / "a"), "--overwrite", *only]) == 2
    assert make_demo_data.main([str(tmp_path / "c"), "--images-per-class", "0"]) == 2


def test_two_thousand_demo_pictures_in_twenty_seconds() -> None:
    best = min(_seconds(number) for number in range(5))
    assert best < 0.015, "2,000 pictures on two cores would take more than 15 seconds"


def _seconds(number: int) -> float:
    begin = time.process_time()
    demo_image("star", number, 1)
    return time.process_time() - begin
