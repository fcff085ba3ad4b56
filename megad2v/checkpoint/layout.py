"""The format: names, the index, and its checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from megad2v.checkpoint.stream import checksum_of
from megad2v.errors import UserError

FORMAT = 2
READABLE = (1, 2)
"""Format 1 (until 0.2) had SHA-256 of every file and one row per kind of a fragment."""
INDEX = "index.json"
KINDS = ("student", "teacher", "exp_avg", "exp_avg_sq")
"""float32 master weights, float32 average, Adam's first and second moment."""
LETTERS = {"s": "student", "t": "teacher", "m": "exp_avg", "v": "exp_avg_sq"}
"""What the index calls them: with 1,024 ranks it has a million fragments."""


@dataclass(frozen=True)
class Piece:
    """A float32 tensor to be written: elements [start, start + values.numel()) of flattened tensor `name`."""

    kind: str
    name: str
    start: int
    values: Tensor

    @property
    def key(self) -> str:
        """Its name inside the safetensors file."""
        return fragment_key(self.kind, self.name, self.start)


def fragment_key(kind: str, name: str, start: int) -> str:
    """KIND/NAME@START."""
    return f"{kind}/{name}@{start}"


Fragment = tuple[tuple[str, ...], str, int, int]
"""(kinds, name, start, length): elements [start, start + length) of flattened tensor `name`, once of each kind."""


def fragments_of(pieces: Sequence[Piece]) -> list[Fragment]:
    """What the index says of `pieces`: kinds that share a range of a tensor share a row; empty pieces have none."""
    kinds: dict[tuple[str, int, int], list[str]] = {}
    for piece in pieces:
        if piece.values.numel():
            kinds.setdefault((piece.name, piece.start, piece.values.numel()), []).append(piece.kind)
    return [(tuple(held), *where) for where, held in kinds.items()]


@dataclass(frozen=True)
class FileRecord:
    """One rank's file: name, size in bytes, "ALGORITHM:HEX", and its fragments."""

    file: str
    bytes: int
    checksum: str
    fragments: list[Fragment]


@dataclass(frozen=True)
class ExtraRecord:
    """A small file that belongs to the checkpoint: its path in the step directory, size in bytes, "ALGORITHM:HEX"."""

    file: str
    bytes: int
    checksum: str


def check_extra_name(name: str) -> None:
    """An extra lies inside the step directory, and is none of the checkpoint's own files. Raises ValueError."""
    path = PurePosixPath(name)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if not inside or path.as_posix() != name or (len(path.parts) == 1 and name.endswith((INDEX, ".safetensors"))):
        raise ValueError(f"{name!r} is no name for an extra file of a checkpoint")


