"""Documents and their sentences in raw text files: .txt, .jsonl and .tsv, plain or compressed, or a part of such."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from megad2v.errors import UserError
from megad2v.modalities.corpus import SourceFile
from megad2v.modalities.text.lines import COMPRESSED, Line, is_blank, lines, paragraphs

KINDS = (".txt", ".jsonl", ".tsv")
DOCUMENTS = ("file", "blank-lines", "line")
SENTENCES = ("line", "paragraph", "document")
LABEL_COLUMN = "label"


@dataclass(frozen=True)
class TextFile(SourceFile):
    """A file, or a part of it: what begins in the bytes [start, stop)."""

    start: int = 0
    stop: int | None = None
    """None: to its end."""
    line: int = 1
    """The number of the line that byte `start` belongs to."""
    columns: tuple[str, ...] = ()
    """Of a .tsv."""

    @property
    def name(self) -> str:
        return f"{self.path}\x1f{self.start}" if self.start else self.path


@dataclass(frozen=True)
class TextOptions:
    """What becomes of a text on its way into a shard."""

    document: str = "file"
    """.txt: what a document is, one of DOCUMENTS."""
    sentence: str = "line"
    """What ends with `</s>`, one of SENTENCES."""
    field: str = "text"
    """.jsonl and .tsv: where the text is."""
    clean: bool = False
    dedupe: bool = False
    max_document_bytes: int = 2**20
    """A longer document of a .txt becomes several, cut between sentences."""


class Document(NamedTuple):
    """One document, or what is wrong with what should be one."""

    line: int
    """Where it begins, from 1."""
    sentences: list[str]
    """Not cleaned; some may be blank."""
    label: str | None = None
    part: int = 0
    """0, or higher for what follows where a document was cut."""
    trouble: str = ""
    """Why there is nothing in it."""


def kind_of(path: str) -> str | None:
    """One of KINDS, by the name without .gz or .zst."""
    stem, extension = os.path.splitext(path.lower())
    kind = os.path.splitext(stem)[1] if extension in COMPRESSED else extension
    return kind if kind in KINDS else None


def documents(path: Path, file: TextFile, options: TextOptions) -> Iterator[Document]:
    """The documents that begin in a part of `path`, in order, and what cannot be used. Raises BadSample, OSError."""
    kind = kind_of(file.path)
    if kind != ".txt":
        return _records(path, file, options, _json_text if kind == ".jsonl" else _table_text)
    return {"file": _pieces, "blank-lines": _blocks, "line": _lines}[options.document](path, file, options)


def _decoded(line: Line) -> tuple[str, str]:
    """(text, what is wrong with it)"""
    if line.data is None:
        return "", "a line of more than 16 MiB"
    try:
        return line.data.decode(), ""
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start + 1} of the line)"


def _lines(path: Path, file: TextFile, options: TextOptions) -> Iterator[Document]:
    for line in lines(path, file.start, file.stop, file.line):
        if not is_blank(line):
            text, trouble = _decoded(line)
            yield Document(line.number, [text], trouble=trouble)


def _joined(group: list[Line], options: TextOptions) -> tuple[list[str], list[Document]]:
    """(sentences of a paragraph, its lines that cannot be used)"""
    texts: list[str] = []
    troubles: list[Document] = []
    for line in group:
        text, trouble = _decoded(line)
        if trouble:
            troubles.append(Document(line.number, [], trouble=trouble))
        else:
            texts.append(text)
    return texts if options.sentence == "line" else ["\n".join(texts)], troubles


def _blocks(path: Path, file: TextFile, options: TextOptions) -> Iterator[Document]:
    for group, part in paragraphs(path, file.start, file.stop, file.line, options.max_document_bytes):
        sentences, troubles = _joined(group, options)
        yield from troubles
        if len(troubles) < len(group):
            yield Document(group[0].number, sentences, part=part)


class _Unit(NamedTuple):
    """What a whole file is cut between."""

    offset: int
    line: int
    sentences: list[str]
    troubles: list[Document]


def _pieces(path: Path, file: TextFile, options: TextOptions) -> Iterator[Document]:
    """The file; where it is long, what begins in each `max_document_bytes` of it."""
    for part, units in groupby(_units(path, file, options), lambda unit: unit.offset // options.max_document_bytes):
        first, sentences = 0, []
        for unit in units:
            yield from unit.troubles
            first = first or unit.line
            sentences += unit.sentences
        if options.sentence == "document":
            sentences = ["\n".join(sentences)]
        if any(map(str.strip, sentences)):
            yield Document(first, sentences, part=part)


def _units(path: Path, file: TextFile, options: TextOptions) -> Iterator[_Unit]:
    if options.sentence == "paragraph":
        for group, _ in paragraphs(path, file.start, file.stop, file.line, options.max_document_bytes):
            yield _Unit(group[0].offset, group[0].number, *_joined(group, options))
        return
    for line in lines(path, file.start, file.stop, file.line):
        yield _Unit(line.offset, line.number, *_joined([line], options))


def _records(path: Path, file: TextFile, options: TextOptions, read) -> Iterator[Document]:
    """One document a line."""
    for line in lines(path, file.start, file.stop, file.line):
        if is_blank(line) or (file.columns and line.offset == 0):
            continue
        text, trouble = _decoded(line)
        label = None
        if not trouble:
            text, label, trouble = read(text, file, options)
        sentences = [text]
        if options.sentence == "line":
            sentences = text.split("\n")
        elif options.sentence == "paragraph":
            runs = groupby(text.split("\n"), lambda one: bool(one.strip()))
            sentences = ["\n".join(run) for full, run in runs if full]
        yield Document(line.number, sentences, label, trouble=trouble)


def _json_text(line: str, file: TextFile, options: TextOptions) -> tuple[str, str | None, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return "", None, f"no JSON ({error})"
    text = record.get(options.field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = f"it has {', '.join(map(str, record))[:80] or 'none'}" if isinstance(record, dict) else "no object"
        return "", None, f"no text in a field {options.field!r} ({has}); see --field"
    return text, None, ""


def _table_text(line: str, file: TextFile, options: TextOptions) -> tuple[str, str | None, str]:
    row = split_row(line)
    if len(row) != len(file.columns):
        return "", None, f"{len(row)} columns, the header has {len(file.columns)}"
    labelled = LABEL_COLUMN in file.columns and options.field != LABEL_COLUMN
    return row[file.columns.index(options.field)], row[file.columns.index(LABEL_COLUMN)] if labelled else None, ""


def split_row(line: str) -> list[str]:
    """The columns of a line: tabs between, no quotes."""
    return line.split("\t")


def read_header(path: Path, file: str, field: str) -> tuple[str, ...]:
    """The columns of a .tsv. Raises UserError where none is the text; BadSample, OSError."""
    first = next(lines(path), None)
    text = _decoded(first)[0] if first is not None else ""
    columns = tuple(name.strip() for name in split_row(text)) if text else ()
    if field not in columns:
        raise UserError(
            f"{file}: line 1 has the columns {', '.join(columns)[:80] or 'none'}; expected a header line with tabs "
            f"between, one of them {field!r} (--field names another)"
        )
    return columns
