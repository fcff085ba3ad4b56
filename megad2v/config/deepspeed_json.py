"""The DeepSpeed JSON: "auto" is filled from the run's configuration, contradictions are refused in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megad2v.config.parts import JOINT
from megad2v.config.schema import Config
from megad2v.errors import UserError

AUTO = "auto"


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError where there is none."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(str(p) for p in Path("ds_configs").glob("*.json"))) or "ds_configs/zero3.json"
        raise UserError(f"--deepspeed {path}: no such file; the project has {known}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed {path}: not valid JSON, line {error.lineno}: {error.msg}") from None
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed {path}: expected a JSON object, got {type(content).__name__}")
    return content


def zero_stage(ds: dict[str, Any]) -> int:
    """The ZeRO stage that the JSON asks for (0 when it says nothing)."""
    return ds.get("zero_optimization", {}).get("stage", 0)


def refuse_unsupported(ds: dict[str, Any]) -> None:
    """Raise UserError for settings under which this project would be silently wrong or could not run at all."""
    for section in ("zero_optimization", "bf16", "fp16", "amp", "torch_autocast", "data_types"):
        if not isinstance(ds.get(section, {}), dict):
            raise UserError(f"{section}: expected a JSON object, got {ds[section]!r}")
    zero = ds.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key, {}), dict):
            raise UserError(f"zero_optimization.{key}: expected a JSON object, got {zero[key]!r}")
    if zero_stage(ds) not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage: expected 0, 1, 2 or 3, got {zero_stage(ds)!r}")
    for problem in (*_foreign_sections(ds), *_non_finite(ds), *_offload(zero, zero_stage(ds)), *_partitioning(zero)):
        raise UserError(problem)


def _non_finite(ds: dict[str, Any]) -> Iterator[str]:
    """What makes DeepSpeed apply a step of NaN instead of skipping it (stages 1 and 2; tried with 0.19)."""
    for path, value in (
        ("bf16.check_grad_overflow", ds.get("bf16", {}).get("check_grad_overflow", True)),
        ("zero_optimization.compute_grad_norm", ds.get("zero_optimization", {}).get("compute_grad_norm", True)),
    ):
        if value is not True:
            yield f"{path}: expected true, got {value!r}: without it, steps that are not finite are applied; remove it"


def _foreign_sections(ds: dict[str, Any]) -> Iterator[str]:
    """What the run's configuration decides, or what takes precision out of its hands."""
    if ds.get("fp16", {}).get("enabled") not in (None, False, AUTO):
        yield (
            "fp16.enabled: fp16 is not supported (loss scaling skips steps that the teacher would still average); "
            "use bf16 on GPUs or fp32"
        )
    for section, what in (("amp", "apex's mixed precision"), ("torch_autocast", "autocast")):
        if ds.get(section, {}).get("enabled") not in (None, False, AUTO):
            yield (
                f"{section}.enabled: {what} is not supported (the student would run in another precision than the "
                'teacher); remove it and use train.precision or bf16.enabled "auto"'
            )
    for section in ("tensor_parallel", "sequence_parallel_size"):
        if section in ds:
            yield f"{section}: set in the run's configuration (parallel.*), not in the DeepSpeed JSON; remove it"
    for section, use in (("optimizer", "optimizer.*"), ("scheduler", "schedule.*")):
        if section in ds:
            yield f"{section}: set in the run's configuration ({use}), not in the DeepSpeed JSON; remove it"


def _offload(zero: dict[str, Any], stage: int) -> Iterator[str]:
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme":
            yield (
                f"zero_optimization.{key}.device nvme: the teacher averages views of the optimizer's memory, "
                "which does not stay in place under NVMe offload; use cpu"
            )
    for key in ("cpu_offload", "cpu_offload_param"):  # DeepSpeed still reads them, past the rules on their successors
        if zero.get(key):
            yield f"zero_optimization.{key}: deprecated in DeepSpeed; use offload_optimizer or offload_param"
    optimizer, parameters = zero.get("offload_optimizer", {}), zero.get("offload_param", {})
    if stage < 3 and optimizer.get("device", "none") != "none":
        yield (
            "zero_optimization.offload_optimizer needs stage 3: stages 1 and 2 keep gradients of unused parameters "
            "when the optimizer is offloaded (DeepSpeed 0.19)"
        )
    if stage < 3 and parameters.get("device", "none") != "none":
        yield "zero_optimization.offload_param needs stage 3: stages 1 and 2 do not partition parameters; remove it"
    if optimizer.get("super_offload"):
        yield (
            "zero_optimization.offload_optimizer.super_offload: it updates weights before it knows that the step is "
            "finite, in another process; remove it"
        )
    if optimizer.get("ratio", 1) != 1:
        yield (
            f"zero_optimization.offload_optimizer.ratio: expected 1, got {optimizer['ratio']!r}: what is not offloaded "
            "has its moments in a second optimizer, which checkpoints would miss"
        )


