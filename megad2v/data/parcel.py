"""How a micro-batch travels from a worker to the trainer: in one piece, through memory that is used again.

torch hands on each tensor by itself, in shared memory that is made for it and whose descriptor goes through a socket:
0.3 to 0.7 ms of CPU time a tensor, and 1.5 ms a megabyte for fresh pages. Here all tensors of a batch lie behind each
other; a small batch goes through the pipe with the message, a large one through a piece of shared memory that its
worker takes from a shelf and the trainer puts back by letting go of the batch.
"""

from __future__ import annotations

import os
import uuid
import weakref
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from megad2v.modalities.batch import Batch

INLINE_BYTES = 2**17
"""Up to here the pipe, which holds 64 KiB at a time, is no dearer (both ways 0.2 ms at 260 kB)."""
ALIGNMENT = 64
GRAIN_BYTES = 2**20
"""Sizes of pieces are multiples of it."""

_SHELVES: weakref.WeakValueDictionary[str, Shelf] = weakref.WeakValueDictionary()
"""Those of this process, by name: parcels are opened by whoever receives them, also by torch's pinning thread."""


class Shelf:
    """The pieces of shared memory of some workers. Each side has one: the workers' say what is written where, the
    trainer's keeps what it has been sent once. A piece is in use from when its worker takes it until nobody in the
    trainer refers to its memory; so there are as many as batches are on their way or held at the same time."""

    def __init__(self, workers: int, pieces: int) -> None:
        self.name = uuid.uuid4().hex
        self._in_use = torch.zeros(workers, pieces, dtype=torch.uint8).share_memory_()
        self._memory: dict[tuple[int, int], torch.Tensor] = {}
        self._largest = 0
        _SHELVES[self.name] = self

    def take(self, worker: int, size: int) -> tuple[int, torch.Tensor, bool] | None:
        """(number, memory of at least `size` bytes, whether the trainer does not know it yet) of a free piece; None
        where `pieces` are in use."""
        # As large as the largest so far: sizes differ, and a piece that is too small is made anew.
        self._largest = max(self._largest, -(-size // GRAIN_BYTES) * GRAIN_BYTES)
        free = np.flatnonzero(self._in_use[worker].numpy() == 0).tolist()
        made = [number for number in free if (worker, number) in self._memory]
        if not free:
            return None
        number = next((n for n in made if self._memory[worker, n].nbytes >= size), (made or free)[0])
        new = (worker, number) not in self._memory or self._memory[worker, number].nbytes < size
        if new:
            self._memory[worker, number] = _shared(self._largest)
        self._in_use[worker, number] = 1
        return number, self._memory[worker, number], new

    def received(self, worker: int, number: int, memory: torch.Tensor | None) -> torch.Tensor:
        """The memory of a piece that a worker has filled (`memory`, where it is new). It is free again when no tensor
        refers to what is returned."""
        if memory is not None:
            self._memory[worker, number] = memory
        array = self._memory[worker, number].numpy()  # a new one each time
        weakref.finalize(array, self._release, os.getpid(), worker, number).atexit = False
        return torch.from_numpy(array)  # its storage refers to the array

    def _release(self, process: int, worker: int, number: int) -> None:
        if os.getpid() == process:  # and not a fork of it that lets go of its copy
            self._in_use[worker, number] = 0


@dataclass(frozen=True)
class Parcel:
    """A Batch, packed. `open` shares the parcel's memory, and can be called once."""

    content: bytearray | torch.Tensor | None
    """None: in a piece that has been sent before."""
    piece: tuple[str, int, int] | None
    """(name of the shelf, worker, number)."""
    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]
    """Field of the batch -> (offset in bytes, dtype, shape)."""
    rest: Batch
    """The fields that are no tensors."""

    @classmethod
    def of(cls, batch: Batch, shelf: Shelf, worker: int) -> Parcel:
        """Copies the tensors."""
        tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        places, end = {}, 0
        for name, value in tensors.items():
            places[name] = (end, value.dtype, tuple(value.shape))
            end += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        content: bytearray | torch.Tensor | None
        piece = None
        if end <= INLINE_BYTES:
            content = bytearray(end)
            memory = torch.frombuffer(content, dtype=torch.uint8)
        elif (taken := shelf.take(worker, end)) is not None:
            number, memory, new = taken
            content, piece = memory if new else None, (shelf.name, worker, number)
        else:
            content = memory = _shared(end)
        for name, view in _views(memory, places).items():
            view.copy_(tensors[name])
        return cls(content, piece, places, replace(batch, **dict.fromkeys(tensors)))

    def open(self) -> Batch:
        """The batch; its tensors are views of the parcel's memory."""
        return replace(self.rest, **_views(self._whole(), self.places))

    def pin_memory(self) -> Parcel:
        """Called by torch's DataLoader when pinning is on: one copy for all tensors, and the piece is free again."""
        return replace(self, content=self._whole().pin_memory(), piece=None)

    def _whole(self) -> torch.Tensor:
        if self.piece is not None:
            assert not isinstance(self.content, bytearray)
            name, worker, number = self.piece
            return _SHELVES[name].received(worker, number, self.content)
        if isinstance(self.content, bytearray):
            return torch.frombuffer(self.content, dtype=torch.uint8)
        assert self.content is not None
        return self.content


def _shared(size: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))


def _views(whole: torch.Tensor, places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    views = {}
    for name, (start, dtype, shape) in places.items():
        count = torch.Size(shape).numel()
        views[name] = whole[start : start + count * dtype.itemsize].view(dtype).view(shape)
    return views
