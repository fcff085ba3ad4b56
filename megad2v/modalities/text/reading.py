"""Lines of text to train a vocabulary on, from any mixture of files, as a stream."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megad2v.errors import UserError
from megad2v.modalities.sample import BadSample
from megad2v.modalities.text.documents import TextFile, TextOptions, documents, kind_of, read_header
from megad2v.modalities.text.lines import require_zstandard
from megad2v.modalities.text.shards import find_texts


@dataclass
class Lines:
    """The lines of all texts, in order; counts what was passed over while it is gone through."""

    files: Sequence[Path]
    field: str = "text"
    read: int = 0
    passed_over: int = 0
    """Lines and files that cannot be read."""

    def __iter__(self) -> Iterator[str]:
        options = TextOptions(document="line", field=self.field)
        for path in self.files:
            try:
                columns = read_header(path, str(path), self.field) if kind_of(path.name) == ".tsv" else ()
                for document in documents(path, TextFile(path.name, -1, columns=columns), options):
                    self.passed_over += bool(document.trouble)
                    for sentence in document.sentences if not document.trouble else ():
                        self.read += 1
                        yield sentence.encode(errors="ignore").decode()  # half surrogate pairs from JSON
            except BadSample:
                self.passed_over += 1
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """The text files that patterns, folders and names stand for, each once. Raises UserError where one has none."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        paths = [path for path in matches if path.is_file() and kind_of(path.name)]
        for folder in (path for path in matches if path.is_dir()):
            paths += [folder / name for name in find_texts(folder)[1]]
        if not paths:
            raise UserError(f"--input {pattern}: no .txt, .jsonl or .tsv (.gz, .zst) there")
        found |= dict.fromkeys(paths)
    if any(path.suffix.lower() == ".zst" for path in found):
        require_zstandard()
    return list(found)
