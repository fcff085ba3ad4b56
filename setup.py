"""Metadata and requirements. pyproject.toml holds the tools' settings; what has to be computed is here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

LOOK = """
import importlib.util, sys
from importlib.metadata import PackageNotFoundError, version
try:
    version(sys.argv[2]); named = True
except PackageNotFoundError:
    named = False
print(importlib.util.find_spec(sys.argv[1]) is not None and not named)
"""


def provided_by_another(module: str, distribution: str) -> bool:
    """Whether `import module` works in the target environment although it holds no distribution of that name.

    pip only compares names. It does not know that pillow-simd is a Pillow, and would lay Pillow over its files; nor
    that a torch which was built on the spot, without metadata, is a torch. Metadata cannot say "A or B", so we look.
    Under build isolation this process sees pip's temporary environment instead of the target: ask a new interpreter
    that ignores PYTHONPATH (-E). (A front end that builds with another interpreter, as uv does, needs
    `--no-build-isolation` for this to see anything.) Where neither is installed, and where the ordinary one is, the
    requirement stays: wheels made there suit everybody.
    """
    found = subprocess.run(
        [sys.executable, "-E", "-c", LOOK, module, distribution], capture_output=True, text=True, cwd="/"
    )
    return found.stdout.strip() == "True"


def unless_provided(module: str, distribution: str, *requirements: str) -> list[str]:
    return [] if provided_by_another(module, distribution) else list(requirements)


def version() -> str:
    """Read, not imported: torch need not be installed yet."""
    source = (HERE / "megad2v" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE).group(1)


def long_description() -> str:
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


INSTALL_REQUIRES = [
    # Lower bounds are judgement, but for what CI runs (torch 2.13.0, DeepSpeed 0.19.8, Python 3.11): see
    # docs/install.md. The engine room reads DeepSpeed's private fields, hence its upper bound: a new minor release is
    # tried before it is admitted.
    *unless_provided("torch", "torch", "torch>=2.6"),
    "deepspeed>=0.19.8,<0.20",
    "numpy>=1.26",
    "filelock>=3.12",  # torch needs it too
    "safetensors>=0.4.3",
    "xxhash>=3.4",  # checksums of checkpoints, at memory speed
    "webdataset>=0.2.100",
    # Every run writes `tensorboard/`, and tools/probe.py is part of judging every run: neither should fail with a
    # missing import at the end of a long job. TensorBoard goes with Pillow because it asks for Pillow by name itself,
    # and would bring it in over pillow-simd (docs/install.md has the way round).
    *unless_provided("PIL", "Pillow", "Pillow>=9.5", "tensorboard>=2.14"),
    "scikit-learn>=1.4",
    # command line and settings
    "PyYAML>=6",
    "jsonargparse>=4.35",
    "docstring-parser>=0.16",
    "tqdm>=4.66",
]

EXTRAS = {
    "hf": ["transformers>=4.45", "tokenizers>=0.20"],  # export to, import from and parity with Hugging Face
    "speech": ["soundfile>=0.12", "soxr>=0.4"],  # decoding and resampling
    "text": ["sentencepiece>=0.2"],  # training vocabularies and encoding; *.zst asks for zstandard when there is one
    "mpi": ["mpi4py>=4"],  # make_shards --mpi; mpirun on several hosts without MASTER_ADDR
    "torchaudio": ["torchaudio"],  # CUDA machines only: there is no CPU build (docs/install.md)
    "dev": ["pytest>=8", "pytest-timeout>=2.3", "ruff>=0.17.6,<0.18", "import-linter>=2.15", "setuptools>=70.1"],
}

setup(
    name="megad2v",
    version=version(),
    description="data2vec pretraining for speech, vision and text at scale, on DeepSpeed",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megad2v", "megad2v.*"]),
    # megad2v/ds_configs is a link to the top-level folder, so that one address finds these files in a checkout, in an
    # editable install and in a wheel: importlib.resources.files("megad2v") / "ds_configs" / "zero3.json".
    package_data={"megad2v": ["config/recipes/*.yaml", "ds_configs/*.json"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
