"""From a checkpoint to the files that fairseq and the BEiT fork load, certified before the folder gets its name.

OUTPUT/
  checkpoint.pt    fairseq: cfg, the student's state dict, the teacher in float32; all of it plain dicts and tensors
  checkpoint.pth   the BEiT fork instead: model (student), model_ema (teacher), args
  dict.txt         text: the dictionary, an id a line
  tokenizer/       text: what makes ids of texts
  parity.json      the certificate
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.stream import sha256_of
from megad2v.config.schema import Config
from megad2v.convert.certificate import SEED, CertificateError, compare_layers, versions
from megad2v.convert.fairseq_run import run_fairseq
from megad2v.convert.foreign import differing, parameter_shapes
from megad2v.convert.hf import CERTIFICATE, check_output, written_aside
from megad2v.convert.incoming import BEIT_EPS, FAIRSEQ, INCEPTION, Incoming, read_beit, read_fairseq
from megad2v.convert.load import (
    Weights,
    checkpoint_config,
    load_encoder,
    load_tokenizer,
    named_as_in_the_run,
    open_encoder,
)
from megad2v.convert.streamed import stream_weights
from megad2v.convert.torch_file import write_torch_file
from megad2v.errors import UserError
from megad2v.modalities.build import HUGGING_FACE
from megad2v.modalities.fairseq_cfg import Rules, refuse, training_sections
from megad2v.modalities.text.codecs import SPECIALS
from megad2v.modalities.vision.beit_keys import to_beit

Tensors = dict[str, Tensor]
FILE, BEIT_FILE, DICTIONARY = "checkpoint.pt", "checkpoint.pth", "dict.txt"


def export_fairseq(
    checkpoint: Checkpoint, output: Path, *, weights: Weights = "student", overwrite: bool = False
) -> dict[str, Any]:
    """Write `output` and return its certificate. All of it appears at once, and only when the certificate holds.

    `weights` "teacher" puts the teacher's weights into the model as well, which is what fine-tuning starts from.
    Raises UserError when `output` is in use or fairseq cannot compute what the configuration describes;
    CertificateError when the file does not hold the model; OSError when the disk refuses.
    """
    check_output(output, overwrite=overwrite)
    config = checkpoint_config(checkpoint)
    keys = FAIRSEQ[config.modality]
    with named_as_in_the_run(checkpoint):
        keys.check(config)
    student, teacher = _parameters(checkpoint, config, weights)
    tokenizer = load_tokenizer(checkpoint)
    with written_aside(output) as aside:
        state = fairseq_state(config, student, teacher)
        write_torch_file(aside / FILE, fairseq_file(config, state, checkpoint.index.step))
        del state
        if config.modality == "text":
            (aside / DICTIONARY).write_text(dictionary(config), encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(aside / "tokenizer")
        found = read_fairseq(aside / FILE)
        parity = {
            **_certified(checkpoint, found, student, teacher, weights),
            "fairseq": run_fairseq(aside / FILE, stream_weights(*open_encoder(checkpoint, weights)), config),
            "weights": weights,
            "step": checkpoint.index.step,
            "sha256": {FILE: sha256_of(aside / FILE)},
        }
        (aside / CERTIFICATE).write_text(json.dumps(parity, indent=2) + "\n", encoding="utf-8")
    return parity


def fairseq_state(config: Config, student: Tensors, teacher: Tensors) -> dict[str, Any]:
    """fairseq's state dict of both, the teacher as a dict within it."""
    keys = FAIRSEQ[config.modality]
    model, average = {**keys.to_fairseq(student, config), **keys.unused(config)}, keys.to_fairseq(teacher, config)
    # Copies of what the student lends: the file would keep one tensor for both, and fairseq averages in place.
    ema = {**{name: value.clone() for name, value in model.items() if name not in average}, **average}
    prefix = keys.averaged(config)
    return {**model, keys.EMA: {n.removeprefix(prefix): value for n, value in ema.items() if n.startswith(prefix)}}


def fairseq_file(config: Config, state: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What fairseq's `load_checkpoint_to_cpu` reads: dicts, lists, strings, numbers and tensors, no class."""
    return {
        "args": None,
        "cfg": {**training_sections(config), **FAIRSEQ[config.modality].sections(config)},
        "model": dict(state),
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "ModelCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": step,
            }
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }


def dictionary(config: Config) -> str:
    """dict.txt: each id as its own symbol, as GPT-2's ids are in fairseq's released one. fairseq puts the four specials
    in front and `<mask>` behind by itself, so that symbol N is id N."""
    vocabulary = config.text.vocabulary
    assert vocabulary is not None  # of a checkpoint
    return "".join(f"{number} 1\n" for number in range(len(SPECIALS), vocabulary - 1))


