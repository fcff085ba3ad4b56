"""The certificate of an export: what transformers loads from the folder computes what our model computes.

Two runs over the same random input. In float32, as people use it, differences are rounding, and rounding hides whatever
a small layer scale shrinks or large activations drown. In float64 the two agree to some 1e-13 or a weight is wrong.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import megad2v
from megad2v.checkpoint.stream import TensorFile
from megad2v.config.schema import Config
from megad2v.convert.streamed import stream_weights
from megad2v.errors import UserError
from megad2v.modalities.keys import Example
from megad2v.models.data2vec import Student

TOLERANCE = 1e-5
"""float32: largest difference over max(1, largest value of the layer)."""
TOLERANCE_FLOAT64 = 1e-9
"""float64: largest difference over the largest value of the layer."""
TOLERANCE_ROUNDED = 1e-6
"""The same where our weights are sums of theirs, rounded to float32: each by up to 6e-8 of itself."""
SEED = 20220207


Theirs = Callable[[Example, torch.dtype], list[Tensor]]
"""Another program's hidden states of an example, computed in a dtype: see `hidden_states`."""


class CertificateError(Exception):
    """The exported model does not compute what ours computes."""

    exit_code = 1


@dataclass(frozen=True)
class LayerDifference:
    """One hidden state of both models."""

    name: str
    """input (of block 1), block 1 ..., output."""
    largest: float
    """Largest absolute value of ours."""
    max_abs: float
    """float32: largest absolute difference."""
    relative: float
    """float32: the same over max(1, largest)."""
    relative_float64: float
    """float64: largest absolute difference over the largest value."""

    def holds(self, tolerance_float64: float) -> bool:
        """Within tolerance; NaN is not."""
        return self.relative <= TOLERANCE and self.relative_float64 <= tolerance_float64


