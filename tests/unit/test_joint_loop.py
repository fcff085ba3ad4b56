"""What the training loop does by modality: the gradient's factor, records, reports, and the demo's shards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megad2v.config.load import load_config
from megad2v.config.modalities import VisionConfig
from megad2v.config.parts import loss_weight
from megad2v.config.schema import Config, ModelConfig, TargetsConfig, VerdictConfig
from megad2v.errors import BadNumericState, UserError
from megad2v.metrics.report import joint_report, versions
from megad2v.modalities.batch import Batch
from megad2v.modalities.build import build_student, build_teacher
from megad2v.models.initialise import initialise_
from megad2v.parallel.topology import Axis
from megad2v.training import loop
from megad2v.training.main import with_demo_shards
from megad2v.training.records import RunRecords
from megad2v.training.setup import _export_remarks
from megad2v.training.state import Progress
from megad2v.training.step import count_step, take_step
from megad2v.training.verdict import Judgement, Verdict

ALONE: Any = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), tensor=Axis(0, 1), data=Axis(0, 1))


def joint(**settings: Any) -> Config:
    return load_config("joint_tiny", **settings)


def picture() -> Batch:
    mask = torch.zeros(2, 1, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    pixels = torch.arange(2 * 3 * 16 * 16).remainder(251).to(torch.uint8).view(2, 3, 16, 16)
    return Batch("vision", pixels, mask, sample_ids=("a", "b"), dropped=(("c", "torn"),))


class Engine:
    """Student and teacher with plain autograd in the place of DeepSpeed."""

    def __init__(self) -> None:
        model = ModelConfig(width=16, depth=2, heads=2)
        config = Config(model=model, vision=VisionConfig(image_size=16), targets=TargetsConfig(layers=2))
        self.student, self.teacher = build_student(config), build_teacher(config)
        initialise_(self.student, 1), initialise_(self.teacher, 1)
        self.modalities: list[str | None] = []

    def forward(self, inputs: Any, mask: Any, padding: Any, run: Any = None, modality: str | None = None) -> Any:
        self.modalities.append(modality)
        return self.student(inputs, mask, self.teacher, padding, run)

    def backward(self, loss_sum: torch.Tensor, count: int) -> None:
        (loss_sum / count).backward()

    def step(self, lr: float, loss: torch.Tensor, judge: Any) -> bool:
        norm = torch.stack([g.norm() for g in self.gradients()]).norm()
        return judge(float(loss), float(norm))

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.student.parameters() if p.grad is not None]


def test_loss_weight_is_a_factor_on_the_gradient_alone() -> None:
    """A power of two, so to the bit. What is judged, and remembered, is the loss itself."""
    engines, progresses, sums = [], [], []
    for weight in (1.0, 0.25):
        engine, progress, losses = Engine(), Progress(), []
        batch = picture()
        taken = take_step(
            engine, SimpleNamespace(update=lambda decay: None, refresh=lambda: None), [batch],  # type: ignore[arg-type]
            count_step([batch], ALONE, lambda counts: list(counts)), world=ALONE, seed=1, step=0, learning_rate=0.0,
            decay=0.9, loss_weight=weight, statistics=None, losses=losses,
            verdict=Verdict(VerdictConfig(), losses=progress.taken_losses, norms=progress.taken_norms),
        )  # fmt: skip
        assert taken and engine.modalities == ["vision"]
        engines.append(engine), progresses.append(progress), sums.append(losses[0])
    assert len(engines[0].gradients()) > 10
    for whole, quarter in zip(engines[0].gradients(), engines[1].gradients(), strict=True):
        assert torch.equal(whole * 0.25, quarter)
    first, second = progresses
    assert sums[0] == sums[1] and first.taken_losses == second.taken_losses and first.taken_losses["vision"][0] > 0
    assert second.taken_norms["vision"][0] == pytest.approx(first.taken_norms["vision"][0] / 4)


def test_loss_weights_are_the_parts() -> None:
    config = joint(joint__speech__loss_weight=0.5)
    assert [loss_weight(config, modality) for modality in ("vision", "speech", "text")] == [1.0, 0.5, 1.0]
    assert loss_weight(load_config("speech_tiny"), "speech") == 1.0


@pytest.mark.parametrize("several", [False, True])
def test_records_name_the_modality_of_a_joint_run(tmp_path: Path, several: bool) -> None:
    records = RunRecords(tmp_path, ALONE, trace=True, resumed_at=0, joint=several)
    records.consumed(7, [picture()])
    records.refused(7, [picture()], [0.5], Judgement(0.5, float("nan"), "not finite: gradient norm"))
    records.close()
    for name in ("trace/rank0.jsonl", "quarantine.jsonl", "bad_steps.jsonl"):
        (line,) = map(json.loads, (tmp_path / name).read_text().splitlines())
        assert line.get("modality") == ("vision" if several else None), name
        assert line["step"] == 7


def test_reports_say_what_each_modality_is_given() -> None:
    (line,) = joint_report(joint(joint__text__loss_weight=0.1))
    assert line.endswith("norms own, factors on the gradient vision 1, speech 1, text 0.1")
    (line,) = joint_report(joint(joint__text__weight=0.0))
    assert "text" not in line
    assert joint_report(load_config("vision_tiny")) == []
    assert {"image decoder", "audio decoder"} < set(versions(("vision", "speech", "text")))
    assert "image decoder" not in versions(("speech",)) and "audio decoder" not in versions(("text",))


def test_export_is_looked_at_for_each_modality() -> None:
    assert _export_remarks(joint(), {}) == []
    config = joint(joint__vision__norm="post", joint__text__layer_scale=0.1)
    vision, text = _export_remarks(config, {})
    assert "will refuse this run's vision: joint.vision.norm: Hugging Face's Data2VecVisionModel" in vision
    assert "will refuse this run's text: joint.text.layer_scale: Hugging Face's Data2VecTextModel" in text
    (alone,) = _export_remarks(load_config("vision_tiny", model__norm="post", model__layer_scale=None), {})
    assert "will refuse this run: model.norm: " in alone


def test_a_joint_run_without_data_takes_the_demo_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards = Path("runs/demo/shards")
    (shards / "image/train").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        with_demo_shards(joint())
    said = str(caught.value)
    for corpus, named in (("image", 0), ("speech", 1), ("text", 1)):
        assert said.count(f"make_shards.py {corpus} ") == said.count(f"--only {corpus} ") == named
    assert said.startswith("data.shards: not given") and said.endswith("a map modality: pattern")

    for corpus in ("speech", "text"):
        (shards / corpus / "train").mkdir(parents=True)
    found = with_demo_shards(joint())
    expected = {"vision": f"{shards}/image/train", "speech": f"{shards}/speech/train", "text": f"{shards}/text/train"}
    assert found.data.shards == expected
    assert found.data.valid is None
    for corpus in ("image", "speech", "text"):
        (shards / corpus / "valid").mkdir()
    assert with_demo_shards(joint()).data.valid == {m: p.replace("train", "valid") for m, p in expected.items()}
    two = with_demo_shards(joint(joint__speech__weight=0.0))
    assert set(two.data.shards or ()) == {"vision", "text"}
    alone = with_demo_shards(load_config("text_tiny"))
    assert (alone.data.shards, alone.data.valid) == (f"{shards}/text/train", f"{shards}/text/valid")
    given = replace(joint(), data=replace(joint().data, shards=expected))
    assert with_demo_shards(given) is given


def test_a_collapse_is_dated_by_lines_of_its_own_modality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict(VerdictConfig(std_after=2), losses={}, norms={}, joint=True)
    assert not verdict.watches_std(2) and verdict.watches_std(3)
    lines = [(10, "speech", 0.5), (20, "speech", 0.05), (25, "vision", 0.9), (30, "speech", 0.04)]
    metrics = tmp_path / "metrics.jsonl"
    written = [{"step": step, "target_std": std, "modality": modality} for step, modality, std in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in written))
    monkeypatch.setattr(loop, "save_checkpoint", lambda run, *, delete_older: None)
    run: Any = SimpleNamespace(
        directory=tmp_path, progress=Progress(step=30), background=None, logger=SimpleNamespace(path=metrics)
    )
    halt = verdict.collapsed({"target_std": 0.04, "pred_std": 1.0}, 30, "speech")
    assert halt is not None
    with pytest.raises(
        BadNumericState, match=r"stopped at step 30: collapse of speech: target_std 0.04.*since step 20"
    ):
        loop._stop(run, halt)
