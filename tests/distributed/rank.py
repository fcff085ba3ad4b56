"""One rank of `tests.distributed.harness.run_ranks`: find the job, run it, write down what it returned."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(parent: int) -> None:
    """A test run that gets a SIGKILL cannot clean up: ask the kernel to kill this rank with it (Linux only)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we could ask
            os._exit(1)


def main() -> None:
    job, output, parent = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    module, _, function = job.partition(":")
    run = getattr(importlib.import_module(module), function)
    result = run(json.loads((output / "arguments.json").read_text()), output)

    dist = sys.modules.get("torch.distributed")  # a job that needs no torch should not wait for its import
    if dist is not None and dist.is_initialized():  # nobody leaves while another is still in a collective
        dist.barrier()
        dist.destroy_process_group()
    path = output / f"rank{os.environ['RANK']}.json"
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(result))
    unfinished.rename(path)
    # Interpreter shutdown can abort in a thread of the process group after all is done (see engine.distributed).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
