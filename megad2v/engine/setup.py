"""From modules to a running engine: construction under ZeRO, initial weights, optimizer groups, one training step."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Collection, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megad2v.engine.fragments import ZeroState, local_range, write_slice, zero_state
from megad2v.engine.gradients import Judge, StepGate, both_finite
from megad2v.engine.traces import TraceCache
from megad2v.errors import UserError
from megad2v.models.block import Block
from megad2v.models.initialise import initial_value, initialisers
from megad2v.parallel.sharding import shard_of
from megad2v.parallel.topology import Topology


def check_deepspeed(ds: dict[str, Any], topology: Topology) -> None:
    """Raise UserError in one line for what DeepSpeed's own schema refuses, before anything is built or written."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(copy.deepcopy(ds), mpu=_mpu(topology))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([error.title.removeprefix("DeepSpeed").removesuffix("Config"), *map(str, first["loc"])])
        raise UserError(f"--deepspeed: DeepSpeed refuses {where}: {first['msg']}") from None
    except (DeepSpeedConfigError, AssertionError) as error:
        raise UserError(f"--deepspeed: DeepSpeed refuses it: {' '.join(str(error).split())}") from None


def _mpu(topology: Topology) -> Topology | None:
    """What DeepSpeed is told: without tensor parallelism it makes its own groups."""
    return topology if topology.tensor.size > 1 else None


def _construct(
    build: Callable[[], nn.Module],
    ds: dict[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    topology: Topology,
    partitioned: bool,
) -> nn.Module:
    """Build a module: partitioned as it grows, or whole on `device`. Values are not set yet."""
    import deepspeed

    if not partitioned:
        return build().to(device=device, dtype=dtype)
    # The dtype must come from the configuration: `Init(dtype=torch.float32)` gives bf16 on CPUs without fp16.
    # And without the group it would partition over all ranks, whatever the mpu says: silently wrong weights.
    with deepspeed.zero.Init(
        config_dict_or_path=ds, mpu=_mpu(topology), data_parallel_group=topology.get_data_parallel_group()
    ):
        module = build()
    # Whole blocks are fetched at once: a trace that changes between steps would never prefetch otherwise.
    deepspeed.utils.set_z3_leaf_modules(module, [Block])
    return module


def check_compiler() -> None:
    """Raise UserError where torch.compile would find no compiler, minutes later and in many lines."""
    candidates = (os.environ.get("CXX"), "g++", "clang++")
    if not any(shutil.which(name) for name in candidates if name):
        raise UserError(
            "train.compile: needs a C++ compiler, and neither g++ nor clang++ (nor $CXX) is in PATH; install one, or "
            "leave train.compile false"
        )


def compile_each_block(module: nn.Module, backend: str = "inductor") -> None:
    """One graph per block. The forward is replaced, not the module: DeepSpeed gathers in hooks around a block, which is
    a leaf module, and `block.compile()` would break the graph at each of them."""
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    # All blocks share one function, and a graph is made for every rate of drop path, modality, training and evaluation,
    # with padding or without, and a few batch sizes. torch counts them per function; beyond its limit (8) a full graph
    # is refused: in the middle of a run. Counted: 17 for one rate and three modalities, 34 for two rates.
    settings = torch._dynamo.config
    name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"
    limit = 8 + 8 * len(blocks) * max(1, len(getattr(module, "parts", ())))
    setattr(settings, name, max(getattr(settings, name), limit))
    name = f"accumulated_{name}"
    setattr(settings, name, max(getattr(settings, name), 16 * limit))
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)


@torch.no_grad()
def write_initial_weights(module: nn.Module, seed: int) -> None:
    """Fill every parameter, or this rank's slice of it, from (seed, name). Nothing is sent."""
    for name, parameter, initialiser in initialisers(module):
        shard = shard_of(parameter)
        value = initial_value(seed, name, shard.full_shape, initialiser).flatten()[shard.start :]
        if hasattr(parameter, "ds_tensor"):
            start, length = local_range(parameter)
            parameter.ds_tensor.zero_()  # padding, too
            write_slice(parameter, value[start : start + length])
        else:
            parameter.zero_().view(-1)[: shard.numel].copy_(value[: shard.numel])


