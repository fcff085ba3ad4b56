"""A checkpoint as another model than its own would have left it: one modality of a joint run, or the reverse."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from megad2v.checkpoint.reader import Checkpoint
from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.build import names_in

ROWS = {"full": 3, "no_key": 2}
"""Of a head's bias, by model.qkv_bias."""


class View(Checkpoint):
    """`source`, whose index has the names and shapes of the model of `config`, as far as they are there.

    Where one of both has key biases and the other none (model.qkv_bias), they are read as zeros, or left out: they add
    the same to every logit of a query, so that both compute the same.
    """

    def __init__(self, source: Checkpoint, config: Config, shapes: Mapping[str, list[int]]) -> None:
        """`shapes`: of the parameters of the model that `config` describes."""
        self.directory, self.source = source.directory, source
        saved, then = source.index.shapes, source.index.config
        self._theirs = names_in(saved, then["modality"], shapes, config.modality)
        found = {name: list(saved[theirs]) for name, theirs in self._theirs.items()}
        self._heads, heads = config.model.heads, then["model"]["heads"]
        self._biases = then["model"]["qkv_bias"], config.model.qkv_bias
        self.rebiased = {name for name in found if self._can_rebias(name, found[name], shapes[name], heads)}
        """Parameters whose key biases are made zeros, or left out."""
        self.index = replace(
            source.index,
            shapes=found | {name: list(shapes[name]) for name in self.rebiased},
            config=json.loads(json.dumps(asdict(config))),  # as it would have been read
        )

    def unused(self, used: Collection[str]) -> list[str]:
        """Parameters of `source` that none of `used`, names of ours, is, by their names there."""
        return sorted(set(self.source.index.shapes) - {self._theirs[name] for name in used})

    def names(self, kind: str) -> list[str]:
        """See `Checkpoint.names`."""
        held = set(self.source.names(kind))
        return [name for name, theirs in self._theirs.items() if theirs in held]

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """See `Checkpoint.read`."""
        if name not in self._theirs:
            raise UserError(f"{self.directory}: holds no {kind} {name}; is it another model's?")
        theirs = self._theirs[name]
        if name not in self.rebiased:
            return self.source.read(kind, theirs, start, length)
        return self._with_our_biases(self.source.full(kind, theirs))[start : start + length]

    def _with_our_biases(self, bias: Tensor) -> Tensor:
        """Theirs, (heads x rows x channels of a head), flat, with our rows: query, key where there is one, value."""
        rows = bias.view(self._heads, ROWS[self._biases[0]], -1)
        query, value = rows[:, 0], rows[:, -1]
        kept = [query, value] if self._biases[1] == "no_key" else [query, torch.zeros_like(query), value]
        return torch.stack(kept, dim=1).flatten()

    def _can_rebias(self, name: str, theirs: Sequence[int], ours: Sequence[int], heads: int) -> bool:
        if not name.endswith(".attention.qkv.bias") or set(self._biases) != set(ROWS) or heads != self._heads:
            return False
        before, after = (ROWS[kind] for kind in self._biases)
        return theirs[0] * after == ours[0] * before