def _partitioning(zero: dict[str, Any]) -> Iterator[str]:
    """Variants of ZeRO that move what `engine.fragments` points at."""
    if zero.get("round_robin_gradients"):
        yield "zero_optimization.round_robin_gradients: its fragment addresses are wrong; remove it"
    if zero.get("zero_hpz_partition_size", 1) not in (0, 1):
        yield (
            "zero_optimization.zero_hpz_partition_size: the teacher's forward would keep reading a secondary copy of "
            "its weights that no refresh reaches; remove it"
        )
    if zero.get("zero_quantized_nontrainable_weights"):
        yield (
            "zero_optimization.zero_quantized_nontrainable_weights: the teacher's weights, not trained but changing, "
            "would be stored as integers; remove it"
        )
    if zero.get("mics_shard_size", -1) not in (-1, 0):
        yield "zero_optimization.mics_shard_size: MiCS partitions weights in a way that is not supported; remove it"
    if zero.get("zenflow") is not None:  # an empty object switches it on, with defaults
        yield "zero_optimization.zenflow: it applies gradients of earlier steps, and not on every step; remove it"


def fill_deepspeed(ds: dict[str, Any], config: Config, *, precision: str, data_parallel: int) -> dict[str, Any]:
    """A copy of `ds` with every "auto" filled and every missing value that the run decides set.

    `precision` is "bf16" or "fp32" as resolved for the device. Raises UserError on a contradiction with `config`.
    """
    refuse_unsupported(ds)
    filled = copy.deepcopy(ds)
    accumulation = config.train.micro_batches_per_step // data_parallel
    # DeepSpeed counts samples by it, for nobody; joint runs have a budget for each modality.
    samples = 1 if config.modality == JOINT else config.data.micro_batch.samples or 1
    decided: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (samples, "data.micro_batch"),
        "gradient_accumulation_steps": (accumulation, "train.micro_batches_per_step / data-parallel size"),
        "train_batch_size": (samples * accumulation * data_parallel, "data.micro_batch x train.micro_batches_per_step"),
        "gradient_clipping": (float(config.optimizer.clip), "optimizer.clip"),
        "bf16.enabled": (precision == "bf16", "train.precision"),
        "data_types.grad_accum_dtype": ("fp32", "fixed: gradients are summed in float32"),
        "zero_force_ds_cpu_optimizer": (False, "fixed: torch's AdamW runs on every device"),
    }
    for key, (value, source) in decided.items():
        *sections, leaf = key.split(".")
        place = filled
        for section in sections:
            place = place.setdefault(section, {})
        given = place.get(leaf, AUTO)
        if given not in (AUTO, value):
            raise UserError(f'{key}: the DeepSpeed JSON says {given!r} but {source} makes it {value!r}; write "auto"')
        place[leaf] = value
    filled.get("fp16", {}).pop("enabled", None)
    leftover = [path for path, value in _leaves(filled) if value == AUTO]
    if leftover:
        raise UserError(f'{leftover[0]}: "auto" is not something this run decides; give a value or remove it')
    # Stage 0 has no fp32 fragments, no gradient norm, and applies NaN steps: it runs as stage 1 (the caller logs it).
    zero = filled.setdefault("zero_optimization", {})
    zero["stage"] = max(1, zero.get("stage", 0))
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        # Managed accumulation re-applies the offloaded gradients of parameters that a step did not use.
        filled["managed_gradient_accumulation"] = False
    # DeepSpeed's own progress lines repeat what metrics.jsonl has.
    filled.setdefault("steps_per_print", 10**9)
    return filled


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
