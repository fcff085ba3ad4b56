"""What key maps to other programs share: tables of names that work both ways, and the example of a certificate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megad2v.config.schema import Config
from megad2v.errors import UserError


class Example(NamedTuple):
    """Random input for both sides: the first three for our front end and encoder, `arguments` for their forward."""

    inputs: Tensor
    mask_bt: Tensor | None
    padding_bt: Tensor | None
    arguments: dict[str, Tensor]
    description: str
    """For parity.json."""


class KeyMap:
    """Names and layouts of a model whose blocks have separate query, key and value projections (fairseq's and Hugging
    Face's speech and text encoders). A `*` in a name stands for a number, the same on both sides.

    Tensors keep their dtype, and any linear quantity of theirs (a weight, a gradient) may be mapped.
    """

    def __init__(
        self,
        program: str,
        *,
        plain: Mapping[str, str],
        transposed: Mapping[str, str],
        projections: tuple[str, str, str],
    ) -> None:
        """`plain`: same layout, ours to theirs; `transposed`: matrices that are laid out the other way; `projections`:
        their query, key and value, without ".weight" and ".bias", of our "encoder.blocks.*.attention.qkv"."""
        self.program, self.projections = program, projections
        self._ours = {ours: (theirs, False) for ours, theirs in plain.items()}
        self._ours |= {ours: (theirs, True) for ours, theirs in transposed.items()}
        self._theirs = [(_pattern(theirs), ours, turn) for ours, (theirs, turn) in self._ours.items()]
        self._projections = [(_pattern(f"{name}.{kind}"), kind) for name in projections for kind in ("weight", "bias")]

    def to_theirs(self, parameters: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        """Their state dict. Biases that ours leaves out are zeros. Raises KeyError for a parameter that has no name
        there."""
        out: dict[str, Tensor] = {}
        for name, value in parameters.items():
            general, numbers = re.sub(r"\b\d+\b", "*", name), re.findall(r"\b\d+\b", name)
            if general in self._ours:
                theirs, turn = self._ours[general]
                out[_filled(theirs, numbers)] = (value.t() if turn else value).contiguous()
            elif general.startswith(f"{_QKV}."):
                out |= self._split(general.rpartition(".")[2], value, numbers, config)
            else:
                raise KeyError(f"no name in {self.program} for the {config.modality} parameter {name}")
        return out

    def _split(self, kind: str, value: Tensor, numbers: list[str], config: Config) -> dict[str, Tensor]:
        heads, biases = config.model.heads, config.model.qkv_bias
        places = [_filled(name, numbers) for name in self.projections]
        if kind == "weight":
            width = value.shape[1]
            parts = [part.reshape(width, width) for part in value.view(heads, 3, -1, width).unbind(1)]
            out = {f"{place}.weight": part for place, part in zip(places, parts, strict=True)}
            if biases == "none":
                out |= {f"{place}.bias": value.new_zeros(width) for place in places}
            return out
        parts = [part.flatten() for part in value.view(heads, 3 if biases == "full" else 2, -1).unbind(1)]
        if biases == "no_key":
            parts.insert(1, torch.zeros_like(parts[0]))
        return {f"{place}.bias": part for place, part in zip(places, parts, strict=True)}

    def to_ours(self, state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        """Our parameters from their state dict. A key's bias is dropped where model.qkv_bias has none: it adds the same
        to every logit of a query. Raises UserError for a tensor that has no place in ours."""
        out: dict[str, Tensor] = {}
        attention: dict[tuple[str, ...], dict[str, Tensor]] = {}
        for name, value in state.items():
            if found := self._find(name):
                ours, turn = found
                out[ours] = (value.t() if turn else value).contiguous()
            elif numbers := self._projection(name):
                attention.setdefault(numbers, {})[name] = value
            else:
                raise UserError(f"{name}: our {config.modality} model has no such parameter")
        for numbers, parts in attention.items():
            out |= self._join(numbers, parts, config)
        return out

    def _find(self, name: str) -> tuple[str, bool] | None:
        for pattern, ours, turn in self._theirs:
            if match := pattern.fullmatch(name):
                return _filled(ours, list(match.groups())), turn
        return None

    def _projection(self, name: str) -> tuple[str, ...] | None:
        return next((m.groups() for pattern, _ in self._projections if (m := pattern.fullmatch(name))), None)

    def _join(self, numbers: tuple[str, ...], parts: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        heads, biases = config.model.heads, config.model.qkv_bias
        places = [_filled(name, list(numbers)) for name in self.projections]
        wanted = {f"{place}.{kind}" for place in places for kind in ("weight", "bias")}
        if parts.keys() != wanted:
            missing = ", ".join(sorted(wanted - parts.keys()))
            raise UserError(f"{self.program}: an attention without {missing}")
        ours, width = _filled(_QKV, list(numbers)), parts[f"{places[0]}.weight"].shape[1]
        weights = [parts[f"{place}.weight"].reshape(heads, -1, width) for place in places]
        out = {f"{ours}.weight": torch.stack(weights, dim=1).reshape(3 * width, width)}
        query, key, value = (parts[f"{place}.bias"].reshape(heads, -1) for place in places)
        if biases == "none":
            if query.any() or value.any():
                raise UserError(f"{places[0]}: has a bias, which model.qkv_bias none has no place for")
            return out
        kept = [query, key, value] if biases == "full" else [query, value]
        return {**out, f"{ours}.bias": torch.stack(kept, dim=1).flatten()}


_QKV = "encoder.blocks.*.attention.qkv"


def mlp_ratio(hidden: int, width: int) -> float:
    """`model.mlp_ratio` of a model whose MLPs have `hidden` channels. It is multiplied and rounded down again, and the
    quotient of floats may be just too small for that: 240 x (245 / 240) is below 245."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", r"(\d+)"))


def _filled(name: str, numbers: list[str]) -> str:
    for number in numbers:
        name = name.replace("*", number, 1)
    return name