def _parameters(checkpoint: Checkpoint, config: Config, weights: Weights) -> tuple[Tensors, Tensors]:
    """The model's parameters that `weights` asks for, and the teacher's. Raises UserError where the checkpoint does not
    hold them."""
    student = {name: value.detach() for name, value in load_encoder(checkpoint, weights).named_parameters()}
    held = set(checkpoint.names("teacher"))
    names = parameter_shapes(config, "teacher")
    missing = next((name for name in names if name not in held), None)
    if missing is not None:
        raise UserError(f"{checkpoint.directory}: holds no teacher weights of {missing}; is it a training checkpoint?")
    teacher = {name: checkpoint.full("teacher", name) for name in names}
    for name, value in (*student.items(), *teacher.items()):
        if not value.isfinite().all():
            raise UserError(f"{checkpoint.directory}: {name} is not finite; its training has diverged")
    return student, teacher


def _certified(
    checkpoint: Checkpoint, found: Incoming, student: Tensors, teacher: Tensors, weights: Weights
) -> dict[str, Any]:
    """The file read back: every tensor to the bit; every hidden state, student's and teacher's, by a second program."""
    for kind, ours, theirs in (("model", student, found.student), ("teacher", teacher, found.teacher)):
        wrong = differing(ours, theirs)
        if wrong:
            raise CertificateError(f"the {kind} in the file does not come back as it was: {wrong[0]}")
    config = checkpoint_config(checkpoint)
    example = HUGGING_FACE[config.modality].example(config, torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        ours = stream_weights(*open_encoder(checkpoint, weights))
        parity = compare_layers(ours, found.forward, example, "the exported model")
        assert found.teacher_forward is not None  # its parameters came back
        average = stream_weights(*open_encoder(checkpoint, "teacher"))
        parity["teacher"] = compare_layers(average, found.teacher_forward, example, "the exported teacher")
    return {**parity, "round_trip": {"tensors": len(student) + len(teacher), "differing": 0}, "versions": versions()}


# --- the BEiT fork


def check_beit(config: Config) -> None:
    """Raises UserError when the BEiT fork (facebookresearch/data2vec_vision) cannot compute what this describes."""
    if config.modality != "vision":
        raise UserError(f"--to beit: is of images, the checkpoint of {config.modality}; export with --to hf or fairseq")
    model, fairseq = config.model, "export with --to fairseq"
    rules: Rules = (
        ("model.norm_eps", model.norm_eps != BEIT_EPS, f"norms with {BEIT_EPS:g}, not {model.norm_eps:g}; {fairseq}"),
        ("model.head_layers", model.head_layers != 1, f"has one linear layer as its head; {fairseq}"),
        ("teacher.scope", config.teacher.scope != "model", f"averages the whole model; {fairseq}"),
        ("model.norm", model.norm != "pre", "is pre-norm"),
        ("model.layer_scale", not model.layer_scale, "is exported with layer scale, which all of data2vec's have"),
        ("model.qkv_bias", model.qkv_bias != "no_key", f"has biases on query and value alone, not {model.qkv_bias}"),
        ("model.relative_bias", not model.relative_bias, "is exported with one table of relative positions"),
        ("model.layer_drop", model.layer_drop > 0, "has no layer drop"),
        ("targets.average", not config.targets.average, "is exported with one head"),
    )
    refuse("the BEiT fork", rules)


def export_beit(
    checkpoint: Checkpoint, output: Path, *, weights: Weights = "student", overwrite: bool = False
) -> dict[str, Any]:
    """As `export_fairseq`, for the program behind the published vision models: what its fine-tuning reads."""
    check_output(output, overwrite=overwrite)
    config = checkpoint_config(checkpoint)
    with named_as_in_the_run(checkpoint):
        check_beit(config)
    student, teacher = _parameters(checkpoint, config, weights)
    depth, layers = config.model.depth, config.targets.layers
    head = {name: value.clone() for name, value in student.items() if name.startswith("head.")}
    content: dict[str, Any] = {
        "model": to_beit(student, config),
        # Its average has a head, which nobody calls: here the student's.
        "model_ema": to_beit({**teacher, **head}, config),
        "epoch": 0,
        "args": {
            "target_layers": str(list(range(depth - layers, depth))),
            "l1_beta": float(config.loss.beta),
            "drop_path": float(config.model.drop_path),
            "imagenet_default_mean_and_std": config.vision.mean != INCEPTION,
            # The program knows those two alone, and passes these by: what the model was trained with, for --from beit.
            "normalization_mean": list(config.vision.mean),
            "normalization_std": list(config.vision.std),
        },
    }
    with written_aside(output) as aside:
        write_torch_file(aside / BEIT_FILE, content)
        del content
        parity = {
            **_certified(checkpoint, read_beit(aside / BEIT_FILE), student, teacher, weights),
            "weights": weights,
            "step": checkpoint.index.step,
            "sha256": {BEIT_FILE: sha256_of(aside / BEIT_FILE)},
        }
        (aside / CERTIFICATE).write_text(json.dumps(parity, indent=2) + "\n", encoding="utf-8")
    return parity
