"""megad2v: data2vec pretraining for speech, vision and text at scale."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Data2VecEncoder", "__version__"]


def __getattr__(name: str) -> Any:
    """`megad2v.Data2VecEncoder`, imported when it is asked for: the package itself needs nothing."""
    if name == "Data2VecEncoder":
        return import_module("megad2v.convert.encoder").Data2VecEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
