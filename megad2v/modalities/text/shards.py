"""Raw text folders -> samples: which files in which parts, which class, and as which tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from megad2v.errors import UserError
from megad2v.modalities.corpus import (
    SPLIT_NAMES,
    Corpus,
    Outcome,
    class_folders,
    find_files,
    label_ids,
    printable,
)
from megad2v.modalities.sample import BadSample
from megad2v.modalities.text.clean import clean, fingerprint
from megad2v.modalities.text.decode import write_tokens
from megad2v.modalities.text.documents import (
    DOCUMENTS,
    KINDS,
    LABEL_COLUMN,
    SENTENCES,
    Document,
    TextFile,
    TextOptions,
    documents,
    kind_of,
    read_header,
    split_row,
)
from megad2v.modalities.text.lines import COMPRESSED, count_lines, lines, require_zstandard
from megad2v.modalities.text.tokenizer import Tokenizer

PART_BYTES = 8 * 2**20
"""Files are divided into parts of about this for several processes; compressed files cannot be divided."""
LABELS = ("auto", "folders", "none")


def text_corpus(
    source: Path,
    tokenizer_folder: Path,
    options: TextOptions,
    *,
    labels: str = "auto",
    classes: Sequence[str] | None = None,
) -> Corpus:
    """All texts under the folder `source`, or that one file, as token ids of the tokenizer in `tokenizer_folder`.

    `labels`: "auto" takes the column "label" of .tsv files, "folders" the first-level folder, "none" none. `classes`
    fixes names and ids beforehand. Raises UserError for wrong options or input, and where a library is missing.
    """
    _check(options)
    tokenizer = Tokenizer.load(tokenizer_folder)
    folder, paths, others = find_texts(source)
    _check_splits(folder, paths)
    headers = {path: _header(folder, path, options) for path in paths if kind_of(path) == ".tsv"}
    ids = _classes(folder, paths, headers, options, labels, classes)
    parts = [part for path in paths for part in _parts(folder, path, headers.get(path, ()), options)]
    if labels == "folders" and ids:
        parts = [_with_label(part, ids) for part in parts]
    vocabulary = (str(tokenizer_folder.absolute()), tokenizer.fingerprint)
    return Corpus(
        name="text",
        modality="text",
        noun="documents",
        folder=folder,
        files=parts,
        classes=list(ids),
        others=others,
        why_not="no .txt, .jsonl or .tsv by its name, or hidden",
        make_samples=partial(make_samples, vocabulary, ids if labels == "auto" else {}),
        options=options,
        tokenizer=tokenizer.about,
        tokenizer_files=tokenizer.files,
    )


def find_texts(source: Path) -> tuple[Path, list[str], list[str]]:
    """(folder, texts, other files) of a folder or of one file. Raises UserError, also where .zst cannot be read."""
    if source.is_file():
        folder, paths, others = source.parent, [source.name], []
    else:
        folder = source
        found, others = find_files(folder, {*KINDS, *COMPRESSED}, "text")
        paths = [path for path in found if kind_of(path)]
        others = sorted({*others, *found} - {*paths})
    if not paths or not all(map(kind_of, paths)):
        raise UserError(f"{source}: no {', '.join(KINDS)}, also with {' or '.join(COMPRESSED)}; check --input")
    if any(path.lower().endswith(".zst") for path in paths):
        require_zstandard()
    return folder, paths, others


def _check(options: TextOptions) -> None:
    for name, value, known in (
        ("--document", options.document, DOCUMENTS),
        ("--sentence", options.sentence, SENTENCES),
    ):
        if value not in known:
            raise UserError(f"{name} {value}: expected one of {', '.join(known)}")
    if options.max_document_bytes < 1024:
        raise UserError(f"--max-document-size: expected 1024 bytes or more, got {options.max_document_bytes}")


def _check_splits(folder: Path, paths: Sequence[str]) -> None:
    """train.tsv and test.tsv side by side are two data sets."""
    stems = {path: re.split(r"[-_. ]", path.lower())[0] for path in paths if "/" not in path}
    if len(set(stems.values())) > 1 and set(stems.values()) <= SPLIT_NAMES:
        names = sorted(stems)
        raise UserError(f"{folder}: {', '.join(names)} look like splits; give one: --input {folder / names[-1]}")


def _header(folder: Path, path: str, options: TextOptions) -> tuple[str, ...]:
    try:
        return read_header(folder / path, printable(path), options.field)
    except (BadSample, OSError) as error:
        raise UserError(f"{folder / path}: cannot be read ({error})") from error


def _classes(
    folder: Path,
    paths: Sequence[str],
    headers: Mapping[str, tuple[str, ...]],
    options: TextOptions,
    labels: str,
    classes: Sequence[str] | None,
) -> dict[str, int]:
    """Class name -> id."""
    if labels == "none":
        return {}
    if labels == "folders":
        return label_ids(folder, class_folders(folder, paths), classes)
    found: set[str] = set()
    for path, columns in headers.items():
        if LABEL_COLUMN in columns and options.field != LABEL_COLUMN:
            found |= _labels_of(folder / path, columns)
    return label_ids(folder, sorted(found), classes) if found else {}


def _labels_of(path: Path, columns: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    try:
        for line in lines(path):
            row = split_row(line.data.decode(errors="replace")) if line.data and line.offset else ()
            if len(row) == len(columns) and "\ufffd" not in row[columns.index(LABEL_COLUMN)]:
                found.add(row[columns.index(LABEL_COLUMN)])
    except (BadSample, OSError):
        pass  # reported when it is converted
    return found


def _parts(folder: Path, path: str, columns: tuple[str, ...], options: TextOptions) -> Iterator[TextFile]:
    """A file in parts of a size that depends on the options alone."""
    # Whole files are cut at multiples of max_document_bytes, whatever the parts are.
    step = options.max_document_bytes * max(1, PART_BYTES // options.max_document_bytes)
    try:
        size = (folder / path).stat().st_size
        if size <= step or path.lower().endswith(COMPRESSED):
            yield TextFile(path, -1, columns=columns)
            return
        starts = range(0, size, step)
        for start, line in zip(starts, count_lines(folder / path, starts)):
            yield TextFile(path, -1, start, min(start + step, size), line, columns)
    except OSError as error:
        raise UserError(f"{folder / path}: cannot be read ({error.strerror})") from error


def _with_label(part: TextFile, ids: Mapping[str, int]) -> TextFile:
    label = ids[part.path.split("/", 1)[0]] if "/" in part.path else -1
    return TextFile(part.path, label, part.start, part.stop, part.line, part.columns)


@cache
def _tokenizer(folder: str, fingerprint: str) -> Tokenizer:
    """Loaded once in each process. Raises UserError where the folder was written anew in the meantime."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"{folder}: changed while it was used; start again")
    return tokenizer


