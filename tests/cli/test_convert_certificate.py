"""The certificate of a conversion: any wrong value fails it, and then nothing is written."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megad2v.config.schema import Config
from megad2v.convert import hf
from megad2v.convert.certificate import SEED, CertificateError, certify, compare_layers, hidden_states
from megad2v.convert.hf import export
from megad2v.convert.load import checkpoint_config, load_encoder, open_checkpoint
from megad2v.modalities.build import build_student
from megad2v.modalities.keys import KeyMap
from megad2v.modalities.speech import fairseq_keys as fairseq_speech_keys
from megad2v.modalities.speech import hf_keys as speech_keys
from megad2v.modalities.text import hf_keys as text_keys
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.modalities.vision import beit_keys, hf_keys
from tests.checkpoints import (
    perturb_,
    small_config,
    small_speech_config,
    small_state,
    small_text_config,
    write_small_checkpoint,
)
from tests.cli.conversions import PUBLISHED, SPEECH, assert_refused, convert, text_checkpoint, written

transformers = pytest.importorskip("transformers")


def test_any_wrong_parameter_fails_the_certificate(vision_run: Path, tmp_path: Path) -> None:
    """One element of any parameter, off by little: float32 would not see most of them behind a layer scale."""
    checkpoint = open_checkpoint(vision_run)
    config, student = checkpoint_config(checkpoint), load_encoder(checkpoint, "student")
    parameters = dict(student.named_parameters())
    kinds = [name for name in parameters if name.startswith(("front_end.", "encoder.")) and "blocks" not in name]
    kinds += [name for name in parameters if name.startswith("encoder.blocks.1.")]
    assert len(kinds) == 7 + 14
    (tmp_path / "config.json").write_text(json.dumps(hf_keys.model_config(config)))
    for name in [None, *kinds]:
        damaged = {**parameters}
        if name is not None:
            damaged[name] = parameters[name].clone()
            damaged[name].view(-1)[parameters[name].numel() // 2] += 1e-3
        save_file(hf_keys.to_hugging_face(damaged, config), tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CertificateError, match="differs from ours") if name is not None else nullcontext():
            certify(tmp_path, student, hf_keys, config)


def test_any_wrong_speech_parameter_fails_the_certificate(tmp_path: Path) -> None:
    """One element of any parameter, off by little; only what a key's bias adds to all logits alike may differ."""
    config = small_speech_config()
    write_small_checkpoint(tmp_path / "run", config, small_state(config))
    student = load_encoder(open_checkpoint(tmp_path / "run"), "student")
    parameters = dict(student.named_parameters())
    kinds = [name for name in parameters if not name.startswith(("head.", "encoder.blocks"))]
    kinds += [name for name in parameters if name.startswith("encoder.blocks.1.")]
    assert len(kinds) == 1 + 3 * 3 + 2 + 2 + 2 * 2 + 2 + 12
    (tmp_path / "config.json").write_text(json.dumps(speech_keys.model_config(config)))
    for name in [None, *kinds]:
        damaged = {**parameters}
        if name is not None:
            damaged[name] = parameters[name].clone()
            damaged[name].view(-1)[parameters[name].numel() - 1] += 1e-3
        state = speech_keys.to_hugging_face(damaged, config)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CertificateError, match="differs from ours") if name is not None else nullcontext():
            certify(tmp_path, student, speech_keys, config)


