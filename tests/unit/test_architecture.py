"""The arrows of DESIGN section 2, in every run of the tests and not only in `make lint`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megad2v"


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


def test_import_contracts_hold():
    pytest.importorskip("importlinter")
    command = "from importlinter.cli import lint_imports_command as main; main()"
    completed = subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--no-logo"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr


def test_models_import_torch_alone():
    """And apex's fused layer norm where apex is installed: it is looked for, never required."""
    allowed = {*sys.stdlib_module_names, "torch", "apex"}
    for path in (PACKAGE / "models").rglob("*.py"):
        foreign = {
            name
            for name in imports_of(path)
            if name.partition(".")[0] not in allowed and not name.startswith("megad2v.models")
        }
        assert not foreign, f"{path.relative_to(REPOSITORY)} imports {sorted(foreign)}"


def test_package_imports_with_torch_alone():
    """`import megad2v` and its models, with every other installed package out of reach."""
    program = """
import sys
class OnlyTorch:
    refused = set("deepspeed numpy PIL yaml webdataset transformers safetensors tensorboard sklearn apex".split())
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.refused:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, OnlyTorch())
import megad2v, megad2v.models.encoder
print(megad2v.__version__)
"""
    completed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr


def test_every_folder_of_modules_is_a_package():
    """setuptools and import-linter both pass over a folder without __init__.py, in silence."""
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(REPOSITORY)} has modules but no __init__.py"


def test_no_machine_path_is_written_down():
    """A path of the machine that wrote a file is of use to nobody else."""
    machine = ("/" + "work/", "/" + "root/")
    places = ["*", ".ci", "megad2v", "ds_configs", "launch", "tools", "tests", "benchmarks", "docs"]
    files = {path for place in places for path in REPOSITORY.glob(place if place == "*" else f"{place}/**/*")}
    for path in sorted(files):
        if (
            path.is_file()
            and path.name != ".git"
            and path.suffix in {"", ".py", ".md", ".yaml", ".json", ".jsonl", ".toml", ".sh", ".tsv"}
        ):
            text = path.read_text(errors="replace")
            found = [word for word in machine if word in text]
            assert not found, f"{path.relative_to(REPOSITORY)} holds {found}"
