"""Our vision encoder and Hugging Face's Data2VecVisionModel with the same weights (invariant 7), and the way back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megad2v.config.modalities import VisionConfig
from megad2v.config.schema import Config, ModelConfig
from megad2v.errors import UserError
from megad2v.modalities.build import build_student
from megad2v.modalities.vision import hf_keys
from megad2v.modalities.vision.transforms import VisionTransform
from megad2v.models.data2vec import Student
from tests.checkpoints import perturb_
from tests.tolerances import HUGGING_FACE

transformers = pytest.importorskip("transformers")

SIZES = {
    "tiny": Config(),
    "eps 1e-6, wide heads": Config(
        model=ModelConfig(width=64, depth=4, heads=2, norm_eps=1e-6), vision=VisionConfig(image_size=48, patch_size=16)
    ),
    "head of two, ratio 3": Config(
        model=ModelConfig(width=30, depth=5, heads=5, mlp_ratio=3.0, head_layers=2, norm_eps=1e-3),
        vision=VisionConfig(image_size=40, patch_size=8),
    ),
    "no layer scale, no table": Config(
        model=ModelConfig(width=32, depth=2, heads=4, layer_scale=None, relative_bias=False),
        vision=VisionConfig(image_size=32, patch_size=8),
    ),
    "key bias": Config(model=ModelConfig(width=32, depth=3, heads=4, qkv_bias="full")),
    "no bias": Config(model=ModelConfig(width=32, depth=3, heads=4, qkv_bias="none")),
}


def exported(config: Config, student: Student, folder: Path) -> Path:
    """What from_pretrained needs."""
    save_file(
        hf_keys.to_hugging_face(dict(student.named_parameters()), config),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(hf_keys.model_config(config)))
    (folder / "preprocessor_config.json").write_text(json.dumps(hf_keys.processor_config(config)))
    return folder


def hidden_states(student: Student, images: torch.Tensor, mask_bt: torch.Tensor | None) -> list[torch.Tensor]:
    """Encoder input, output of each block, output behind the final norm."""
    view_btd = student.front_end(images, mask_bt)[0]
    output_btd, blocks = student.encoder(view_btd, last=len(student.encoder.blocks), tensor="block")
    return [view_btd, *blocks, output_btd]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES.keys())
def test_every_hidden_state_is_theirs(config: Config, masked: bool, tmp_path: Path) -> None:
    student = perturb_(build_student(config), 5)
    model, info = transformers.Data2VecVisionModel.from_pretrained(
        exported(config, student, tmp_path), local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    example = hf_keys.example(config, torch.Generator().manual_seed(0))
    mask_bt = example.mask_bt if masked else None
    with torch.no_grad():
        theirs = model.eval()(example.inputs, bool_masked_pos=mask_bt, output_hidden_states=True)
        ours = hidden_states(student, example.inputs, mask_bt)
        features = student.features(example.inputs)
    assert len(theirs.hidden_states) == config.model.depth + 1
    for our, their in zip(ours, [*theirs.hidden_states, theirs.last_hidden_state], strict=True):
        assert 0.1 < our.abs().max() < 50  # "of order one", or the tolerance means nothing
        assert (our - their).abs().max() < HUGGING_FACE
    if not masked:
        assert (features - theirs.last_hidden_state).abs().max() < HUGGING_FACE


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES.keys())
def test_there_and_back_again(config: Config) -> None:
    student = perturb_(build_student(config), 6)
    parameters = {name: p for name, p in student.named_parameters() if not name.startswith("head.")}
    back = hf_keys.from_hugging_face(hf_keys.to_hugging_face(parameters, config), config)
    assert back.keys() == parameters.keys()
    for name, value in parameters.items():
        expected = value.clone()
        if config.model.qkv_bias == "full" and name.endswith("attention.qkv.bias"):
            expected.view(config.model.heads, 3, -1)[:, 1] = 0.0  # the key's, which changes nothing
        assert torch.equal(back[name], expected), name
        assert back[name].is_contiguous(), name


def test_their_weights_become_ours() -> None:
    """A model that transformers initialised: every one of its parameters has a place."""
    config = SIZES["tiny"]
    torch.manual_seed(0)
    theirs = transformers.Data2VecVisionModel(transformers.Data2VecVisionConfig(**_arguments(config))).eval()
    student = build_student(config).eval()
    student.load_state_dict(hf_keys.from_hugging_face(theirs.state_dict(), config), strict=True)
    example = hf_keys.example(config, torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = student.features(example.inputs) - theirs(example.inputs).last_hidden_state
    assert difference.abs().max() < HUGGING_FACE


def _arguments(config: Config) -> dict[str, object]:
    return {k: v for k, v in hf_keys.model_config(config).items() if k not in ("architectures", "model_type")}


def test_foreign_weights_are_refused() -> None:
    config = SIZES["tiny"]
    theirs = hf_keys.to_hugging_face(dict(build_student(config).named_parameters()), config)
    pooler = {**theirs, "pooler.layernorm.weight": torch.ones(192)}
    with pytest.raises(UserError, match=r"pooler\.layernorm\.weight: our vision model has no such parameter"):
        hf_keys.from_hugging_face(pooler, config)
    del theirs["encoder.layer.0.attention.attention.key.weight"]
    with pytest.raises(UserError, match=r"encoder\.layer\.0: missing or unknown.*key\.weight"):
        hf_keys.from_hugging_face(theirs, config)
    with pytest.raises(UserError, match="biases"):
        hf_keys.from_hugging_face(
            hf_keys.to_hugging_face(
                dict(perturb_(build_student(SIZES["key bias"]), 0).named_parameters()), SIZES["key bias"]
            ),
            SIZES["no bias"],
        )


def test_post_norm_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.norm"):
        hf_keys.check(Config(model=ModelConfig(norm="post")))


def test_config_states_what_their_defaults_would_change() -> None:
    written = hf_keys.model_config(SIZES["head of two, ratio 3"])
    config = transformers.Data2VecVisionConfig(**_arguments(SIZES["head of two, ratio 3"]))
    assert config.layer_norm_eps == 1e-3
    assert config.intermediate_size == 90
    assert config.use_shared_relative_position_bias
    assert not config.use_mean_pooling
    assert (
        json.loads(config.to_json_string(use_diff=False)).items()
        >= {k: v for k, v in written.items() if k not in ("architectures", "model_type")}.items()
    )


@pytest.mark.parametrize(
    ("size", "tolerance"), [((50, 50), 1e-6), ((32, 32), 1e-6), ((64, 32), 1e-6), ((47, 61), 0.25)]
)
def test_image_processor_prepares_as_our_validation(size: tuple[int, int], tolerance: float, tmp_path: Path) -> None:
    """Exactly where the centre falls on whole pixels; elsewhere within a shift of a fraction of a pixel.

    The images are smooth, so that such a shift stays small; values are about +-2.
    """
    config = Config(vision=VisionConfig(image_size=32, patch_size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)))
    exported(config, perturb_(build_student(config), 0), tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / 10
    waves = np.stack([np.sin(x) * np.cos(y), np.sin(x + y), np.cos(x - y)], axis=-1)
    image = Image.fromarray((127.5 + 127.5 * waves).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    uint8_bchw = VisionTransform(config, "probe")(buffer.getvalue(), "id", 0).inputs[None]
    ours = build_student(config).front_end._pixels(uint8_bchw)
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    assert theirs.shape == (1, 3, 32, 32)
    assert theirs.dtype == torch.float32
    assert (ours - theirs).abs().max() < tolerance


def test_image_processor_converts_grey_and_transparent(tmp_path: Path) -> None:
    config = SIZES["tiny"]
    exported(config, perturb_(build_student(config), 0), tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    for mode in ("L", "RGBA", "P"):
        assert processor(Image.new(mode, (70, 90)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
