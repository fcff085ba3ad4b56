"""What every test may use: the shared data beside the repository, and the count of ranks in the summary."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.harness import RANK_COUNT_VARIABLE

REPOSITORY = Path(__file__).resolve().parents[1]
OWN_COUNT = pytest.StashKey[Path]()


def shared_root() -> Path:
    """The folder of data that is too large for the repository: $MEGAD2V_SHARED, or `shared` beside the checkout."""
    return Path(os.environ.get("MEGAD2V_SHARED") or REPOSITORY.parent / "shared")


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("data/image/clothing")` is that path, or a skip that names what is missing."""

    def find(relative: str) -> Path:
        path = shared_root() / relative
        if not path.exists():
            pytest.skip(f"no {relative} in {shared_root()} (set MEGAD2V_SHARED)")
        return path

    return find


def reference_root() -> Path:
    """The reference vectors: $MEGAD2V_REFERENCE, or `reference` in the shared folder."""
    return Path(os.environ.get("MEGAD2V_REFERENCE") or shared_root() / "reference")


@pytest.fixture(scope="session")
def reference() -> Path:
    """`reference_root`, or a skip."""
    path = reference_root()
    if not path.exists():
        pytest.skip(f"no reference vectors at {path} (set MEGAD2V_REFERENCE)")
    return path


def pytest_configure(config: pytest.Config) -> None:
    """One file takes the counts of all processes of this run: xdist's workers inherit the variable."""
    if RANK_COUNT_VARIABLE not in os.environ:
        descriptor, path = tempfile.mkstemp(prefix="megad2v-ranks-")
        os.close(descriptor)
        os.environ[RANK_COUNT_VARIABLE] = path
        config.stash[OWN_COUNT] = Path(path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if OWN_COUNT not in config.stash:
        return
    counts = [int(line.split("\t")[0]) for line in config.stash[OWN_COUNT].read_text().splitlines()]
    where = shared_root()
    terminalreporter.write_line(
        f"megad2v: {sum(counts)} ranks spawned in {len(counts)} launches; "
        f"shared data: {where if where.exists() else f'none at {where}, tests that need it were skipped'}"
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    if OWN_COUNT in config.stash:
        config.stash[OWN_COUNT].unlink(missing_ok=True)
        os.environ.pop(RANK_COUNT_VARIABLE, None)
