"""make_shards that was killed goes on: crashes at every file operation, other plans, changed inputs; who packs what."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from megad2v.data import chunks, make, writer
from megad2v.data.format import read_dataset
from megad2v.data.index import build
from megad2v.data.packing import Packer, Piece
from megad2v.data.ranks import Ranks, serve
from megad2v.data.shardset import ShardSet
from megad2v.data.writer import Cuts
from megad2v.errors import UserError
from megad2v.modalities.text.documents import TextOptions
from megad2v.modalities.text.shards import text_corpus
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.modalities.text.train import TrainingOptions, train_tokenizer
from tests.unit.test_make_shards import files

BYTES: Tokenizer = train_tokenizer((), TrainingOptions(0, "byte"))
SHARD = 20_480


class Killed(BaseException):
    """Nothing in the code handles it."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve files of one to six documents: duplicates, documents left out, a file that is nothing."""
    BYTES.save(tmp_path / "vocabulary")
    folder = tmp_path / "in"
    folder.mkdir()
    rng = random.Random(3)
    for number in range(12):
        documents = [f"Text {rng.randrange(30)} " + "x" * rng.randrange(900) for _ in range(1 + number % 6)]
        (folder / f"{number:02d}.txt").write_bytes("\n\n".join([*documents, "the same"]).encode() + b"\n\n\xff\n")
    (folder / "other.bin").touch()
    return folder


def run(source: Path, out: Path, **options: Any) -> make.Made:
    text = TextOptions(document="blank-lines", dedupe=True)
    corpus = text_corpus(source, source.parent / "vocabulary", text)
    return make.make_shards(corpus, out, **{"workers": 0, "max_shard_bytes": SHARD, "progress": False, **options})


