"""Documents in blocks of whole sentences: against a plain greedy loop, fairseq's rule, and the tokens themselves."""

from __future__ import annotations

import copy
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megad2v.data import blocks as blocks_module
from megad2v.data.blocks import BLOCK, BlockSet, blocks_path, cut
from megad2v.data.shardset import ShardSet
from megad2v.errors import UserError
from megad2v.modalities.sample import BadSample
from megad2v.modalities.text.decode import read_tokens, write_tokens
from megad2v.modalities.text.tokenizer import Tokens
from tests.unit.text_helpers import document, story, write_text

ROOM = 63


def blocks_of(folder: Path, max_tokens: int = ROOM + 1) -> BlockSet:
    return BlockSet(ShardSet(str(folder), "text"), max_tokens)


def rows(found: BlockSet) -> list[tuple[str, list[int]]]:
    """(id behind the shard's name, tokens)"""
    samples = [found.read(index) for index in range(len(found))]
    assert [found.sample_id(index) for index in range(len(found))] == [sample.id for sample in samples]
    return [(sample.id.partition("/")[2], read_tokens(sample.data).tolist()) for sample in samples]


def sentences(tokens: list[int]) -> list[list[int]]:
    out: list[list[int]] = [[]]
    for token in tokens:
        out[-1].append(token)
        if token == 2:
            out.append([])
    return [sentence for sentence in out if sentence]


def greedy(tokens: list[int], room: int) -> list[list[int]]:
    """The rule, sentence by sentence, with what is left of a long one going on as a sentence of its own."""
    out: list[list[int]] = []
    waiting = sentences(tokens)
    while waiting:
        block: list[int] = []
        while waiting and len(block) + len(waiting[0]) <= room:
            block += waiting.pop(0)
        if not block:
            block, waiting[0] = waiting[0][:room], waiting[0][room:]
        out.append(block)
    return out


def by_fairseq(tokens: list[int], room: int) -> list[list[int]]:
    """complete_doc for one document: sentences are added while they fit, and one that never does is alone."""
    out: list[list[int]] = []
    block: list[int] = []
    for sentence in sentences(tokens):
        if block and len(block) + len(sentence) > room:
            out.append(block)
            block = []
        block = block + sentence
    return [*out, block]


@pytest.fixture(scope="module")
def documents() -> list[Tokens]:
    """Of all sorts: long, short, a sentence longer than a block, or just as long, none at the end."""
    made = [story(int(length), seed) for seed, length in enumerate(np.random.default_rng(0).integers(1, 900, 60))]
    made += [
        document(lengths, seed) for seed, lengths in enumerate(([ROOM], [ROOM + 1], [1], [10, 200, 5], [ROOM] * 3))
    ]
    made.append(story(300, 5)[:-1])
    made.append(np.full(2 * ROOM, 7, dtype="<u2"))
    made.append(document([4, 50, 30]).astype("<u4"))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, documents: list[Tokens]) -> Path:
    return write_text(tmp_path_factory.mktemp("blocks") / "shards", documents)


def test_blocks_are_the_rule_s(folder: Path, documents: list[Tokens]) -> None:
    found = blocks_of(folder)
    expected = []
    for number, tokens in enumerate(documents):
        start = 0
        for block in greedy(tokens.tolist(), ROOM):
            expected.append((f"{number:04d}:{start}", block))
            start += len(block)
        assert start == len(tokens), "nothing is lost"
    assert rows(found) == expected
    assert found.lengths().tolist() == [len(block) for _, block in expected] and found.lengths().dtype == np.int64
    assert len(list(folder.glob("*.tar"))) == len(found.shard_sizes) > 3
    assert sum(found.shard_sizes) == len(found) == len(expected)


def test_fairseq_has_the_same_blocks_where_all_sentences_fit(folder: Path, documents: list[Tokens]) -> None:
    found = rows(blocks_of(folder))
    compared = 0
    for number, tokens in enumerate(documents):
        if max(map(len, sentences(tokens.tolist()))) <= ROOM:
            mine = [block for name, block in found if name.startswith(f"{number:04d}:")]
            assert mine == by_fairseq(tokens.tolist(), ROOM)
            compared += len(mine)
    assert compared > 300


@pytest.mark.parametrize("room", [1, 2, 7, 1000])
def test_other_sizes(folder: Path, documents: list[Tokens], room: int) -> None:
    expected = [block for tokens in documents for block in greedy(tokens.tolist(), room)]
    assert [block for _, block in rows(blocks_of(folder, room + 1))] == expected


def test_dtype_label_and_kind(folder: Path, documents: list[Tokens]) -> None:
    found = blocks_of(folder)
    last = found.read(len(found) - 1)
    assert read_tokens(last.data).dtype == np.dtype("<u4") and last.kind == "tokens.npy"
    assert last.label == (len(documents) - 1) % 3
    with pytest.raises(IndexError):
        found.read(len(found))


