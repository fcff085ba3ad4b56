"""A state dict of another program against the model that its settings describe: what is there, missing, left over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megad2v.config.schema import Config
from megad2v.config.validate import validate_model
from megad2v.errors import UserError
from megad2v.modalities.build import build_student, build_teacher

Mapped = Callable[[Mapping[str, Tensor], Config], dict[str, Tensor]]
"""A key map, one way: to_fairseq, from_beit, ..."""

BUFFERS = ("relative_position_index", ".version", ".position_ids", ".token_type_ids")
"""Ends of names that hold no parameter, and may be there or not."""
MAY_LACK = ("head.", "front_end.mask_token")
"""Beginnings of our names that the encoder does without: released files often do not have them."""


def understood(where: str, read: Callable[[], Config]) -> Config:
    """The configuration that `read` makes of another program's settings, which `where` holds. Raises UserError where
    they are of other types or contradict each other: anybody may have written them."""
    try:
        config = read()
    except (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not the settings of a data2vec model ({error}); copy the file again") from None
    try:
        validate_model(config)
    except UserError as error:
        raise UserError(f"{where}: describes a model that cannot be ({error})") from None
    return config


_KEY_BIASES = (".attention.self.key.bias", ".k_proj.bias")
"""Ends of other programs' names for the bias of a key."""


def with_key_biases(config: Config, state: Mapping[str, Tensor]) -> Config:
    """`config`, with model.qkv_bias no_key where the keys in `state` have biases, and all of them are zero: so our
    exports write models that have none."""
    biases = [value for name, value in state.items() if name.endswith(_KEY_BIASES)]
    if not biases or any(value.any() for value in biases):
        return config
    return replace(config, model=replace(config.model, qkv_bias="no_key"))


def parameter_shapes(config: Config, kind: str = "student") -> dict[str, Tensor]:
    """Every parameter of the student or the teacher by name, on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = build_student(config) if kind == "student" else build_teacher(config)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def fit(
    state: Mapping[str, Tensor],
    config: Config,
    to_theirs: Mapped,
    to_ours: Mapped,
    *,
    where: str,
    names: Mapping[str, Tensor],
    lacking: Sequence[str] = MAY_LACK,
    dropped: Sequence[str] = (),
) -> tuple[dict[str, Tensor], list[str]]:
    """Our parameters from `state`, and the names that were left out.

    `names`: ours that are looked for, as `parameter_shapes` gives them; `lacking`: beginnings of those that may be
    missing; `dropped`: beginnings of theirs that have no use here. Raises UserError, in the file's own names, for what
    is missing, unknown, or of another shape.
    """
    expected = to_theirs(names, config)
    optional = to_theirs({name: value for name, value in names.items() if name.startswith(tuple(lacking))}, config)
    for name, wanted in expected.items():
        if name not in state:
            if name not in optional and not name.endswith(BUFFERS):
                raise UserError(f"{where}: {name} is missing; is the file that of another model, or of a part of one?")
        elif state[name].shape != wanted.shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(state[name].shape)}, the file's settings make it "
                f"{tuple(wanted.shape)}"
            )
    left = [name for name in state if name not in expected and not name.endswith(BUFFERS)]
    unknown = [name for name in left if not name.startswith(tuple(dropped))]
    if unknown:
        raise UserError(f"{where}: {unknown[0]}: our {config.modality} model has no such parameter")
    return to_ours({name: value for name, value in state.items() if name in expected}, config), left


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names of `ours` that are not bit-equal in `theirs`."""
    return [name for name, value in ours.items() if name not in theirs or not torch.equal(value, theirs[name])]
