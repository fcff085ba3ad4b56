"""Initial values: a pure function of (seed, parameter name), so that every layout starts from the same model.

Each module that owns parameters lists an initialiser per parameter in `self.initialisers`; whoever builds the model
(one process, ZeRO-3 ranks that own a slice each, or a checkpoint converter) asks `initial_value` for the full tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Initialiser = Callable[[Tensor, torch.Generator], None]
"""Fills a float32 CPU tensor in place."""


def zeros(value: Tensor, generator: torch.Generator) -> None:
    """All zeros."""
    value.zero_()


def constant(fill: float) -> Initialiser:
    """All equal to `fill`."""

    def initialise(value: Tensor, generator: torch.Generator) -> None:
        value.fill_(fill)

    return initialise


def truncated_normal(std: float, mean: float = 0.0, low: float = -2.0, high: float = 2.0) -> Initialiser:
    """Normal(mean, std) redrawn inside the absolute bounds [low, high]."""

    def initialise(value: Tensor, generator: torch.Generator) -> None:
        nn.init.trunc_normal_(value, mean, std, low, high, generator=generator)

    return initialise


def torch_default(fan_in: int) -> Initialiser:
    """What nn.Linear and torch's convolutions start from, weight and bias alike: uniform within +-1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return uniform(-bound, bound)


def uniform(low: float, high: float) -> Initialiser:
    """Uniform in [low, high)."""

    def initialise(value: Tensor, generator: torch.Generator) -> None:
        value.uniform_(low, high, generator=generator)

    return initialise


def zero_rows(initialiser: Initialiser, *rows: int) -> Initialiser:
    """`initialiser`'s values, but for these rows, which are zeros."""

    def initialise(value: Tensor, generator: torch.Generator) -> None:
        initialiser(value, generator)
        value[list(rows)] = 0.0

    return initialise


def scaled(initialiser: Initialiser, factor: float) -> Initialiser:
    """`initialiser`'s values times `factor`."""

    def initialise(value: Tensor, generator: torch.Generator) -> None:
        initialiser(value, generator)
        value.mul_(factor)

    return initialise


def values_scaled(initialiser: Initialiser, heads: int, factor: float) -> Initialiser:
    """The fused weight (heads, 3, head_dim) of query, key and value, of which the value's part is times `factor`."""

    def initialise(value: Tensor, generator: torch.Generator) -> None:
        initialiser(value, generator)
        value.view(heads, 3, -1)[:, 2] *= factor

    return initialise


def normal(std: float) -> Initialiser:
    """Normal(0, std)."""

    def initialise(value: Tensor, generator: torch.Generator) -> None:
        value.normal_(0.0, std, generator=generator)

    return initialise


def kaiming_normal(fan_in: int) -> Initialiser:
    """Normal(0, sqrt(2 / fan_in)), which keeps the variance through a ReLU (arXiv:1502.01852)."""
    return normal(math.sqrt(2.0 / fan_in))


@dataclass(frozen=True)
class InitScheme:
    """Where a whole model starts: one of `INIT_SCHEMES`."""

    encoder: Initialiser
    """Every matrix of the encoder; its biases start at 0."""
    front_end: Callable[[int], tuple[Initialiser, Initialiser]]
    """Weight and bias of a linear map or convolution of the front end, by fan-in."""
    head: Callable[[int], tuple[Initialiser, Initialiser]]
    """The same for the regression head."""
    token: Initialiser
    """CLS and mask token of vision."""


def _torch_linear(fan_in: int) -> tuple[Initialiser, Initialiser]:
    return torch_default(fan_in), torch_default(fan_in)


STD = 0.02
_CUT = truncated_normal(STD, low=-STD, high=STD)

FAIRSEQ = InitScheme(
    encoder=normal(STD),
    front_end=_torch_linear,
    head=_torch_linear,
    token=truncated_normal(1.0, mean=STD),  # it passes the deviation as the mean (spec 3.2)
)
INIT_SCHEMES = {
    "fairseq": FAIRSEQ,
    "bert": replace(FAIRSEQ, head=lambda fan_in: (normal(STD), zeros)),
    "beit": InitScheme(_CUT, lambda fan_in: (_CUT, zeros), lambda fan_in: (_CUT, zeros), _CUT),
}
"""fairseq: speech (spec 1.5) and the vision port (3.2). bert: text (2.3). beit: the published vision models (3.1)."""


def initial_value(seed: int, name: str, shape: torch.Size, initialiser: Initialiser) -> Tensor:
    """The full float32 tensor of parameter `name`; equal on every rank, whatever else the model holds."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    value = torch.full(shape, float("nan"))
    initialiser(value, generator)
    return value


def initialisers(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Initialiser]]:
    """(full name, parameter, initialiser) of every parameter of `model`.

    Raises TypeError for a parameter whose module does not say how it starts: nothing is left to a library's default.
    """
    for prefix, module in model.named_modules():
        own = getattr(module, "initialisers", {})
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            if name not in own:
                raise TypeError(f"{type(module).__name__} does not say how to initialise its parameter {full_name}")
            yield full_name, parameter, own[name]


def initialise_(model: nn.Module, seed: int) -> None:
    """Fill every parameter of an unpartitioned model in place (one process; ranks of ZeRO-3 write their slices)."""
    with torch.no_grad():
        for name, parameter, initialiser in initialisers(model):
            parameter.copy_(initial_value(seed, name, parameter.shape, initialiser))
