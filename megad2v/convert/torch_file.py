"""Files of torch.save, read without running what is in them."""

from __future__ import annotations

import argparse
import pickle  # noqa: TID251 - the name of an error alone
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megad2v.errors import UserError

_SCALAR = np.float64(0).__reduce__()[0]
"""What NumPy's numbers are unpickled by."""
_SHOWN = 120
"""Characters of another's message that are shown."""
ALLOWED: tuple[Any, ...] = (
    argparse.Namespace,  # arguments of older fairseq and of the BEiT fork: a bag of attributes
    np.dtype,
    np.float64,
    type(np.dtype(np.float64)),  # numbers among a trainer's meters
    type(np.dtype(np.int64)),
    (_SCALAR, "numpy.core.multiarray.scalar"),  # where numpy 1 has it
    (_SCALAR, "numpy._core.multiarray.scalar"),
)
"""What may be in a file beside tensors, numbers, strings and containers. All of it is data: building one runs no code
of the file's choosing."""


def read_torch_file(path: Path) -> dict[str, Any]:
    """The dict in a .pt, .pth or .bin file, by torch's restricted reader ("weights only").

    Raises UserError where the file is missing, damaged, of another kind, or holds objects of other classes, which could
    run code when they are built.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(list(ALLOWED)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of a newer protocol
            content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - nothing in it is run
    except Exception as error:  # a damaged file makes the reader raise anything
        reason = _refused(str(error)) if isinstance(error, pickle.UnpicklingError) else ""
        if reason:
            raise UserError(
                f"{path}: not read, since it holds more than weights and settings ({reason}), and building that could "
                "run code from the file; in a program that you trust, load it there and save its tensors and plain "
                "settings"
            ) from None
        words = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        first = words.splitlines()[0][:_SHOWN]
        raise UserError(f"{path}: not a whole file of torch.save ({first}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict with the model's weights")
    return content


def _refused(text: str) -> str:
    """Of torch's paragraphs of advice, the words that name the class which it would not build; "" where there are none,
    since the file is no pickle at all, or a damaged one."""
    for mark in ("Unsupported global: ", "Unsupported class ", "unsupported GLOBAL "):
        if mark in text:
            name = text.split(mark, 1)[1].splitlines()[0]
            return (mark + re.split(r" was not| whose module", name)[0]).strip()
    return ""


def tensors_of(state: Any, where: str) -> dict[str, Tensor]:
    """The float32 tensors of a state dict, integer buffers as they are. Raises UserError where it is none."""
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{where}: expected a state dict, names with tensors")
    found = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    for name, value in found.items():
        if value.layout is not torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
            raise UserError(f"{where}: {name} is no plain tensor ({value.dtype}, {value.layout}, {value.device})")
        found[name] = value.float() if value.is_floating_point() else value
        if not value.isfinite().all():
            raise UserError(f"{where}: {name} holds values that are not finite; its training has diverged")
    return found


def write_torch_file(path: Path, content: Mapping[str, Any]) -> None:
    """torch.save of tensors and plain values. Raises OSError when the disk refuses, where torch's writer raises a
    RuntimeError that shows its source."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        raise OSError(f"{path.name}: not written ({str(error).strip().splitlines()[0][:_SHOWN]})") from None
