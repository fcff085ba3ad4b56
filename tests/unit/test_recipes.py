"""Every recipe in the package, found by itself: complete, sourced, of the size it claims, accepted with every
DeepSpeed JSON of the project. tests/distributed/test_recipes.py trains each for an update."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from torch import nn

from megad2v.config.deepspeed_json import fill_deepspeed, read_deepspeed_json
from megad2v.config.load import load_config, recipes, to_yaml
from megad2v.config.parts import PART_KEYS, PART_SECTIONS, modalities, of_modality
from megad2v.config.schema import Config
from megad2v.modalities.build import build_student, build_teacher, positions
from megad2v.modalities.vision.masking import mask_budget

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted(recipes())
DOCS = REPOSITORY / "docs" / "recipes.md"
JSONS = sorted((REPOSITORY / "ds_configs").glob("*.json"))


class Size(NamedTuple):
    """What a recipe must come to."""

    student: int
    """Parameters, front end and head included."""
    teacher: int
    batch: int | tuple[int, ...]
    """Images, seconds of speech, or tokens, of an update; of a joint run those of each modality."""
    masked: int | None
    """Most positions that a sample hides; None where spans overlap at random."""


SIZES = {
    # The fork prints 86,256,720 for its B by the same formula; fairseq's encoder alone is 85,074,000 (spec 4.9).
    "vision_base": Size(86_256_720, 85_666_128, 2048, 120),
    # fairseq counts a final_proj of 590,592 that no gradient reaches: 86,256,720 with it (spec 4.9).
    "vision_base_d2v1": Size(86_256_720 - 590_592, 85_074_000, 2048, 75),
    "vision_large": Size(304_186_816, 303_137_216, 4096, 120),
    "vision_large_phase2": Size(304_186_816, 303_137_216, 4096, 120),
    "vision_huge14": Size(632_133_184, 630_493_504, 4096, 157),
    "vision_tiny": Size(1_233_040, 1_216_528, 32, 38),
    # fairseq's own counts (spec 1.4); 16 x 3.8 and 24 x 3.4 million samples.
    "speech_base": Size(93_754_880, 88_561_920, 3800, None),
    "speech_audioset": Size(93_754_880, 88_561_920, 5670, None),
    "speech_large": Size(314_326_016, 308_542_464, 3800, None),
    "speech_tiny": Size(1_379_968, 1_287_808, 32, None),
    # fairseq's own count of what it trains (spec 2.3); 256 rows of 512.
    "text_base": Size(126_415_872, 85_056_000, 131_072, None),
    "text_base_fairseq": Size(126_415_872, 85_056_000, 131_072, None),
    "text_large": Size(358_506_496, 302_311_424, 131_072, None),
    "text_tiny": Size(1_387_904, 793_344, 4096, None),
    "joint_base": Size(136_392_272, 89_248_848, (2048, 3800, 131_072), None),
    "joint_tiny": Size(2_024_336, 1_321_104, (32, 32, 4096), None),
}
"""A new recipe needs a line here."""

VOCABULARIES = {"text_tiny": 4000, "joint_tiny": 4000}
"""Ids that a text recipe is counted with, where they are not RoBERTa's 50,265."""


def loaded(recipe: str) -> Config:
    """The recipe, with a vocabulary where it leaves that to the tokenizer."""
    config = load_config(recipe)
    if "text" not in modalities(config):
        return config
    assert config.text.vocabulary is None  # the tokenizer's
    return load_config(recipe, text__vocabulary=VOCABULARIES.get(recipe, 50_265))


def vit_parameters(config: Config) -> dict[str, int]:
    """Parameters of a BEiT-like ViT by part, counted on paper."""
    d, hidden = config.model.width, int(config.model.width * config.model.mlp_ratio)
    patch, grid = config.vision.patch_size, config.vision.image_size // config.vision.patch_size
    attention = 3 * d * d + 2 * d + d * d + d  # query, key and value; biases of query and value; output
    block = 2 * 2 * d + attention + (d * hidden + hidden + hidden * d + d) + 2 * d  # two norms, MLP, two layer scales
    table = ((2 * grid - 1) ** 2 + 3) * config.model.heads  # every offset; CLS to patch, patch to CLS, CLS to CLS
    return {
        "front_end": 3 * patch * patch * d + d + 2 * d,  # patches, CLS and mask token
        "encoder": config.model.depth * block + table + 2 * d,
        "head": {0: 0, 1: d * d + d}[config.model.head_layers],
    }


def text_parameters(config: Config) -> dict[str, int]:
    """Parameters of RoBERTa's encoder with a head of two layers, counted on paper."""
    d, hidden = config.model.width, int(config.model.width * config.model.mlp_ratio)
    block = 4 * (d * d + d) + (d * hidden + hidden + hidden * d + d) + 2 * 2 * d  # attention, MLP, two norms
    return {
        "front_end": config.text.vocabulary * d + (config.text.max_tokens + 2) * d,  # positions begin at 2
        "encoder": 2 * d + config.model.depth * block,  # the norm of the embeddings is the encoder's first
        "head": (d * 2 * d + 2 * d) + (2 * d * d + d),
    }