def test_chunks_change_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(str(folder), "text")
    indexes = [shards.index(shard) for shard in range(len(shards.paths))]
    whole = [blocks_module.build(path, index, 64) for path, index in zip(shards.paths, indexes, strict=True)]
    monkeypatch.setattr(blocks_module, "CHUNK_TOKENS", 30)
    chunks = [list(blocks_module._chunks(index)) for index in indexes]
    assert sum(map(len, chunks)) > 1.5 * len(chunks)
    for path, index, expected, own in zip(shards.paths, indexes, whole, chunks, strict=True):
        assert [row for rows in own for row in rows] == list(range(len(index)))
        assert (blocks_module.build(path, index, 64) == expected).all()


def test_no_documents_are_no_blocks() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert [len(part) for part in cut(none, none, none, 5)] == [0, 0, 0]


def test_one_read_of_the_block_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks_of(folder)
    found.read(0)  # opens the tar
    sizes: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: sizes.append(arguments[1]) or pread(*arguments))
    assert len(read_tokens(found.read(1).data)) * 2 == sizes[0] and len(sizes) == 1


# --- what is kept beside the index


def test_kept_mapped_and_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = blocks_of(folder)
    monkeypatch.setattr(blocks_module, "build", lambda *_: pytest.fail("the stored blocks fit"))
    again = blocks_of(folder)
    assert rows(again) == rows(first) and again.fingerprint == first.fingerprint
    assert all(isinstance(table, np.memmap) for table in again._tables.values())
    assert BLOCK.itemsize <= 20
    stored = np.load(blocks_path(again.paths[0], 64), mmap_mode="r")
    assert stored["length"].max() <= ROOM and len(stored) == again.shard_sizes[0]


def test_changed_shards_are_cut_again(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "a", [story(300, 1)])
    before = blocks_of(folder)
    tar = before.paths[0]
    other = write_text(tmp_path / "b", [story(300, 2)])
    os.replace(other / tar.name, tar)
    after = blocks_of(folder)
    assert rows(after) == [(f"0000:{s}", b) for s, b in _placed(greedy(story(300, 2).tolist(), ROOM))]
    with pytest.raises(UserError, match="has changed since this run indexed it"):
        before.read(0)


def replaced_alike(folder: Path, other: Path) -> None:
    """Copy the tar of `other` over the one of `folder`, which keeps its size and time."""
    tar = folder / "text-000000.tar"
    before = tar.stat()
    tar.write_bytes((other / tar.name).read_bytes())
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tar.stat().st_size == before.st_size