@dataclass(frozen=True)
class Index:
    """The content of index.json."""

    step: int
    shapes: dict[str, list[int]]
    """Full shape of every parameter by name."""
    files: list[FileRecord]
    state: dict[str, Any]
    """Everything else a resumed run needs, as plain JSON: counters, loader position, Adam's step."""
    config: dict[str, Any]
    layout: dict[str, Any]
    """For people: the number of ranks and the ZeRO stage that wrote it."""
    code: dict[str, str]
    """Versions and git revision."""
    extras: list[ExtraRecord] = field(default_factory=list)
    """Small files that belong to it (a tokenizer)."""

    def dumps(self) -> str:
        """JSON text whose last line is the SHA-256 of the text before it.

        Raises ValueError where a fragment is of a kind or a parameter that is not in KINDS or `shapes`.
        """
        body = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("files", "extras")}
        head = json.dumps({"format": FORMAT, **body, "extras": [vars(extra) for extra in self.extras]}, indent=1)
        numbers = {name: number for number, name in enumerate(self.shapes)}
        lines = ",\n".join(_file_line(record, numbers) for record in self.files)
        text = f'{head[:-2]},\n "files": [\n{lines}\n ]'
        return f"{text}{SEAL}{_sha256(text)}{END}"

    @staticmethod
    def load(path: Path) -> Index:
        """Read and check index.json. Raises UserError naming the file and what is wrong with it."""
        try:
            text = path.read_text()
            body = json.loads(text)
            version = body.pop("format")
            claimed = body.pop("sha256")
        except FileNotFoundError:
            raise UserError(f"{path.parent}: not a checkpoint (it has no {INDEX})") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:  # not JSON, or not such JSON
            raise UserError(f"{path}: damaged index ({error}); use an older checkpoint") from None
        if version not in READABLE:
            raise UserError(
                f"{path}: written in format {version}, this version reads formats {' and '.join(map(str, READABLE))}"
            )
        if not (text.endswith(f"{SEAL}{claimed}{END}") and claimed == _sha256(text.rpartition(SEAL)[0])) and not (
            version == 1 and claimed == _sha256(json.dumps({"format": 1, **body}, sort_keys=True))
        ):
            raise UserError(f"{path}: its checksum does not match its content; use an older checkpoint")
        files = _first_format(body.pop("files")) if version == 1 else _files(body.pop("files"), list(body["shapes"]))
        extras = [ExtraRecord(**extra) for extra in body.pop("extras", [])]
        return Index(files=files, extras=extras, **body)

    def problems(self, directory: Path, *, checksums: bool, share: tuple[int, int] = (0, 1)) -> Iterator[str]:
        """What is wrong with its files: missing, of another size, or (with `checksums`) of another content. Of them
        all, or of every n-th from i where `share` is (i, n)."""
        first, every = share
        for record in (*self.files, *self.extras)[first::every]:
            path = directory / record.file
            if not _inside(record) or not path.is_file():
                yield f"{path} is missing"
            elif path.stat().st_size != record.bytes:
                yield f"{path} has {path.stat().st_size:,} bytes, expected {record.bytes:,} (truncated?)"
            elif checksums and checksum_of(path, record.checksum.partition(":")[0]) != record.checksum:
                yield f"{path} does not match its checksum"


SEAL, END = ',\n "sha256": "', '"\n}\n'


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_line(record: FileRecord, numbers: Mapping[str, int]) -> str:
    """One line per file; of a fragment [number of the parameter in `shapes`, start, length, letters of its kinds]."""
    letters = {kind: letter for letter, kind in LETTERS.items()}
    try:
        rows = [
            [numbers[name], start, length, "".join(letters[kind] for kind in kinds)]
            for kinds, name, start, length in record.fragments
        ]
    except KeyError as error:
        raise ValueError(f"{record.file}: {error} is no parameter of this model, or no kind of tensor") from None
    return json.dumps({**vars(record), "fragments": rows}, separators=(",", ":"))


def _files(lines: list[dict[str, Any]], names: Sequence[str]) -> list[FileRecord]:
    kinds: dict[str, tuple[str, ...]] = {}  # a handful of tuples that a million fragments share
    for line in lines:
        for *_, letters in line["fragments"]:
            if letters not in kinds:
                kinds[letters] = tuple(LETTERS[letter] for letter in letters)
    return [
        FileRecord(
            line["file"],
            line["bytes"],
            line["checksum"],
            [(kinds[held], names[number], start, length) for number, start, length, held in line["fragments"]],
        )
        for line in lines
    ]


def _first_format(lines: list[dict[str, Any]]) -> list[FileRecord]:
    return [
        FileRecord(
            line["file"],
            line["bytes"],
            f"sha256:{line['sha256']}",
            [((kind,), name, start, length) for kind, name, start, length in line["fragments"]],
        )
        for line in lines
    ]


def _inside(record: FileRecord | ExtraRecord) -> bool:
    """Whether the file that it names lies where it may: an index from elsewhere must not name files outside."""
    if isinstance(record, FileRecord):
        return Path(record.file).name == record.file
    try:
        check_extra_name(record.file)
    except ValueError:
        return False
    return True