def numel(module: nn.Module) -> int:
    parameters = list(module.parameters())
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    return sum(parameter.numel() for parameter in parameters)


def built(config: Config) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        return build_student(config), build_teacher(config)


@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes(recipe: str) -> None:
    config, expected = loaded(recipe), SIZES[recipe]
    student, teacher = built(config)
    assert (numel(student), numel(teacher)) == (expected.student, expected.teacher)
    alone = [of_modality(config, modality) for modality in modalities(config)]
    budgets = [view.data.micro_batch for view in alone]
    batch = expected.batch if isinstance(expected.batch, tuple) else (expected.batch,)
    micro_batches = config.train.micro_batches_per_step
    assert tuple((b.samples or b.seconds or b.tokens) * micro_batches for b in budgets) == batch
    if expected.masked is not None:
        assert mask_budget(config.mask.ratio, positions(config)) == expected.masked
    (row,) = re.findall(rf"^\| `{recipe}` \|.*", DOCS.read_text(), flags=re.MULTILINE)
    for numbers in ((expected.student,), batch, (config.train.steps,)):
        assert f"| {' / '.join(f'{number:,}' for number in numbers)} |" in row


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("modality", ["vision", "speech", "text"])
def test_joint_recipes_have_the_parts_that_they_say(size: str, modality: str) -> None:
    """All that is a modality's own is its recipe's, but for the averaged layers of text, which has fewer blocks."""
    joint, single = of_modality(load_config(f"joint_{size}"), modality), load_config(f"{modality}_{size}")
    if (size, modality) == ("tiny", "text"):
        assert (single.targets.layers, single.model.depth) == (3, 4)
        single = replace(single, targets=replace(single.targets, layers=4))
    for section in (*PART_SECTIONS, modality, *(("augment",) if modality == "vision" else ())):
        assert getattr(joint, section) == getattr(single, section), section
    for section, keys in PART_KEYS.items():
        for key in keys:
            expected = getattr(getattr(single, section), key)
            if key == "bucket_ratio" and modality == "vision":
                continue  # images are of one size
            assert getattr(getattr(joint, section), key) == expected, f"{section}.{key}"


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.startswith(("vision_", "text_"))])
def test_parameters_counted_on_paper(recipe: str) -> None:
    """Part by part; the teacher has what its scope says, and never a head."""
    config = loaded(recipe)
    student, teacher = built(config)
    expected = {"vision": vit_parameters, "text": text_parameters}[config.modality](config)
    assert {name: numel(part) for name, part in student.named_children()} == expected
    scope = ("encoder", "front_end") if config.teacher.scope == "model" else ("encoder",)
    assert {name: numel(part) for name, part in teacher.named_children()} == {part: expected[part] for part in scope}


@pytest.mark.parametrize(("recipe", "millions"), [("vision_base", 86), ("vision_large", 304), ("vision_huge14", 632)])
def test_sizes_are_those_of_the_vit_papers(recipe: str, millions: int) -> None:
    """ViT-B, L and H have 86, 304 and 632 million parameters; ours have a head and a bias table, and no positions."""
    assert round(numel(built(load_config(recipe))[0]) / 1e6) == millions