@pytest.mark.parametrize("lengths", [(40, 300, 90, 500), (300, 300)], ids=["other lengths", "same lengths"])
def test_tar_replaced_by_one_of_the_same_size_and_time(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """Its index notices by a look at the bytes; the table of blocks then belongs to another index."""
    documents = [story(length, seed) for seed, length in enumerate(lengths)]
    folder = write_text(tmp_path / "a", documents, max_bytes=10**6)
    other = write_text(tmp_path / "b", documents[::-1], max_bytes=10**6)
    before = rows(blocks_of(folder))
    expected = rows(blocks_of(other))
    assert before != expected
    replaced_alike(folder, other)
    opened = blocks_of(folder)  # stamps alone do not tell
    with pytest.raises(UserError, match="has changed since this run indexed it"):
        opened.read(0)
    assert rows(blocks_of(folder)) == expected


def test_block_behind_its_document_is_refused(tmp_path: Path) -> None:
    """Never tokens of the next document."""
    found = blocks_of(write_text(tmp_path / "a", [story(300, 1), story(300, 2)]))
    table = np.array(found._table(0))
    last = int(np.flatnonzero(table["row"] == 0)[-1])
    table["length"][last] += 1
    found._tables[0] = table
    with pytest.raises(BadSample, match="ends behind its document"):
        found.read(last)
    assert len(read_tokens(found.read(last - 1).data)) == table["length"][last - 1]


def test_few_tables_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times as many shards as a process may open files, read at random."""
    monkeypatch.setattr("megad2v.data.blocks.OPEN_FILES", 4)
    monkeypatch.setattr("megad2v.data.shardset.OPEN_FILES", 4)
    folder = write_text(tmp_path / "a", [story(300, seed) for seed in range(200)], max_bytes=1)
    used = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        first, again = blocks_of(folder), blocks_of(folder)  # made, then found
        assert len(first.paths) == 200 and first.fingerprint == again.fingerprint
        first.close()
        monkeypatch.setattr(blocks_module, "build", lambda *_: pytest.fail("the stored blocks fit"))
        for index in np.random.default_rng(0).permutation(len(again)).tolist():
            read_tokens(again.read(index).data)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(again._tables) == 4


def test_opening_reads_no_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = blocks_of(folder)
    monkeypatch.setattr(np, "memmap", lambda *_, **__: pytest.fail("a table was mapped"))
    found = blocks_of(folder)
    assert found.shard_sizes == expected.shard_sizes and not found._tables


def test_table_of_a_tar_that_came_later_is_not_used(tmp_path: Path) -> None:
    """The tar changed while this run had it open, and another run cut the new one."""
    folder = write_text(tmp_path / "a", [story(300, 1)])
    before = blocks_of(folder)
    before.read(0)
    before._tables.clear()  # as if other shards had been wanted since
    tar = before.paths[0]
    os.replace(write_text(tmp_path / "b", [story(300, 2)]) / tar.name, tar)
    blocks_of(folder)
    with pytest.raises(UserError, match="has changed since this run indexed it"):
        before.read(0)


def _placed(blocks: list[list[int]]) -> list[tuple[int, list[int]]]:
    starts = np.cumsum([0, *map(len, blocks)])[:-1]
    return list(zip(starts.tolist(), blocks, strict=True))


def test_damaged_table_is_made_again(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "a", [story(300, 1)])
    expected = rows(blocks_of(folder))
    path = blocks_path(folder / "text-000000.tar", 64)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for broken in (b"", whole[:150], whole[:-1], bytes(flipped), b"something else"):
        path.write_bytes(broken)
        assert rows(blocks_of(folder)) == expected
        assert path.read_bytes() == whole


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables go where indexes go then, and stay in memory where that cannot be written either."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("MEGAD2V_INDEX", str(cache))
    folder = write_text(tmp_path / "a", [story(300, 1)])
    expected = rows(blocks_of(folder))
    assert not cache.exists()
    shutil.rmtree(folder / "index")
    (folder / "index").write_text("a file where the folder should be")  # tests may run as root
    assert rows(blocks_of(folder)) == expected
    assert {path.name for path in cache.glob("*/*")} == {"text-000000.text.npy", "text-000000.text.blocks64.npy"}
    with monkeypatch.context() as there:
        there.setattr(blocks_module, "build", lambda *_: pytest.fail("the blocks in the cache fit"))
        assert rows(blocks_of(folder)) == expected
    shutil.rmtree(cache)
    cache.write_text("a file where the cache should be")
    found = blocks_of(folder)
    assert rows(found) == expected and list(found._in_memory) == [0]


def test_many_build_at_once(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "a", [story(300, seed) for seed in range(20)], max_bytes=10**6)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: blocks_of(folder).fingerprint, range(16)))
    assert len(set(found)) == 1
    names = {path.name for path in (folder / "index").iterdir()}
    assert names == {"text-000000.text.npy", "text-000000.text.blocks64.npy"}


def test_fingerprint_knows_the_blocks(tmp_path: Path) -> None:
    """The same documents with sentences elsewhere are other blocks, in another order."""
    one = write_text(tmp_path / "a", [document([40, 40, 40])])
    other = write_text(tmp_path / "b", [document([30, 50, 40])])
    prints = {blocks_of(one).fingerprint, blocks_of(other).fingerprint, blocks_of(one, 31).fingerprint}
    assert len(prints) == 3
    assert blocks_of(one).fingerprint == blocks_of(one).fingerprint


def test_another_process_can_use_it(folder: Path) -> None:
    found = blocks_of(folder)
    found.read(0)
    other = copy.deepcopy(found)  # as pickling does
    assert other.read(3) == found.read(3)
    found.close()
    assert other.read(5) == found.read(5)


# --- documents that cannot be read


def test_damaged_documents_are_one_block_each(tmp_path: Path) -> None:
    good = write_tokens(story(200, 1))
    broken = [good[:-9], b"no .npy", b"", write_tokens(np.zeros(0, "<u2")), write_tokens(np.zeros(9, "<i8"))]
    folder = write_text(tmp_path / "a", [good, *broken, good])
    found = blocks_of(folder)
    names = [found.sample_id(index).partition("/")[2] for index in range(len(found))]
    assert [name for name in names if name[:4] not in ("0000", "0006")] == [f"000{n}:0" for n in range(1, 6)]
    assert sum(name.startswith("0006") for name in names) == len(greedy(story(200, 1).tolist(), ROOM))
    lengths = dict(zip(names, found.lengths().tolist(), strict=True))
    assert [lengths[f"000{number}:0"] for number in range(1, 6)] == [ROOM, 0, 0, 0, 9]
    for index, name in enumerate(names):
        if name[:4] in ("0001", "0002", "0003", "0005"):
            with pytest.raises(BadSample, match=r"cut short|no \.npy|expected one dimension"):
                read_tokens(found.read(index).data)
