"""The one batch type that workers build and the trainer consumes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one modality. B samples, T positions, M masks per sample (data2vec 1: M = 1).

    A dropped (bad) sample is simply absent. A micro-batch with nothing left still has one row of zeros
    whose mask is all False, so that every rank runs the same modules: it weighs nothing.
    """

    modality: str
    inputs: torch.Tensor
    """vision: uint8 (B, C, H, W); speech: float32 (B, samples), 16 kHz; text: int64 (B, V, T), ids that the
    teacher sees, and with V = 2 those that the student sees (without a mask V = 1)."""
    mask_bmt: torch.Tensor
    """bool (B, M, T): True where the student's view is hidden."""
    padding_bt: torch.Tensor | None = None
    """bool (B, T): True where a position is padding; None when nothing is padded."""
    labels: torch.Tensor | None = None
    """int64 (B,) class ids, -1 unknown; only probes ask for them."""
    sample_ids: tuple[str, ...] = ()
    """"<shard file name>/<key>" of each real row; shorter than B only for the row of zeros."""
    fingerprints: tuple[str, ...] = ()
    """Hex hash of each row's crop and mask, for `data.trace`."""
    dropped: tuple[tuple[str, str], ...] = field(default=())
    """(sample id, reason) of the samples that could not be used."""

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device` (asynchronously from pinned memory)."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("inputs", "mask_bmt", "padding_bt", "labels")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when pinning is on."""
        pinned = {
            name: value.pin_memory()
            for name in ("inputs", "mask_bmt", "padding_bt", "labels")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **pinned)

    def masked_count(self) -> int:
        """Masked positions over all rows and masks: what the loss is divided by once summed over the step."""
        return int(self.mask_bmt.sum())

    def position_counts(self) -> tuple[int, int]:
        """Positions of the real rows, and the sum over these rows of their squares (what attention costs). Padding and
        the row of zeros do not count."""
        rows, positions = len(self.sample_ids), self.mask_bmt.shape[2]
        if self.padding_bt is None or not rows:
            return rows * positions, rows * positions**2
        real_b = (~self.padding_bt).sum(dim=1)
        return int(real_b.sum()), int(real_b.square().sum())
