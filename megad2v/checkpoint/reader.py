"""Reading: any range of any tensor, from whatever layout wrote it, by intersecting intervals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megad2v.checkpoint.layout import INDEX, Index, fragment_key
from megad2v.checkpoint.stream import TensorFile, checksum_of_bytes
from megad2v.errors import UserError


class Checkpoint:
    """An open checkpoint directory. Files are opened when first asked for; nothing is read before."""

    def __init__(self, directory: Path, *, check_sizes: bool = True) -> None:
        """Raises UserError when `directory` holds no readable index or a file is missing or truncated. Where ranks
        open what has been verified, `check_sizes` False saves each of them a look at everybody's file."""
        self.directory = directory
        self.index = Index.load(directory / INDEX)
        for problem in self.index.problems(directory, checksums=False) if check_sizes else ():
            raise UserError(f"{problem}; use an older checkpoint")
        self._files: dict[str, TensorFile] = {}
        self._ranges: dict[str, list[tuple[int, int, str, tuple[str, ...]]]] = {}
        for record in self.index.files:
            for kinds, name, start, length in record.fragments:
                self._ranges.setdefault(name, []).append((start, length, record.file, kinds))
        for ranges in self._ranges.values():
            ranges.sort()
        self._held = {(kind, name) for name, ranges in self._ranges.items() for *_, kinds in ranges for kind in kinds}

    def verify(self) -> None:
        """Read every file and compare checksums. Raises UserError naming the first file that differs."""
        for problem in self.index.problems(self.directory, checksums=True):
            raise UserError(f"{problem}; use an older checkpoint")

    def names(self, kind: str) -> list[str]:
        """Parameters that have tensors of this kind ("student", "teacher", ...), in the model's order."""
        return [name for name in self.index.shapes if (kind, name) in self._held]

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened tensor, float32 on the CPU.

        Raises UserError when the checkpoint does not cover them.
        """
        out, filled = torch.empty(length), 0
        for at, size, file, kinds in self._ranges.get(name, []):
            low, high = max(start, at), min(start + length, at + size)
            if low < high and kind in kinds:
                if low != start + filled:  # a gap, or two claims to the same values, which could hide one
                    break
                out[low - start : high - start] = self._part(file, fragment_key(kind, name, at), low - at, high - low)
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
                if checksum_of_bytes(content, record.checksum.partition(":")[0]) != record.checksum:
                    raise UserError(f"{self.directory / name} does not match its checksum; use an older checkpoint")
                return content
        raise UserError(f"{self.directory}: holds no {name} (but {', '.join(self.extras) or 'no extra file at all'})")

    def _part(self, file: str, key: str, start: int, length: int) -> Tensor:
        try:
            if file not in self._files:
                self._files[file] = TensorFile(self.directory / file)
            return self._files[file].read(key, start, length)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.directory / file}: not readable ({error}); use an older checkpoint") from None
