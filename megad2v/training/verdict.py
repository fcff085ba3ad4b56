"""The verdict on a step, before it changes anything: is it finite, is it a spike; and when is the run to stop.

Plain arithmetic on numbers that every rank has to the bit (`engine.gradients.StepGate`), so all ranks decide alike.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from megad2v.config.schema import VerdictConfig

LEAST_HISTORY = 16
"""Steps below which a median and a spread say little: no spike is called before."""
LEAST_SPREAD = 0.1
"""Smallest spread, in the logarithm, that z is measured in: after a quiet stretch a harmless wiggle is no spike."""
MAD_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""


@dataclass(frozen=True)
class Judgement:
    """What was found of one step."""

    loss: float
    """Per masked position, over the whole step."""
    norm: float
    """Global gradient norm before clipping."""
    reason: str | None
    """Why the step is refused; None: it may be taken."""

    @property
    def is_spike(self) -> bool:
        """Finite, and refused all the same."""
        return self.reason is not None and math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True)
class Halt:
    """Why the run stops with exit code 3."""

    what: str
    since: int
    """The step at which it began, as far as is known here."""
    advice: str
    low: tuple[str, float, str] | None = None
    """(metric, floor, modality) where a logged metric fell under a floor: earlier lines tell since when."""


def robust_z(value: float, history: list[float]) -> float:
    """How far `value` lies above the median of `history`, in robust standard deviations of the logarithm.

    z = (log x - median) / max(1.4826 MAD, 0.1), median and MAD of the logarithms. All numbers are above 0. With the
    smallest spread 0.1, z = 20 is 20 x 0.1 = 2 in the logarithm, e^2 = 7.4 times the median; after a history that
    scatters more, a step has to stand out by more.
    """
    logs = [math.log(x) for x in history]
    median = statistics.median(logs)
    spread = MAD_TO_SIGMA * statistics.median(abs(x - median) for x in logs)
    return (math.log(value) - median) / max(spread, LEAST_SPREAD)


class Verdict:
    """Judges the steps of one run, one after the other. Nothing of it is communicated or written.

    A step is of one modality and measured against taken steps of that one: their losses differ by a factor of 100.
    """

    def __init__(
        self,
        config: VerdictConfig,
        *,
        losses: dict[str, list[float]],
        norms: dict[str, list[float]],
        joint: bool = False,
    ) -> None:
        """`losses` and `norms` are the run's memory of the last taken steps of each modality (`Progress`), kept up to
        date in place. Where the run is `joint`, reasons name the modality."""
        self.config, self._joint = config, joint
        self._histories = {"loss": losses, "gradient norm": norms}
        self.latest = Judgement(math.nan, math.nan, None)
        self.bad_in_a_row = 0
        """Refused steps since the last one taken, or since this process began."""

    def judge(self, modality: str, loss: float, norm: float) -> bool:
        """Whether a step of this modality, loss and gradient norm may be taken; `latest` says why not."""
        values = {"loss": loss, "gradient norm": norm}
        reason = _not_finite(values) or self._spike(modality, values)
        self.latest = Judgement(loss, norm, reason)
        if reason is not None:
            self.bad_in_a_row += 1
            return False
        self.bad_in_a_row = 0
        for name, value in values.items():
            if value > 0:  # a step with nothing masked has 0 of both, and says nothing about the next
                history = self._histories[name].setdefault(modality, [])
                history.append(value)
                del history[: -self.config.window]
        return True

    def _spike(self, modality: str, values: dict[str, float]) -> str | None:
        if self.config.spike_z == 0:
            return None
        for name, value in values.items():
            history = self._histories[name].get(modality, [])[-self.config.window :]
            if value <= 0 or len(history) < max(LEAST_HISTORY, self.config.window // 2):
                continue
            z = robust_z(value, history)
            if z > self.config.spike_z:
                steps = f"{modality} steps" if self._joint else "steps"
                return (
                    f"spike: {name} {value:.4g} is z {z:.3g} above the median {statistics.median(history):.4g} of the "
                    f"last {len(history)} {steps} taken"
                )
        return None

    def too_many_bad(self, step: int) -> Halt | None:
        """After step number `step` was refused: whether that was one too many in a row."""
        limit = self.config.max_bad_steps
        if not 0 < limit <= self.bad_in_a_row:
            return None
        since = step - self.bad_in_a_row + 1
        return Halt(
            what=f"{self.bad_in_a_row} steps in a row were not taken (verdict.max_bad_steps {limit}), the last: "
            f"{self.latest.reason}; bad_steps.jsonl has their samples",
            since=since,
            advice="Lower optimizer.lr or lengthen schedule.warmup_steps"
            + (" or, where such a jump is expected, raise verdict.spike_z" if self.latest.is_spike else "")
            + "; then repeat the command (train.resume auto goes on behind these samples), or go back further",
        )

    def watches_std(self, updates: int) -> bool:
        """Whether the floors on standard deviations hold after so many updates of a modality: every rank reads that
        one's from then on."""
        floors = (self.config.min_target_std, self.config.min_pred_std)
        return updates > self.config.std_after and any(floor > 0 for floor in floors)

    def collapsed(self, read: dict[str, float], step: int, modality: str) -> Halt | None:
        """Whether a logged step's `target_std` or `pred_std` lies under its floor (not a number does not)."""
        whose = f" of {modality}" if self._joint else ""
        for key, what in (("target_std", "targets"), ("pred_std", "predictions")):
            floor = getattr(self.config, f"min_{key}")
            if read[key] < floor:
                return Halt(
                    what=f"collapse{whose}: {key} {read[key]:.4g}, the standard deviation of the {what} over masked "
                    f"positions, is under verdict.min_{key} {floor:g} (fairseq's guard: 0.1 for targets, 0.01 for "
                    "predictions, after 5,000 updates)",
                    since=step,
                    advice="What was saved is collapsed too. Lower optimizer.lr, lengthen schedule.warmup_steps, or "
                    "raise teacher.decay_start and teacher.decay_end; then start anew or from before it",
                    low=(key, floor, modality),
                )
        return None


def _not_finite(values: dict[str, float]) -> str | None:
    names = [name for name, value in values.items() if not math.isfinite(value)]
    return f"not finite: {' and '.join(names)}" if names else None
