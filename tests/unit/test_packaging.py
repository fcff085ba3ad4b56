"""What a wheel holds and asks for, and that a replacement of Pillow or torch is left alone."""

from __future__ import annotations

import importlib.resources
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytest.importorskip("setuptools")


def copy_of_what_is_built(target: Path) -> Path:
    """A build leaves folders behind; they shall not lie in the checkout, where a second build would pick them up."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "megad2v", "ds_configs"):
        if (REPOSITORY / name).exists():
            # cp keeps megad2v/ds_configs the link it is
            subprocess.run(["cp", "-R", "-P", str(REPOSITORY / name), str(target)], check=True)
    return target


def build_wheel(source: Path, output: Path, **environment: str) -> zipfile.ZipFile:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        + ["--no-build-isolation", "--no-index", "--wheel-dir", str(output), str(source)],
        check=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    (wheel,) = output.glob("megad2v-*.whl")
    return zipfile.ZipFile(wheel)


def requirements(wheel: zipfile.ZipFile) -> list[str]:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = wheel.read(name).decode().splitlines()
    return [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_what_is_built(tmp_path_factory.mktemp("packaging") / "source")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def test_every_source_file_is_in_the_wheel(wheel: zipfile.ZipFile):
    """Recipes, ds_configs and modules, each file; a folder of modules without __init__.py would be missing here."""
    package = REPOSITORY / "megad2v"
    wanted = {str(path.relative_to(REPOSITORY)) for path in package.rglob("*.py")}
    wanted |= {str(path.relative_to(REPOSITORY)) for path in (package / "config" / "recipes").glob("*.yaml")}
    wanted |= {f"megad2v/ds_configs/{path.name}" for path in (REPOSITORY / "ds_configs").glob("*.json")}
    assert {"megad2v/ds_configs/zero3.json", "megad2v/config/recipes/vision_tiny.yaml"} <= wanted
    packed = {name for name in wheel.namelist() if name.startswith("megad2v/")}
    assert packed == wanted


def test_ds_configs_of_the_wheel_are_those_of_the_checkout(wheel: zipfile.ZipFile):
    for path in (REPOSITORY / "ds_configs").glob("*.json"):
        assert wheel.read(f"megad2v/ds_configs/{path.name}") == path.read_bytes()


def test_data_files_are_found_as_resources():
    """By the same address in a checkout, an editable install and a wheel."""
    package = importlib.resources.files("megad2v")
    assert (package / "ds_configs" / "zero3.json").is_file()
    assert (package / "config" / "recipes" / "vision_tiny.yaml").is_file()


def test_requirements(wheel: zipfile.ZipFile):
    needed = requirements(wheel)
    core = {name.split("[")[0] for name in needed if "extra ==" not in name}
    assert any(name.startswith("torch>=") for name in core)
    assert any(name.startswith("Pillow>=") for name in core)
    for heavy in ("torchaudio", "transformers", "mpi4py", "soundfile", "sentencepiece", "torchvision"):
        assert not any(name.lower().startswith(heavy) for name in core), f"{heavy} belongs to an extra"
    extras = {name.rpartition("extra == ")[2].strip("\"'") for name in needed if "extra ==" in name}
    assert extras == {"hf", "speech", "text", "mpi", "torchaudio", "dev"}


def ask_setup(source: Path, python: Path, module: str, distribution: str) -> str:
    """What setup.py, run by `python` in pip's way (build isolation sets PYTHONPATH), finds out about the target."""
    text = (source / "setup.py").read_text()
    text = text[: text.index("\nsetup(\n")] + f"\nprint(provided_by_another({module!r}, {distribution!r}))\n"
    text = text.replace("from setuptools import find_packages, setup\n", "").replace(
        "__file__", repr(str(source / "setup.py"))
    )
    environment = {**os.environ, "PYTHONPATH": str(source)}
    completed = subprocess.run(
        [str(python), "-c", text], capture_output=True, text=True, env=environment, check=True, cwd=source
    )
    return completed.stdout.strip()


@pytest.mark.parametrize(
    ("metadata", "left_out"),
    [("Pillow_SIMD-9.5.0.post2", "True"), ("pillow-13.0.0", "False"), (None, "False")],
    ids=["pillow-simd", "Pillow", "neither"],
)
def test_pillow_is_required_unless_another_distribution_provides_it(
    source: Path, tmp_path: Path, metadata: str | None, left_out: str
):
    """A bare environment with stand-ins: only names matter to pip, and only the import to us."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=60)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    if metadata:
        (packages / "PIL").mkdir()
        (packages / "PIL" / "__init__.py").touch()
        (packages / f"{metadata}.dist-info").mkdir()
        name, _, version = metadata.partition("-")
        (packages / f"{metadata}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    assert ask_setup(source, tmp_path / "venv" / "bin" / "python", "PIL", "Pillow") == left_out
