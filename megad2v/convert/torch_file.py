"""Files of torch.save, read without running what is in them."""

from __future__ import annotations

import argparse
import pickle  # noqa: TID251 - the name of an error alone
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megad2v.errors import UserError

_SCALAR = np.float64(0).__reduce__()[0]
"""What NumPy's numbers are unpickled by."""
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

    Raises UserError where the file is missing, cut off, no such file, or holds objects of other classes, which could
    run code when they are built.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - nothing in it is run
    except pickle.UnpicklingError as error:
        reason = _reason(str(error))
        raise UserError(
            f"{path}: not read, since it holds more than weights and settings ({reason}), and building that could run "
            "code from the file; in a program that you trust, load it there and save its tensors and plain settings"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a whole file of torch.save ({first}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict with the model's weights")
    return content


def _reason(text: str) -> str:
    """Of torch's paragraphs of advice, the sentence that names the class."""
    for mark in ("Unsupported global: ", "Unsupported class ", "Unsupported operand "):
        if mark in text:
            return (mark + text.split(mark, 1)[1]).split(" was not", 1)[0].splitlines()[0].strip()
    return text.strip().splitlines()[0]


def tensors_of(state: Any, where: str) -> dict[str, Tensor]:
    """The float32 tensors of a state dict, integer buffers as they are. Raises UserError where it is none."""
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{where}: expected a state dict, names with tensors")
    found = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
