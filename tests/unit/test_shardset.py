"""ShardSet: patterns as users give them, ids, random access, and what happens when files change."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megad2v.data import shardset
from megad2v.data.format import DatasetInfo, ShardInfo, write_dataset
from megad2v.data.shardset import ShardSet
from megad2v.errors import UserError
from tests.unit.data_helpers import SHARDS, TOTAL, jpeg, members, write_shards, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


@pytest.mark.parametrize(
    "pattern,shards",
    [
        ("{}", "abc"),
        ("{}/", "abc"),
        ("{}/b.tar", "b"),
        ("{}/*.tar", "abc"),
        ("{}/../**/[ab].tar", "ab"),
        ("{}/{{c,a}}.tar", "ac"),
        ("{}/{{a..c}}.tar", "abc"),
        ("{}/{{a,?}}.tar", "abc"),
    ],
)
def test_patterns(folder: Path, pattern: str, shards: str) -> None:
    found = ShardSet(pattern.format(folder), "vision")
    assert [path.name for path in found.paths] == [f"{name}.tar" for name in shards]
    counts = dict(SHARDS)
    assert found.shard_sizes == tuple(counts[f"{name}.tar"] for name in shards)
    assert len(found) == sum(found.shard_sizes)


def test_reads_what_was_written(folder: Path) -> None:
    shards = ShardSet(str(folder), "vision")
    expected = []
    for name, count in SHARDS:
        rows = dict(members(name, count))
        expected += [(f"{name}/{i:04d}", rows[f"{i:04d}.jpg"], "jpg", i % 3) for i in range(count)]
    read = [shards.read(i) for i in range(TOTAL)]
    assert [(sample.id, sample.data, sample.kind, sample.label) for sample in read] == expected
    for outside in (-1, TOTAL):
        with pytest.raises(IndexError):
            shards.read(outside)


def test_same_from_another_place(folder: Path, tmp_path: Path) -> None:
    here = ShardSet(str(folder), "vision")
    ids = [here.sample_id(i) for i in range(TOTAL)]
    moved = folder.rename(tmp_path / "elsewhere")
    there = ShardSet(f"{moved}/{{c,b,a}}.tar", "vision")
    assert here.fingerprint == there.fingerprint
    assert [there.sample_id(i) for i in range(TOTAL)] == ids
    assert ShardSet(f"{moved}/[ab].tar", "vision").fingerprint != here.fingerprint


@pytest.mark.parametrize(
    "pattern,message",
    [
        ("{}/missing", "no such file"),
        ("{}/*.tgz", "no such file"),
        ("{}/{{a..e}}.tar", r"d\.tar: no such file \(one of 5"),
        ("{}/{{a,b.tar", "braces"),
        ("s3://bucket/x.tar", "only local files"),
        ("pipe:cat x.tar", "only local files"),
        ("{}/empty", r"no \.tar file"),
        ("{}/*", "matches the folder"),
    ],
)
def test_patterns_that_name_nothing(folder: Path, pattern: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        ShardSet(pattern.format(folder), "vision")
    assert "\n" not in str(caught.value)


def test_no_sample_of_the_modality(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("img.0001.jpg", jpeg(0)), ("a.txt", b"x")])
    with pytest.raises(UserError, match=r"no vision samples.*first dot.*0001\.jpg"):
        ShardSet(str(tar), "vision")
    with pytest.raises(UserError, match="no speech samples"):
        ShardSet(str(tar), "speech")


def test_broken_shard_names_itself(folder: Path) -> None:
    (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"b\.tar: "):
        ShardSet(str(folder), "vision")


def test_two_shards_of_one_name(folder: Path) -> None:
    write_shards(folder / "more")
    with pytest.raises(UserError, match="same file name"):
        ShardSet(f"{folder}/**/*.tar", "vision")


def test_incomplete_copy_of_a_data_set(folder: Path) -> None:
    listed = tuple(ShardInfo(name, count, 1, "") for name, count in SHARDS)
    write_dataset(folder, DatasetInfo(("vision",), TOTAL, listed))
    assert len(ShardSet(str(folder), "vision")) == TOTAL
    (folder / "b.tar").unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards .*missing \(first: b\.tar\)"):
        ShardSet(str(folder), "vision")
    assert len(ShardSet(f"{folder}/*.tar", "vision")) == TOTAL - 5, "a pattern says which ones are wanted"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 99}', "\xff"])
def test_damaged_dataset_json(folder: Path, text: str) -> None:
    (folder / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"dataset\.json"):
        ShardSet(str(folder), "vision")


def test_unfinished_folder(folder: Path) -> None:
    (folder / ".making").mkdir()
    with pytest.raises(UserError, match="not finished"):
        ShardSet(str(folder), "vision")


def test_few_files_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shardset, "OPEN_FILES", 2)
    shards = ShardSet(str(folder), "vision")
    before = len(os.listdir("/proc/self/fd"))
    expected = [shards.read(i).data for i in range(TOTAL)]
    assert len(os.listdir("/proc/self/fd")) == before + 4, "two tars, two indexes"
    assert [shards.read(i).data for i in reversed(range(TOTAL))] == expected[::-1]
    shards.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert shards.read(0).data == expected[0]


@pytest.mark.parametrize("warm", [False, True])
def test_copies_and_forks(folder: Path, warm: bool) -> None:
    shards = ShardSet(str(folder), "vision")
    expected = [shards.read(i).data for i in range(TOTAL)] if warm else [ShardSet(str(folder), "vision").read(0).data]
    copied = copy.deepcopy(shards)  # takes the road that spawned workers take
    assert copied.read(0).data == expected[0]
    child = os.fork()
    if not child:
        os._exit(0 if shards.read(0).data == expected[0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del copied
    assert shards.read(0).data == expected[0], "closing a copy leaves the original's files alone"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda path: path.write_bytes(path.read_bytes() + bytes(512)), "has changed"),
        (lambda path: os.utime(path, ns=(1, 1)), "has changed"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
    ids=["grown", "touched", "gone"],
)
def test_shard_that_changes_under_a_run(folder: Path, change: Callable[[Path], None], message: str) -> None:
    shards = ShardSet(str(folder), "vision")
    shards.read(0)
    change(folder / "b.tar")
    assert shards.read(0)
    with pytest.raises(UserError, match=rf"b\.tar: .*{message}|b\.tar: {message}"):
        shards.read(8)