@pytest.mark.parametrize("json", JSONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_deepspeed_json_takes_every_recipe(recipe: str, json: Path) -> None:
    """On the smallest layout, and on the largest that its micro-batches allow."""
    config = load_config(recipe)
    joint = config.modality == "joint"  # each modality has a budget of its own
    micro_batches, samples = config.train.micro_batches_per_step, (not joint and config.data.micro_batch.samples) or 1
    for data_parallel in (1, micro_batches):
        filled = fill_deepspeed(read_deepspeed_json(json), config, precision="bf16", data_parallel=data_parallel)
        assert filled["train_batch_size"] == samples * micro_batches
        assert filled["train_micro_batch_size_per_gpu"] == samples
        assert filled["gradient_accumulation_steps"] == micro_batches // data_parallel
        assert filled["gradient_clipping"] == config.optimizer.clip
        assert "auto" not in str(filled)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_run_writes_down_is_the_recipe(recipe: str, tmp_path: Path) -> None:
    """config.yaml of its run directory gives the same configuration again."""
    config = load_config(recipe)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config
    assert config.train.output_dir == f"runs/{recipe}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_where_its_values_come_from(recipe: str) -> None:
    """Each key on a line of its own with a comment, but for the name of the run directory."""
    for line in recipes()[recipe].read_text().splitlines():
        assert len(line) <= 120, line
        key = re.match(r" +(\w+):", line)
        if key and key[1] != "output_dir":
            assert re.search(r"\S\s+# \S", line), f"{recipe}: {line}"


COMPLETE = {
    "vision": {
        "model": "width depth heads mlp_ratio norm norm_eps layer_scale qkv_bias relative_bias init head_layers "
        "dropout attention_dropout drop_path layer_drop",
        "vision": "image_size patch_size channels mean std",
        "augment": "crop_scale_min crop_scale_max flip jitter draft",
        "mask": "ratio min_block max_block min_aspect",
        "targets": "layers tensor layer_norm average_norm",
        "loss": "kind beta scale",
        "teacher": "scope decay_start decay_end",
        "optimizer": "lr betas eps weight_decay decay_all clip",
        "schedule": "kind warmup_steps peak_in_warmup start_lr min_lr",
        "data": "micro_batch",
        "train": "steps micro_batches_per_step output_dir",
    },
    "speech": {
        "model": "width depth heads mlp_ratio norm norm_eps layer_scale qkv_bias relative_bias init head_layers "
        "dropout attention_dropout drop_path layer_drop deep_norm",
        "speech": "conv_layers conv_bias extractor_norm position_depth position_kernel position_groups normalise "
        "min_seconds max_seconds",
        "mask": "ratio span min_spans equal_counts",
        "targets": "layers tensor layer_norm average_norm padding",
        "loss": "kind scale",
        "teacher": "scope copied decay_start decay_end decay_steps",
        "optimizer": "lr betas eps weight_decay decay_all clip",
        "schedule": "kind warmup_steps",
        "data": "micro_batch bucket_ratio",
        "train": "steps micro_batches_per_step output_dir",
    },
    "joint": {
        "model": "width depth heads mlp_ratio norm qkv_bias init dropout attention_dropout drop_path layer_drop "
        "deep_norm",
        "joint": "norms vision speech text",
        "teacher": "decay_start decay_end decay_steps",
        "optimizer": "lr betas eps weight_decay decay_all clip",
        "schedule": "kind warmup_steps",
        "train": "steps micro_batches_per_step output_dir",
    },
    "text": {
        "model": "width depth heads mlp_ratio norm norm_eps layer_scale qkv_bias relative_bias init head_layers "
        "dropout attention_dropout drop_path layer_drop deep_norm",
        "text": "vocabulary max_tokens blocks loss_on teacher_sees",
        "mask": "ratio span random kept",
        "targets": "layers tensor layer_norm average_norm",
        "loss": "kind beta scale",
        "teacher": "scope copied decay_start decay_end decay_steps",
        "optimizer": "lr betas eps weight_decay decay_all clip",
        "schedule": "kind warmup_steps",
        "data": "micro_batch bucket_ratio",
        "train": "steps micro_batches_per_step output_dir",
    },
}
"""By modality, the keys that decide what is computed: a full-size recipe leaves none of them to a default."""


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.endswith("_tiny")])
def test_full_size_recipes_leave_nothing_to_defaults(recipe: str) -> None:
    given = yaml.safe_load(recipes()[recipe].read_text())
    for section, keys in COMPLETE[given["modality"]].items():
        assert set(keys.split()) <= given[section].keys(), section


def test_large_phases_differ_in_the_schedule_alone() -> None:
    """Same model, data and objective; a slower teacher, a shorter warm-up, and the first phase's weights."""
    first, second = (to_yaml(load_config(name)).splitlines() for name in ("vision_large", "vision_large_phase2"))
    differing = {a.split(":")[0].strip() for a, b in zip(first, second, strict=True) if a != b}
    assert differing == {"decay_start", "decay_end", "warmup_steps", "init", "init_teacher", "seed", "output_dir"}


def test_paper_and_program_differ_where_the_docs_say() -> None:
    """docs/recipes.md has a row for each key in which text_base and text_base_fairseq differ, and for no other."""
    paper, program = (yaml.safe_load(to_yaml(load_config(name))) for name in ("text_base", "text_base_fairseq"))
    differing = {
        f"{section}.{key}"
        for section, values in paper.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if program[section][key] != value
    }
    section = DOCS.read_text().split("### Text", 1)[1].split("\n## ", 1)[0].split("\n### ", 1)[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")]
    named = {key for row in rows for key in re.findall(r"`(\w+\.\w+)`", row)}
    assert named == differing - {"train.output_dir", "schedule.hold_fraction"}  # of which a cosine reads nothing


@pytest.mark.parametrize("tensor", [2, 4, 8, 16])
def test_huge_can_be_split(tensor: int) -> None:
    """Heads and hidden units divide by every size that a node may offer."""
    config = load_config("vision_huge14", parallel__tensor=tensor)
    assert config.model.heads % tensor == 0
    assert int(config.model.width * config.model.mlp_ratio) % tensor == 0