def optimizer_groups(
    student: nn.Module, averaged: set[str], *, weight_decay: float, decay_all: bool
) -> list[dict[str, Any]]:
    """Parameter groups, split by (in the teacher?, decayed?).

    The first split lets ZeRO-1/2 gather exactly the teacher's parameters; it changes no update. Without `decay_all`
    those are decayed that the published vision program decays (optim_factory.get_parameter_groups): what has more than
    one dimension there. Its mask token does, (1, 1, D), and a module names such in `decayed_vectors`; so does CLS,
    which is excepted by name.
    """
    vectors = {
        f"{prefix}.{name}"
        for prefix, module in student.named_modules()
        for name in getattr(module, "decayed_vectors", ())
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        decayed = decay_all or dimensions > 1 or name in vectors
        groups.setdefault((name in averaged, decayed), []).append(parameter)
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
        topology: Topology,
        resident_teacher: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        """`ds` is the filled DeepSpeed configuration, `optimizer` AdamW's keyword arguments. `resident_teacher` keeps
        the teacher's forward weights whole under ZeRO-3 too. Collective."""
        import deepspeed

        zero3 = ds["zero_optimization"]["stage"] == 3
        dtype = torch.bfloat16 if ds["bf16"]["enabled"] else torch.float32
        construct = partial(_construct, ds=ds, dtype=dtype, device=device, topology=topology)
        student = construct(build_student, partitioned=zero3)
        write_initial_weights(student, seed)
        teacher = construct(build_teacher, partitioned=zero3 and not resident_teacher)
        if compile_blocks:
            compile_each_block(student)
            compile_each_block(teacher)
        averaged = {name for name, _ in teacher.named_parameters()}
        groups = optimizer_groups(student, averaged, weight_decay=optimizer["weight_decay"], decay_all=decay_all)
        adamw = torch.optim.AdamW(groups, fused=True, **optimizer)
        self._mpu = _mpu(topology)
        self.deepspeed, *_ = deepspeed.initialize(
            model=student, optimizer=adamw, config=ds, mpu=self._mpu, dist_init_required=False
        )
        self.state: ZeroState = zero_state(self.deepspeed)
        if any(f.master.dtype != torch.float32 for f in self.state.fragments):
            raise RuntimeError("the optimizer's master weights are not float32: the teacher would average rounded ones")
        self.teacher_module = teacher
        self.teacher: nn.Module = self._teacher_engine(teacher, ds) if zero3 and not resident_teacher else teacher
        self.accumulation: int = ds["gradient_accumulation_steps"]
        self.data_parallel: int = self.deepspeed.dp_world_size
        self._gate = StepGate(self.deepspeed, device)
        self._joint = hasattr(student, "parts")
        self._traces = [TraceCache(self.deepspeed)] if zero3 else []
        if zero3 and self._joint and not resident_teacher:  # of one modality all its passes are alike
            self._traces.append(TraceCache(self.teacher))
        self._plan: Hashable = None
        self._managed: bool = ds.get("managed_gradient_accumulation", True)

    def _teacher_engine(self, teacher: nn.Module, ds: dict[str, Any]) -> nn.Module:
        """A second engine, without an optimizer, gathers the teacher's weights: the student's trace stays its own."""
        import deepspeed

        zero = {key: value for key, value in ds["zero_optimization"].items() if key != "offload_optimizer"}
        engine, *_ = deepspeed.initialize(
            model=teacher, config={**ds, "zero_optimization": zero}, mpu=self._mpu, dist_init_required=False
        )
        engine.eval()
        return engine

    @property
    def student(self) -> nn.Module:
        """The student's module (call the engine, not it, to run a training forward)."""
        return self.deepspeed.module

    def forward(
        self,
        inputs: Tensor,
        mask_bmt: Tensor,
        padding_bt: Tensor | None,
        run: Collection[int] | None = None,
        modality: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One micro-batch through student and teacher; see `Student.forward`. `modality` decides something in joint
        models alone. Collective under ZeRO-3."""
        plan, self._plan = self._plan, None
        own = (self.deepspeed.training, None if run is None else tuple(run), modality)
        for traces in self._traces:
            traces.expect(own if plan is None else plan)
        if self._joint:
            return self.deepspeed(inputs, mask_bmt, self.teacher, padding_bt, run, modality)
        return self.deepspeed(inputs, mask_bmt, self.teacher, padding_bt, run)

    def expect(self, plan: Hashable) -> None:
        """What all ranks agreed that the next forward runs. Without it ZeRO-3 goes by the forward's own arguments, and
        a rank whose arguments are wrong gathers otherwise than the rest before anybody can see why."""
        self._plan = plan

    def backward(self, loss_sum: Tensor, count: int) -> None:
        """Accumulate the gradient of loss_sum / count, where count is the step's GLOBAL number of masked positions.

        DeepSpeed averages over data-parallel ranks, hence the factor. A step with nothing masked has zero gradient.
        """
        self.deepspeed.backward(loss_sum * (self.data_parallel / max(1, count)), scale_wrt_gas=False)
        if self._managed and not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # only advances the accumulation counter

    def step(self, lr: float, loss: Tensor | None = None, judge: Judge = both_finite) -> bool:
        """Update the weights with learning rate `lr` if `judge` allows it; whether it did (see `StepGate.step`).

        `loss` is this rank's part of the step's loss, a scalar on the device; left out, only the gradient is judged.
        A refused step changes no weight and no moment. Collective, the same on every rank.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        taken = self._gate.step(torch.zeros(()) if loss is None else loss, judge)
        self.state.clear_unused_gradients()
        return taken

    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping; not finite where the gradient was not."""
        return self._gate.norm