def require_transformers() -> ModuleType:
    """transformers, or a UserError that says what to install."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"Hugging Face's transformers is needed here ({error}); pip install 'megad2v[hf]' or transformers"
        ) from None


def certify(folder: Path, student: Student, keys: ModuleType, config: Config) -> dict[str, Any]:
    """Load `folder` as anyone would, without a network, and compare every hidden state with `student`'s.

    `keys` is the modality's key map. Returns the content of parity.json. Raises CertificateError naming the first
    layer, or the parameters that transformers did not find or did not know.
    """
    transformers = require_transformers()
    weights = TensorFile(folder / "model.safetensors")
    model = stream_weights(_load(transformers, folder, keys), weights.read, keep=keys.NEW_THERE)
    example = keys.example(config, torch.Generator().manual_seed(SEED))
    return {
        **compare_layers(student, of_transformers(model), example, "the exported model"),
        "versions": versions(transformers),
    }


def compare_layers(
    student: Student, theirs: Theirs, example: Example, what: str, *, padding: bool = True, rounded: bool = False
) -> dict[str, Any]:
    """Every hidden state of `student` and of another program on the same input, in float32 and float64: what
    parity.json says of them. `padding` false leaves out the places that hold nothing, which nobody looks at;
    `rounded`: see TOLERANCE_ROUNDED.

    Raises CertificateError naming the first layer (`what` is whose it is), UserError where ours is not finite.
    """
    tolerance_float64 = TOLERANCE_ROUNDED if rounded else TOLERANCE_FLOAT64
    single = _compare(student, theirs, example, padding)
    try:
        double = _compare(student.double(), theirs, _double(example), padding)
    finally:
        student.float()  # exact: these values came from float32
    layers = [
        LayerDifference(name, largest, difference, difference / max(1.0, largest), exact / max(scale, 1e-30))
        for (name, largest, difference), (_, scale, exact) in zip(single, double, strict=True)
    ]
    failed = [layer for layer in layers if not layer.holds(tolerance_float64)]
    if failed:
        first = failed[0]
        raise CertificateError(
            f"{what} differs from ours from {first.name} on: {first.relative:.1e} in float32 (allowed "
            f"{TOLERANCE:g}), {first.relative_float64:.1e} in float64 (allowed {tolerance_float64:g})"
        )
    return {
        "passed": True,
        "tolerance": TOLERANCE,
        "tolerance_float64": tolerance_float64,
        "max_abs": max(layer.max_abs for layer in layers),
        "relative": max(layer.relative for layer in layers),
        "relative_float64": max(layer.relative_float64 for layer in layers),
        "input": f"{example.description}; seed {SEED}",
        "layers": [asdict(layer) for layer in layers],
    }


def of_transformers(model: nn.Module) -> Theirs:
    """A model of transformers as what `compare_layers` takes."""

    def run(example: Example, dtype: torch.dtype) -> list[Tensor]:
        result = model.to(dtype)(**example.arguments, output_hidden_states=True)
        return [*result.hidden_states, result.last_hidden_state]

    return run


def versions(*modules: ModuleType) -> dict[str, str]:
    """What computed: megad2v, Python, torch and `modules`."""
    found = {module.__name__: module.__version__ for module in (megad2v, torch, *modules)}
    return {"python": platform.python_version(), **found}


def _load(transformers: ModuleType, folder: Path, keys: ModuleType) -> nn.Module:
    with quiet(transformers):
        model, info = transformers.AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if type(model).__name__ != keys.MODEL_CLASS:
        raise CertificateError(f"transformers loads a {type(model).__name__} instead of a {keys.MODEL_CLASS}")
    info["missing_keys"] = [name for name in info["missing_keys"] if not name.startswith(keys.NEW_THERE)]
    odd = {what: sorted(map(str, names)) for what, names in info.items() if names and what != "error_msgs"}
    if odd or info.get("error_msgs"):
        raise CertificateError(f"transformers does not load the weights as they are: {odd or info['error_msgs']}")
    return model.eval()


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """No progress bars, and no warnings of what the caller makes an error of, or does on purpose."""
    log = transformers.utils.logging
    bars, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _double(example: Example) -> Example:
    """The example with its floating-point tensors in float64."""

    def double(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    arguments = {name: double(value) for name, value in example.arguments.items()}
    return example._replace(inputs=double(example.inputs), arguments=arguments)


def hidden_states(student: Student, example: Example) -> list[Tensor]:
    """What enters the first block (behind positions and, in post-norm models, the norm), the output of each block, and
    the encoder's output, each (B, prefix + T, D). `example` has no prefix padding: its modality has no prefix, or it no
    padding."""
    states: list[Tensor] = []
    visit_states(student, example, states.append)
    return states


@torch.no_grad()
def visit_states(student: Student, example: Example, visit: Callable[[Tensor], None]) -> None:
    """Show `visit` each of `hidden_states` as it is made; none is kept."""
    encoder = student.encoder
    hooks = [encoder.blocks[0].register_forward_pre_hook(lambda _, arguments: visit(arguments[0]))]
    hooks += [block.register_forward_hook(lambda _, __, made: visit(made[0])) for block in encoder.blocks]
    try:
        masked_btd, _ = student.front_end(example.inputs, example.mask_bt)
        output_btd, _ = encoder(masked_btd, example.padding_bt)
    finally:
        for hook in hooks:
            hook.remove()
    visit(output_btd)


@torch.no_grad()
def _compare(student: Student, theirs: Theirs, example: Example, padding: bool) -> list[tuple[str, float, float]]:
    """(name, largest absolute value of ours, largest absolute difference) of each hidden state, bottom up."""
    others = iter(theirs(example, next(student.parameters()).dtype))
    left_out = example.padding_bt if not padding else None
    found: list[tuple[float, float]] = []

    def compare(our: Tensor) -> None:
        their = next(others, None)
        if their is None or their.shape != our.shape:  # a difference of other shapes would be broadcast
            shape = "nothing" if their is None else tuple(their.shape)
            raise CertificateError(f"hidden state {len(found)} is {tuple(our.shape)}, and {shape} there")
        if not our.isfinite().all():
            raise UserError("the model's hidden states are not finite; its training has diverged")
        if left_out is not None:
            our, their = our[~left_out], their[~left_out]
        found.append((float(our.abs().max()), float((our - their).abs().max())))

    visit_states(student.eval(), example, compare)
    if next(others, None) is not None:
        raise CertificateError(f"they have more than our {len(found)} hidden states")
    names = ["input", *(f"block {number}" for number in range(1, len(found) - 1)), "output"]
    return [(name, *values) for name, values in zip(names, found, strict=True)]
