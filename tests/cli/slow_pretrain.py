"""launch/pretrain.py on a disk that takes its time: SLOW_DISK_S more seconds for each file of a checkpoint. On the rank
FULL_DISK_RANK the file of step FULL_DISK_STEP does not fit the first time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megad2v.training.signals import StopRequests

if __name__ == "__main__":
    requests = StopRequests().listen()

    from megad2v.checkpoint import writer
    from megad2v.checkpoint.layout import Piece
    from megad2v.engine.distributed import leave_now
    from megad2v.training.main import main

    write = writer.write_tensors

    def slowly(path: Path, pieces: Sequence[Piece]) -> tuple[int, str]:
        print(f"writing {path.parent.name}", flush=True)
        time.sleep(float(os.environ["SLOW_DISK_S"]))
        full = f"step_{int(os.environ.get('FULL_DISK_STEP', 0)):08d}_"
        if full in path.parent.name and os.environ["RANK"] == os.environ.pop("FULL_DISK_RANK", ""):
            raise OSError(28, "No space left on device")
        return write(path, pieces)

    writer.write_tensors = slowly
    leave_now(main(requests=requests))