def test_any_wrong_text_parameter_fails_the_certificate(tmp_path: Path) -> None:
    """One element of any parameter, off by little; of the table of tokens a row that the input holds."""
    text_checkpoint(tmp_path / "run", Tokenizer("bytes", 261, name="bytes"), max_tokens=128)
    checkpoint = open_checkpoint(tmp_path / "run")
    config, student = checkpoint_config(checkpoint), load_encoder(checkpoint, "student")
    parameters = dict(student.named_parameters())
    kinds = [name for name in parameters if not name.startswith(("head.", "encoder.blocks"))]
    kinds += [name for name in parameters if name.startswith("encoder.blocks.1.")]
    assert len(kinds) == 2 + 2 + 12
    (tmp_path / "config.json").write_text(json.dumps(text_keys.model_config(config)))
    for name in [None, *kinds]:
        damaged = {**parameters}
        if name is not None:
            damaged[name] = parameters[name].clone()
            damaged[name].view(-1)[parameters[name].numel() - 1] += 1e-3
        state = text_keys.to_hugging_face(damaged, config)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CertificateError, match="differs from ours") if name is not None else nullcontext():
            certify(tmp_path, student, text_keys, config)


def test_a_wrong_tokenizer_fails_its_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cuts a space off, one that finds "<mask>" in texts, one without an id: nothing is written."""
    text_checkpoint(tmp_path / "run", Tokenizer("bytes", 261, name="bytes"))
    right = text_keys.hugging_face_files

    def stripped(settings: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        tokenizer["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": False}

    def finds_masks(settings: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        settings["split_special_tokens"] = False

    def lacks_an_id(settings: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"].pop("<0xFF>")

    for spoil, expected in (
        (stripped, r"gives \[0, 2\] for ' ', ours \[0, 36, 2\]"),
        (finds_masks, "for '<s> <pad> </s> <unk> <mask>"),
        (lacks_an_id, "the exported tokenizer has 260 ids"),
    ):

        def wrong(tokenizer: Tokenizer, longest: int, spoil: Any = spoil) -> dict[str, str]:
            files = {name: json.loads(content) for name, content in right(tokenizer, longest).items()}
            spoil(files["tokenizer_config.json"], files["tokenizer.json"])
            return {name: json.dumps(content) for name, content in files.items()}

        monkeypatch.setattr(text_keys, "hugging_face_files", wrong)
        with pytest.raises(CertificateError, match=expected):
            export(open_checkpoint(tmp_path / "run"), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_flipped_weight_leaves_no_output(
    vision_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = hf_keys.to_hugging_face

    def wrong(parameters: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
        state = right(parameters, config)
        if (name := "encoder.layer.2.output.dense.weight") in state and not state[name].is_meta:
            state[name][3, 5] *= -1
        return state

    monkeypatch.setattr(hf_keys, "to_hugging_face", wrong)
    assert convert("--checkpoint", vision_run, "--to", "hf", "--output", tmp_path / "new" / "hf") == 1
    assert "differs from ours from block 3 on" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_failed_certificate_is_one_line_and_leaves_the_old_export(
    vision_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(open_checkpoint(vision_run), tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    config = hf_keys.model_config
    monkeypatch.setattr(hf_keys, "model_config", lambda c: {**config(c), "layer_norm_eps": 1e-12})
    assert convert("--checkpoint", vision_run, "--to", "hf", "--output", tmp_path / "hf", "--overwrite") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("convert_checkpoint: the exported model differs from ours from block 1 on: ")
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before


def test_parameters_that_they_do_not_know_fail_the_certificate(
    vision_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hf_keys.model_config
    for key, value in {"use_mean_pooling": True, "use_mask_token": False, "layer_scale_init_value": 0.0}.items():
        monkeypatch.setattr(hf_keys, "model_config", lambda c, k=key, v=value: {**config(c), k: v})
        with pytest.raises(CertificateError, match="unexpected_keys"):
            export(open_checkpoint(vision_run), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_wrong_map_that_undoes_itself_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Query and key exchanged, both ways: the round trip is exact, and the second program computes something else."""
    run = written(tmp_path, SPEECH)
    right = fairseq_speech_keys._MAPS["layer"]
    places = ("k", "q", "v")
    wrong = KeyMap(
        "fairseq",
        plain={ours: theirs for ours, (theirs, turn) in right._ours.items() if not turn},
        transposed={ours: theirs for ours, (theirs, turn) in right._ours.items() if turn},
        projections=tuple(f"encoder.layers.*.self_attn.{part}_proj" for part in places),
    )
    monkeypatch.setitem(fairseq_speech_keys._MAPS, "layer", wrong)
    words = "the exported model differs from ours from block 1 on"
    assert_refused(capsys, words, "--checkpoint", run, "--to", "fairseq", "--output", tmp_path / "out", code=1)


