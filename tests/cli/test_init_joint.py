"""train.init between joint runs and those of one modality: what matches, what is said of it, and every value."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.view import View
from megad2v.config.load import load_config
from megad2v.convert.load import checkpoint_config
from megad2v.modalities.build import joint_name
from megad2v.training.initial import Matching, initialised
from tests.checkpoints import small_joint_config, small_speech_config, small_state, write_small_checkpoint
from tests.distributed.harness import REPOSITORY, run_command

MODALITIES = ("vision", "speech", "text")
CONFIG = small_joint_config()
STATE = small_state(CONFIG)


def test_views_between_models(tmp_path: Path) -> None:
    """What train.init reads: any range of a parameter, under the other model's names, key biases either way."""
    speech = small_speech_config(depth=4, heads=4)
    write_small_checkpoint(tmp_path / "joint", CONFIG, STATE)
    state = small_state(speech)
    write_small_checkpoint(tmp_path / "speech", speech, state)
    joint, single = (Checkpoint(tmp_path / name / "checkpoints" / "step_00000007") for name in ("joint", "speech"))
    down = View(joint, speech, {name: list(value.shape) for name, value in state["student"].items()})
    assert set(down.index.shapes) == set(state["student"])  # nothing is missing
    assert down.rebiased == {f"encoder.blocks.{n}.attention.qkv.bias" for n in range(4)}
    up = View(single, CONFIG, {name: list(value.shape) for name, value in STATE["student"].items()})
    mine = {name for name in STATE["student"] if "parts.vision." not in name and "parts.text." not in name}
    assert set(up.index.shapes) == mine and up.unused(mine) == []
    for kind in ("student", "teacher"):
        assert set(up.names(kind)) == {joint_name("speech", name, STATE["student"]) for name in state[kind]}
        for name in down.names(kind):
            theirs = joint_name("speech", name, STATE["student"])
            large, small = state[kind][name], STATE[kind][theirs]
            if name in down.rebiased:
                rows = large.view(4, 3, -1)
                assert torch.equal(up.full(kind, theirs), torch.stack((rows[:, 0], rows[:, 2]), 1).flatten())
                rows = down.full(kind, name).view(4, 3, -1)
                assert not rows[:, 1].any() and torch.equal(rows[:, [0, 2]].flatten(), small)
                assert torch.equal(down.read(kind, name, 5, 40), rows.flatten()[5:45])
            else:
                assert torch.equal(down.full(kind, name), small) and torch.equal(up.full(kind, theirs), large)
    # Joint to joint, and what another run's modalities lack.
    less = small_joint_config(joint__speech__weight=0.0)
    fewer = {name: list(value.shape) for name, value in small_state(less)["student"].items()}
    across = View(joint, less, fewer)
    assert across.index.shapes == fewer and all("parts.speech." in name for name in across.unused(fewer))
    words = initialised(single, CONFIG, matching_of(up), {})
    assert words[0].endswith(f"{len(mine)} parameters matched")
    assert words[1] == "into what all modalities share, and speech's own; the others' own start new"
    assert any(line.startswith("model.qkv_bias: full there, no_key here") for line in words)
    text, vision = (sum(f"parts.{name}." in theirs for theirs in STATE["student"]) for name in ("text", "vision"))
    assert words[-1] == f"missing: all {text} of text's own, all {vision} of vision's own"
    words = initialised(joint, less, matching_of(across), {})
    assert not any(line.startswith(("missing", "into")) for line in words)
    assert words[-1] == f"unused: all {len(across.unused(fewer))} of speech's own"


def matching_of(view: View) -> Matching:
    """What `initialise_from` finds, without an engine."""
    ours = small_state(checkpoint_config(view))["student"]
    matched = [name for name in ours if view.index.shapes.get(name) == list(ours[name].shape)]
    missing = sorted(set(ours) - set(matched))
    return Matching(matched, missing, view.unused(matched), sorted(view.rebiased))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_runs_start_from_each_other(demo_shards: Path, tmp_path: Path) -> None:
    """Joint to single, single to joint, joint to joint, through launch/pretrain.py: a step that moves nothing leaves
    student and teacher as the first checkpoint has them, to the bit."""
    shape = {"model__width": 32, "model__depth": 2, "model__heads": 2, "vision__image_size": 32}
    layers = {f"joint__{name}__targets__layers": 2 for name in MODALITIES}
    config = load_config("joint_tiny", text__vocabulary=261, **shape, **layers)
    state = small_state(config)
    write_small_checkpoint(tmp_path / "joint", config, state)
    command = [sys.executable, "launch/pretrain.py", "--deepspeed", "ds_configs/zero2.json", "--data.workers", "0"]
    command += [
        "--train.steps",
        "1",
        "--optimizer.lr",
        "1e-30",
        "--schedule.min_lr",
        "0",
        "--train.tensorboard",
        "false",
    ]
    command += ["--teacher.decay_start", "1", "--teacher.decay_end", "1", "--model.width", "32", "--model.depth", "2"]
    command += ["--model.heads", "2", "--vision.image_size", "32"]
    single = ["--config", "vision_tiny", "--targets.layers", "2", "--data.shards", str(demo_shards / "train")]
    only = [f"--joint.{name}.weight=0" for name in ("speech", "text")]
    only += [f"--joint.{name}.targets.layers=2" for name in MODALITIES]
    joint = ["--config", "joint_tiny", *only, f"--data.shards={{vision: {demo_shards / 'train'}}}"]

    def started(name: str, source: str, *how: str) -> tuple[Checkpoint, str]:
        places = ["--train.init", str(tmp_path / source), "--train.output_dir", str(tmp_path / name)]
        done = run_command([*command, *how, *places], timeout=90, cwd=REPOSITORY, ranks=1)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "missing:" not in done.stdout
        return Checkpoint(tmp_path / name / "checkpoints" / "step_00000001"), done.stdout

    first, said = started("first", "joint", *single)
    assert "of that joint model what all modalities share, and vision's own" in said
    assert "unused: all " in said and "of speech's own" in said and "of text's own" in said
    second, said = started("second", "first", *joint)
    assert "into what all modalities share, and vision's own" in said and "unused:" not in said
    third, said = started("third", "second", *joint)
    assert "own" not in said.split("weights from")[1].split("step 1/1")[0]
    for kind in ("student", "teacher"):
        for name in first.names(kind):
            theirs = joint_name("vision", name, state["student"])
            assert torch.equal(first.full(kind, name), state[kind][theirs]), (kind, name)
        for name in second.names(kind):
            assert torch.equal(second.full(kind, name), state[kind][name]), (kind, name)
            assert torch.equal(third.full(kind, name), state[kind][name]), (kind, name)
