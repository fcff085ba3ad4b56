"""Our speech encoder and Hugging Face's Data2VecAudioModel with the same weights (invariant 7), and the way back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megad2v.config.schema import Config
from megad2v.convert.certificate import hidden_states
from megad2v.errors import UserError
from megad2v.modalities.build import build_student
from megad2v.modalities.speech import hf_keys
from megad2v.models.data2vec import Student
from tests.checkpoints import perturb_, small_speech_config
from tests.tolerances import HUGGING_FACE

transformers = pytest.importorskip("transformers")

RELEASED = Config().speech.conv_layers
NARROW = tuple((32, kernel, stride) for _, kernel, stride in RELEASED)
POSITIONS = {"position_depth": 5, "position_kernel": 19}
SIZES = {
    "small": small_speech_config(),
    "base": small_speech_config(
        width=96, depth=12, heads=12, mlp_ratio=4.0, speech={**POSITIONS, "conv_layers": NARROW, "position_groups": 16}
    ),
    "large": small_speech_config(
        width=128, depth=24, heads=16, mlp_ratio=4.0, speech={**POSITIONS, "conv_layers": NARROW, "position_groups": 16}
    ),
    "width of base, two blocks": small_speech_config(
        width=768,
        depth=2,
        heads=12,
        mlp_ratio=4.0,
        speech={**POSITIONS, "conv_layers": RELEASED, "position_groups": 16},
    ),
    "biases, even kernel, other eps": small_speech_config(
        norm_eps=1e-3, speech={"conv_bias": True, "position_kernel": 4, "position_groups": 8}
    ),
    "no key bias": small_speech_config(qkv_bias="no_key"),
    "no bias": small_speech_config(qkv_bias="none"),
}


def exported(config: Config, student: Student, folder: Path) -> Path:
    """What from_pretrained needs."""
    state = hf_keys.to_hugging_face(dict(student.named_parameters()), config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_keys.model_config(config)))
    (folder / "preprocessor_config.json").write_text(json.dumps(hf_keys.processor_config(config)))
    return folder


@pytest.mark.parametrize(
    "config",
    [pytest.param(one, id=name, marks=[pytest.mark.slow] if name == "large" else []) for name, one in SIZES.items()],
)
def test_every_hidden_state_is_theirs(config: Config, tmp_path: Path) -> None:
    """Two waveforms of different lengths, masked; then the first alone, neither padded nor masked."""
    student = perturb_(build_student(config), 5, size=min(0.1, 2.4 / config.model.width))
    model, info = transformers.Data2VecAudioModel.from_pretrained(
        exported(config, student, tmp_path), local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    example = hf_keys.example(config, torch.Generator().manual_seed(0))
    assert example.padding_bt is not None and example.padding_bt.any() and (example.mask_bt & ~example.padding_bt).any()
    whole = example._replace(
        inputs=example.inputs[:1].clone(), mask_bt=None, padding_bt=None, arguments={"input_values": example.inputs[:1]}
    )
    for case in (example, whole):
        with torch.no_grad():
            theirs = model.eval()(**case.arguments, output_hidden_states=True)
        ours = hidden_states(student, case)
        assert len(theirs.hidden_states) == config.model.depth + 1
        for our, their in zip(ours, [*theirs.hidden_states, theirs.last_hidden_state], strict=True):
            assert 0.1 < our.abs().max() < 50  # "of order one", or the tolerance means nothing
            assert (our - their).abs().max() < HUGGING_FACE
    with torch.no_grad():
        assert (student.features(whole.inputs) - theirs.last_hidden_state).abs().max() < HUGGING_FACE


@pytest.mark.parametrize("name", ["small", "biases, even kernel, other eps", "no key bias", "no bias"])
def test_there_and_back_again(name: str) -> None:
    config = SIZES[name]
    student = perturb_(build_student(config), 6)
    parameters = {name: p for name, p in student.named_parameters() if not name.startswith("head.")}
    back = hf_keys.from_hugging_face(hf_keys.to_hugging_face(parameters, config), config)
    assert back.keys() == parameters.keys()
    for name, value in parameters.items():
        assert torch.equal(back[name], value), name
        assert back[name].is_contiguous(), name


def _arguments(config: Config) -> dict[str, object]:
    return {k: v for k, v in hf_keys.model_config(config).items() if k not in ("architectures", "model_type")}


def test_their_weights_become_ours() -> None:
    """A model that transformers initialised: every one of its parameters has a place."""
    config = SIZES["small"]
    torch.manual_seed(0)
    theirs = transformers.Data2VecAudioModel(transformers.Data2VecAudioConfig(**_arguments(config))).eval()
    student = build_student(replace(config, model=replace(config.model, head_layers=0))).eval()
    student.load_state_dict(hf_keys.from_hugging_face(theirs.state_dict(), config), strict=True)
    waveforms = hf_keys.example(config, torch.Generator().manual_seed(1)).inputs
    with torch.no_grad():
        difference = student.features(waveforms) - theirs(waveforms).last_hidden_state
    assert difference.abs().max() < HUGGING_FACE


def test_foreign_weights_are_refused() -> None:
    config = SIZES["small"]
    theirs = hf_keys.to_hugging_face(dict(build_student(config).named_parameters()), config)
    adapted = {**theirs, "adapter.proj.weight": torch.ones(2)}
    with pytest.raises(UserError, match=r"adapter\.proj\.weight: our speech model has no such parameter"):
        hf_keys.from_hugging_face(adapted, config)
    del theirs["encoder.layers.1.attention.k_proj.weight"]
    with pytest.raises(UserError, match=r"an attention without encoder\.layers\.1\.attention\.k_proj\.weight"):
        hf_keys.from_hugging_face(theirs, config)
    biased = dict(perturb_(build_student(config), 0).named_parameters())
    with pytest.raises(UserError, match=r"q_proj: has a bias, which model\.qkv_bias none has no place for"):
        hf_keys.from_hugging_face(hf_keys.to_hugging_face(biased, config), SIZES["no bias"])
    with pytest.raises(KeyError, match=r"no name in Data2VecAudioModel for the speech parameter encoder\.cheese"):
        hf_keys.to_hugging_face({"encoder.cheese": torch.ones(1)}, config)


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("model.norm", small_speech_config(norm="pre")),
        ("model.deep_norm", small_speech_config(deep_norm=True)),
        ("model.layer_scale", small_speech_config(layer_scale=0.1)),
        ("speech.extractor_norm", small_speech_config(speech={"extractor_norm": "group"})),
    ],
)
def test_what_has_no_place_there_is_refused(key: str, config: Config) -> None:
    hf_keys.check(SIZES["small"])
    with pytest.raises(UserError, match=f"^{key}: Hugging Face's Data2VecAudioModel"):
        hf_keys.check(config)


def test_config_states_what_their_defaults_would_change() -> None:
    config = SIZES["biases, even kernel, other eps"]
    written = transformers.Data2VecAudioConfig(**_arguments(config))
    assert written.layer_norm_eps == 1e-3
    assert written.layerdrop == written.activation_dropout == 0.0
    assert written.conv_bias
    assert json.loads(written.to_json_string(use_diff=False)).items() >= _arguments(config).items()


def test_feature_extractor_prepares_as_fairseq_does(tmp_path: Path) -> None:
    """Layer norm over the whole recording (spec 1.1), zeros behind, and a mask that says where."""
    config = SIZES["small"]
    exported(config, perturb_(build_student(config), 0), tmp_path)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path, local_files_only=True)
    assert type(extractor).__name__ == "Wav2Vec2FeatureExtractor"
    generator = np.random.default_rng(0)
    waveforms = [0.1 + 0.3 * generator.standard_normal(length).astype(np.float32) for length in (900, 700)]
    batch = extractor(waveforms, sampling_rate=16_000, padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(dim=1).tolist() == [900, 700]
    for row, waveform in zip(batch["input_values"], waveforms, strict=True):
        expected = torch.nn.functional.layer_norm(torch.from_numpy(waveform), waveform.shape, eps=1e-5)
        # They add 1e-7 to the variance: here, of 0.09, a factor of 1 + 5e-5.
        assert (row[: len(expected)] - expected).abs().max() < 1e-4 * expected.abs().max()
        assert not row[len(expected) :].any()
