"""Our text encoder and Hugging Face's Data2VecTextModel with the same weights (invariant 7), and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megad2v.config.schema import Config
from megad2v.convert.certificate import hidden_states
from megad2v.errors import UserError
from megad2v.modalities.build import build_student
from megad2v.modalities.keys import Example
from megad2v.modalities.text import fairseq_keys, hf_keys
from megad2v.modalities.text.export import export_hugging_face
from megad2v.modalities.text.reading import Lines, find_inputs
from megad2v.modalities.text.train import TrainingOptions, train_tokenizer
from megad2v.models.data2vec import Student
from tests.checkpoints import perturb_, small_text_config
from tests.tolerances import HUGGING_FACE

transformers = pytest.importorskip("transformers")

SIZES = {
    "small": small_text_config(),
    "base": small_text_config(width=96, depth=12, heads=12, mlp_ratio=4.0, text={"max_tokens": 512}),
    "large": small_text_config(width=128, depth=24, heads=16, mlp_ratio=4.0, text={"max_tokens": 512}),
    "width of base, two blocks": small_text_config(
        width=768, depth=2, heads=12, mlp_ratio=4.0, text={"vocabulary": 50_265, "max_tokens": 512}
    ),
    "other eps, one layer of head": small_text_config(norm_eps=1e-3, head_layers=1, text={"max_tokens": 9}),
    "no key bias": small_text_config(qkv_bias="no_key"),
    "no bias": small_text_config(qkv_bias="none"),
}


def exported(config: Config, student: Student, folder: Path) -> Path:
    """What AutoModel needs."""
    state = hf_keys.to_hugging_face(dict(student.named_parameters()), config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_keys.model_config(config)))
    return folder


def loaded(folder: Path) -> torch.nn.Module:
    """What AutoModel makes of it; a pooler is new, nothing else is missing or too much."""
    model, info = transformers.AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert type(model).__name__ == hf_keys.MODEL_CLASS
    assert set(info.pop("missing_keys")) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not any(info.values()), info
    return model.eval()


def assert_equal(student: Student, model: torch.nn.Module, case: Example) -> None:
    """Every hidden state, of order one, or the tolerance means nothing."""
    with torch.no_grad():
        theirs = model(**case.arguments, output_hidden_states=True)
    assert len(theirs.hidden_states) == len(student.encoder.blocks) + 1
    ours = hidden_states(student, case)
    for our, their in zip(ours, [*theirs.hidden_states, theirs.last_hidden_state], strict=True):
        assert 0.1 < our.abs().max() < 50
        assert (our - their).abs().max() < HUGGING_FACE


@pytest.mark.parametrize(
    "config",
    [pytest.param(one, id=name, marks=[pytest.mark.slow] if name == "large" else []) for name, one in SIZES.items()],
)
def test_every_hidden_state_is_theirs(config: Config, tmp_path: Path) -> None:
    """Two rows of different lengths, one with padding; then the first alone."""
    student = perturb_(build_student(config), 5, size=min(0.1, 2.4 / config.model.width))
    model = loaded(exported(config, student, tmp_path))
    example = hf_keys.example(config, torch.Generator().manual_seed(0))
    assert example.padding_bt is not None and example.padding_bt.any() and not example.padding_bt[0].any()
    assert example.inputs.shape == (2, 1, config.text.max_tokens)  # so every position counts
    assert (example.inputs == hf_keys.model_config(config)["vocab_size"] - 1).any(2).all()
    ids = example.inputs[:1]
    whole = example._replace(inputs=ids, padding_bt=None, arguments={"input_ids": ids[:, 0]})
    for case in (example, whole):
        assert_equal(student, model, case)
    with torch.no_grad():
        difference = student.features(ids) - model(ids[:, 0]).last_hidden_state
    assert difference.abs().max() < HUGGING_FACE


def test_what_student_and_teacher_see(tmp_path: Path) -> None:
    """Their model is given the student's row of ids, and the teacher's closed up: positions start anew in both."""
    config = small_text_config(text={"teacher_sees": "masked_only"})
    student = perturb_(build_student(config), 5)
    model = loaded(exported(config, student, tmp_path))
    original = hf_keys.example(config, torch.Generator().manual_seed(2)).inputs[:1, 0]
    mask = torch.arange(original.shape[1])[None] % 3 == 1
    hidden = original.masked_fill(mask, 100)
    inputs = torch.stack([original.masked_fill(~mask, 1), hidden], dim=1)
    with torch.no_grad():
        masked, clean = student.front_end(inputs, mask)
        ours = (
            student.encoder(masked, None)[0],
            student.encoder(clean, student.front_end.teacher_padding(inputs, None))[0],
        )
        assert (ours[0] - model(hidden).last_hidden_state).abs().max() < HUGGING_FACE
        assert (ours[1][mask] - model(original[mask][None]).last_hidden_state[0]).abs().max() < HUGGING_FACE


def test_real_text_with_a_trained_tokenizer(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """Sentences as AutoTokenizer pads them; ours gets the ids of our own tokenizer."""
    pytest.importorskip("sentencepiece")
    lines = [line for line in Lines(find_inputs([str(shared("data/text/books"))])) if line.strip()]
    tokenizer = train_tokenizer(lines[::10], TrainingOptions(2_000))
    config = small_text_config(width=96, depth=4, heads=12, text={"vocabulary": 2_000, "max_tokens": 128})
    student = perturb_(build_student(config), 7, size=0.025)
    model = loaded(exported(config, student, tmp_path))
    export_hugging_face(tokenizer, tmp_path, config.text.max_tokens)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    batch = lines[500:20_000:500]
    arguments = theirs(batch, padding=True, return_tensors="pt")
    ids_bt = torch.full(arguments["input_ids"].shape, tokenizer.pad)
    for row, line in enumerate(batch):
        ids = [tokenizer.bos, *tokenizer.encode_document([line]).tolist()]
        ids_bt[row, : len(ids)] = torch.tensor(ids)
    padding_bt = ids_bt == tokenizer.pad
    assert 0.2 < padding_bt.float().mean() < 0.8
    assert_equal(student, model, Example(ids_bt[:, None], None, padding_bt, dict(arguments), ""))


@pytest.mark.parametrize("name", [n for n, config in SIZES.items() if config.model.width < 96])
def test_there_and_back_again(name: str) -> None:
    """Through their names and through fairseq's, head included there."""
    config = SIZES[name]
    parameters = dict(perturb_(build_student(config), 6).named_parameters())
    headless = {name: p for name, p in parameters.items() if not name.startswith("head.")}
    for expected, back in (
        (headless, hf_keys.from_hugging_face(hf_keys.to_hugging_face(parameters, config), config)),
        (parameters, fairseq_keys.from_fairseq(fairseq_keys.to_fairseq(parameters, config), config)),
    ):
        assert back.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(back[name], value), name
            assert back[name].is_contiguous(), name


