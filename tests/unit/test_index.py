"""Indexes of tars: any tar format, nothing lost silently, stale and damaged indexes are noticed."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megad2v.data import index
from megad2v.data.format import KINDS, split_key
from megad2v.data.index import build, index_path, load_or_build, stored_index
from megad2v.errors import UserError
from tests.unit.data_helpers import encoded, jpeg, members, picture, write_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def content(tar: Path, found: index.ShardIndex) -> dict[str, bytes]:
    data = tar.read_bytes()
    return {
        found.key(i): data[int(row["offset"]) : int(row["offset"]) + int(row["size"])]
        for i, row in enumerate(found.records)
    }


@pytest.mark.parametrize("format", FORMATS, ids=["ustar", "gnu", "pax"])
def test_offsets_in_every_tar_format(tmp_path: Path, format: int) -> None:
    long = "folder-" * 12 + "/" + "key-" * 22 + "end"  # needs extension headers in GNU and PAX, a prefix in ustar
    rows = [("a/0.jpg", jpeg(1)), ("a/0.cls", b"4\n"), (f"{long}.png", encoded(picture(2), "PNG")), ("b.JPEG", jpeg(3))]
    if format != tarfile.USTAR_FORMAT:
        rows.append(("schön/日本.webp", encoded(picture(4), "WEBP")))
    tar = write_tar(tmp_path / "x.tar", rows, format)
    found = build(tar, "vision")
    expected = {split_key(name)[0]: data for name, data in rows if not name.endswith("cls")}
    assert content(tar, found) == expected
    assert [KINDS[kind] for kind in found.records["kind"]][:3] == ["jpg", "png", "jpeg"]
    assert found.records["label"].tolist()[:2] == [4, index.NO_LABEL]
    assert set(found.lengths.tolist()) == {40 * 36}


@pytest.mark.parametrize(
    "path,expected",
    [
        ("a/b/c.jpg", ("a/b/c", "jpg")),
        ("c.seg.PNG", ("c", "seg.png")),
        ("v1.2/c.jpg", ("v1.2/c", "jpg")),
        ("./c.jpg", ("./c", "jpg")),
        ("c", None),
        ("v1.2/c", None),
        (".hidden", None),
        ("a/._c.jpg", ("a/", "_c.jpg")),
        ("a.b/._c.jpg", None),
        ("a.b/c/.jpg", ("a.b/c/", "jpg")),
        ("__meta__/c.jpg", None),
        ("a/__c__.jpg", ("a/__c__", "jpg")),
    ],
)
def test_keys_follow_webdataset(path: str, expected: tuple[str, str] | None) -> None:
    assert split_key(path) == expected


def test_parts_need_not_be_neighbours(tmp_path: Path) -> None:
    """`tar` packs a folder in the order of the directory, so a label can lie far from its image."""
    rows = [("0.cls", b"7"), ("1.jpg", jpeg(1)), ("0.jpg", jpeg(0)), ("1.cls", b"8")]
    found = build(write_tar(tmp_path / "x.tar", rows), "vision")
    assert {found.key(i): int(found.records["label"][i]) for i in range(2)} == {"0": 7, "1": 8}


def test_label_that_is_not_a_number(tmp_path: Path) -> None:
    found = build(write_tar(tmp_path / "x.tar", [("0.jpg", jpeg(0)), ("0.cls", b"cat")]), "vision")
    assert found.records["label"].tolist() == [index.UNREADABLE_LABEL]


def test_other_modalities_are_left_out(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("0.jpg", jpeg(0)), ("0.flac", b"fLaC"), ("1.wav", b"RIFF"), ("2.txt", b"a")])
    assert len(build(tar, "vision")) == 1
    assert len(build(tar, "speech")) == 2


def test_same_file_twice(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("0.jpg", jpeg(0)), ("0.jpg", jpeg(1))])
    with pytest.raises(UserError, match=r"x\.tar: 0\.jpg is there twice"):
        build(tar, "vision")


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """Also between two files, where tarfile (and so webdataset) reads a shorter tar without a word."""
    rows = members("a", 3)
    whole = write_tar(tmp_path / "x.tar", rows).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        borders = [member.offset for member in tar]
    end = borders[-1] + 1024  # header and one block of data
    cut = tmp_path / "cut.tar"
    for size in {0, 1, 100, 512, *borders, *(b + 512 for b in borders), *(b + 700 for b in borders), end - 1, end}:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.tar: .*(copy|make) it again"):
            build(cut, "vision")
    cut.write_bytes(whole[: end + 512])
    assert len(build(cut, "vision")) == 3, "one zero block is an end"


def test_damaged_header_and_compressed_tar(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", members("a", 3))
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        header = opened.getmembers()[4].offset
    tar.write_bytes(whole[: header + 20] + b"\xff" * 40 + whole[header + 60 :])
    with pytest.raises(UserError, match=r"x\.tar: cut short or damaged"):
        build(tar, "vision")
    tar.write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"x\.tar: .*uncompressed"):
        build(tar, "vision")
    with pytest.raises(UserError, match=r"missing\.tar.*No such file"):
        load_or_build(tmp_path / "missing.tar", "vision")


def test_what_follows_an_end_is_noticed(tmp_path: Path) -> None:
    """Both read as short tars otherwise: tars laid behind each other, and one in which a disk lost a piece."""
    first, second = (write_tar(tmp_path / f"{name}.tar", members(name, 3)) for name in "ab")
    both = tmp_path / "both.tar"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    size = first.stat().st_size
    with pytest.raises(UserError, match=rf"both\.tar: ends at byte \d+, .* at byte {size}, .*tar --concatenate"):
        build(both, "vision")
    with tarfile.open(first) as tar:
        lost = tar.getmembers()[2].offset
    whole = first.read_bytes()
    first.write_bytes(whole[:lost] + bytes(512) + whole[lost + 512 :])
    with pytest.raises(UserError, match=rf"a\.tar: ends at byte {lost}, and there is more at byte {lost + 512}"):
        build(first, "vision")
    first.write_bytes(whole + bytes(3 * 2**20))
    assert len(build(first, "vision")) == 3, "zeros are padding"


@pytest.mark.timeout(20)
def test_sizes_that_cannot_be(tmp_path: Path) -> None:
    """tarfile goes round in circles for a negative size, and reads as long a name as a header states."""
    plain, negative = tarfile.TarInfo("a.jpg"), tarfile.TarInfo("b.jpg")
    negative.size = -1024
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2**40
    records = b"14 size=-1024\n"
    pax = tarfile.TarInfo("x")
    pax.type, pax.size = tarfile.XHDTYPE, len(records)
    pax_header = pax.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")
    tar = tmp_path / "x.tar"
    for broken in (
        negative.tobuf(tarfile.GNU_FORMAT),
        name.tobuf(tarfile.GNU_FORMAT),
        pax_header + plain.tobuf(tarfile.USTAR_FORMAT),
    ):
        for before in (b"", plain.tobuf(tarfile.USTAR_FORMAT)):
            tar.write_bytes(before + broken + bytes(1024))
            with pytest.raises(UserError, match=r"x\.tar: .*copy or make it again"):
                build(tar, "vision")


def test_names_without_tar_have_indexes_of_their_own(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"shard.{number}", members(str(number), 2 + number))
    paths = [tmp_path / "shard.0", tmp_path / "shard.1"]
    assert [len(load_or_build(path, "vision")) for path in paths] == [2, 3]
    assert all(stored_index(path, "vision") is not None for path in paths)


def test_stored_index_is_used_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_tar(tmp_path / "x.tar", members("a", 4))
    made = load_or_build(tar, "vision")
    monkeypatch.setattr(index, "build", lambda *_: pytest.fail("the stored index fits"))
    again = load_or_build(tar, "vision")
    assert not again.records.flags.owndata and not again.records.flags.writeable, "it is mapped"
    assert (again.records == made.records).all()
    assert [again.key(i) for i in range(4)] == ["0000", "0001", "0002", "0003"]
    assert np.load(index_path(tar, "vision"))["samples"].tolist() == [4]


def test_changed_tar_is_indexed_again(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", members("a", 4))
    assert len(load_or_build(tar, "vision")) == 4
    write_tar(tar, members("a", 6))
    assert stored_index(tar, "vision") is None
    assert len(load_or_build(tar, "vision")) == 6
    os.utime(tar, ns=(1, 1))
    assert stored_index(tar, "vision") is None, "same size, other time"
    assert len(load_or_build(tar, "vision")) == 6


def test_damaged_index_is_made_again(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", members("a", 4))
    expected = content(tar, load_or_build(tar, "vision"))
    path = index_path(tar, "vision")
    whole = path.read_bytes()
    broken = [whole[:size] for size in (0, 5, 100, 300, len(whole) - 300, len(whole) - 1)]
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for data in [*broken, bytes(flipped), b"something else"]:
        path.write_bytes(data)
        assert stored_index(tar, "vision") is None
        assert content(tar, load_or_build(tar, "vision")) == expected
        assert path.read_bytes() == whole


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(index.CACHE_VARIABLE, str(tmp_path / "index"))
    tar = write_tar(tmp_path / "x.tar", members("a", 4))
    (tmp_path / "index").write_text(
        "a file where the folder should be"
    )  # tests may run as root: permissions say nothing
    assert len(load_or_build(tar, "vision")) == 4


def test_many_build_at_once(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", members("a", 4))
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda _: len(load_or_build(tar, "vision")), range(16)))
    assert sizes == [4] * 16
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["x.vision.npy"]


def test_empty_tar(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [])
    assert len(load_or_build(tar, "vision")) == 0
    assert len(load_or_build(tar, "vision")) == 0, "also from its stored index"


def test_recordings_whose_header_does_not_say_are_decoded_once(tmp_path: Path) -> None:
    """A FLAC written into a pipe states no length; unknown ones would be cropped to the shortest of a micro-batch."""
    soundfile = pytest.importorskip("soundfile")
    whole = io.BytesIO()
    soundfile.write(whole, np.random.default_rng(1).normal(0, 0.1, 24_000), 16_000, format="FLAC", subtype="PCM_16")
    data = bytearray(whole.getvalue())
    assert data[:4] == b"fLaC"
    data[21] &= 0xF0  # STREAMINFO's 36 bits of total samples, to "unknown"
    data[22:26] = bytes(4)
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        for name, content in (("stated.flac", whole.getvalue()), ("unstated.flac", bytes(data)), ("bad.flac", b"fLaC")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    assert build(tar, "speech").lengths.tolist() == [24_000, 24_000, 0]
