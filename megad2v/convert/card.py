"""README.md of an export: what the model is, how to load it, and the run that it comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from megad2v.checkpoint.reader import Checkpoint
from megad2v.config.parts import JOINT, modalities
from megad2v.config.schema import Config
from megad2v.convert.load import run_config
from megad2v.convert.provenance import data_counts, recipe_of

SECTIONS = ("mask", "targets", "loss", "teacher", "optimizer", "schedule")
"""What describes the model and its training, beside `model` and what the modality adds (its CARD_SECTIONS). The others
hold paths of the machine it ran on."""

JOINT_SECTIONS = ("model", "vision", "augment", "speech", "text", "joint", "teacher", "optimizer", "schedule")
"""The same of a joint run, by which its recipe is known."""

WEIGHTS_TEXT = {
    "student": "the student, which the optimizer trained (what the released data2vec models hold)",
    "teacher": "the teacher, the student's moving average",
}

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: {pipeline}
tags:
- data2vec
- {tag}
- self-supervised
---

# data2vec {modality} encoder, {width} channels, {depth} blocks

{parameters:,} parameters in float32, pretrained without labels by [data2vec](https://arxiv.org/abs/2202.03555).
It has no classifier: use its features, or fine-tune it. These weights are {weights}{shared}.
{jointly}
{usage}
## Agreement with the model that was trained

Every hidden state was compared on random input: largest difference {max_abs:.1e} in float32 (relative {relative:.1e},
allowed {tolerance:g}), relative {relative_float64:.1e} in float64. Layer by layer: `parity.json`.

## The run

| | |
|---|---|
{rows}

<details><summary>Configuration</summary>

```json
{config}
```

</details>
"""


_JOINTLY = """
It was trained jointly with {others}: one encoder, whose attention and MLPs{norms} all modalities share, one modality to
an update. That is megad2v's own; data2vec's paper trains each modality apart, and its results are not this model's.
"""


def model_card(
    checkpoint: Checkpoint, config: Config, keys: ModuleType, weights: str, parameters: int, parity: Mapping[str, Any]
) -> str:
    """Markdown with the front matter that Hugging Face's hub reads. `keys` is the modality's key map."""
    shared = " (with the student's own front end)" if weights == "teacher" and config.teacher.scope == "encoder" else ""
    tree = dataclasses.asdict(config)
    del tree["text"]["tokenizer"]  # a path, too: what the run used lies beside the card
    sections = {name: tree[name] for name in _sections(keys)}
    run = run_config(checkpoint)
    facts = _facts(checkpoint, run, config, keys, parity)
    return _TEMPLATE.format(
        pipeline=keys.PIPELINE,
        tag=keys.model_config(config)["model_type"],
        usage=keys.USAGE,
        modality=config.modality,
        width=config.model.width,
        depth=config.model.depth,
        parameters=parameters,
        weights=WEIGHTS_TEXT[weights],
        shared=shared,
        jointly=_jointly(run, config.modality) if run.modality == JOINT else "",
        max_abs=parity["max_abs"],
        relative=parity["relative"],
        relative_float64=parity["relative_float64"],
        tolerance=parity["tolerance"],
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        config=json.dumps(sections, indent=1),
    )


def _jointly(run: Config, modality: str) -> str:
    others = " and ".join(name for name in modalities(run) if name != modality) or "no other modality"
    return _JOINTLY.format(others=others, norms=" and norms" if run.joint.norms == "shared" else "")


def _sections(keys: ModuleType) -> tuple[str, ...]:
    return "model", *keys.CARD_SECTIONS, *SECTIONS


def _facts(
    checkpoint: Checkpoint, run: Config, config: Config, keys: ModuleType, parity: Mapping[str, Any]
) -> dict[str, str]:
    """`run` is of all modalities of a joint run, `config` of this one."""
    index, train = checkpoint.index, config.train
    sections, shares = _sections(keys), _shares(run)
    facts = {
        "recipe": recipe_of(run, JOINT_SECTIONS if run.modality == JOINT else sections),
        "data": data_counts(config),
        "updates": f"{index.step:,} of {train.steps:,}" + (", of all modalities together" if shares else ""),
        "of them": _turns(index.state, shares),
        "micro-batches per update": f"{train.micro_batches_per_step}, each {_budget(config)}",
        "objective": f"{config.targets.tensor} outputs of the teacher's last {config.targets.layers} blocks",
        "seed": str(train.seed),
    }
    facts = {name: value for name, value in facts.items() if value}
    metrics = checkpoint.directory.parent.parent / "metrics.jsonl"
    training, validation = last_metrics(metrics, index.step, config.modality)
    if shares:
        training.pop("samples", None)  # of all modalities
        training["epoch"] = training.get(f"epoch_{config.modality}")
    for title, line in (("training", training), ("validation", validation)):
        for key, value in line.items():
            if key in _SHOWN and value is not None:
                facts[f"{_SHOWN[key]} ({title}, step {line['step']:,})"] = _number(value)
    facts["trained with"] = _listed(index.code)
    facts["layout"] = _listed(index.layout)
    facts["exported with"] = _listed(parity["versions"])
    return facts


def _shares(run: Config) -> str:
    """Of a joint run, how many updates are of which modality; else ""."""
    weights = {name: getattr(run.joint, name).weight for name in modalities(run)} if run.modality == JOINT else {}
    return ", ".join(f"{weight / sum(weights.values()):.1%} {name}" for name, weight in weights.items())


def _turns(state: Mapping[str, Any], shares: str) -> str:
    """How many updates were of which modality, as counted; of runs without that count what the weights say."""
    counted = state.get("progress", {}).get("modality_updates", {}) if shares else {}
    return ", ".join(f"{count:,} {name}" for name, count in counted.items()) or shares


_SHOWN = {
    "samples": "samples",
    "epoch": "epoch",
    "loss": "loss",
    "target_std": "standard deviation of targets",
    "pred_std": "standard deviation of predictions",
    "valid_loss": "loss",
    "valid_retrieval": "masked-target retrieval accuracy",
    "valid_retrieval_chance": "retrieval accuracy of guessing",
}


def last_metrics(path: Path, step: int, modality: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last training and the last validation line of `modality` in a metrics.jsonl up to `step`; {} where there is
    none."""
    training: dict[str, Any] = {}
    validation: dict[str, Any] = {}
    with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
        for text in file:
            # A killed run may leave half a line.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                line = json.loads(text)
                if line.get("modality", modality) != modality:
                    continue
                if line["step"] <= step and "loss" in line:
                    training = line
                if line["step"] <= step and "valid_loss" in line:
                    validation = {k: v for k, v in line.items() if k == "step" or k.startswith("valid_")}
    return {k: v for k, v in training.items() if not k.startswith("valid_")}, validation


def _budget(config: Config) -> str:
    budget = {name: n for name, n in dataclasses.asdict(config.data.micro_batch).items() if n is not None}
    return ", ".join(f"{n} {name}" for name, n in budget.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "unknown"