def _arguments(config: Config) -> dict[str, object]:
    return {k: v for k, v in hf_keys.model_config(config).items() if k not in ("architectures", "model_type")}


def test_their_weights_become_ours() -> None:
    """A model of theirs, pooler and embedding of the segment included: padding in it, and pad rows stay zeros."""
    config = SIZES["small"]
    torch.manual_seed(0)
    theirs = transformers.Data2VecTextModel(transformers.Data2VecTextConfig(**_arguments(config))).eval()
    with torch.no_grad():
        theirs.embeddings.token_type_embeddings.weight.normal_()
    student = build_student(replace(config, model=replace(config.model, head_layers=0))).eval()
    student.load_state_dict(hf_keys.from_hugging_face(theirs.state_dict(), config), strict=True)
    assert not student.front_end.positions.weight[1].any() and not student.front_end.tokens.weight[1].any()
    example = hf_keys.example(config, torch.Generator().manual_seed(1))
    real = ~example.padding_bt
    with torch.no_grad():
        difference = (
            student.features(example.inputs, example.padding_bt) - theirs(**example.arguments).last_hidden_state
        )
    assert difference[real].abs().max() < HUGGING_FACE


def test_foreign_weights_are_refused() -> None:
    config = SIZES["small"]
    theirs = hf_keys.to_hugging_face(dict(build_student(config).named_parameters()), config)
    with pytest.raises(UserError, match=r"lm_head\.bias: our text model has no such parameter"):
        hf_keys.from_hugging_face({**theirs, "lm_head.bias": torch.ones(2)}, config)
    segments = "embeddings.token_type_embeddings.weight"
    with pytest.raises(UserError, match=rf"{segments}: 2 kinds of segments; our text model knows one"):
        hf_keys.from_hugging_face({**theirs, segments: torch.ones(2, 24)}, config)
    del theirs["encoder.layer.1.attention.self.key.weight"]
    with pytest.raises(UserError, match=r"an attention without encoder\.layer\.1\.attention\.self\.key\.weight"):
        hf_keys.from_hugging_face(theirs, config)
    with pytest.raises(KeyError, match=r"no name in Data2VecTextModel for the text parameter encoder\.cheese"):
        hf_keys.to_hugging_face({"encoder.cheese": torch.ones(1)}, config)


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("model.norm", small_text_config(norm="pre")),
        ("model.deep_norm", small_text_config(deep_norm=True)),
        ("model.layer_scale", small_text_config(layer_scale=0.1)),
    ],
)
def test_what_has_no_place_there_is_refused(key: str, config: Config) -> None:
    hf_keys.check(SIZES["small"])
    with pytest.raises(UserError, match=f"^{key}: Hugging Face's Data2VecTextModel"):
        hf_keys.check(config)


def test_config_states_what_their_defaults_would_change() -> None:
    config = SIZES["other eps, one layer of head"]
    written = transformers.Data2VecTextConfig(**_arguments(config))
    assert written.layer_norm_eps == 1e-3
    assert written.type_vocab_size == 1
    assert written.hidden_dropout_prob == written.attention_probs_dropout_prob == 0.0
    assert written.max_position_embeddings == 9 + 2
    assert json.loads(written.to_json_string(use_diff=False)).items() >= _arguments(config).items()
