"""Documents as rows of whole sentences: a view on a ShardSet whose samples are blocks (fairseq's complete_doc).

A block is as many whole sentences of one document, each ended by `</s>`, as fit; a sentence that is longer is cut, and
what is left of it goes on as a sentence of its own. (fairseq makes such a sentence a block and drops it for its length,
and drops blocks of one token; ours come once an epoch like any other token.)

Which tokens are a block is worked out once for each shard, by reading it, and kept beside its index as
`index/<tar>.text.blocks<max_tokens>.npy` (data/stored.py), in the cache where that cannot be written: 15 bytes a
block. Opening a set reads how many there are; a table is mapped when it is wanted, and as many stay mapped as tars stay
open.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megad2v.data import index, stored
from megad2v.data.archive import LARGEST_MEMBER
from megad2v.data.index import ShardIndex, index_path, places, write_beside
from megad2v.data.order import Int64s
from megad2v.data.shardset import OPEN_FILES, RawSample, ShardSet, in_own_order, locate, order_fingerprint
from megad2v.data.stored import Origin
from megad2v.errors import UserError
from megad2v.modalities.sample import BadSample
from megad2v.modalities.text.codecs import EOS
from megad2v.modalities.text.decode import data_start, data_type, token_header

VERSION = (index.VERSION << 8) + 1
"""Raised whenever a field gets another meaning; rows are those of an index."""

BLOCK = np.dtype(
    [
        ("row", "<u4"),  # of the document in the shard's index
        ("start", "<u4"),  # first token in the document
        ("length", "<u4"),  # tokens
        ("header", "<u2"),  # bytes in the document's file before its tokens
        ("width", "u1"),  # bytes of a token; 0: the document cannot be read, and the block is all of its file
    ]
)
Blocks = npt.NDArray[np.void]

CHUNK_TOKENS = 2**24
"""Documents of about so many tokens are cut at a time."""

log = logging.getLogger(__name__)


class BlockSet:
    """The blocks of up to `max_tokens` - 1 tokens (`<s>` comes before them) of all documents in `shards`.

    Raises UserError where a shard cannot be read.
    """

    def __init__(self, shards: ShardSet, max_tokens: int) -> None:
        self._shards = shards
        self.paths = shards.paths
        self._max_tokens = max_tokens
        self._tables: OrderedDict[int, Blocks] = OrderedDict()
        """Tables in use, mapped: each costs a descriptor."""
        self._in_memory: dict[int, Blocks] = {}
        """Tables that can be kept nowhere."""
        self.shard_sizes = tuple(in_own_order(self._count, range(len(self.paths))))
        self._ends = list(accumulate(self.shard_sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """As ShardSet's."""
        lengths = [zlib.crc32(self.shard_lengths(shard)) for shard in range(len(self.paths))]
        return order_fingerprint(self.paths, self.shard_sizes, lengths)

    def lengths(self) -> Int64s:
        """(len,) tokens; 0 for documents that cannot be read and do not say how long they are."""
        return np.concatenate([self.shard_lengths(shard) for shard in range(len(self.paths))], dtype=np.int64)

    def shard_lengths(self, shard: int) -> npt.NDArray[np.uint32]:
        """(shard_sizes[shard],) the same of one shard."""
        return np.ascontiguousarray(self._table(shard)["length"])

    def sample_id(self, index: int) -> str:
        """ "<shard file name>/<key>:<first token>"."""
        shard, number = locate(self._ends, index)
        row, start, _, _, _ = self._table(shard)[number].item()
        return self._id(shard, self._documents(shard).key(row), start)

    def read(self, index: int) -> RawSample:
        """Block `index` (0..len-1), by one read of its own bytes, as the .npy of a document. Raises UserError as
        `ShardSet.read` does, BadSample for a block that its document cannot hold."""
        shard, number = locate(self._ends, index)
        row, start, length, header, width = self._table(shard)[number].item()
        document = self._documents(shard).entry(row)
        offset, size, name = document.offset, document.size, self._id(shard, document.key, start)
        if width:
            if header + (start + length) * width > size:
                raise BadSample(f"ends behind its document of {size} bytes: the table of blocks is damaged")
            offset, size = offset + header + start * width, length * width
        data = self._shards.read_bytes(shard, offset, size, name)
        if width:
            data = token_header(length, width) + data
        return RawSample(name, data, "tokens.npy", max(document.label, -1))

    def close(self) -> None:
        """Close tars and tables; reading opens them again."""
        self._tables.clear()
        self._shards.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}  # maps would be copied

    def _count(self, shard: int) -> int:
        """Blocks of a shard, from the head of its stored table; without one the table is made."""
        tar, origin = self.paths[shard], Origin.of(self._shards.stamp(shard))
        for path in places(tar, table_name(self._max_tokens)):
            counts = stored.counts(path, (BLOCK,), VERSION, origin)
            if counts is not None:
                return counts[0]
        return len(self._made(shard))

    def _made(self, shard: int) -> Blocks:
        origin, documents = Origin.of(self._shards.stamp(shard)), partial(self._documents, shard)
        blocks, kept = load_or_build(self.paths[shard], origin, documents, self._max_tokens)
        if not kept:
            self._in_memory[shard] = blocks
        return blocks

    def _documents(self, shard: int) -> ShardIndex:
        """The index of a shard. Raises UserError where it is of another tar than the table of blocks."""
        documents = self._shards.index(shard)
        now, first = documents.stamp, self._shards.stamp(shard)
        if (now.crc, now.probe) != (first.crc, first.probe):
            raise _changed(self.paths[shard])
        return documents

    def _table(self, shard: int) -> Blocks:
        """(shard_sizes[shard],) of BLOCK. Raises UserError where it is not the one that was there at first."""
        if shard in self._in_memory:
            return self._in_memory[shard]
        if shard in self._tables:
            self._tables.move_to_end(shard)
            return self._tables[shard]
        blocks = self._made(shard)
        if len(blocks) != self.shard_sizes[shard]:
            raise _changed(self.paths[shard])
        self._tables[shard] = blocks
        if len(self._tables) > OPEN_FILES:
            self._tables.popitem(last=False)
        return blocks

    def _id(self, shard: int, key: str, start: int) -> str:
        return f"{self._shards.names[shard]}/{key}:{start}"


