"""The DeepSpeed JSON: what is filled in, and what is refused because it would be silently wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megad2v.config.deepspeed_json import fill_deepspeed, read_deepspeed_json, refuse_unsupported, zero_stage
from megad2v.config.schema import Config, DataConfig, MicroBatchConfig, OptimizerConfig, TrainConfig
from megad2v.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
SHIPPED = sorted(path.name for path in FOLDER.glob("*.json"))
CONFIG = Config(
    optimizer=OptimizerConfig(clip=2),
    data=DataConfig(micro_batch=MicroBatchConfig(samples=5)),
    train=TrainConfig(micro_batches_per_step=12),
)


def filled(ds: dict[str, Any], *, precision: str = "fp32", ranks: int = 4) -> dict[str, Any]:
    return fill_deepspeed(ds, CONFIG, precision=precision, data_parallel=ranks)


def refusal(ds: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        filled(ds)
    message = str(caught.value)
    assert "\n" not in message
    return message


def zero(stage: int = 3, **values: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **values}}


def autos(tree: Any) -> int:
    if isinstance(tree, dict):
        return sum(autos(value) for value in tree.values())
    return int(tree == "auto")


def test_what_is_shipped() -> None:
    assert {"zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shipped_files_fill(name: str, precision: str) -> None:
    given = read_deepspeed_json(FOLDER / name)
    before = copy.deepcopy(given)
    ds = filled(given, precision=precision)
    assert given == before, "the file's content is left as it was"
    assert autos(before) > 3
    assert autos(ds) == 0
    assert ds["zero_optimization"]["stage"] == int(name.removeprefix("zero")[0])
    for key, value in before["zero_optimization"].items():
        assert ds["zero_optimization"][key] == value
    assert ds["bf16"]["enabled"] == (precision == "bf16")
    assert ds["data_types"]["grad_accum_dtype"] == "fp32"
    assert ds["train_micro_batch_size_per_gpu"] == 5
    assert ds["gradient_accumulation_steps"] == 3
    assert ds["train_batch_size"] == 60
    assert ds["gradient_clipping"] == 2.0
    assert ds["zero_force_ds_cpu_optimizer"] is False
    # Managed accumulation would re-apply offloaded gradients of parameters that a step did not use.
    assert ds.get("managed_gradient_accumulation", True) == ("offload" not in name)
    assert filled(ds, precision=precision) == ds, "what a run writes down can be given to it again"


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_ranks_share_the_micro_batches(ranks: int) -> None:
    ds = filled(zero(), ranks=ranks)
    assert ds["gradient_accumulation_steps"] * ranks == 12
    assert ds["train_batch_size"] == 60


def test_the_least_that_works() -> None:
    """An empty object is stage 0, which runs as stage 1; everything the run decides is set all the same."""
    assert zero_stage({}) == 0
    ds = filled({})
    assert ds["zero_optimization"]["stage"] == 1
    assert ds["train_batch_size"] == 60
    assert filled(zero(0))["zero_optimization"]["stage"] == 1


def test_values_that_agree_are_kept() -> None:
    assert filled({**zero(), "train_batch_size": 60, "gradient_clipping": 2})["train_batch_size"] == 60
    assert filled({**zero(), "fp16": {"enabled": False}})["zero_optimization"]["stage"] == 3
    assert filled({**zero(2, offload_optimizer={"device": "none"})})["zero_optimization"]["stage"] == 2
    assert filled({**zero(), "torch_autocast": {"enabled": False}})["zero_optimization"]["stage"] == 3
    assert filled(zero(2, offload_param={"device": "none"}))["zero_optimization"]["stage"] == 2
    assert filled(zero(zero_hpz_partition_size=1, zenflow=None))["zero_optimization"]["zero_hpz_partition_size"] == 1
    offloaded = {"device": "cpu", "ratio": 1.0, "super_offload": False}
    assert filled(zero(offload_optimizer=offloaded))["zero_optimization"]["offload_optimizer"] == offloaded
    assert filled({**zero(), "steps_per_print": 3})["steps_per_print"] == 3


@pytest.mark.parametrize(
    ("change", "theirs", "ours"),
    [
        ({"train_batch_size": 64}, "train_batch_size: the DeepSpeed JSON says 64", "data.micro_batch x train.micro"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu: the DeepSpeed JSON says 8",
         "data.micro_batch makes it 5"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: the DeepSpeed JSON says 1",
         "train.micro_batches_per_step / data-parallel size makes it 3"),
        ({"gradient_clipping": 1.0}, "gradient_clipping: the DeepSpeed JSON says 1.0", "optimizer.clip makes it 2.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: the DeepSpeed JSON says True", "train.precision makes it False"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype: the DeepSpeed JSON says 'bf16'",
         "makes it 'fp32'"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer: the DeepSpeed JSON says True",
         "makes it False"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_contradictions_name_both_sides(change: dict[str, Any], theirs: str, ours: str) -> None:
    message = refusal({**zero(), **change})
    assert message.startswith(theirs)
    assert ours in message
    assert message.endswith('write "auto"')


@pytest.mark.parametrize(
    ("ds", "message"),
    [
        ({**zero(), "fp16": {"enabled": True}}, "fp16.enabled: fp16 is not supported"),
        ({**zero(), "optimizer": {"type": "AdamW"}}, "optimizer: set in the run's configuration (optimizer.*)"),
        ({**zero(), "scheduler": {"type": "WarmupLR"}}, "scheduler: set in the run's configuration (schedule.*)"),
        (zero(offload_optimizer={"device": "nvme"}), "zero_optimization.offload_optimizer.device nvme: the teacher"),
        (zero(offload_param={"device": "nvme"}), "zero_optimization.offload_param.device nvme: the teacher"),
        (zero(1, offload_optimizer={"device": "cpu"}), "zero_optimization.offload_optimizer needs stage 3"),
        (zero(2, offload_optimizer={"device": "cpu"}), "zero_optimization.offload_optimizer needs stage 3"),
        (zero(2, cpu_offload=True), "zero_optimization.cpu_offload: deprecated in DeepSpeed"),
        (zero(1, round_robin_gradients=True), "zero_optimization.round_robin_gradients: its fragment addresses"),
        ({**zero(), "amp": {"enabled": True}}, "amp.enabled: apex's mixed precision is not supported"),
        ({**zero(), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast.enabled: autocast is"),
        ({**zero(2), "bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow: expected true, got False"),
        (zero(2, compute_grad_norm=False), "zero_optimization.compute_grad_norm: expected true, got False"),
        (zero(0, offload_param={"device": "cpu"}), "zero_optimization.offload_param needs stage 3"),
        (zero(2, offload_param={"device": "cpu"}), "zero_optimization.offload_param needs stage 3"),
        (
            zero(offload_optimizer={"device": "cpu", "super_offload": True}),
            "zero_optimization.offload_optimizer.super_offload: it updates weights before",
        ),
        (
            zero(offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "zero_optimization.offload_optimizer.ratio: expected 1, got 0.5",
        ),
        (zero(zero_hpz_partition_size=2), "zero_optimization.zero_hpz_partition_size: the teacher's forward"),
        (zero(zero_hpz_partition_size="auto"), "zero_optimization.zero_hpz_partition_size: the teacher's forward"),
        (
            zero(zero_quantized_nontrainable_weights=True),
            "zero_optimization.zero_quantized_nontrainable_weights: the teacher's weights",
        ),
        (zero(mics_shard_size=4), "zero_optimization.mics_shard_size: MiCS"),
        (zero(2, zenflow={"topk_ratio": 0.05}), "zero_optimization.zenflow: it applies gradients of earlier steps"),
        (zero(zenflow={}), "zero_optimization.zenflow: it applies gradients of earlier steps"),
        ({**zero(), "torch_autocast": True}, "torch_autocast: expected a JSON object, got True"),
        (zero(4), "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 'auto'"),
        ({"zero_optimization": True}, "zero_optimization: expected a JSON object, got True"),
        ({**zero(), "bf16": True}, "bf16: expected a JSON object, got True"),
        (zero(offload_param=None), "zero_optimization.offload_param: expected a JSON object, got None"),
        (zero(reduce_bucket_size="auto"), 'zero_optimization.reduce_bucket_size: "auto" is not something'),
        ({**zero(), "wall_clock_breakdown": "auto"}, 'wall_clock_breakdown: "auto" is not something this run'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(ds: dict[str, Any], message: str) -> None:
    assert refusal(ds).startswith(message)


def test_refused_before_anything_is_started() -> None:
    """The launcher's ranks ask this first, with the JSON alone."""
    refuse_unsupported(zero())
    with pytest.raises(UserError, match="fp16 is not supported"):
        refuse_unsupported({"fp16": {"enabled": True}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; the project has "),
        ('{\n"a": 1,\n', "not valid JSON, line 3"),
        ("[1]", "expected a JSON object, got list"),
    ],
)
def test_unreadable_files(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_deepspeed_json(path)
    assert f"--deepspeed {path}: " in str(caught.value)
    assert message in str(caught.value)


def test_filled_survives_json() -> None:
    ds = filled(read_deepspeed_json(FOLDER / "zero3_offload.json"))
    assert json.loads(json.dumps(ds)) == ds
