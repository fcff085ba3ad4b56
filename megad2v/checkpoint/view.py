"""A checkpoint as another model than its own would have left it: one modality of a joint run, or the other way round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor

from megad2v.checkpoint.reader import Checkpoint
from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.build import names_in

KEYLESS = {"full": 3, "no_key": 2}
"""Rows of a head's bias, by model.qkv_bias."""


class View(Checkpoint):
    """`source`, whose index has the names and shapes of the model of `config`, as far as they are there.

    Where one of both has key biases and the other none (model.qkv_bias), they are read as zeros, or left out: they add
    the same to every logit of a query, so that both compute the same.
    """

    def __init__(self, source: Checkpoint, config: Config, shapes: Mapping[str, list[int]]) -> None:
        """`shapes`: of the parameters of the model that `config` describes."""
        self.directory, self.source, then = source.directory, source, source.index.config
        saved = source.index.shapes
        self._theirs = names_in(saved, then["modality"], shapes, config.modality)
        self._heads = config.model.heads
        self._biases = then["model"]["qkv_bias"], config.model.qkv_bias
        found = {name: list(saved[theirs]) for name, theirs in self._theirs.items()}
        self._rebiased = {name for name in found if self._can_rebias(name, found, shapes, then["model"]["heads"])}
        self.index = replace(
            source.index,
            shapes=found | {name: list(shapes[name]) for name in self._rebiased},
            config=json.loads(json.dumps(asdict(config))),  # as it would have been read
        )

    @property
    def rebiased(self) -> bool:
        """Whether key biases are read as zeros, or left out."""
        return bool(self._rebiased)

    @property
    def unused(self) -> list[str]:
        """Parameters of `source` that this model has not, by their names there."""
        return sorted(set(self.source.index.shapes) - set(self._theirs.values()))

    def names(self, kind: str) -> list[str]:
        """See `Checkpoint.names`."""
        held = set(self.source.names(kind))
        return [name for name, theirs in self._theirs.items() if theirs in held]

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """See `Checkpoint.read`."""
        if name not in self._theirs:
            raise UserError(f"{self.directory}: holds no {kind} {name}; is it another model's?")
        theirs = self._theirs[name]
        if name not in self._rebiased:
            return self.source.read(kind, theirs, start, length)
        return self._with_our_biases(self.source.full(kind, theirs))[start : start + length]

    def _with_our_biases(self, bias: Tensor) -> Tensor:
        """(heads x rows x d,) of theirs -> the same of ours."""
        before, after = (KEYLESS[kind] for kind in self._biases)
        rows = bias.view(self._heads, before, -1)
        key = torch.zeros_like(rows[:, :1])
        kept = [rows[:, :1], rows[:, -1:]] if after == 2 else [rows[:, :1], key, rows[:, -1:]]
        return torch.cat(kept, dim=1).flatten()

    def _can_rebias(
        self, name: str, found: Mapping[str, list[int]], shapes: Mapping[str, list[int]], heads: int
    ) -> bool:
        before, after = (KEYLESS.get(kind, 0) for kind in self._biases)
        return (
            name.endswith(".attention.qkv.bias")
            and heads == self._heads
            and 0 < before != after > 0
            and found[name][0] * after == shapes[name][0] * before
        )
