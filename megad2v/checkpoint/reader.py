"""Reading: any range of any tensor, from whatever layout wrote it, by intersecting intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megad2v.checkpoint.layout import INDEX, Index, fragment_key
from megad2v.errors import UserError


class Checkpoint:
    """An open checkpoint directory. Files are mapped when first asked for; nothing is read before."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError when `directory` holds no readable index or a data file is missing or truncated."""
        self.directory = directory
        self.index = Index.load(directory / INDEX)
        for problem in self.index.problems(directory, checksums=False):
            raise UserError(f"{problem}; use an older checkpoint")
        self._files: dict[str, safe_open] = {}
        self._ranges: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for record in self.index.files:
            for kind, name, start, length in record.fragments:
                self._ranges.setdefault((kind, name), []).append((start, length, record.file))
        for ranges in self._ranges.values():
            ranges.sort()

    def verify(self) -> None:
        """Read every file and compare checksums. Raises UserError naming the first file that differs."""
        for problem in self.index.problems(self.directory, checksums=True):
            raise UserError(f"{problem}; use an older checkpoint")

    def names(self, kind: str) -> list[str]:
        """Parameters that have tensors of this kind ("student", "teacher", ...), in the model's order."""
        return [name for name in self.index.shapes if (kind, name) in self._ranges]

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened tensor, float32 on the CPU.

        Raises UserError when the checkpoint does not cover them.
        """
        out, filled = torch.empty(length), 0
        for at, size, file in self._ranges.get((kind, name), []):
            low, high = max(start, at), min(start + length, at + size)
            if low < high:
                if low != start + filled:  # a gap, or two claims to the same values, which could hide one
                    break
                part = self._open(file).get_slice(fragment_key(kind, name, at))[low - at : high - at]
                out[low - start : high - start] = part
                filled += high - low
        if filled != length:
            raise UserError(
                f"{self.directory}: holds {filled:,} of the {length:,} values asked of {kind} {name} "
                f"[{start:,}, {start + length:,}); is it another model's?"
            )
        return out

    def full(self, kind: str, name: str) -> Tensor:
        """The whole tensor in its shape."""
        shape = torch.Size(self.index.shapes[name])
        return self.read(kind, name, 0, shape.numel()).view(shape)

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor), one at a time."""
        for name in self.names(kind):
            yield name, self.full(kind, name)

    @property
    def extras(self) -> list[str]:
        """Names of the small files that belong to it, such as "tokenizer/vocab.json"."""
        return [record.file for record in self.index.extras]

    def extra(self, name: str) -> bytes:
        """Content of one of `extras`. Raises UserError where there is none of that name, or its checksum differs."""
        for record in self.index.extras:
            if record.file == name:
                try:
                    content = (self.directory / name).read_bytes()
                except OSError as error:
                    raise UserError(f"{self.directory / name}: not readable ({error})") from None
                if hashlib.sha256(content).hexdigest() != record.sha256:
                    raise UserError(f"{self.directory / name} does not match its checksum; use an older checkpoint")
                return content
        raise UserError(f"{self.directory}: holds no {name} (but {', '.join(self.extras) or 'no extra file at all'})")

    def _open(self, file: str) -> safe_open:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.directory / file, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.directory / file}: not readable ({error}); use an older checkpoint") from None
        return self._files[file]
