"""What was said: finds the transcripts of a speech corpus, in the three places where corpora keep them."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megad2v.errors import UserError

TABLE = "transcripts.tsv"
"""Read from the input folder where no other table is named."""
PATH_COLUMNS, TEXT_COLUMNS = ("path", "file"), ("text", "sentence")
"""Names that are understood in a table's header; "path" and "sentence" are Common Voice's."""
LIBRISPEECH = ".trans.txt"


@dataclass(frozen=True)
class Transcripts:
    """Where the text of each recording is."""

    texts: dict[str, str]
    """Path of the recording -> its text."""
    sidecars: dict[str, str]
    """Path of the recording -> path of the file with its text, for those that are not in `texts`."""
    sources: frozenset[str]
    """The files in the corpus that these come from, which are no strangers there."""


def find_transcripts(folder: Path, audio: Sequence[str], others: Sequence[str], table: Path | None) -> Transcripts:
    """The transcripts of the recordings `audio` among the files `others`, all relative to `folder`.

    A table goes before a sidecar `X.txt` beside `X.wav`, and that before LibriSpeech's `*.trans.txt` in the same
    folder. Raises UserError for a table or list that cannot be read, or a table that names none of the recordings.
    """
    by_stem: dict[str, list[str]] = {}
    for path in audio:
        by_stem.setdefault(os.path.splitext(path)[0], []).append(path)
    texts: dict[str, str] = {}
    sidecars: dict[str, str] = {}
    sources: set[str] = set()
    for other in others:
        if other.endswith(LIBRISPEECH):
            sources.add(other)
            for name, text in _read_list(folder / other):
                for path in by_stem.get((PurePosixPath(other).parent / name).as_posix(), ()):
                    texts[path] = text
        elif other.endswith(".txt") and (stem := other.removesuffix(".txt")) in by_stem:
            sources.add(other)
            sidecars.update(dict.fromkeys(by_stem[stem], other))
    for path in sidecars:
        texts.pop(path, None)
    if table is None and TABLE in others:
        table = folder / TABLE
    if table is not None:
        if not table.is_file() and (folder / table).is_file():
            table = folder / table
        sources |= {other for other in others if folder / other == table}
        named = _read_table(table, folder, set(audio))
        texts.update(named)
        sidecars = {path: sidecar for path, sidecar in sidecars.items() if path not in named}
    return Transcripts(texts, sidecars, frozenset(sources))


def _read_list(path: Path) -> list[tuple[str, str]]:
    """(utterance id, text) of the lines `ID TEXT` of LibriSpeech's lists."""
    pairs = (line.strip().partition(" ") for line in _text_of(path).splitlines())
    return [(name, text.strip()) for name, _, text in pairs if name and text.strip()]


def _read_table(table: Path, folder: Path, audio: Collection[str]) -> dict[str, str]:
    """Path -> text of the rows that name one of `audio`. Raises UserError."""
    if not table.is_file():
        raise UserError(f"--transcripts {table}: no such file")
    # No quotes: a transcript may begin with one.
    rows = csv.reader(_text_of(table).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = [name.strip().lower() for name in next(rows, [])]
    columns = [
        next((header.index(name) for name in names if name in header), None) for names in (PATH_COLUMNS, TEXT_COLUMNS)
    ]
    if None in columns:
        raise UserError(
            f"{table}: line 1 has the columns {', '.join(header) or 'none'}; expected a header line with tabs between, "
            f"with {' or '.join(PATH_COLUMNS)} and {' or '.join(TEXT_COLUMNS)}"
        )
    path_column, text_column = columns
    texts: dict[str, str] = {}
    count = 0
    for number, row in enumerate(rows, start=2):
        if not any(row):
            continue
        if len(row) != len(header):
            raise UserError(f"{table}: line {number} has {len(row)} columns, the header {len(header)}; correct it")
        count += 1
        path, text = _inside(row[path_column], folder), " ".join(row[text_column].split())
        if path not in audio:
            continue
        if texts.get(path, text) != text:
            raise UserError(f"{table}: line {number} names {path} once more, with another text; keep one of the two")
        texts[path] = text
    if not texts:
        raise UserError(f"{table}: none of its {count} paths is a recording below {folder}; paths are relative to it")
    return {path: text for path, text in texts.items() if text}


def _inside(path: str, folder: Path) -> str:
    """A path of a table, relative to the input folder."""
    path = os.path.normpath(path.strip())
    root = os.path.abspath(folder)
    return os.path.relpath(path, root) if os.path.isabs(path) else PurePosixPath(path).as_posix()


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert it, or take it out of the folder") from error
