"""What a run consumed, for audits: trace/rank*.jsonl (data.trace), quarantine.jsonl, bad_steps.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from megad2v.engine.distributed import World
from megad2v.metrics.logger import drop_later_lines, logging_into
from megad2v.modalities.batch import Batch
from megad2v.training.verdict import Judgement

QUARANTINE, BAD_STEPS = "quarantine.jsonl", "bad_steps.jsonl"


class RunRecords:
    """One writer per data-parallel rank. Lines of a `joint` run name the modality."""

    def __init__(self, run: Path, world: World, *, trace: bool, resumed_at: int, joint: bool = False) -> None:
        self._data, self._joint = world.data, joint
        # Tensor-parallel ranks consume the same micro-batches: one of them writes.
        self._writes = world.tensor.rank == 0
        self._run = run
        self._trace = None
        if not trace:
            return
        path = run / "trace" / f"rank{world.rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Before it was killed the run may have had more ranks, or others that wrote: their steps are taken again too.
        own = [path]
        if world.rank == 0:
            own += [other for other in path.parent.glob("rank*.jsonl") if int(other.stem[4:]) >= world.size]
        for stale in own:
            drop_later_lines(stale, resumed_at)
        if self._writes:
            self._trace = path.open("a", buffering=1)

    def consumed(self, step: int, batches: Sequence[Batch]) -> None:
        """Record this rank's micro-batches of step number `step` (from 1): ids, and hashes of crop and mask."""
        for place, batch in enumerate(batches if self._writes else ()):
            micro_batch = self._data.rank + place * self._data.size
            if self._trace is not None:
                line = {
                    "step": step,
                    "micro_batch": micro_batch,
                    **self._modality(batch),
                    "samples": batch.sample_ids,
                    "hashes": batch.fingerprints,
                }
                with logging_into(self._run):
                    self._trace.write(json.dumps(line) + "\n")
            if batch.dropped:
                place_of = {"step": step, "micro_batch": micro_batch, **self._modality(batch)}
                lines = [
                    json.dumps({**place_of, "sample": sample, "reason": reason}) + "\n"
                    for sample, reason in batch.dropped
                ]
                self._append(QUARANTINE, lines)

    def refused(self, step: int, batches: Sequence[Batch], losses: Sequence[float], judgement: Judgement) -> None:
        """Record a step that was not taken: a line for each of this rank's micro-batches, with the loss per masked
        position of that micro-batch (`losses`) beside loss and gradient norm of the whole step; null: not finite."""
        lines = []
        for place, (batch, loss) in enumerate(zip(batches, losses, strict=True)):
            line = {
                "step": step,
                "micro_batch": self._data.rank + place * self._data.size,
                **self._modality(batch),
                "reason": judgement.reason,
                "loss": _finite(loss),
                "step_loss": _finite(judgement.loss),
                "grad_norm": _finite(judgement.norm),
                "samples": batch.sample_ids,
            }
            lines.append(json.dumps(line) + "\n")
        if self._writes:
            self._append(BAD_STEPS, lines)

    def _modality(self, batch: Batch) -> dict[str, str]:
        return {"modality": batch.modality} if self._joint else {}

    def _append(self, name: str, lines: list[str]) -> None:
        with (
            logging_into(self._run),
            (self._run / name).open("a") as file,
        ):  # one append per write: ranks share the file
            file.write("".join(lines))

    def close(self) -> None:
        """Close the trace."""
        if self._trace is not None:
            self._trace.close()


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def low_since(metrics: Path, key: str, floor: float, modality: str, step: int) -> int:
    """The first step of the unbroken row of a modality's logged steps, up to `step`, whose `key` lies under `floor`."""
    since = step
    for text in reversed(metrics.read_text().splitlines()):
        line = json.loads(text)
        if key not in line or line["modality"] != modality:
            continue
        if line[key] is None or line[key] >= floor:
            break
        since = min(since, line["step"])
    return since