def make_samples(
    vocabulary: tuple[str, str], ids: Mapping[str, int], folder: Path, file: TextFile, options: TextOptions
) -> Iterator[Outcome]:
    """An outcome for each document that begins in a part of a file; what cannot be read is named with its line.

    `vocabulary` is (folder, fingerprint) of the tokenizer; `ids` the classes by name, where documents name theirs.
    """
    tokenizer = _tokenizer(*vocabulary)
    try:
        for document in documents(folder / file.path, file, options):
            label = ids.get(document.label or "", -1) if ids else file.label
            yield _outcome(tokenizer, file, document, label, options)
    except OSError as error:
        yield Outcome(file, "skipped", f"cannot be read: {error.strerror}")
    except BadSample as error:
        yield Outcome(file, "skipped", str(error))


def _outcome(tokenizer: Tokenizer, file: TextFile, document: Document, label: int, options: TextOptions) -> Outcome:
    def skipped(reason: str) -> Outcome:
        return Outcome(file, "skipped", reason, line=document.line)

    if document.trouble:
        return skipped(document.trouble)
    sentences = [clean(one) for one in document.sentences] if options.clean else document.sentences
    sentences = [one for one in sentences if one.strip()]
    if not sentences:
        return skipped("nothing is left of it" if any(map(str.strip, document.sentences)) else "empty")
    try:
        tokens = tokenizer.encode_document(sentences)
    except UserError as error:
        return skipped(str(error))
    meta: dict[str, Any] = {"path": printable(file.path), "line": document.line}
    if document.part:
        meta["part"] = document.part
    parts = {"tokens.npy": write_tokens(tokens), "json": json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()}
    if label >= 0:
        parts["cls"] = str(label).encode()
    same = fingerprint(sentences) if options.dedupe else b""
    return Outcome(file, "converted", "", (parts,), {"tokens": len(tokens)}, document.line, same)
