"""Lines and paragraphs of a text file, plain or compressed, also of a part of it: files may be larger than memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megad2v.errors import UserError
from megad2v.modalities.sample import BadSample

COMPRESSED = (".gz", ".zst")
LONGEST_LINE = 16 * 2**20
"""Bytes; a longer line is passed over, or a file without line ends would have to fit into memory."""
BLOCK = 2**20
BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line."""

    number: int
    """From 1."""
    offset: int
    """Of its first byte in the (uncompressed) file."""
    data: bytes | None
    """Without the line end; None: longer than LONGEST_LINE."""


class Paragraph(NamedTuple):
    """Lines that follow each other, none of them blank."""

    lines: list[Line]
    part: int
    """0, or higher for what follows where a long paragraph was cut."""


def require_zstandard() -> None:
    """Raises UserError where .zst files cannot be read."""
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise UserError(f"*.zst needs zstandard ({error}); `pip install zstandard`, or decompress the files") from error


class _Zstandard(io.RawIOBase):
    """A .zst file as a stream. zstandard's own reader takes a file that was cut short for a whole one."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file, self._frame = file, zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._object, self._rest, self._pending = self._frame(), b"", b""
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._rest:
            if self._begun and self._object.eof:
                self._pending, self._object, self._begun = self._object.unused_data, self._frame(), False
            data = self._pending or self._file.read(BLOCK // 8)
            self._pending = b""
            if not data:
                if self._begun:
                    raise EOFError("ends too soon")
                return 0
            self._begun = True
            try:
                self._rest = self._object.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from error
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed by its name. Reading raises BadSample where it is damaged or cut short."""
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".gz":
                with gzip.open(file) as stream:
                    yield stream
            elif path.suffix.lower() == ".zst":
                yield io.BufferedReader(_Zstandard(file), BLOCK)
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadSample(f"damaged or cut short ({error}); what comes after is lost") from error


def lines(path: Path, start: int = 0, stop: int | None = None, number: int = 1) -> Iterator[Line]:
    """The lines whose first byte lies in [start, stop); `number` is that of the line that byte `start` belongs to.

    So each line belongs to exactly one of several adjoining parts. Raises BadSample, OSError.
    """
    with open_text(path) as stream:
        offset = start
        if start:
            stream.seek(start - 1)
            skipped = _read_line(stream)
            offset += skipped.size - 1
            number += skipped.size > 1
        while stop is None or offset < stop:
            line = _read_line(stream)
            if not line.size:
                return
            data = line.data
            if data is not None:
                data = data.removesuffix(b"\n").removesuffix(b"\r")
                data = data.removeprefix(BOM) if offset == 0 else data
            yield Line(number, offset, data)
            offset += line.size
            number += 1


class _RawLine(NamedTuple):
    size: int
    data: bytes | None


def _read_line(stream: BinaryIO) -> _RawLine:
    data = stream.readline(LONGEST_LINE)
    size = len(data)
    if size < LONGEST_LINE or data.endswith(b"\n"):
        return _RawLine(size, data)
    while data and not data.endswith(b"\n"):
        data = stream.readline(BLOCK)
        size += len(data)
    return _RawLine(size, None)


def is_blank(line: Line) -> bool:
    """Whether it separates paragraphs."""
    return line.data is not None and not line.data.strip()


def paragraphs(path: Path, start: int, stop: int | None, number: int, longest: int) -> Iterator[Paragraph]:
    """The paragraphs whose first line begins in [start, stop), cut after the line in which they reach `longest` bytes.

    Raises BadSample, OSError.
    """
    foreign = start > 0 and not _follows_blank(path, start)  # what began before `start` belongs to the part before
    group: list[Line] = []
    size = part = 0
    for line in lines(path, start, None, number):
        beyond = stop is not None and line.offset >= stop
        if is_blank(line):
            if group:
                yield Paragraph(group, part)
            group, size, part, foreign = [], 0, 0, False
            if beyond:
                return
            continue
        if beyond and (foreign or not (group or part)):
            return
        if foreign:
            continue
        group.append(line)
        size += len(line.data or b"")
        if size >= longest:
            yield Paragraph(group, part)
            group, size, part = [], 0, part + 1
    if group:
        yield Paragraph(group, part)


def _follows_blank(path: Path, start: int) -> bool:
    """Whether the line that byte `start` - 1 belongs to is blank."""
    with path.open("rb") as file:
        back = min(start - 1, BLOCK)
        while True:
            file.seek(start - 1 - back)
            before = file.read(back)
            head = before.rpartition(b"\n")[2]
            if b"\n" in before or head.strip() or back == start - 1:
                break
            back = min(start - 1, 2 * back)
        return not (head + file.readline(LONGEST_LINE)).removeprefix(BOM if back == start - 1 else b"").strip()


def count_lines(path: Path, marks: range) -> list[int]:
    """For each offset of `marks`, the number of the line, from 1, that this byte belongs to."""
    numbers: list[int] = []
    count, position = 1, 0
    with path.open("rb") as file:
        for mark in marks:
            while position < mark:
                block = file.read(min(BLOCK, mark - position))
                if not block:
                    return numbers
                count += block.count(b"\n")
                position += len(block)
            numbers.append(count)
    return numbers
