"""All launchers on two nodes, and Slurm: the scripts beside this file, where the machine lets them run."""

from __future__ import annotations

import pytest

from tests.distributed.harness import count_ranks, run_command

CANNOT_RUN = 77


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("script", "ranks"), [("two_nodes.sh", 26), ("slurm.sh", 10)])
def test_every_launcher_gives_one_curve(script: str, ranks: int) -> None:
    done = run_command(["bash", f"tests/cluster/{script}"], timeout=880, env={"OMP_NUM_THREADS": None})
    if done.returncode == CANNOT_RUN:
        pytest.skip(done.stdout.strip())
    count_ranks(ranks, script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all the same\n")
