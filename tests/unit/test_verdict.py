"""What is a spike, when a run stops, and what a resumed run remembers."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from megad2v.checkpoint.writer import CheckpointError
from megad2v.config.schema import VerdictConfig
from megad2v.errors import BadNumericState
from megad2v.training import loop
from megad2v.training.records import low_since
from megad2v.training.state import Progress
from megad2v.training.verdict import Halt, Verdict, robust_z

NAN, INF = math.nan, math.inf
A, B = "vision", "speech"


def verdict_of(steps: int = 64, **settings: float) -> Verdict:
    """After `steps` taken steps of loss 0.5 and gradient norm 2."""
    verdict = Verdict(VerdictConfig(**settings), losses={}, norms={})
    assert all(verdict.judge(A, 0.5, 2.0) for _ in range(steps))
    return verdict


def test_robust_z_of_a_normal_history_counts_standard_deviations() -> None:
    """Against quantiles of the normal distribution, in the logarithm: median 1, sigma 0.3."""
    from statistics import NormalDist

    history = [math.exp(NormalDist(0.0, 0.3).inv_cdf((k + 0.5) / 1000)) for k in range(1000)]
    assert robust_z(math.exp(0.3 * 5), history) == pytest.approx(5, rel=2e-3)
    assert robust_z(math.exp(-0.3 * 5), history) == pytest.approx(-5, rel=2e-3)
    # A tenth of wild steps in the history hardly moves it: that is what robust is for.
    assert robust_z(math.exp(0.3 * 5), history + [1e6] * 100) == pytest.approx(5, rel=0.2)


def test_after_a_quiet_history_z_is_measured_in_tenths_of_the_logarithm() -> None:
    assert robust_z(0.5 * math.exp(2.0), [0.5] * 64) == pytest.approx(20)
    verdict = verdict_of()
    assert verdict.judge(A, 0.5 * 7.3, 2.0)
    assert not verdict.judge(A, 0.5 * 7.5, 2.0)


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (NAN, 2.0, "not finite: loss"),
        (0.5, INF, "not finite: gradient norm"),
        (-INF, NAN, "not finite: loss and gradient norm"),
        (50.0, 2.0, "spike: loss 50 is z 46.1 above the median 0.5 of the last 64 steps taken"),
        (0.5, 100.0, "spike: gradient norm 100 is z 39.1 above the median 2 of the last 64 steps taken"),
    ],
)
def test_refused_with_the_reason_and_forgotten(loss: float, norm: float, reason: str) -> None:
    verdict = verdict_of()
    before = deepcopy(verdict._histories)
    assert not verdict.judge(A, loss, norm)
    assert verdict.latest.reason == reason
    assert verdict.latest.is_spike == reason.startswith("spike")
    assert verdict._histories == before, "a refused step must not become usual"


def test_only_upward_counts() -> None:
    assert verdict_of().judge(A, 0.5e-6, 2e-6)


def test_no_spike_is_called_before_half_the_window_is_there() -> None:
    assert verdict_of(63).judge(A, 500.0, 2.0)
    assert not verdict_of(64).judge(A, 500.0, 2.0)
    assert verdict_of(15, window=20).judge(A, 500.0, 2.0), "16 at least, whatever the window"
    assert not verdict_of(16, window=20).judge(A, 500.0, 2.0)


def test_switched_off_only_the_finite_is_asked_for() -> None:
    verdict = verdict_of(spike_z=0.0)
    assert verdict.judge(A, 1e9, 1e9) and not verdict.judge(A, NAN, 1.0)


def test_a_step_with_nothing_masked_is_taken_and_says_nothing() -> None:
    verdict = verdict_of(40)
    assert verdict.judge(A, 0.0, 0.0)
    assert [len(histories[A]) for histories in verdict._histories.values()] == [40, 40]
    fresh = Verdict(VerdictConfig(), losses={}, norms={})
    assert all(fresh.judge(A, 0.0, 0.0) for _ in range(200))  # mask.ratio 0, a control


def test_the_memory_is_the_last_window_of_taken_steps() -> None:
    progress = Progress()
    verdict = Verdict(VerdictConfig(window=16), losses=progress.taken_losses, norms=progress.taken_norms)
    for step in range(1, 21):
        verdict.judge(A, float(step), 2.0 * step)
    assert progress.taken_losses == {A: [float(step) for step in range(5, 21)]}
    assert progress.taken_norms == {A: [2.0 * step for step in range(5, 21)]}


def test_a_resumed_run_judges_as_the_uninterrupted_one() -> None:
    """Through JSON, as in a checkpoint; a window that was made smaller looks at the newest steps only."""
    progress = Progress()
    whole = Verdict(VerdictConfig(), losses=progress.taken_losses, norms=progress.taken_norms)
    values = [(0.1 + 1 / (3 + k % 7), 1 + math.sin(k)) for k in range(200)]
    for loss, norm in values[:100]:
        whole.judge(A, loss, norm)
    loaded = Progress.restored(json.loads(json.dumps(asdict(progress))), A)
    again = Verdict(VerdictConfig(), losses=loaded.taken_losses, norms=loaded.taken_norms)
    for loss, norm in [*values[100:], (3.7, 1.0)]:
        assert whole.judge(A, loss, norm) == again.judge(A, loss, norm)
        assert whole.latest == again.latest
    assert loaded == progress

    shrunk = Verdict(VerdictConfig(window=16), losses={A: [100.0] * 100 + [1.0] * 16}, norms={A: [1.0] * 116})
    assert not shrunk.judge(A, 100.0, 1.0)


def test_a_checkpoint_from_before_has_no_memory() -> None:
    old = Progress.restored({"step": 7, "updates": 6, "samples": 56, "dropped": 0, "skipped": 1}, A)
    assert old.taken_losses == old.taken_norms == {}
    assert old.modality_updates == {A: 6}


def test_lists_of_an_older_checkpoint_are_the_one_modality_s() -> None:
    saved = {"step": 90, "updates": 70, "samples": 8, "dropped": 0, "skipped": 20}
    saved |= {"taken_losses": [0.5] * 70, "taken_norms": [2.0] * 70}  # type: ignore[dict-item]
    old = Progress.restored(saved, B)
    assert old == Progress(90, 70, 8, 0, 20, {B: [0.5] * 70}, {B: [2.0] * 70}, {B: 70})
    assert isinstance(saved["taken_losses"], list), "what a checkpoint holds is not changed by reading it"
    verdict = Verdict(VerdictConfig(), losses=old.taken_losses, norms=old.taken_norms)
    assert not verdict.judge(B, 50.0, 2.0)
    assert "median 0.5 of the last 70 steps taken" in str(verdict.latest.reason)


def test_steps_are_measured_against_their_own_modality() -> None:
    """A loss that is usual for one would be a spike for the other; refused steps in a row are counted over all."""
    progress = Progress()
    verdict = Verdict(VerdictConfig(), losses=progress.taken_losses, norms=progress.taken_norms, joint=True)
    for _ in range(64):
        assert verdict.judge(A, 0.5, 2.0) and verdict.judge(B, 50.0, 200.0)
    assert progress.taken_losses == {A: [0.5] * 64, B: [50.0] * 64}
    assert verdict.judge(B, 51.0, 200.0) and not verdict.judge(A, 50.0, 2.0)
    assert verdict.latest.reason == "spike: loss 50 is z 46.1 above the median 0.5 of the last 64 vision steps taken"
    assert not verdict.judge(B, NAN, 200.0) and verdict.bad_in_a_row == 2
    assert verdict.judge("text", 1e6, 1e6), "one that is new has no usual yet"
    assert verdict.bad_in_a_row == 0


def test_too_many_in_a_row() -> None:
    verdict = verdict_of(max_bad_steps=3)
    for step, norm in ((65, NAN), (66, NAN), (67, 2.0), (68, NAN), (69, INF)):
        verdict.judge(A, 0.5, norm)
        assert verdict.too_many_bad(step) is None, "a step taken in between starts the count anew"
    verdict.judge(A, 0.5, 1e9)
    halt = verdict.too_many_bad(70)
    assert halt is not None and halt.since == 68
    for word in ("3 steps in a row", "verdict.max_bad_steps 3", "spike: gradient norm", "bad_steps.jsonl"):
        assert word in halt.what
    assert "optimizer.lr" in halt.advice and "verdict.spike_z" in halt.advice


def test_never_too_many_at_zero() -> None:
    verdict = verdict_of(max_bad_steps=0)
    assert not any(verdict.judge(A, NAN, NAN) for _ in range(50))
    assert verdict.bad_in_a_row == 50 and verdict.too_many_bad(114) is None


@pytest.mark.parametrize(
    ("target_std", "pred_std", "named"),
    [
        (0.5, 0.5, None),
        (0.1, 0.01, None),
        (0.0999, 0.5, "target_std 0.0999"),
        (0.5, 0.0099, "pred_std 0.0099"),
        (NAN, NAN, None),  # another verdict's business
    ],
)
def test_floors(target_std: float, pred_std: float, named: str | None) -> None:
    verdict = Verdict(VerdictConfig(), losses={}, norms={})
    halt = verdict.collapsed({"target_std": target_std, "pred_std": pred_std}, 5010, A)
    assert (halt is None) == (named is None)
    if halt is not None and named is not None:
        assert halt.what.startswith("collapse: ") and halt.low is not None and halt.low[2] == A
        assert named in halt.what and "fairseq" in halt.what and f"verdict.min_{named.split()[0]}" in halt.what


def test_floors_hold_after_so_many_updates_and_can_be_switched_off() -> None:
    def watches(updates: int, **settings: float) -> bool:
        return Verdict(VerdictConfig(**settings), losses={}, norms={}).watches_std(updates)

    assert not watches(5000) and watches(5001)
    assert watches(1, std_after=0) and watches(5001, min_target_std=0.0)
    assert not watches(5001, min_target_std=0.0, min_pred_std=0.0)
    off = Verdict(VerdictConfig(min_target_std=0.0), losses={}, norms={})
    assert off.collapsed({"target_std": 0.0, "pred_std": 0.5}, 5010, A) is None
    joint = Verdict(VerdictConfig(), losses={}, norms={}, joint=True).collapsed({"target_std": 0.0}, 5010, B)
    assert joint is not None and joint.what.startswith("collapse of speech: target_std 0,")


def test_since_when_a_metric_lies_low(tmp_path: Path) -> None:
    lines = [(10, 0.05), (20, 0.5), (30, 0.09), (40, 0.08), (50, 0.01)]
    written = [{"step": step, "target_std": std, "modality": A} for step, std in lines]
    written += [{"step": 50, "valid_target_std": 0.3, "modality": A}, {"step": 50, "saved": "step_00000050"}]
    written[3:3] = [{"step": 35, "target_std": 0.9, "modality": B}]  # does not end the row of the other
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in written))
    assert low_since(path, "target_std", 0.1, A, 50) == 30
    assert low_since(path, "target_std", 1.0, A, 50) == 10
    assert low_since(path, "target_std", 1.0, B, 35) == 35


@pytest.mark.parametrize("disk_full", [False, True])
def test_where_a_stopped_run_can_go_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_full: bool) -> None:
    """Step 30 was computed with the state after 29: that one is no way back. A full disk does not hide the reason."""
    for step in (10, 20, 29, 35):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)

    def save(run: object, *, delete_older: bool) -> None:
        assert not delete_older
        if disk_full:
            raise CheckpointError("No space left on device")

    monkeypatch.setattr(loop, "save_checkpoint", save)
    run = SimpleNamespace(directory=tmp_path, progress=Progress(step=40), logger=None, background=None)
    with pytest.raises(BadNumericState) as caught:
        loop._stop(run, Halt("what happened", since=30, advice="Do this"))
    said = str(caught.value)
    assert "stopped at step 40: what happened; since step 30." in said and said.endswith("Do this")
    assert f"{tmp_path / 'checkpoints' / 'step_00000020'} (--train.resume PATH)" in said
    assert ("could not be saved (No space left on device)" in said) == disk_full
    assert (f"Saved {tmp_path / 'checkpoints' / 'step_00000040'};" in said) != disk_full
