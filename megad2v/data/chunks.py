"""What became of a chunk of files, on disk: its data, its heads, and the journal of all heads so far.

Data (`spool/000000012`): for each outcome a line of JSON, its head, and the bytes of its samples. Heads
(`spool/000000012.heads`): the same lines alone, and a last one that says how large the data are, their CRC, and the
size and time of each source. Whoever prepares a chunk renames its heads into place last: with them it is whole.
The journal takes the heads of one chunk after the other as they are packed; data go when they are in finished shards.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megad2v.data.format import LABEL_EXTENSION
from megad2v.modalities.corpus import Corpus, Outcome, SourceFile

END = b'{"end"'
"""How the last line of a chunk's heads begins."""
SPOOL_FOLDER = "spool"
JOURNAL_FILE = "journal"

Stamps = list[list[list[int]]]
"""For each file, for each path that it is read from: size and modification time, in ns; -1 where it is not there."""


def chunk_path(work: Path, number: int) -> Path:
    """Where the data of a chunk lie."""
    return work / SPOOL_FOLDER / f"{number:09d}"


def heads_path(data: Path) -> Path:
    """Where its heads lie."""
    return data.with_name(f"{data.name}.heads")


def write_chunk(corpus: Corpus, files: Sequence[SourceFile], data: Path, buffer: int) -> None:
    """Prepare some files. An outcome at a time is in memory, and `buffer` bytes. Raises OSError."""
    stamps = [_stamp(corpus.folder, file) for file in files]
    aside = data.with_name(f".{data.name}.{uuid.uuid4().hex}")
    crc = size = 0
    with aside.open("wb", buffering=buffer) as body, heads_path(aside).open("wb") as heads:
        for number, file in enumerate(files):
            for outcome in corpus.outcomes(file):
                head = _head(number, outcome)
                heads.write(head)
                for part in (head, *(part for sample in outcome.samples for part in sample.values())):
                    body.write(part)
                    crc, size = zlib.crc32(part, crc), size + len(part)
        heads.write(json.dumps({"end": True, "bytes": size, "crc": crc, "stamps": stamps}).encode() + b"\n")
    os.replace(aside, data)
    os.replace(heads_path(aside), heads_path(data))


def _head(number: int, outcome: Outcome) -> bytes:
    head = {
        "file": number,
        "action": outcome.action,
        "reason": outcome.reason,
        "totals": dict(outcome.totals),
        "line": outcome.line,
        "fingerprint": outcome.fingerprint.hex(),
        "samples": [{kind: len(part) for kind, part in sample.items()} for sample in outcome.samples],
        "labels": [int(sample.get(LABEL_EXTENSION, b"-1")) for sample in outcome.samples],
    }
    return json.dumps(head).encode() + b"\n"


def read_outcomes(files: Sequence[SourceFile], stream: IO[bytes]) -> Iterator[Outcome]:
    """The data of a chunk of `files`."""
    while line := stream.readline():
        head = json.loads(line)
        del head["labels"]
        samples = tuple({kind: stream.read(size) for kind, size in sizes.items()} for sizes in head.pop("samples"))
        fingerprint = bytes.fromhex(head.pop("fingerprint"))
        yield Outcome(files[head.pop("file")], samples=samples, fingerprint=fingerprint, **head)


def _stamp(folder: Path, file: SourceFile) -> list[list[int]]:
    found: list[list[int]] = []
    for path in file.sources:
        try:
            stat = os.stat(folder / path)
            found.append([stat.st_size, stat.st_mtime_ns])
        except OSError:
            found.append([-1, -1])
    return found


def check_chunk(
    folder: Path, files: Sequence[SourceFile], data: Path, size: int, crc: int, stamps: Stamps
) -> tuple[str, bool]:
    """(a source that has changed since, or nothing; whether the data are there and whole)."""
    for file, before in zip(files, stamps, strict=True):
        if _stamp(folder, file) != before:
            return file.path, False
    found = 0
    try:
        with data.open("rb") as stream:
            while part := stream.read(1 << 20):
                found, size = zlib.crc32(part, found), size - len(part)
    except FileNotFoundError:
        return "", False
    return "", size == 0 and found == crc


class Journal:
    """The heads of the chunks 0, 1, ... in one file, of which a killed run leaves the beginning."""

    def __init__(self, work: Path) -> None:
        self._work, self._path = work, work / JOURNAL_FILE
        (work / SPOOL_FOLDER).mkdir(exist_ok=True)
        self.chunks = 0
        """How many it holds."""
        whole = 0
        with self._path.open("ab+") as file:
            file.seek(0)
            for line in iter(file.readline, b""):
                if line.startswith(END) and line.endswith(b"\n"):
                    whole, self.chunks = file.tell(), self.chunks + 1
            file.truncate(whole)  # a chunk that was being copied: its own heads are there still
        self._writing = self._path.open("ab")
        self._reading = self._path.open("rb")

    def close(self) -> None:
        self._writing.close()
        self._reading.close()

    def known(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, last line) of all chunks in it and of those that are prepared beside it."""
        number = 0
        with self._path.open("rb") as file:
            for line in file:
                if line.startswith(END):
                    yield number, json.loads(line)
                    number += 1
        for path in sorted((self._work / SPOOL_FOLDER).iterdir()):
            if path.suffix != ".heads":
                if int(path.name) >= self.chunks and not heads_path(path).exists():
                    path.unlink()
            else:
                last = _last_line(path) if int(path.stem) >= self.chunks else b""
                if last.startswith(END):
                    yield int(path.stem), json.loads(last)
                else:
                    path.unlink()

    def heads(self, number: int) -> Iterator[dict[str, Any]]:
        """Those of the next chunk: from the journal, or from its own file, which goes into the journal."""
        if number < self.chunks:
            for line in self._reading:
                if line.startswith(END):
                    return
                yield json.loads(line)
        heads = heads_path(chunk_path(self._work, number))
        with heads.open("rb") as file:
            for line in file:
                self._writing.write(line)
                if not line.startswith(END):
                    yield json.loads(line)
        self._writing.flush()
        heads.unlink()


def _last_line(path: Path) -> bytes:
    last = b""
    with path.open("rb") as file:
        for line in file:
            last = line
    return last if last.endswith(b"\n") else b""
