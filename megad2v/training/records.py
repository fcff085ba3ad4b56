"""What a run consumed, for audits: trace/rank*.jsonl (data.trace) and quarantine.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megad2v.engine.distributed import World
from megad2v.metrics.logger import drop_later_lines
from megad2v.modalities.batch import Batch


class RunRecords:
    """One writer per data-parallel rank."""

    def __init__(self, run: Path, world: World, *, trace: bool, resumed_at: int) -> None:
        self._data = world.data
        # Tensor-parallel ranks consume the same micro-batches: one of them writes.
        self._writes = world.tensor.rank == 0
        self._quarantine = run / "quarantine.jsonl"
        self._trace = None
        if trace and self._writes:
            path = run / "trace" / f"rank{world.rank}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_later_lines(path, resumed_at)
            self._trace = path.open("a", buffering=1)

    def consumed(self, step: int, batches: Sequence[Batch]) -> None:
        """Record this rank's micro-batches of step number `step` (from 1): ids, and hashes of crop and mask."""
        for place, batch in enumerate(batches if self._writes else ()):
            micro_batch = self._data.rank + place * self._data.size
            if self._trace is not None:
                line = {
                    "step": step,
                    "micro_batch": micro_batch,
                    "samples": batch.sample_ids,
                    "hashes": batch.fingerprints,
                }
                self._trace.write(json.dumps(line) + "\n")
            if batch.dropped:
                lines = [
                    json.dumps({"step": step, "micro_batch": micro_batch, "sample": sample, "reason": reason}) + "\n"
                    for sample, reason in batch.dropped
                ]
                with self._quarantine.open("a") as file:  # one append per write: ranks share the file
                    file.write("".join(lines))

    def close(self) -> None:
        """Close the trace."""
        if self._trace is not None:
            self._trace.close()