_INNER = "encoder.blocks.1.mlp.output.weight"


@pytest.mark.parametrize(
    ("name", "spoilt", "words"),
    [
        (_INNER, 1, "the BEiT fork's model differs from ours from block 2 on"),
        (_INNER, 2, "the teacher in the BEiT fork's model differs from ours"),
        ("head.weight", 1, "lm_head.weight of the student does not come back as it was"),
    ],
)
def test_any_wrong_tensor_in_an_import_fails(
    name: str,
    spoilt: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One element of the student's (the first that is mapped), then of the teacher's; and of the head, which no hidden
    state depends on."""
    run = written(tmp_path, small_config(**PUBLISHED))
    assert convert("--checkpoint", run, "--to", "beit", "--output", tmp_path / "beit") == 0
    capsys.readouterr()
    right, calls = beit_keys.from_beit, 0

    def wrong(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        ours = {name: value.clone() for name, value in right(state, config).items()}
        if calls == spoilt:
            ours[name][3, 5] += 1e-3
        return ours

    monkeypatch.setattr("megad2v.convert.incoming.from_beit", wrong)
    arguments = ("--from", "beit", "--input", tmp_path / "beit", "--output", tmp_path / "out")
    assert_refused(capsys, words, *arguments, code=1)


def test_a_row_that_no_input_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit in the row of a token that the certificate's 64 ids do not have: no hidden state shows it."""
    text_checkpoint(tmp_path / "run", Tokenizer("bytes", 261, name="bytes"))
    right, ids = hf.write_weights, text_keys.example(small_text_config(text={"vocabulary": 261}), seeded()).inputs
    row = next(row for row in range(4, 260) if row not in ids)

    def damaged(path: Path, *rest: Any) -> tuple[int, str]:
        written = right(path, *rest)
        content = load_file(path)
        content["embeddings.word_embeddings.weight"][row, 5] += 1e-6
        save_file(content, path, metadata={"format": "pt"})
        return written

    monkeypatch.setattr(hf, "write_weights", damaged)
    words = "embeddings.word_embeddings.weight in the exported file is not the checkpoint's front_end.tokens.weight"
    assert_refused(capsys, words, "--checkpoint", tmp_path / "run", "--to", "hf", "--output", tmp_path / "out", code=1)


def seeded() -> torch.Generator:
    """As the certificate's."""
    return torch.Generator().manual_seed(SEED)


def test_states_of_another_shape_or_number() -> None:
    """A difference would be broadcast over one row, and a layer left out would pass unseen."""
    student, example = perturb_(build_student(small_config()), 1), hf_keys.example(small_config(), seeded())
    ours = hidden_states(student, example)
    cases = (
        ([state[:1] for state in ours], r"hidden state 0 is \(2, 17, 24\), and \(1, 17, 24\) there"),
        (ours[:-1], "hidden state 4 is .*, and nothing there"),
        ([*ours, ours[-1]], "more than our 5 hidden states"),
    )
    for states, words in cases:
        with pytest.raises(CertificateError, match=words):
            compare_layers(student, lambda *_, states=states: states, example, "theirs")


@pytest.mark.parametrize("target", ["hf", "beit"])
def test_a_run_that_diverged(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(**PUBLISHED)
    state = small_state(config)
    state["student"]["encoder.blocks.1.mlp.input.weight"][3, 5] = float("nan")
    write_small_checkpoint(tmp_path / "run", config, state)
    arguments = ("--checkpoint", tmp_path / "run", "--to", target, "--output", tmp_path / "out")
    assert_refused(capsys, "not finite; its training has diverged", *arguments)
