"""From modules to a running engine: construction under ZeRO, initial weights, optimizer groups, one training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from megad2v.engine.fragments import ZeroState, local_range, write_slice, zero_state
from megad2v.errors import UserError
from megad2v.models.block import Block
from megad2v.models.initialise import initial_value, initialisers


def check_deepspeed(ds: dict[str, Any]) -> None:
    """Raise UserError in one line for what DeepSpeed's own schema refuses, before anything is built or written."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(copy.deepcopy(ds))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([error.title.removeprefix("DeepSpeed").removesuffix("Config"), *map(str, first["loc"])])
        raise UserError(f"--deepspeed: DeepSpeed refuses {where}: {first['msg']}") from None
    except (DeepSpeedConfigError, AssertionError) as error:
        raise UserError(f"--deepspeed: DeepSpeed refuses it: {' '.join(str(error).split())}") from None


def _construct(build: Callable[[], nn.Module], ds: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Build a module: partitioned as it grows under ZeRO-3, whole on `device` otherwise. Values are not set yet."""
    import deepspeed

    if ds["zero_optimization"]["stage"] < 3:
        return build().to(device=device, dtype=dtype)
    # The dtype must come from the configuration: `Init(dtype=torch.float32)` gives bf16 on CPUs without fp16.
    with deepspeed.zero.Init(config_dict_or_path=ds):
        module = build()
    # Whole blocks are fetched at once: a trace that changes between steps would never prefetch otherwise.
    deepspeed.utils.set_z3_leaf_modules(module, [Block])
    return module


@torch.no_grad()
def write_initial_weights(module: nn.Module, seed: int) -> None:
    """Fill every parameter, or this rank's slice of it, from (seed, name). Nothing is sent."""
    for name, parameter, initialiser in initialisers(module):
        if hasattr(parameter, "ds_tensor"):
            value = initial_value(seed, name, parameter.ds_shape, initialiser)
            start, length = local_range(parameter)
            write_slice(parameter, value.flatten()[start : start + length])
        else:
            parameter.copy_(initial_value(seed, name, parameter.shape, initialiser))


def optimizer_groups(
    student: nn.Module, averaged: set[str], *, weight_decay: float, decay_all: bool
) -> list[dict[str, Any]]:
    """Parameter groups, split by (in the teacher?, decayed?).

    The first split lets ZeRO-1/2 gather exactly the teacher's parameters; it changes no update.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        groups.setdefault((name in averaged, decay_all or dimensions > 1), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": weight_decay if key[1] else 0.0} for key in sorted(groups, reverse=True)
    ]


class TrainingEngine:
    """The student under DeepSpeed, and the teacher's module prepared for the same stage."""

    def __init__(
        self,
        build_student: Callable[[], nn.Module],
        build_teacher: Callable[[], nn.Module],
        ds: dict[str, Any],
        *,
        optimizer: dict[str, Any],
        decay_all: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        """`ds` is the filled DeepSpeed configuration, `optimizer` AdamW's keyword arguments. Collective."""
        import deepspeed

        dtype = torch.bfloat16 if ds["bf16"]["enabled"] else torch.float32
        student = _construct(build_student, ds, dtype, device)
        write_initial_weights(student, seed)
        teacher = _construct(build_teacher, ds, dtype, device)
        averaged = {name for name, _ in teacher.named_parameters()}
        groups = optimizer_groups(student, averaged, weight_decay=optimizer["weight_decay"], decay_all=decay_all)
        adamw = torch.optim.AdamW(groups, fused=True, **optimizer)
        self.deepspeed, *_ = deepspeed.initialize(model=student, optimizer=adamw, config=ds, dist_init_required=False)
        self.state: ZeroState = zero_state(self.deepspeed)
        if any(f.master.dtype != torch.float32 for f in self.state.fragments):
            raise RuntimeError("the optimizer's master weights are not float32: the teacher would average rounded ones")
        self.teacher_module = teacher
        self.teacher: nn.Module = self._teacher_engine(teacher, ds) if self.state.stage == 3 else teacher
        self.accumulation: int = ds["gradient_accumulation_steps"]
        self.data_parallel: int = self.deepspeed.dp_world_size
        self._managed: bool = ds.get("managed_gradient_accumulation", True)

    @staticmethod
    def _teacher_engine(teacher: nn.Module, ds: dict[str, Any]) -> nn.Module:
        """A second engine, without an optimizer, gathers the teacher's weights: the student's trace stays its own."""
        import deepspeed

        zero = {key: value for key, value in ds["zero_optimization"].items() if key != "offload_optimizer"}
        engine, *_ = deepspeed.initialize(
            model=teacher, config={**ds, "zero_optimization": zero}, dist_init_required=False
        )
        engine.eval()
        return engine

    @property
    def student(self) -> nn.Module:
        """The student's module (call the engine, not it, to run a training forward)."""
        return self.deepspeed.module

    def forward(
        self, inputs: Tensor, mask_bmt: Tensor, padding_bt: Tensor | None, run: Collection[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One micro-batch through student and teacher; see `Student.forward`. Collective under ZeRO-3."""
        return self.deepspeed(inputs, mask_bmt, self.teacher, padding_bt, run)

    def backward(self, loss_sum: Tensor, count: int) -> None:
        """Accumulate the gradient of loss_sum / count, where count is the step's GLOBAL number of masked positions.

        DeepSpeed averages over data-parallel ranks, hence the factor. A step with nothing masked has zero gradient.
        """
        self.deepspeed.backward(loss_sum * (self.data_parallel / max(1, count)), scale_wrt_gas=False)
        if self._managed and not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # only advances the accumulation counter

    def step(self, lr: float) -> bool:
        """Update the weights with learning rate `lr`. False where DeepSpeed skipped a non-finite step. Collective."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        self.state.clear_unused_gradients()
        return not getattr(self.deepspeed.optimizer, "overflow", False)

    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping."""
        norm = self.deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)
