"""launch/pretrain.py as its users call it: what it writes, and how it refuses what it cannot do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from megad2v.training.main import main
from tests.cli.conftest import TINY
from tests.distributed.harness import REPOSITORY, run_command

ZERO3 = str(REPOSITORY / "ds_configs" / "zero3.json")
SCRIPT = str(REPOSITORY / "launch" / "pretrain.py")


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `main` leaves for arguments that it refuses before any process group exists."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("pretrain: error: ")
    return out + err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--deepspeed", ZERO3, "--model.dept", "4"], ["--model.dept", "did you mean model.depth?"]),
        (["--deepspeed", ZERO3, "--train.precision", "fp16"], ["train.precision", "fp16", "bf16"]),
        (["--deepspeed", ZERO3, "--model.width", "wide"], ["model.width", "int", "wide"]),
        (["--deepspeed", ZERO3, "--config", "vision_tyni"], ["vision_tyni", "did you mean vision_tiny?"]),
        (["--deepspeed", "no/such.json"], ["no/such.json", "ds_configs/zero3.json"]),
        (["--config", "vision_tiny"], ["--deepspeed"]),
        (["--deepspeed", ZERO3, "--parallel.tensor", "3"], ["parallel.tensor", "model.heads = 4"]),
    ],
)
def test_refuses_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    line = _refused(arguments, capsys)
    for word in words:
        assert word in line


def test_unknown_key_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("targets: {layer: 3}\n")
    line = _refused(["--deepspeed", ZERO3, "--config", str(path)], capsys)
    assert "targets.layer" in line and str(path) in line and "targets.layers" in line


def test_fp16_in_the_deepspeed_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"fp16": {"enabled": True}, "zero_optimization": {"stage": 3}}))
    assert "fp16" in _refused(["--deepspeed", str(path)], capsys)


def test_print_config_is_the_whole_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--deepspeed", ZERO3, "--print-config", "--model.depth", "9", "--targets.layers", "4"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["model"]["depth"] == 9
    assert {"data", "train", "teacher", "optimizer", "parallel"} <= set(tree)


@pytest.mark.timeout(60)
def test_literal_command_without_shards_says_what_to_type(tmp_path: Path) -> None:
    """`deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json` in a folder where no demo was made."""
    done = run_command(["deepspeed", SCRIPT, "--deepspeed", ZERO3], timeout=50, cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("pretrain: error")]
    assert len(lines) == 1
    for words in ("make demo", "tools/make_demo_data.py", "tools/make_shards.py", "--data.shards"):
        assert words in lines[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("local_rank", [0, 1])
def test_what_is_wrong_on_one_host_alone_is_said_there(local_rank: int, tmp_path: Path) -> None:
    """Before the ranks have met, rank 0 cannot know that a file is missing on another host."""
    place = {"RANK": str(2 + local_rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    command = ["python", SCRIPT, "--deepspeed", "nowhere.json"]
    env = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run_command(command, timeout=50, cwd=tmp_path, env=env)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "pretrain: error: --deepspeed nowhere.json" in line]
    assert len(said) == (1 if local_rank == 0 else 0)


@pytest.mark.timeout(60)
def test_a_directory_has_one_run_at_a_time(demo_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with FileLock(output / ".lock"):
        flags = ["--data.shards", demo_shards / "train", "--train.output_dir", output]
        done = run_command(["python", SCRIPT, "--deepspeed", ZERO3, *flags], timeout=50, cwd=REPOSITORY, ranks=1)
    assert done.returncode == 2
    assert "train.output_dir: another run is writing to" in done.stderr
    assert [path.name for path in output.iterdir()] == [".lock"]


def _broken(kind: str, demo: Path, tmp_path: Path) -> tuple[list[str], list[str]]:
    """(flags, words that the error must have)."""
    train = demo / "train"
    if kind == "wrong_path":
        return ["--data.shards", str(tmp_path / "nowhere")], ["data.shards", "nowhere"]
    if kind == "empty_pattern":
        return ["--data.shards", str(train / "none-*.tar")], ["data.shards", "none-*.tar"]
    if kind == "M_not_divisible":
        return ["--data.shards", str(train), "--train.micro_batches_per_step", "3"], ["micro_batches_per_step", "4"]
    if kind == "deepspeed_typo":
        return ["--data.shards", str(train)], ["overlap_com", "DeepSpeed refuses"]
    if kind == "deepspeed_removed":
        return ["--data.shards", str(train)], ["Apex AMP", "DeepSpeed refuses"]
    if kind == "contradiction":
        return ["--data.shards", str(train), "--optimizer.clip", "2"], ["gradient_clipping", "optimizer.clip"]
    copy = tmp_path / "copy"
    shutil.copytree(train, copy)
    shutil.rmtree(copy / "index")
    tar = sorted(copy.glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:5000])
    return ["--data.shards", str(copy)], [tar.name]


JSON_CHANGES = {
    "contradiction": (None, {"gradient_clipping": 1.0}),
    "deepspeed_typo": ("zero_optimization", {"overlap_com": True}),
    "deepspeed_removed": (None, {"amp": {"enabled": False}}),
}
"""Kind of bad DeepSpeed JSON -> (section, keys put into it)."""

ON_TWO_RANKS = {"wrong_path", "M_not_divisible"}
"""What only several ranks can have, and one more to see that a single rank speaks; a launch costs seconds."""


@pytest.mark.timeout(90)
@pytest.mark.parametrize("kind", ["wrong_path", "empty_pattern", "M_not_divisible", *JSON_CHANGES, "corrupt_tar"])
def test_bad_input_is_one_line(kind: str, demo_shards: Path, tmp_path: Path) -> None:
    flags, words = _broken(kind, demo_shards, tmp_path)
    json_path = tmp_path / "ds.json"
    content = json.loads(Path(ZERO3).read_text())
    section, change = JSON_CHANGES.get(kind, (None, {}))
    (content if section is None else content[section]).update(change)
    json_path.write_text(json.dumps(content))
    output = tmp_path / "run"
    start = ["deepspeed", "--num_gpus", "2"] if kind in ON_TWO_RANKS else [sys.executable]
    command = [*start, SCRIPT, "--deepspeed", str(json_path), *TINY, *flags, "--train.output_dir", str(output)]
    done = run_command(command, timeout=80, cwd=tmp_path)
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    lines = [line for line in text.splitlines() if line.startswith("pretrain: error")]
    assert len(lines) == 1 and "Traceback" not in text, text
    for word in words:
        assert word in lines[0]
    assert not (output / "checkpoints").exists()


@pytest.mark.timeout(90)
def test_check_leaves_nothing_behind(demo_shards: Path, tmp_path: Path) -> None:
    shards = ["--data.shards", str(demo_shards / "train"), "--data.valid", str(demo_shards / "valid")]
    command = [sys.executable, SCRIPT, "--deepspeed", str(REPOSITORY / "ds_configs" / "zero2.json"), *TINY, *shards]
    done = run_command([*command, "--train.output_dir", str(tmp_path / "run"), "--check"], timeout=80, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check passed" in done.stdout and "MiB" in done.stdout
    assert list(tmp_path.iterdir()) == []
