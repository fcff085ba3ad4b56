"""The format: names, the index, and its checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from megad2v.errors import UserError

FORMAT = 1
INDEX = "index.json"
KINDS = ("student", "teacher", "exp_avg", "exp_avg_sq")
"""float32 master weights, float32 average, Adam's first and second moment."""


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: elements [start, start + values.numel()) of flattened tensor `name`."""

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


@dataclass(frozen=True)
class FileRecord:
    """One rank's file: name, size in bytes, SHA-256, and its fragments as (kind, name, start, length)."""

    file: str
    bytes: int
    sha256: str
    fragments: list[tuple[str, str, int, int]]


@dataclass(frozen=True)
class ExtraRecord:
    """A small file that belongs to the checkpoint: its path in the step directory, size in bytes, SHA-256."""

    file: str
    bytes: int
    sha256: str


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
    """Small files that belong to it (a tokenizer). Indexes from before there were any lack the field."""

    def dumps(self) -> str:
        """JSON text that carries its own checksum."""
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps({**body, "sha256": _digest(body)}, indent=1)

    @staticmethod
    def load(path: Path) -> Index:
        """Read and check index.json. Raises UserError naming the file and what is wrong with it."""
        try:
            body = json.loads(path.read_text())
            claimed = body.pop("sha256")
            version = body.pop("format")
        except FileNotFoundError:
            raise UserError(f"{path.parent}: not a checkpoint (it has no {INDEX})") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:  # not JSON, or not such JSON
            raise UserError(f"{path}: damaged index ({error}); use an older checkpoint") from None
        if version != FORMAT:
            raise UserError(f"{path}: written in format {version}, this version reads format {FORMAT}")
        if claimed != _digest({"format": version, **body}):
            raise UserError(f"{path}: its checksum does not match its content; use an older checkpoint")
        files = [
            FileRecord(f["file"], f["bytes"], f["sha256"], [tuple(fragment) for fragment in f["fragments"]])
            for f in body.pop("files")
        ]
        extras = [ExtraRecord(**extra) for extra in body.pop("extras", [])]
        return Index(files=files, extras=extras, **body)

    def problems(self, directory: Path, *, checksums: bool) -> Iterator[str]:
        """What is wrong with its files: missing, of another size, or (with `checksums`) of another content."""
        for record in (*self.files, *self.extras):
            path = directory / record.file
            if not _inside(record) or not path.is_file():
                yield f"{path} is missing"
            elif path.stat().st_size != record.bytes:
                yield f"{path} has {path.stat().st_size:,} bytes, expected {record.bytes:,} (truncated?)"
            elif checksums and file_digest(path) != record.sha256:
                yield f"{path} does not match its checksum"


def _inside(record: FileRecord | ExtraRecord) -> bool:
    """Whether the file that it names lies where it may: an index from elsewhere must not name files outside."""
    if isinstance(record, FileRecord):
        return Path(record.file).name == record.file
    try:
        check_extra_name(record.file)
    except ValueError:
        return False
    return True


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
