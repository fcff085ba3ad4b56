"""Features of many samples in a folder: one array a layer, and an index that says whose they are.

OUTPUT/
  output.npy, layer_03.npy   float32: a row a sample (N, D), or with pool none a row a position (P, D)
  features.safetensors       instead, tensors "output", "layer_03"
  index.jsonl                a line a sample: id, start and length (its rows), positions (what was encoded)
  skipped.jsonl              samples that could not be used: id, reason
  features.json              what computed them: checkpoint, step, weights, layers, pooling, counts
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from megad2v.checkpoint.stream import as_bytes, write_whole
from megad2v.convert.encoder import Data2VecEncoder, Layer, position_lengths
from megad2v.errors import UserError
from megad2v.metrics.probe import mean_over_positions
from megad2v.modalities.batch import Batch
from megad2v.modalities.sample import BadSample

INDEX, SKIPPED, ABOUT, TENSORS = "index.jsonl", "skipped.jsonl", "features.json", "features.safetensors"
FORMATS, POOLS = ("npy", "safetensors"), ("mean", "none")
HEADER = 128
"""Bytes of a .npy's header, which is written last: only then is the number of rows known."""


def layer_name(layer: Layer) -> str:
    """What its array is called."""
    return "output" if layer is None else f"layer_{layer:02d}"


def batches(
    encoder: Data2VecEncoder, samples: Iterable[tuple[str, Any]], budget: int, skipped: list[tuple[str, str]]
) -> Iterator[Batch]:
    """Samples in their order, as many to a batch as `budget` positions hold, padding counted, and at least one; where
    padding would change features (`pads_matter`) of one length only. Those that cannot be used go to `skipped`."""
    rows: list[Any] = []
    ids: list[str] = []
    longest, size = 0, torch.Size()
    for sample_id, sample in samples:
        try:
            row = encoder.prepare_one(sample, sample_id)
        except BadSample as error:
            skipped.append((sample_id, str(error)))
            continue
        alone = encoder.transform.collate([row], [sample_id], [-1], [])
        (length,) = position_lengths(alone)
        unlike = encoder.pads_matter and alone.inputs.shape != size
        if rows and (unlike or max(longest, length) * (len(rows) + 1) > budget):
            yield encoder.transform.collate(rows, ids, [-1] * len(ids), [])
            rows, ids, longest = [], [], 0
        rows.append(row)
        ids.append(sample_id)
        longest, size = max(longest, length), alone.inputs.shape
    if rows:
        yield encoder.transform.collate(rows, ids, [-1] * len(ids), [])


@torch.inference_mode()
def extract_features(
    encoder: Data2VecEncoder,
    samples: Iterable[tuple[str, Any]],
    folder: Path,
    *,
    layers: Sequence[Layer],
    pool: str,
    file_format: str,
    budget: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Fill `folder` with the features of (id, raw sample); returns the content of features.json. Memory: one batch.

    Raises UserError when no sample can be used, and when features are not finite; OSError when the disk refuses.
    """
    skipped: list[tuple[str, str]] = []
    encoder.eval()
    count = total = 0
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"{layer_name(layer)}.npy").open("wb")) for layer in layers]
        for file in files:
            file.write(bytes(HEADER))
        index = stack.enter_context((folder / INDEX).open("w", encoding="utf-8"))
        for batch in batches(encoder, samples, budget, skipped):
            lengths = position_lengths(batch)
            on_device = batch.to(encoder.device)
            found = encoder.layers(on_device.inputs, on_device.padding_bt, layers)
            for file, layer, x_btd in zip(files, layers, found, strict=True):
                _append(file, _rows(x_btd[:, encoder.prefix_tokens :], on_device, lengths, pool), layer)
            for sample_id, length in zip(batch.sample_ids, lengths, strict=True):
                rows = 1 if pool == "mean" else length
                index.write(json.dumps({"id": sample_id, "start": total, "length": rows, "positions": length}) + "\n")
                total, count = total + rows, count + 1
        if not count:
            why = f"; the first, {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise UserError(f"none of {len(skipped):,} samples could be used{why}")
        for file in files:
            file.seek(0)
            file.write(_header((total, encoder.width)))
    lines = (json.dumps({"id": sample_id, "reason": reason}) + "\n" for sample_id, reason in skipped)
    (folder / SKIPPED).write_text("".join(lines), encoding="utf-8")
    names = [layer_name(layer) for layer in layers]
    if file_format == "safetensors":
        _join(folder, names, (total, encoder.width))
    counts = {"samples": count, "skipped": len(skipped), "rows": total, "width": encoder.width}
    content = {**about, "modality": encoder.modality, "layers": names, "pool": pool, **counts}
    (folder / ABOUT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def _rows(x_btd: Tensor, batch: Batch, lengths: Sequence[int], pool: str) -> Tensor:
    """What is kept of a batch: (B, D), or (P, D) of all positions that hold something."""
    if pool == "mean":
        return mean_over_positions(x_btd, batch.padding_bt)
    return torch.cat([x_td[:length] for x_td, length in zip(x_btd, lengths, strict=True)])


def _append(file: IO[bytes], rows: Tensor, layer: Layer) -> None:
    values = rows.float().cpu().contiguous()
    if not values.isfinite().all():
        raise UserError(f"{layer_name(layer)}: features are not finite; this checkpoint's run has diverged")
    file.write(as_bytes(values))


def _header(shape: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    assert len(stream.getvalue()) == HEADER, "of any two numbers: numpy leaves room for them to grow"
    return stream.getvalue()


def _join(folder: Path, names: Sequence[str], shape: tuple[int, int]) -> None:
    """The arrays in one safetensors file."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))

    write_whole(folder / TENSORS, dict.fromkeys(names, shape), tensors(), {"format": "pt"})
    for name in names:
        (folder / f"{name}.npy").unlink()
