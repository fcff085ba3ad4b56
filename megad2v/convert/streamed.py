"""Models whose weights are read when they run and go when they have: a forward in the memory of the largest layer."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

Source = Callable[[str, int, int], Tensor]
"""(parameter's name, start, length) -> elements [start, start + length) of it, flattened, float32 on the CPU."""

Model = TypeVar("Model", bound=nn.Module)

M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""
AT_ONCE = 1 << 18
"""Values read at a time: what a range costs beside the tensor that it is copied into."""


def return_freed_memory() -> None:
    """For programs, not libraries: from here on the C library gives freed blocks of 1 MiB and more back to the system.

    glibc raises that limit to 32 MiB by itself, and activations and weights of changing sizes then leave holes: a
    ViT-B's certificate had 500 MB of them. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory, and buffers with theirs (which nothing could restore)."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else _meta(parameter)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def load_weights(model: nn.Module, source: Source) -> None:
    """Give `model`, on meta, its weights, for good."""
    for prefix, module in model.named_modules():
        for name in list(module._parameters):
            _load(module, name, f"{prefix}.{name}".removeprefix("."), source)


def stream_weights(model: Model, source: Source, *, keep: tuple[str, ...] = ()) -> Model:
    """From here on `model` has no weights but those of the modules that are running: each module's own are read, in
    the dtype that the model was last cast to, before its forward, and dropped behind it. Its modules must not look at
    the parameters of others. `keep`: beginnings of parameters that stay as they are."""
    for prefix, module in model.named_modules():
        names = {name: f"{prefix}.{name}".removeprefix(".") for name, p in module._parameters.items() if p is not None}
        names = {name: full_name for name, full_name in names.items() if not full_name.startswith(keep)}
        if names:
            _stream(module, names, source)
    return model


def _stream(module: nn.Module, names: dict[str, str], source: Source) -> None:
    def load(*_: object) -> None:
        for name, full_name in names.items():
            _load(module, name, full_name, source)

    def drop(*_: object) -> None:
        for name in names:
            module._parameters[name] = _meta(module._parameters[name])

    drop()
    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop, always_call=True)


def _load(module: nn.Module, name: str, full_name: str, source: Source) -> None:
    parameter = module._parameters[name]
    if parameter is None:
        return
    values = torch.empty(parameter.shape, dtype=parameter.dtype)
    flat = values.view(-1)
    for start in range(0, len(flat), AT_ONCE):
        part = flat[start : start + AT_ONCE]
        part.copy_(source(full_name, start, len(part)))
    module._parameters[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)


def _meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
