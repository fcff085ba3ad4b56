"""A joint run from the demo's corpora to its logs: all three modalities, one to an update, on two processes."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megad2v.checkpoint.catalog import steps_present
from megad2v.checkpoint.reader import Checkpoint
from tests.cli.live_run import LiveRun, last_step
from tests.distributed.harness import REPOSITORY, run_command
from tests.tolerances import CURVE

MODALITIES = ("vision", "speech", "text")
CORPORA = {"vision": "image", "speech": "speech", "text": "text"}
SIZES = ("--images-per-class", "6", "--clips-per-speaker", "3", "--stories", "60")
STEPS, LOG_EVERY = 24, 3
SMALL = [
    *("--model.width", "32", "--model.depth", "2", "--model.heads", "2", "--vision.image_size", "32"),
    *("--speech.position_depth", "1", "--data.workers", "1"),
]
for modality in MODALITIES:
    SMALL += [f"--joint.{modality}.targets.layers", "2"]
SMALL += ["--joint.vision.micro_batch.samples", "4", "--joint.speech.micro_batch.seconds", "8"]
SMALL += ["--joint.text.micro_batch.tokens", "512", "--joint.speech.loss_weight", "0.5"]


def tool(*command: str | Path) -> None:
    run_command([sys.executable, *command], timeout=150, cwd=REPOSITORY).check_returncode()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image/, speech/ and text/, each with train/ and valid/, made by the tools themselves."""
    root = tmp_path_factory.mktemp("joint")
    tool("tools/train_tokenizer.py", "--model", "byte", "--output", root / "tokenizer")
    for part, seed in (("train", "1"), ("valid", "2")):
        tool("tools/make_demo_data.py", root / f"data-{part}", *SIZES, "--seed", seed)
        for corpus in CORPORA.values():
            more = ["--tokenizer", root / "tokenizer", "--document", "blank-lines"] if corpus == "text" else []
            tool(
                "tools/make_shards.py", corpus, "--input", root / f"data-{part}" / corpus,
                "--output", root / corpus / part, *more,
            )  # fmt: skip
    return root


def flags(shards: Path, run: Path, layout: str) -> list[str]:
    """Of launch/pretrain.py, but for what differs between the runs."""
    patterns = [
        f"--data.{key}={json.dumps({modality: str(shards / corpus / part) for modality, corpus in CORPORA.items()})}"
        for key, part in (("shards", "train"), ("valid", "valid"))
    ]
    words = ["--deepspeed", f"ds_configs/{layout}.json", "--config", "joint_tiny", *SMALL, *patterns]
    words += ["--train.steps", str(STEPS), "--train.eval_every", "12", "--data.trace", "true"]
    return [*words, "--train.tensorboard", "false", "--train.output_dir", str(run)]


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """(run directory, what the command said)"""
    run = tmp_path_factory.mktemp("run") / "joint"
    command = ["deepspeed", "--num_gpus", "2", "--master_port", "27431", "launch/pretrain.py"]
    command += [*flags(shards, run, "zero3"), "--train.log_every", str(LOG_EVERY)]
    return run, run_command(command, timeout=280, cwd=REPOSITORY, ranks=2)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def consumed(run: Path) -> dict[int, str]:
    """Modality of each step, as both ranks' traces say."""
    turns: dict[int, str] = {}
    for rank in range(2):
        for line in lines_of(run / "trace" / f"rank{rank}.jsonl"):
            assert turns.setdefault(line["step"], line["modality"]) == line["modality"]
    return turns


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_modality_is_trained_and_logged_by_its_own_steps(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    turns = consumed(run)
    assert sorted(turns) == list(range(1, STEPS + 1)) and set(turns.values()) == set(MODALITIES)
    trained = [line for line in lines_of(run / "metrics.jsonl") if "loss" in line]
    for modality in MODALITIES:
        own = [step for step in sorted(turns) if turns[step] == modality]
        due = {step for count, step in enumerate(own, 1) if count % LOG_EVERY == 0 or step == STEPS}
        lines = [line for line in trained if line["modality"] == modality]
        assert due and {line["step"] for line in lines} == due
        epochs = [line[f"epoch_{modality}"] for line in lines]
        assert epochs == sorted(epochs) and epochs[0] > 0
        for key in ("loss", "target_std", "pred_std", "grad_norm", "lr", "tokens_per_second", "mfu"):
            assert all(math.isfinite(line[key]) for line in lines), (modality, key)
        assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
        assert f"/{STEPS}  {modality}  loss " in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_modality_is_validated(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, done = finished
    validated = [line for line in lines_of(run / "metrics.jsonl") if "valid_loss" in line]
    assert [(line["step"], line["modality"]) for line in validated] == [
        (step, modality) for step in (12, STEPS) for modality in MODALITIES
    ]
    for line in validated:
        assert line["valid_loss"] > 0 and 0 < line["valid_retrieval_chance"] < 1
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert f"{line['modality']}  valid_loss {line['valid_loss']:.4g}" in done.stdout
    assert "factors on the gradient vision 1, speech 0.5, text 1" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_remembers_each_modality(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, _ = finished
    index = Checkpoint(run / "checkpoints" / f"step_{STEPS:08d}").index
    turns = list(consumed(run).values())
    progress = index.state["progress"]
    assert progress["updates"] == STEPS, "no step of this run is refused"
    assert progress["modality_updates"] == {modality: turns.count(modality) for modality in MODALITIES}
    for key in ("taken_losses", "taken_norms"):
        assert {modality: len(values) for modality, values in progress[key].items()} == progress["modality_updates"]
    assert "image decoder" in index.code and "audio decoder" in index.code


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_resumed_on_another_layout(
    finished: tuple[Path, subprocess.CompletedProcess[str]], shards: Path, tmp_path: Path
) -> None:
    """In the middle of everybody's epoch: one process under ZeRO-1 to its end by kill -9, then two tensor-parallel ones
    under ZeRO-3. What was consumed, trained and validated is that of two data-parallel ones that ran through."""
    run, often = tmp_path / "run", ["--train.log_every", "1", "--train.save_every", "3"]
    with LiveRun([*flags(shards, run, "zero1"), *often], ranks=1, logs=tmp_path / "log1") as live:
        live.wait_for_step(8, 150)
        live.signal(0, signal.SIGKILL)
        assert live.wait(30) == [-signal.SIGKILL]
    assert max(steps_present(run)) < last_step(run) < STEPS, "to be killed between two checkpoints, on its way"
    words = [*flags(shards, run, "zero3"), *often, "--parallel.tensor", "2"]
    with LiveRun(words, ranks=2, logs=tmp_path / "log2") as live:
        assert live.wait(300) == [0, 0], live.log()
    expected, found = (
        sorted((line["step"], line["micro_batch"], line["modality"], line["samples"], line["hashes"]) for line in lines)
        for lines in (
            [line for path in (one / "trace").glob("rank*.jsonl") for line in lines_of(path)]
            for one in (finished[0], run)
        )
    )
    assert found == expected and len(found) == 2 * STEPS
    for kind in ("loss", "valid_loss"):
        expected_curve, curve = (
            {(line["step"], line["modality"]): line[kind] for line in lines_of(one / "metrics.jsonl") if kind in line}
            for one in (finished[0], run)
        )
        assert len(expected_curve) > 5 or kind == "valid_loss"
        assert {key: curve[key] for key in expected_curve} == pytest.approx(expected_curve, rel=CURVE)