def at_operation(limit: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """From now on the `limit`-th renaming, removal or synchronisation raises, before or after it was done, and all
    that would come after; returns how many there were."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **words: Any) -> Any:
            nonlocal count
            count += 1
            if count > limit:
                raise Killed
            result = function(*arguments, **words)
            if count == limit and limit % 2:
                raise Killed
            return result

        return call

    for holder, name in ((os, "replace"), (os, "unlink"), (os, "fsync"), (Path, "unlink"), (writer, "_checksum")):
        monkeypatch.setattr(holder, name, counted(getattr(holder, name)))
    return lambda: count


def test_killed_at_any_operation(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to three times, then not: nothing is lost or doubled, and what the summary says is the same."""
    expected = run(source, tmp_path / "whole")
    assert len(expected.info.shards) >= 4
    assert expected.counts["skipped"] > 12, "duplicates, and lines that are no UTF-8"
    with monkeypatch.context() as patch:
        count = at_operation(10**9, patch)
        run(source, tmp_path / "counted")
        total = count()
    rng = random.Random(5)
    moments = sorted(rng.sample(range(total), 12)) + list(range(total - 12, total))
    for moment in moments:
        out = tmp_path / f"killed-{moment}"
        for limit in (moment, rng.randrange(total), rng.randrange(10)):
            if not (out / "dataset.json").exists():
                with monkeypatch.context() as patch:
                    at_operation(limit, patch)
                    try:
                        assert run(source, out).summary == expected.summary
                    except Killed:
                        if (out / ".making").exists() and (out / "dataset.json").exists():
                            with pytest.raises(UserError, match="not finished"):
                                ShardSet(str(out), "text")
        if not (out / "dataset.json").exists() or (out / ".making").exists():
            made = run(source, out)
            assert made.summary == expected.summary, moment
            assert made.counts == expected.counts
        (tmp_path / "rest").mkdir(exist_ok=True)
        if (out / ".made").exists():  # killed while rubbish was cleared away
            os.rename(out / ".made", tmp_path / "rest" / str(moment))
        assert files(out) == files(tmp_path / "whole"), moment
        assert read_dataset(out) == expected.info


def half(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, moment: int = 60, **options: Any) -> None:
    with monkeypatch.context() as patch:
        at_operation(moment, patch)
        with pytest.raises(Killed):
            run(source, out, **options)


def prepared(monkeypatch: pytest.MonkeyPatch, patch_name: str = "write_chunk") -> list[str]:
    """Names of what is prepared, or written as a shard, from now on."""
    names: list[str] = []
    original = getattr(make, patch_name)

    def noted(*arguments: Any) -> Any:
        names.extend([path.path for path in arguments[1]] if patch_name == "write_chunk" else [arguments[0].name])
        return original(*arguments)

    monkeypatch.setattr(make, patch_name, noted)
    return names


def test_goes_on_where_it_stopped(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    half(source, out, monkeypatch)
    (work,) = (path for path in (out / ".making").iterdir() if path.is_dir())
    finished = sorted(path.stem for path in work.glob("text-*.json"))
    expected = run(source, tmp_path / "whole")
    assert 1 <= len(finished) < len(expected.info.shards)
    with monkeypatch.context() as patch:
        again, written = prepared(patch), prepared(patch, "write_shard")
        run(source, out, workers=0)
    assert 1 <= len(again) < 9, "of twelve"
    assert not {f"{name}.tar" for name in finished} & {*written}
    assert len(finished) + len(written) == len(expected.info.shards)
    assert files(out) == files(tmp_path / "whole")


def test_each_file_is_prepared_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = prepared(monkeypatch)
    run(source, tmp_path / "out")
    assert sorted(names) == sorted(path.name for path in source.glob("*.txt"))


def test_damaged_leftovers_are_made_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that lost its power: spooled data without their end, a journal and a finished shard that are gone."""
    run(source, tmp_path / "whole")
    for name, damage in {
        "data": lambda work: [os.truncate(p, 10) for p in work.glob("spool/*") if p.suffix != ".heads"],
        "flipped": lambda work: [
            p.write_bytes(p.read_bytes()[:-1] + b"?") for p in work.glob("spool/*") if p.suffix != ".heads"
        ],
        "heads": lambda work: [os.truncate(p, 10) for p in work.glob("spool/*.heads")],
        "journal": lambda work: os.truncate(work / "journal", 700),
        "tar": lambda work: (work / "text-000000.tar").unlink(),
        "short tar": lambda work: os.truncate(work / "text-000000.tar", 10_240),
        "index": lambda work: next((work / "index").iterdir()).unlink(),
    }.items():
        out = tmp_path / f"damaged {name}"
        half(source, out, monkeypatch)
        (work,) = (path for path in (out / ".making").iterdir() if path.is_dir())
        damage(work)
        run(source, out)
        assert files(out) == files(tmp_path / "whole"), name


def test_another_plan_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    half(source, out, monkeypatch)
    before = files(out)
    for message, change in {
        "with other options .seed 0, now 1.; start it as it was": {"seed": 1},
        "with other options .max_shard_bytes 20480, now 30000.": {"max_shard_bytes": 30_000},
    }.items():
        with pytest.raises(UserError, match=message):
            run(source, out, **change)
        assert files(out) == before
    (source / "late.txt").write_text("late")
    with pytest.raises(UserError, match="unfinished run of another input"):
        run(source, out)
    (source / "late.txt").unlink()
    assert files(out) == before
    run(source, out)
    run(source, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")
    half(source, tmp_path / "dropped", monkeypatch)
    run(source, tmp_path / "dropped", seed=1, overwrite=True)
    run(source, tmp_path / "other", seed=1)
    assert files(tmp_path / "dropped") == files(tmp_path / "other")


def test_changed_input_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    half(source, out, monkeypatch)
    before = files(out)
    for path in source.glob("*.txt"):
        path.write_bytes(path.read_bytes() + b"more\n")
    with pytest.raises(UserError, match=r"\.txt: has changed since the run began that was interrupted; --overwrite"):
        run(source, out)
    assert files(out) == before
    run(source, out, overwrite=True)
    run(source, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_overwriting_goes_on_too(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old shards stay until the new ones are whole, and what is half moved is moved on."""
    run(source, tmp_path / "whole", seed=1)
    for moment in (60, *range(112, 130, 3)):
        out = tmp_path / f"out-{moment}"
        run(source, out, seed=9)
        old = files(out)
        half(source, out, monkeypatch, moment, seed=1, overwrite=True)
        if moment == 60:
            assert old.items() <= files(out).items()
            with pytest.raises(UserError, match="is not empty"):
                run(source, out, seed=1)
        run(source, out, seed=1, overwrite=True)
        assert files(out) == files(tmp_path / "whole"), moment


def test_interrupted_by_hand_is_kept_and_wrong_input_is_not(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, kept in ((KeyboardInterrupt, True), (RuntimeError, True), (OSError, False), (UserError, False)):
        out = tmp_path / error.__name__
        with monkeypatch.context() as patch:
            patch.setattr(make, "write_shard", lambda *_, error=error: (_ for _ in ()).throw(error()))
            with pytest.raises(UserError if error is OSError else error):
                run(source, out)
        assert (out / ".making").exists() == kept
        run(source, out)


def test_cuts_are_those_of_webdataset_tars(tmp_path: Path) -> None:
    """No shard is larger than asked for, and none could have taken the next one's first sample."""
    rng = random.Random(1)
    sizes = [rng.choice([0, 1, 511, 512, 513, 4_000, 30_000]) for _ in range(200)]
    cuts, groups = Cuts(25_000), [[]]
    for number, size in enumerate(sizes):
        if cuts.before(writer.sample_bytes([size, 3])):
            groups.append([])
        groups[-1].append((f"{number:04d}", {"tokens.npy": bytes(size), "cls": b"123"}))
    for number, group in enumerate(groups):
        info = writer.write_shard(tmp_path / f"{number}.tar", "text", group)
        assert info.samples == len(group) == len(build(tmp_path / f"{number}.tar", "text"))
        assert info.bytes <= 25_000 or len(group) == 1
        if number + 1 < len(groups):
            larger = writer.write_shard(tmp_path / "larger.tar", "text", [*group, groups[number + 1][0]])
            assert larger.bytes > 25_000


def test_record_is_of_the_same_samples(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    tar = tmp_path / "text-000000.tar"
    info = writer.write_shard(tar, "text", [("a", {"tokens.npy": b"1"})])
    assert writer.read_record(tar, "text", "x") is None
    writer.write_record(tar, "x", info)
    assert writer.read_record(tar, "text", "x") == info
    assert writer.read_record(tar, "text", "y") is None


def head(samples: int, size: int = 4_000, fingerprint: str = "") -> dict[str, Any]:
    parts = [{"flac": size} for _ in range(samples)]
    return {"samples": parts, "labels": [-1] * samples, "totals": {"hours": 1.0}, "fingerprint": fingerprint}


def test_pieces_of_chunks() -> None:
    """An outcome may be cut by the end of a shard, a chunk may be in several, and duplicates are in none."""
    packer = Packer(20_480)
    packer.begin(0)
    assert packer.add(head(3, fingerprint="a")) == []
    assert packer.add(head(0)) == []
    packer.begin(1)
    assert packer.open_chunks == {0}
    assert packer.add(head(2, fingerprint="a")) == []
    (first,) = packer.add(head(3))
    assert packer.open_chunks == {1}
    assert first.pieces == (Piece(0, 0, 0, 3, ()), Piece(1, 2, 0, 1, (0,)))
    (last,) = packer.last()
    assert last.pieces == (Piece(1, 2, 1, 3, (0,)),)
    assert (first.samples, last.samples, packer.labels[-1], packer.outcomes) == (4, 2, 6, 4)
    assert packer.totals == {"hours": 2.0}
    assert packer.last() == []


class Wire:
    """Two or more threads as ranks: what mpi4py's communicator does, for messages that are pickled anyway."""

    def __init__(self, rank: int, boxes: dict[tuple[int, int, int], list[Any]], size: int) -> None:
        self.rank, self.size, self._boxes = rank, size, boxes

    def send(self, message: Any, dest: int, tag: int) -> None:
        self._boxes.setdefault((self.rank, dest, tag), []).append(message)

    def isend(self, message: Any, dest: int, tag: int) -> Any:
        self.send(message, dest, tag)
        done: Future[None] = Future()
        done.Test = lambda: True  # type: ignore[attr-defined]
        return done

    def iprobe(self, source: int, tag: int) -> bool:
        return bool(self._boxes.get((source, self.rank, tag)))

    def recv(self, source: int, tag: int) -> Any:
        return self._boxes[source, self.rank, tag].pop(0)


def test_ranks_share_the_work(source: Path, tmp_path: Path) -> None:
    """The protocol alone; tests/cli/test_make_shards_mpi.py has real ranks."""
    boxes: dict[tuple[int, int, int], list[Any]] = {}
    codes: list[int] = []
    others = [threading.Thread(target=lambda r=r: codes.append(serve(Wire(r, boxes, 3)))) for r in (1, 2)]
    for thread in others:
        thread.start()
    ranks = Ranks(Wire(0, boxes, 3))
    try:
        made = run(source, tmp_path / "out", team=ranks)
        where = [ranks.submit(_fail_slowly, error) for error in (OSError(28, "No space left"), UserError("wrong"))]
        while not all(future.done() for future in where):
            ranks.wait([future for future in where if not future.done()])
        assert isinstance(where[0].exception(), OSError)
        assert all(", rank " in str(future.exception()) or "(rank " in str(future.exception()) for future in where)
    finally:
        ranks.release(2)
    for thread in others:
        thread.join(10)
    assert codes == [2, 2]
    assert len(made.written) == 3
    assert all(made.written)
    assert sum(made.written) == made.info.samples
    run(source, tmp_path / "alone")
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def _fail_slowly(error: Exception) -> None:
    time.sleep(0.01)
    raise error


def test_chunks_remember_their_sources(source: Path, tmp_path: Path) -> None:
    corpus = text_corpus(source, source.parent / "vocabulary", TextOptions())
    data = tmp_path / "000000000"
    chunks.write_chunk(corpus, corpus.files[:2], data, 1024)
    end = json.loads(chunks.heads_path(data).read_bytes().splitlines()[-1])
    about = (corpus.folder, corpus.files[:2], data, end["bytes"], end["crc"], end["stamps"])
    assert chunks.check_chunk(*about) == ("", True)
    data.write_bytes(data.read_bytes()[:-1])
    assert chunks.check_chunk(*about) == ("", False)
    (source / corpus.files[1].path).unlink()
    assert chunks.check_chunk(*about) == (corpus.files[1].path, False)
