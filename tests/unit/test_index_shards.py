"""Anybody's tars: webdataset's own rule for keys, every tar format and writer, what is odd about them, and the tool."""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from webdataset.tariterators import base_plus_ext

from megad2v.data.format import split_key
from megad2v.data.index import CACHE_VARIABLE, build, cached_path, index_path, stored_index, stored_stamp
from megad2v.data.indexing import index_shards
from megad2v.data.shardset import ShardSet
from megad2v.modalities.text.decode import write_tokens
from tests.unit.data_helpers import jpeg, members, write_shards, write_tar
from tests.unit.speech_helpers import flac, tone
from tools.index_shards import main

ALPHABET = [
    "a",
    "b",
    "Z",
    ".",
    "..",
    "/",
    "//",
    "_",
    "__",
    " ",
    "é",
    "日本",
    "jpg",
    ".JPG",
    ".seg.png",
    "-",
    "./",
    "\\",
]


def tokens(count: int) -> bytes:
    return write_tokens(np.arange(count, dtype=np.uint16))


def test_keys_are_webdatasets() -> None:
    """The rule itself, on names that nobody would choose. `__meta__` entries are left out by its tar reader."""
    rng = random.Random(5)
    names = {"".join(rng.choices(ALPHABET, k=rng.randint(1, 7))) for _ in range(40_000)}
    assert len(names) > 20_000
    for name in names:
        key, extension = base_plus_ext(name)
        meta = re.match(r"__[^/]*__($|/)", name) is not None
        expected = None if key is None or meta else (key, extension.lower())
        assert split_key(name) == expected, name


def theirs(tar: Path) -> list[dict[str, bytes]]:
    return list(webdataset.WebDataset([str(tar)], shardshuffle=False, nodesplitter=None))


def check_as_webdataset(tar: Path, modality: str, extension: str) -> None:
    """The same samples, keys, bytes and order as webdataset's own reader."""
    ours = ShardSet(str(tar), modality)
    samples = [sample for sample in theirs(tar) if extension in sample]
    assert [ours.read(i).id for i in range(len(ours))] == [f"{tar.name}/{sample['__key__']}" for sample in samples]
    assert [ours.read(i).data for i in range(len(ours))] == [sample[extension] for sample in samples]


