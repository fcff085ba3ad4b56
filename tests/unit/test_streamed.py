"""convert/streamed.py: a forward with weights that are there only while they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megad2v.checkpoint.stream import TensorFile, write_whole
from megad2v.convert.streamed import AT_ONCE, load_weights, parameters_on_meta, stream_weights
from megad2v.modalities.build import build_student
from megad2v.models.data2vec import Student
from tests.checkpoints import perturb_, small_config


def present(model: Student) -> int:
    return sum(p.numel() for p in model.parameters() if not p.is_meta)


def test_one_module_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal to the model, in both dtypes, with never more weights than its largest module has; read in ranges."""
    monkeypatch.setattr("megad2v.convert.streamed.AT_ONCE", 100)
    config = small_config()
    whole = perturb_(build_student(config), 1)
    state = dict(whole.named_parameters())
    with parameters_on_meta():
        streamed = build_student(config).eval()
    assert present(streamed) == 0 and not any(buffer.is_meta for buffer in streamed.buffers())
    most, longest = [0], [0]

    def source(name: str, start: int, length: int) -> Tensor:
        most[0], longest[0] = max(most[0], present(streamed)), max(longest[0], length)
        return state[name].flatten()[start : start + length]

    stream_weights(streamed, source)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(streamed.features(images), whole.features(images))
        largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in whole.modules())
        assert 0 < most[0] <= largest + 2 * config.model.width  # the tokens of the front end are there meanwhile
        assert longest[0] == 100 and present(streamed) == 0
        assert torch.equal(streamed.double().features(images.double()), whole.double().features(images.double()))
    with parameters_on_meta():
        loaded = build_student(config)
    load_weights(loaded, source)
    assert all(torch.equal(p, state[name].float()) for name, p in loaded.named_parameters())
    assert AT_ONCE > 100  # else the ranges were not the test's


def test_a_failed_forward_leaves_no_weights() -> None:
    state = dict(perturb_(build_student(small_config()), 1).named_parameters())
    with parameters_on_meta():
        streamed = build_student(small_config()).eval()
    stream_weights(streamed, lambda name, start, length: state[name].flatten()[start : start + length])
    with pytest.raises(RuntimeError, match="30"):  # no multiple of a patch
        streamed.features(torch.randn(1, 3, 32, 30))
    assert present(streamed) == 0


def test_files_of_tensors(tmp_path: Path) -> None:
    """What the library writes is read range by range, what is written is what the library reads; damage has a name."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(0, 2), "c.d": torch.randn(7)}
    save_file(tensors, tmp_path / "theirs")
    file = TensorFile(tmp_path / "theirs")
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name, 0, tensor.numel()), tensor.flatten())
    assert torch.equal(file.read("a", 4, 6), tensors["a"].flatten()[4:10])
    with pytest.raises(ValueError, match="of 15"):
        file.read("a", 10, 6)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_whole(tmp_path / "ours", shapes, tensors.items(), {"format": "pt"})
    ours = TensorFile(tmp_path / "ours")
    assert all(torch.equal(ours.read(n, 0, t.numel()), t.flatten()) for n, t in tensors.items())
    with pytest.raises(ValueError, match="expected a"):
        write_whole(tmp_path / "wrong", shapes, reversed(tensors.items()), {})
    data = (tmp_path / "theirs").read_bytes()
    for damaged in (b"", data[:6], data[:-4], b"\xff" * 8 + data[8:], data.replace(b'"F32"', b'"F16"')):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"header|no float32|Expecting|decode"):
            TensorFile(tmp_path / "damaged")
