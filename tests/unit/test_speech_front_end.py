"""The speech front end and its convolutional positions: shapes, norms, masks, initial values, counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megad2v.config.modalities import SpeechConfig
from megad2v.config.schema import Config, ModelConfig, TargetsConfig, TeacherConfig
from megad2v.modalities.build import blank_inputs, build_student, build_teacher, positions
from megad2v.modalities.speech.front_end import SpeechFrontEnd
from megad2v.modalities.speech.geometry import frame_count
from megad2v.modalities.speech.positions import ConvPositions
from megad2v.models.initialise import initialise_
from tests.checkpoints import perturb_, small_speech_config
from tests.tolerances import FORMULA, SPREAD


def released(width: int, depth: int, heads: int) -> Config:
    """A model of the released shape (spec 1.4)."""
    return Config(
        modality="speech",
        model=ModelConfig(
            width=width,
            depth=depth,
            heads=heads,
            norm="post",
            layer_scale=None,
            qkv_bias="full",
            relative_bias=False,
            head_layers=1,
        ),
        targets=TargetsConfig(layers=8),
        teacher=TeacherConfig(copied=("positions",)),
    )


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_base() -> None:
    """The published model's numbers (spec 1.4, 4.9), head included."""
    with torch.device("meta"):
        student, teacher = build_student(released(768, 12, 12)), build_teacher(released(768, 12, 12))
    assert numel(student) == 93_754_880
    assert numel(student) - numel(student.head) == 93_164_288
    assert numel(teacher) == 88_561_920


def test_views_and_mask_token() -> None:
    config = small_speech_config()
    front_end = perturb_(build_student(config), 0).front_end
    waveforms = torch.randn(2, 333)
    frames = frame_count(333, config.speech.conv_layers)
    mask_bt = torch.rand(2, frames) < 0.5
    masked, clean = front_end(waveforms, mask_bt)
    assert masked.shape == clean.shape == (2, frames, 24)
    assert torch.equal(masked[~mask_bt], clean[~mask_bt])
    assert (masked[mask_bt] == front_end.mask_token).all()
    alone, same = front_end(waveforms, None)
    assert alone is same and torch.equal(alone, clean)


def test_a_frame_sees_its_own_samples_alone() -> None:
    """Layer norms reach over channels, not time: a frame before the padding does not depend on it."""
    front_end = perturb_(build_student(small_speech_config()), 0).front_end
    short = torch.randn(1, 335)
    long = torch.cat((short, torch.zeros(1, 200)), dim=1)
    ours, padded = front_end(short, None)[1], front_end(long, None)[1]
    assert torch.allclose(ours, padded[:, : ours.shape[1]], atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "group"])
@pytest.mark.parametrize("bias", [False, True])
def test_extractor_is_made_of_torch_modules(kind: str, bias: bool) -> None:
    """The same stack from nn.Conv1d, nn.LayerNorm and nn.GroupNorm in float64 (wav2vec 2.0's one group norm stands
    behind the first convolution)."""
    config = SpeechConfig(conv_layers=((12, 10, 5), (8, 3, 2), (16, 2, 2)), conv_bias=bias, extractor_norm=kind)
    front_end = perturb_(SpeechFrontEnd(config, 24), 1).double()
    waveforms = torch.randn(2, 400, dtype=torch.float64)
    x = waveforms[:, None]
    for number, (channels, kernel, stride) in enumerate(config.conv_layers):
        state = front_end.convolutions[number].state_dict()
        conv = nn.Conv1d(x.shape[1], channels, kernel, stride, bias=bias).double()
        conv.load_state_dict({k.removeprefix("conv."): v for k, v in state.items() if k.startswith("conv.")})
        x = conv(x)
        if kind == "layer":
            x = F.layer_norm(x.mT, (channels,), state["norm.weight"], state["norm.bias"]).mT
        elif number == 0:
            norm = nn.GroupNorm(channels, channels).double()
            norm.load_state_dict({k.removeprefix("norm."): v for k, v in state.items() if k.startswith("norm.")})
            x = norm(x)
        else:
            assert set(state) <= {"conv.weight", "conv.bias"}
        x = nn.functional.gelu(x)
    expected = F.layer_norm(x.mT, x.shape[1:2], front_end.norm.weight, front_end.norm.bias)
    expected = expected @ front_end.projection.weight.T + front_end.projection.bias
    assert torch.allclose(front_end(waveforms, None)[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [F.layer_norm, F.group_norm], ids=["layer", "group"])
def test_norms_of_bf16_are_computed_in_float32(norm: object) -> None:
    """So fairseq's cast to float32 around them would change nothing but, now and then, how a tie is rounded."""
    generator = torch.Generator().manual_seed(1)
    x_bct = (3 * torch.randn(2, 16, 50, generator=generator) + 2).bfloat16()
    weight, bias = torch.randn(2, 16, generator=generator).bfloat16()
    shape = 16 if norm is F.group_norm else (16,)
    x = x_bct if norm is F.group_norm else x_bct.transpose(1, 2)
    ours, expected = norm(x, shape, weight, bias), norm(x.float(), shape, weight.float(), bias.float()).bfloat16()
    assert (ours == expected).float().mean() > 0.99
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-3)