SAMPLES = {
    "plain": ("jpg", jpeg(1)),
    "a folder/with.dots/x y": ("jpg", jpeg(2)),
    "schön/日本": ("jpg", jpeg(3)),
    "long-" * 40 + "name": ("jpg", jpeg(4)),
    "deep/" * 40 + "sample": ("jpg", jpeg(5)),
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_pythons_tarfile(tmp_path: Path, format: int) -> None:
    rows = []
    for key, (extension, data) in SAMPLES.items():
        if format != tarfile.USTAR_FORMAT or len(key) < 100:
            rows += [(f"{key}.{extension}", data), (f"{key}.json", b"{}")]
    rows += [("nothing", b"x"), (".hidden", b"x"), ("__meta__/m.jpg", b"x"), ("odd/.jpg", jpeg(6)), ("UP.JPG", jpeg(7))]
    check_as_webdataset(write_tar(tmp_path / "x.tar", rows, format), "vision", "jpg")
    assert len(ShardSet(str(tmp_path / "x.tar"), "vision")) == (5 if format == tarfile.USTAR_FORMAT else 7)


@pytest.mark.parametrize("format", ["gnu", "pax", "posix", "oldgnu"])
def test_tars_of_gnu_tar(tmp_path: Path, format: str) -> None:
    if (
        shutil.which("tar") is None
        or "GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout
    ):
        pytest.skip("no GNU tar")
    for key, (extension, data) in SAMPLES.items():
        path = tmp_path / "in" / f"{key}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "in/linked.jpg").symlink_to("plain.jpg")
    os.link(tmp_path / "in/plain.jpg", tmp_path / "in/twin.jpg")
    subprocess.run(
        ["tar", "--sort=name", f"--format={format}", "-cf", "../x.tar", "."], cwd=tmp_path / "in", check=True
    )
    check_as_webdataset(tmp_path / "x.tar", "vision", "jpg")
    survey = index_shards([str(tmp_path / "x.tar")], again=True)
    assert survey.warnings == [
        f"{tmp_path / 'x.tar'}: 2 files are left out: links or devices, which have no bytes of their own"
    ]


def test_tars_of_webdatasets_writers_with_several_modalities(tmp_path: Path) -> None:
    """A sample may hold an image, a recording and a text; each modality reads its own."""
    samples = [
        {"__key__": f"s{i}", "jpg": jpeg(i), "flac": flac(tone(900 + i, i)), "tokens.npy": tokens(5 + i), "cls": str(i)}
        for i in range(5)
    ]
    with webdataset.TarWriter(str(tmp_path / "one.tar"), encoder=False) as writer:
        for sample in samples:
            writer.write({k: v.encode() if k == "cls" else v for k, v in sample.items()})
    with webdataset.ShardWriter(str(tmp_path / "many-%03d.tar"), maxcount=2, encoder=False, verbose=0) as writer:
        for sample in samples:
            writer.write({k: v.encode() if k == "cls" else v for k, v in sample.items()})
    names = sorted(path.name for path in tmp_path.glob("*.tar"))
    assert names == ["many-000.tar", "many-001.tar", "many-002.tar", "one.tar"]
    survey = index_shards([str(tmp_path)])
    assert (survey.tars, survey.new, survey.problem()) == (4, 4, None)
    lengths = {"vision": [40 * 36] * 5, "speech": [900 + i for i in range(5)], "text": [5 + i for i in range(5)]}
    for modality, extension in (("vision", "jpg"), ("speech", "flac"), ("text", "tokens.npy")):
        for name in names:
            check_as_webdataset(tmp_path / name, modality, extension)
        one = ShardSet(str(tmp_path / "one.tar"), modality)
        assert one.lengths().tolist() == lengths[modality]
        assert one.labels().tolist() == list(range(5))
        assert survey.holdings[modality].samples == 10
    assert "vision: 10 samples in 4 tars, " in "\n".join(survey.lines())
    assert "text: 10 samples in 4 tars" in "\n".join(survey.lines())


def test_more_than_eight_gigabytes(tmp_path: Path) -> None:
    """Offsets beyond 2^33, behind a member whose size fits into no ustar header; a hole on the disk, not bytes."""
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        hole = 9 * 2**30
        with path.open("wb") as file:
            for name, size, data in (("0.jpg", None, jpeg(0)), ("big.bin", hole, b""), ("1.jpg", None, jpeg(1))):
                info = tarfile.TarInfo(name)
                info.size = len(data) if size is None else size
                file.write(info.tobuf(format) + data)
                file.seek(-len(data) % 512 + (size or 0), os.SEEK_CUR)
            file.truncate(file.tell() + 1024)
        shards = ShardSet(str(path), "vision")
        assert [shards.read(i).data for i in range(len(shards))] == [jpeg(0), jpeg(1)]
        assert build(path, "vision").records["offset"].max() > 2**33
        assert path.stat().st_blocks * 512 < 2**20
        path.unlink()


def test_sparse_members_are_left_out(tmp_path: Path) -> None:
    """GNU tar's --sparse stores pieces of a file: no `pread` gives it back."""
    (tmp_path / "in").mkdir()
    with (tmp_path / "in/hole.jpg").open("wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(jpeg(0))
    (tmp_path / "in/whole.jpg").write_bytes(jpeg(1))
    done = subprocess.run(
        ["tar", "--sparse", "-cf", "../x.tar", "hole.jpg", "whole.jpg"], cwd=tmp_path / "in", check=False
    )
    if done.returncode:
        pytest.skip("no tar that knows --sparse")
    survey = index_shards([str(tmp_path / "x.tar")])
    assert survey.holdings["vision"].samples == 1
    assert "1 files are left out: stored sparse" in survey.warnings[0]


def test_names_are_keys_and_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is unpacked: names that climb out of a folder, absolute ones and links to files touch nothing."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    folder = tmp_path / "deep/shards"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, data in (("../../secret.jpg", jpeg(0)), (str(secret), jpeg(1)), ("../../index/a.jpg", jpeg(2))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
        bomb = tarfile.TarInfo("a.pyd")  # webdataset would unpickle these two on decode()
        bomb.size = 4
        tar.addfile(bomb, io.BytesIO(b"cos\n"))
    before = sorted(path for path in tmp_path.rglob("*"))
    shards = ShardSet(str(folder), "vision")
    assert [shards.read(i).data for i in range(len(shards))] == [jpeg(0), jpeg(1), jpeg(2)]
    assert [shards.sample_id(i) for i in (0, 1)] == ["x.tar/../../secret", f"x.tar/{secret.with_suffix('')}"]
    assert secret.read_bytes() == b"secret"
    new = sorted(str(p.relative_to(tmp_path)) for p in set(tmp_path.rglob("*")) - set(before))
    assert new == ["deep/shards/index", "deep/shards/index/x.vision.npy"]


def test_only_new_and_changed_tars_are_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    assert index_shards([str(folder)]).new == 3
    assert index_shards([str(folder)]).new == 0
    os.utime(folder / "b.tar", ns=(1, 1))
    again = index_shards([str(folder)])
    assert (again.new, again.tars, again.holdings["vision"].samples) == (1, 3, 21)
    write_tar(folder / "d.tar", members("d", 2))
    assert index_shards([str(folder)]).new == 1
    assert index_shards([str(folder)], again=True).new == 4
    assert index_shards([str(folder)], modalities=["vision"]).new == 0


def test_other_content_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    """A tar that a tool made again, and whose time it set, as rsync and reproducible builds do."""
    first, second = jpeg(1), jpeg(2)
    size = max(len(first), len(second))
    rows = [[("0.jpg", data.ljust(size, b"\0"))] for data in (first, second)]
    tar = write_tar(tmp_path / "x.tar", rows[0])
    os.utime(tar, ns=(10**9, 10**9))
    ShardSet(str(tar), "vision")
    write_tar(tar, rows[1])
    os.utime(tar, ns=(10**9, 10**9))
    assert stored_stamp(tar, "vision") is not None, "size and time say nothing"
    assert stored_index(tar, "vision") is None
    assert index_shards([str(tar)], modalities=["vision"]).new == 1
    assert stored_index(tar, "vision") is not None


def test_same_indexes_from_any_number_of_workers(tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        folder = write_shards(tmp_path / str(workers))
        for path in folder.glob("*.tar"):
            os.utime(path, ns=(10**9, 10**9))
        assert index_shards([str(folder)], workers=workers).new == 3
        found.append({path.name: path.read_bytes() for path in (folder / "index").iterdir()})
    assert found[0] == found[1]
    assert len(found[0]) == 9, "an empty index says that there is nothing of a modality"


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes go to the cache, where training finds them; where that cannot be written either, one line says so."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = write_shards(tmp_path / "shards")
    (folder / "index").write_text("in the way")  # tests may run as root: permissions say nothing
    survey = index_shards([str(folder)])
    assert survey.problem() is None
    assert any(str(tmp_path / "cache") in line for line in survey.lines())
    assert cached_path(folder / "a.tar", "vision").is_file()
    assert index_shards([str(folder)]).new == 0
    monkeypatch.setattr("megad2v.data.shardset.build", lambda *_: pytest.fail("the cached index fits"))
    assert len(ShardSet(str(folder), "vision")) == 21
    (tmp_path / "nothing").write_text("in the way")
    other = write_shards(tmp_path / "other")
    (other / "index").write_text("in the way")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "nothing"))
    assert CACHE_VARIABLE in (index_shards([str(other)]).problem() or "")


def test_odd_tars_are_named_and_spoil_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "apart.tar", [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1)), ("0.cls", b"3"), ("1.cls", b"4")])
    write_tar(tmp_path / "good.tar", members("g", 2))
    write_tar(tmp_path / "twice.tar", [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1)), ("0.jpg", jpeg(2))])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "good.tar").read_bytes()[:1500])
    assert main([str(tmp_path), "--workers", "0"]) == 2
    out, err = capsys.readouterr()
    assert "4 tars: 2 indexed now, 0 unchanged" in out and "vision: 4 samples in 2 tars" in out
    assert "not used: 2 .json" in out
    assert re.search(r"not usable either: .*twice\.tar: 0\.jpg is there twice", out)
    assert re.search(r"warning: .*apart\.tar: the files of 2 keys do not follow each other \(first: 0\)", out)
    assert re.fullmatch(r"index_shards: .*cut\.tar: .* \(and 1 more tars are not usable\)\n", err)
    assert len(theirs(tmp_path / "apart.tar")) == 4, "that is what the warning says of webdataset"
    assert len(ShardSet(str(tmp_path / "apart.tar"), "vision")) == 2
    (tmp_path / "cut.tar").unlink()
    assert main([str(tmp_path), "--workers", "0"]) == 2
    assert "twice.tar: 0.jpg is there twice" in capsys.readouterr().err
    assert main([str(tmp_path / "good.tar"), "--workers", "1"]) == 0
    assert "0 indexed now, 1 unchanged" in capsys.readouterr().out


def test_tool_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", [("a.txt", b"x"), ("b.mp4", b"y")])
    for arguments, words in (
        ([str(tmp_path / "x.tar"), "--workers", "0"], "no samples found; expected files KEY.jpg|"),
        ([str(tmp_path / "none")], "no such file"),
        ([str(tmp_path), "--workers", "-1"], "--workers: expected 0 to 1024"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not list(tmp_path.glob("index/.*")), "nothing half-written"
    assert index_path(tmp_path / "x.tar", "text").is_file()


def test_absurd_lengths_in_headers(tmp_path: Path) -> None:
    """A text that declares a billion tokens would plan as many blocks of nothing."""
    head = tokens(4).replace(b"(4,), }" + b" " * 9, b"(1000000000,), }")
    assert len(head) == len(tokens(4))
    tar = write_tar(tmp_path / "x.tar", [("0.tokens.npy", tokens(4)), ("1.tokens.npy", head)])
    assert build(tar, "text").lengths.tolist() == [4, 0]