def table_name(max_tokens: int) -> str:
    """What blocks are kept as, in the place of a modality."""
    return f"text.blocks{max_tokens}"


def blocks_path(tar: Path, max_tokens: int) -> Path:
    """Where the blocks of a tar are kept if that folder can be written."""
    return index_path(tar, table_name(max_tokens))


def load_or_build(
    tar: Path, origin: Origin, documents: Callable[[], ShardIndex], max_tokens: int
) -> tuple[Blocks, bool]:
    """(blocks,) of BLOCK, by document and place, and whether they are stored: those that were when they fit the tar as
    it was at `origin`, else they are worked out, and stored where that is allowed. Raises UserError when the tar cannot
    be read or has changed."""
    name = table_name(max_tokens)
    for path in places(tar, name):
        found = stored.load(path, (BLOCK,), VERSION, origin)
        if found is not None:
            return found[0], True
    log.info("cutting %s into blocks of %d tokens", tar, max_tokens)
    blocks = build(tar, documents(), max_tokens)
    kept = write_beside(tar, name, lambda path: stored.store(path, (blocks,), VERSION, origin))
    return blocks, kept is not None


def _changed(tar: Path) -> UserError:
    return UserError(f"{tar}: has changed since this run indexed it; leave shards alone and start again")


def build(tar: Path, documents: ShardIndex, max_tokens: int) -> Blocks:
    """Read all tokens of a tar and cut them. Raises UserError when it cannot be read."""
    try:
        with tar.open("rb") as file:
            if not documents.stamp.fits(os.fstat(file.fileno())):
                raise _changed(tar)
            cut = partial(_cut_documents, file.fileno(), documents, room=max_tokens - 1)
            parts = [cut(rows) for rows in _chunks(documents)]
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error}); check the disk, or copy the shard again") from error
    return np.concatenate([np.zeros(0, BLOCK), *parts])


def _chunks(documents: ShardIndex) -> Iterator[range]:
    """Rows that follow each other, about CHUNK_TOKENS at a time."""
    chunk = np.cumsum(documents.lengths.astype(np.int64)) // CHUNK_TOKENS
    borders = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(chunk)]
    return (range(start, stop) for start, stop in pairwise(borders))


def _cut_documents(descriptor: int, documents: ShardIndex, rows: range, *, room: int) -> Blocks:
    """The blocks of some documents. One that cannot be read becomes one block, which is refused when it is read."""
    records = documents.records
    counts = np.zeros(len(rows), dtype=np.int64)
    headers, widths = np.zeros(len(rows), dtype=np.uint16), np.zeros(len(rows), dtype=np.uint8)
    ends: list[Int64s] = []
    total = 0
    for number, row in enumerate(rows):
        size = int(records["size"][row])
        if size > LARGEST_MEMBER:
            continue
        data = os.pread(descriptor, size, int(records["offset"][row]))
        try:
            tokens = np.frombuffer(data, dtype=data_type(data), offset=data_start(data))
        except BadSample:
            continue
        counts[number], headers[number], widths[number] = len(tokens), data_start(data), tokens.itemsize
        ends.append(np.flatnonzero(tokens == EOS) + (total + 1))
        total += len(tokens)
    stops = np.cumsum(counts)
    number, start, stop = cut(stops - counts, stops, np.concatenate([np.zeros(0, np.int64), *ends]), room)
    unread = np.flatnonzero(counts == 0)
    blocks = np.zeros(len(number) + len(unread), dtype=BLOCK)
    blocks["row"] = rows.start + np.concatenate([number, unread])
    blocks["start"][: len(number)] = start - (stops - counts)[number]
    # What an unreadable document says of its length decides what it is batched with.
    blocks["length"] = np.concatenate([stop - start, np.minimum(documents.lengths[rows.start + unread], room)])
    blocks["header"][: len(number)], blocks["width"][: len(number)] = headers[number], widths[number]
    return blocks[np.lexsort((blocks["start"], blocks["row"]))]


def cut(starts: Int64s, stops: Int64s, ends: Int64s, room: int) -> tuple[Int64s, Int64s, Int64s]:
    """(document, first, behind the last) token of each block, for documents [starts, stops) in one line of tokens.

    `ends`: behind which tokens sentences end, ascending; what follows a document's last one is a sentence too. All
    documents are cut at once, block by block.
    """
    ends = np.concatenate([[0], ends])
    document = np.flatnonzero(stops > starts)
    at, stops = starts[document], stops[document]
    blocks: list[tuple[Int64s, Int64s, Int64s]] = [(document[:0], at[:0], at[:0])]
    while len(document):
        limit = np.minimum(at + room, stops)
        sentence = ends[np.searchsorted(ends, limit, side="right") - 1]
        whole = (limit < stops) & (sentence > at)
        to = np.where(whole, sentence, limit)
        blocks.append((document, at, to))
        more = to < stops
        document, at, stops = document[more], to[more], stops[more]
    first, second, third = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return first, second, third
