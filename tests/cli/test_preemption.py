"""A run that is asked to stop: all ranks save the same step, leave with exit code 75, and go on as if nothing was."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil  # DeepSpeed brings it
import pytest

from megad2v.checkpoint.catalog import steps_present
from megad2v.checkpoint.reader import Checkpoint
from tests.cli.conftest import TINY
from tests.cli.live_run import LiveRun, curve, last_step, lines
from tests.distributed.harness import REPOSITORY, _environment, _kill_group, count_ranks, reserved_port

STEPS = 60


def _flags(shards: Path, output: Path, *more: str) -> list[str]:
    flags = ["--deepspeed", "ds_configs/zero1.json", *TINY, "--data.shards", str(shards / "train")]
    flags += ["--train.steps", str(STEPS), "--train.save_every", "0", "--train.log_every", "1"]
    flags += ["--model.dropout", "0.1", "--train.tensorboard", "false", "--data.trace", "true"]
    return [*flags, "--train.output_dir", str(output), *more]


@pytest.fixture(scope="module")
def whole(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody asks to stop."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with LiveRun(_flags(demo_shards, output), ranks=2, logs=output.parent) as run:
        assert run.wait() == [0, 0], run.log()
    return output


def _same(run: Path, whole: Path) -> None:
    """Curve, what was consumed, and the last checkpoint are equal to the bit."""
    assert curve(run) == curve(whole)
    assert len(curve(run)) == STEPS
    for rank in range(2):
        name = f"trace/rank{rank}.jsonl"
        assert lines(run / name) == lines(whole / name)
    first, second = (Checkpoint(path / "checkpoints" / f"step_{STEPS:08d}") for path in (run, whole))
    assert first.index.state == second.index.state
    for kind in ("student", "teacher", "exp_avg", "exp_avg_sq"):
        assert all(value.equal(second.full(kind, name)) for name, value in first.tensors(kind))


def _said(run: LiveRun) -> str:
    """The line of the one rank that says why the run ends."""
    (line,) = (line for line in run.log().splitlines() if "preempted" in line)
    assert line.startswith("pretrain: preempted at step ") and "exit code 75" in line
    assert "Traceback" not in run.log()
    return line


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_signal_to_any_rank_and_the_time_stop_all(demo_shards: Path, whole: Path, tmp_path: Path) -> None:
    """One run: SIGTERM to rank 1 (twice: the second one while it saves), SIGUSR1 to rank 0, its time, then the rest."""
    output = tmp_path / "run"
    reached = 0
    for rank, number in ((1, signal.SIGTERM), (0, signal.SIGUSR1)):
        with LiveRun(_flags(demo_shards, output), ranks=2, logs=tmp_path / "logs") as run:
            run.wait_for_step(reached + 4)
            for _ in range(3):
                run.signal(rank, number)
                time.sleep(0.02)
            assert run.wait(30) == [75, 75], run.log()
        said = _said(run)
        assert f"(rank {rank}: {signal.Signals(number).name})" in said
        before, reached = reached, last_step(output)
        assert before + 4 <= reached < STEPS  # in the middle
        assert f"preempted at step {reached} (" in said and f"saved {output}/checkpoints/step_{reached:08d}" in said
        assert steps_present(output)[-1] == reached
        assert (output / "checkpoints" / "latest").read_text().strip() == f"step_{reached:08d}"
        assert not (output / "hang").exists()

    # Start-up takes seconds, so the time is up before the first step: nothing to save, nothing touched.
    with LiveRun(_flags(demo_shards, output, "--train.max_minutes", "0.001"), ranks=2, logs=tmp_path / "logs") as run:
        assert run.wait() == [75, 75], run.log()
    assert "(ranks 0, 1: train.max_minutes (0.001) is over): no step was taken" in _said(run)
    assert steps_present(output)[-1] == reached

    with LiveRun(_flags(demo_shards, output), ranks=2, logs=tmp_path / "logs") as run:
        assert run.wait() == [0, 0], run.log()
        assert f"(step {reached})" in run.log()
    _same(output, whole)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_time_is_up_in_the_middle(demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    monkeypatch.setenv("MEGAD2V_PREEMPTED", str(tmp_path / "preempted"))
    flags = _flags(demo_shards, output, "--train.steps", "100000", "--train.max_minutes", "0.3")
    began = time.monotonic()
    with LiveRun(flags, ranks=2, logs=tmp_path) as run:
        assert run.wait() == [75, 75], run.log()
    assert 18 <= time.monotonic() - began < 40
    reached = last_step(output)
    assert 0 < reached < 100000 and steps_present(output) == [reached]
    assert "train.max_minutes (0.3) is over" in _said(run)
    assert (tmp_path / "preempted").exists()
    Checkpoint(output / "checkpoints" / f"step_{reached:08d}").verify()


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("full", [False, True], ids=["written", "disk full"])
def test_while_an_older_step_is_being_written(full: bool, demo_shards: Path, tmp_path: Path) -> None:
    """Both are saved; where the older one fails, on one rank, that is said and the step at hand is saved all the
    same."""
    output = tmp_path / "run"
    flags = _flags(
        demo_shards, output, "--train.steps", "100000", "--train.save_every", "50", "--train.async_save", "true"
    )
    slow = {"SLOW_DISK_S": "2"} | ({"FULL_DISK_RANK": "1", "FULL_DISK_STEP": "50"} if full else {})
    program = "tests/cli/slow_pretrain.py"
    with LiveRun(flags, ranks=2, logs=tmp_path, program=program, environment=slow) as run:
        run.until(lambda: run.log().count("writing .writing_step_00000050_") == 2)
        run.signal(1, signal.SIGTERM)
        assert run.wait(40) == [75, 75], run.log()
    reached = last_step(output)
    assert steps_present(output) == sorted({reached} if full else {50, reached})
    (said,) = (line for line in run.log().splitlines() if "preempted at step" in line)
    assert f"preempted at step {reached} (rank 1: SIGTERM): saved " in said and "Traceback" not in run.log()
    assert run.log().count("step_00000050 could not be written: rank 1: ") == int(full)
    assert not list((output / "checkpoints").glob(".writing_*"))
    Checkpoint(output / "checkpoints" / f"step_{reached:08d}").verify()


@pytest.mark.timeout(150)
@pytest.mark.parametrize("when", ["while it imports", "start-up"])
def test_a_signal_before_the_first_step(
    when: str, demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    monkeypatch.setenv("MEGAD2V_PREEMPTED", str(tmp_path / "preempted"))
    with LiveRun(_flags(demo_shards, output), ranks=1, logs=tmp_path) as run:
        if when == "start-up":
            run.until(lambda: (output / "config.yaml").exists())
        else:
            run.until(lambda: _catches(run.processes[0].pid, signal.SIGTERM))
        run.signal(0, signal.SIGTERM)
        assert run.wait(60) == [75], run.log()
    (line,) = (line for line in run.log().splitlines() if line.startswith("pretrain: "))
    assert "SIGTERM before the first step: there is nothing to save" in line and "Traceback" not in run.log()
    assert steps_present(output) == [] and not (output / "hang").exists()
    assert not (tmp_path / "preempted").exists()  # its launcher may be ending it because another rank failed


def _catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal: mask SigCgt of proc(5)."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("number", "whom", "code"),
    [
        (signal.SIGUSR1, "rank 1", 75),
        # The launcher has a handler of its own: it hands SIGTERM on, waits up to 30 s for each rank, and exits with 1.
        pytest.param(signal.SIGTERM, "launcher", 1, marks=pytest.mark.slow),
    ],
)
def test_under_the_deepspeed_launcher(number: int, whom: str, code: int, demo_shards: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    count_ranks(2, "deepspeed, signalled")
    with reserved_port() as port, log.open("wb") as stream:
        command = ["deepspeed", "--num_gpus", "2", "--master_port", str(port), "launch/pretrain.py"]
        process = subprocess.Popen(
            [*command, *_flags(demo_shards, output, "--train.steps", "100000")],
            cwd=REPOSITORY, env=_environment(None), stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 100
            while last_step(output) < 3 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            (launcher,) = (child for child in psutil.Process(process.pid).children())
            (one,) = (rank for rank in launcher.children() if "--local_rank=1" in rank.cmdline())
            (launcher if whom == "launcher" else one).send_signal(number)
            assert process.wait(60) == code, log.read_text()
        finally:
            _kill_group(process)
    (line,) = (line for line in log.read_text().splitlines() if line.startswith("pretrain: "))
    reached = last_step(output)
    assert f"preempted at step {reached} (rank" in line and f": {signal.Signals(number).name})" in line
    assert steps_present(output) == [reached] and "Traceback" not in log.read_text()