def test_bf16_runs_end_to_end() -> None:
    student = perturb_(build_student(small_speech_config()), 0)
    waveforms = torch.randn(2, 400)
    expected = student.features(waveforms)
    ours = student.bfloat16().features(waveforms)
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kernel", [19, 4])
def test_positions_are_made_of_torch_modules(kernel: int) -> None:
    config = SpeechConfig(position_depth=3, position_kernel=kernel, position_groups=4)
    ours = perturb_(ConvPositions(config, 24), 2)
    x = expected = torch.randn(2, 11, 24)
    for layer in ours.layers:
        conv = nn.Conv1d(24, 24, kernel, padding=kernel // 2, groups=4)
        conv.load_state_dict(layer.state_dict())
        y = conv(expected.mT)[..., : x.shape[1]]
        expected = F.gelu(F.layer_norm(y.mT, (24,)))
    assert (ours(x) - expected).norm() < FORMULA * expected.norm()


@pytest.mark.parametrize("depth", [1, 2])
def test_what_padding_holds_does_not_matter(depth: int) -> None:
    """To real frames, positions included. With one convolution a sample comes out alone as it does padded; with several
    its last frames do not, as in fairseq and Hugging Face: the second sees what the first made of the zeros."""
    encoder = perturb_(build_student(small_speech_config(speech={"position_depth": depth})), 0).encoder
    x_btd, real = torch.randn(1, 20, 24), 13
    padding_bt = torch.arange(20)[None] >= real
    padded, _ = encoder(x_btd, padding_bt)
    other, _ = encoder(torch.where(padding_bt.unsqueeze(-1), 7.0, x_btd), padding_bt)
    assert torch.equal(padded[:, :real], other[:, :real])
    alone, _ = encoder(x_btd[:, :real])
    assert torch.allclose(padded[:, :real], alone, atol=1e-5) == (depth == 1)


def test_initial_values() -> None:
    """Convolutions Kaiming-normal, mask token uniform from 0 to 1, positions and projection as torch starts them."""
    with torch.device("cpu"):
        student = build_student(released(768, 1, 12))
    initialise_(student, 1)
    first, second = student.front_end.convolutions[0].conv.weight, student.front_end.convolutions[1].conv.weight
    assert first.std().item() == pytest.approx(math.sqrt(2 / 10), rel=0.05)  # 5,120 draws
    assert second.std().item() == pytest.approx(math.sqrt(2 / (512 * 3)), rel=SPREAD)
    token = student.front_end.mask_token
    assert 0 <= token.min() < 0.02 and 0.98 < token.max() <= 1
    for weight, fan_in in (
        (student.encoder.positions.layers[0].weight, 768 // 16 * 19),
        (student.front_end.projection.weight, 512),
        (student.head.weight, 768),
    ):
        assert 0.99 / math.sqrt(fan_in) < weight.abs().max() <= 1 / math.sqrt(fan_in)
        assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=SPREAD)
    assert student.encoder.blocks[0].mlp.input.weight.std().item() == pytest.approx(0.02, rel=SPREAD)


def test_frames_of_a_configuration() -> None:
    config = released(768, 12, 12)
    assert positions(config) == frame_count(320_000, config.speech.conv_layers) == 999
    assert frame_count(blank_inputs(config, 49).shape[1], config.speech.conv_layers) == 49
    assert positions(replace(config, modality="vision")) == 64


def test_front_end_learns_from_the_student_alone() -> None:
    """It is shared with the teacher, whose view of it is detached: without masked frames there is no gradient."""
    config = small_speech_config()
    student, teacher = build_student(config), build_teacher(config)
    for model in (student, teacher):
        initialise_(model, 1)
    waveforms = torch.randn(1, 400)
    mask_bmt = torch.zeros(1, 1, frame_count(400, config.speech.conv_layers), dtype=torch.bool)
    for hidden in (0, 5):
        mask_bmt[..., :hidden] = True
        student.zero_grad()
        student(waveforms, mask_bmt, teacher)[0].backward()
        gradients = [parameter.grad for parameter in student.front_end.parameters()]
        assert all(bool(gradient.any()) == (hidden > 0) for gradient in gradients)
    assert all(parameter.grad is None for parameter in teacher.parameters())
