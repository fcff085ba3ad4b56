"""Where metrics go: metrics.jsonl always, TensorBoard and W&B where they are there, one progress line for people."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from megad2v.config.schema import TrainConfig
from megad2v.errors import LogError, UserError
from megad2v.files import write_file


class MetricsLogger:
    """Only the main rank makes one. `resumed_at` > 0 drops what a killed run had logged beyond that step.

    In a `joint` run each modality has its own curves in TensorBoard and W&B (vision/loss); metrics.jsonl keeps plain
    keys beside "modality".
    """

    def __init__(
        self, run: Path, train: TrainConfig, *, resumed_at: int, config: dict[str, Any], joint: bool = False
    ) -> None:
        self._joint = joint
        self.path = run / "metrics.jsonl"
        self.total = train.steps
        drop_later_lines(self.path, resumed_at)
        self._file = self.path.open("a", buffering=1)
        self._tensorboard = _tensorboard(run, resumed_at) if train.tensorboard else None
        self._wandb = _wandb(run, train, config)
        self._started, self._first_step = time.monotonic(), resumed_at

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics for `step`. Numbers that are not finite are written as null, which JSON has. Raises
        LogError."""
        line = {"step": step, **values}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with logging_into(self.path.parent):
            self._file.write(json.dumps(finite) + "\n")
            prefix = f"{line['modality']}/" if self._joint and "modality" in line else ""
            scalars = {f"{prefix}{k}": v for k, v in finite.items() if isinstance(v, (int, float)) and k != "step"}
            if self._tensorboard is not None:
                for key, value in scalars.items():
                    self._tensorboard.add_scalar(key, value, step)
            if self._wandb is not None:
                self._wandb.log(scalars, step=step)

    def progress(self, step: int, values: dict[str, Any], *, modality: str) -> None:
        """The line a person watches; it says which modality where the run has several."""
        elapsed, done = time.monotonic() - self._started, step - self._first_step
        eta = timedelta(seconds=round(elapsed / max(1, done) * (self.total - step)))
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, (int, float)))
        whose = f"  {modality}" if self._joint else ""
        print(f"step {step}/{self.total}{whose}  {shown}  ETA {eta}", flush=True)

    def close(self) -> None:
        """Flush all sinks; one that fails does not keep the others from it."""
        with contextlib.ExitStack() as sinks:
            sinks.callback(self._file.close)
            if self._tensorboard is not None:
                sinks.callback(self._tensorboard.close)
            if self._wandb is not None:
                sinks.callback(self._wandb.finish)


@contextlib.contextmanager
def logging_into(run: Path) -> Iterator[None]:
    """OSErrors of what is written in here become LogError: one line, not a traceback."""
    try:
        yield
    except OSError as error:
        raise LogError(
            f"logs in {run} could not be written: {error}; checkpoints are untouched, and the same command goes on "
            "from them"
        ) from error


def drop_later_lines(path: Path, step: int) -> None:
    """Keep only the lines of a .jsonl file up to `step`: a resumed run writes the later ones again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a killed run may leave half a line
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_file(path, "".join(kept))


def _tensorboard(run: Path, resumed_at: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: no tensorboard/ (pip install tensorboard)", flush=True)
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)


def _wandb(run: Path, train: TrainConfig, config: dict[str, Any]) -> Any:
    if train.wandb.project is None:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("train.wandb.project: the wandb package is not installed (pip install wandb)") from None
    return wandb.init(
        project=train.wandb.project,
        entity=train.wandb.entity,
        name=train.wandb.name or run.name,
        mode=train.wandb.mode,
        dir=str(run),
        config=config,
    )
