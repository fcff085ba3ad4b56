"""The README's commands, typed as they stand: the demo first, then each line of the bash blocks that follow it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.distributed.harness import REPOSITORY, run_command

WORKING = ("launch", "tools", "ds_configs", "megad2v")
"""What the commands expect below the current folder."""


def readme_commands() -> list[str]:
    """Every command of the README's ```bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.split("    #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_readme_starts_with_the_two_commands_that_the_makefile_has() -> None:
    assert readme_commands()[:2] == ["make demo", "make test"]
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"demo", "test", "test-all", "lint", "mutants", "install"} <= set(targets)


def test_readme_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / "README.md").read_text()):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), target


@pytest.mark.timeout(1500)
def test_demo_and_every_command_after_it(tmp_path: Path) -> None:
    """`make demo` (its script, shortened to 4 steps), then the rest, in a folder that has only what a checkout has."""
    for name in WORKING:
        (tmp_path / name).symlink_to(REPOSITORY / name)
    environment = {
        "DEMO_STEPS": "4",
        "DEMO_IMAGES_PER_CLASS": "25",
        "DEMO_CLIPS_PER_SPEAKER": "3",
        "DEMO_STORIES": "300",
        "HF_HUB_OFFLINE": "1",
    }
    done = run_command(["bash", "launch/demo.sh"], timeout=700, cwd=tmp_path, env=environment, ranks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    for corpus in ("image", "speech", "text", "joint-vision", "joint-speech", "joint-text"):
        export = tmp_path / "runs" / "demo" / "export" / "hf" / corpus
        assert (export / "model.safetensors").exists() and (export / "parity.json").exists()
    assert "runs/demo/export/hf/image" in done.stdout and "tools/probe.py" in done.stdout

    for command in readme_commands()[2:]:
        words = shlex.split(command.replace("--train.steps 20", "--train.steps 2"))
        done = run_command(words, timeout=100, cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    runs = tmp_path / "runs"
    assert [json.loads(line)["step"] for line in (runs / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert not (runs / "other").exists()  # --check leaves nothing
    assert (runs / "mine" / "hf" / "config.json").exists()
