"""Checkpoints: any range from any cut, damage that is named, whole commits, and which one a run goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megad2v.checkpoint import writer
from megad2v.checkpoint.catalog import find_checkpoint, newest_valid, prune, step_directory, steps_present
from megad2v.checkpoint.layout import ExtraRecord, FileRecord, Index, Piece, fragment_key
from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.stream import checksum_of, write_tensors
from megad2v.checkpoint.writer import CheckpointError, write_checkpoint
from megad2v.errors import UserError
from tests.checkpoints import cut, index_fields, small_config, small_state, write_small_checkpoint

CONFIG = small_config(depth=1)
STATE = small_state(CONFIG)
SHAPES = {name: tuple(value.shape) for name, value in STATE["student"].items()}


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(run: Path, step: int = 7, ranks: int = 3) -> Path:
    return write_small_checkpoint(run, CONFIG, STATE, step=step, ranks=ranks)


def flip(path: Path, position: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_full_tensors_from_any_cut(ranks: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, ranks=ranks))
    checkpoint.verify()
    assert len(checkpoint.index.files) == ranks
    for kind, tensors in STATE.items():
        assert checkpoint.names(kind) == [name for name in SHAPES if name in tensors]
        for name, value in checkpoint.tensors(kind):
            assert torch.equal(value, tensors[name]), name
            assert value.dtype == torch.float32


def test_every_range_across_odd_boundaries(tmp_path: Path) -> None:
    """All (start, length) of a tensor in eight pieces, some of them empty or of one element."""
    checkpoint = Checkpoint(write(tmp_path, ranks=8))
    name = "encoder.norm.weight"
    whole = STATE["student"][name]
    pieces = [f for file in checkpoint.index.files for f in file.fragments if f[:2] == (("student",), name)]
    assert len(pieces) > 4
    for start in range(whole.numel()):
        for length in range(whole.numel() - start + 1):
            assert torch.equal(checkpoint.read("student", name, start, length), whole[start : start + length])


def test_what_is_not_there_is_not_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path))
    name = "encoder.norm.weight"
    with pytest.raises(UserError, match=r"holds 20 of the 25 values asked of student encoder\.norm\.weight \[4, 29\)"):
        checkpoint.read("student", name, 4, 25)
    with pytest.raises(UserError, match="holds 0 of the 24 values asked of exp_avg"):
        checkpoint.full("exp_avg", name)
    assert checkpoint.names("exp_avg") == []
    assert not [name for name in checkpoint.names("teacher") if not name.startswith("encoder.")]


def test_overlapping_fragments_are_refused(tmp_path: Path) -> None:
    """A value that two files claim would be counted twice and hide one that is missing."""
    directory = write(tmp_path)
    index = Index.load(directory / "index.json")
    name = "encoder.norm.weight"
    record = next(r for r in index.files if any(f[:2] == (("student",), name) for f in r.fragments))
    start, length = next(f[2:] for f in record.fragments if f[:2] == (("student",), name))
    record.fragments.append((("student",), name, start, length))
    (directory / "index.json").write_text(index.dumps())
    with pytest.raises(UserError, match=r"student encoder\.norm\.weight"):
        Checkpoint(directory).full("student", name)


def test_a_gap_is_not_hidden_by_an_overlap(tmp_path: Path) -> None:
    """As many values as asked for, but one of them twice and another one never."""
    directory = write(tmp_path)
    name, values = "a", torch.arange(6.0)
    save_file({fragment_key("student", name, at): values[at : at + 3].clone() for at in (0, 1)}, directory / "x")
    index = Index.load(directory / "index.json")
    fragments = [(("student",), name, at, 3) for at in (0, 1)]
    index.files.append(FileRecord("x", (directory / "x").stat().st_size, checksum_of(directory / "x"), fragments))
    index.shapes[name] = [6]
    (directory / "index.json").write_text(index.dumps())
    with pytest.raises(UserError, match=r"of the 6 values asked of student a"):
        Checkpoint(directory).full("student", name)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_truncated_and_missing_files_are_named_at_once(rank: int, tmp_path: Path) -> None:
    directory = write(tmp_path)
    file = directory / f"rank{rank:05d}.safetensors"
    truncate(file)
    with pytest.raises(UserError, match=rf"rank{rank:05d}\.safetensors has [\d,]+ bytes, expected [\d,]+ \(truncated"):
        Checkpoint(directory)
    file.unlink()
    with pytest.raises(UserError, match=rf"rank{rank:05d}\.safetensors is missing"):
        Checkpoint(directory)


@pytest.mark.parametrize("position", [20, 5000, -1], ids=["header", "data", "last byte"])
def test_a_flipped_bit_is_found(position: int, tmp_path: Path) -> None:
    directory = write(tmp_path)
    flip(directory / "rank00002.safetensors", position)
    with pytest.raises(UserError, match=r"rank00002\.safetensors does not match its checksum"):
        Checkpoint(directory).verify()


def test_a_header_that_lies_is_one_clear_error(tmp_path: Path) -> None:
    """Without verify() a damaged header must still not end in a library's traceback."""
    directory = write(tmp_path)
    (directory / "rank00001.safetensors").write_bytes(b"\xff" * (directory / "rank00001.safetensors").stat().st_size)
    checkpoint = Checkpoint(directory)
    with pytest.raises(UserError, match=r"rank00001\.safetensors: not readable"):
        list(checkpoint.tensors("student"))


def test_index_tampering(tmp_path: Path) -> None:
    index = write(tmp_path) / "index.json"
    text = index.read_text()

    def problem(content: str) -> str:
        index.write_text(content)
        with pytest.raises(UserError) as caught:
            Checkpoint(index.parent)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    body = json.loads(text)
    assert "checksum does not match" in problem(json.dumps({**body, "step": 8}))
    assert "checksum does not match" in problem(json.dumps({**body, "extra": 1}))
    shorter = json.loads(text)
    shorter["files"].pop()
    assert "checksum does not match" in problem(json.dumps(shorter))
    assert "format 9, this version reads formats 1 and 2" in problem(json.dumps({**body, "format": 9}))
    assert "checksum does not match" in problem(text.replace('"step": 7', '"step": 8'))
    assert "checksum does not match" in problem(text + " ")
    assert "checksum does not match" in problem(json.dumps({**body, "format": 1}))
    assert "damaged index" in problem(text[: len(text) // 2])
    assert "damaged index" in problem("")
    assert "damaged index" in problem("[]")
    assert "damaged index" in problem("{}")
    index.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="damaged index"):
        Checkpoint(index.parent)
    index.unlink()
    with pytest.raises(UserError, match="not a checkpoint"):
        Checkpoint(index.parent)


def test_files_outside_the_folder_are_not_opened(tmp_path: Path) -> None:
    directory = write(tmp_path)
    index = Index.load(directory / "index.json")
    (directory.parent / "elsewhere").write_bytes((directory / "rank00000.safetensors").read_bytes())
    index.files[0] = type(index.files[0])("../elsewhere", *list(vars(index.files[0]).values())[1:])
    (directory / "index.json").write_text(index.dumps())
    with pytest.raises(UserError, match="missing"):
        Checkpoint(directory)


def test_newest_valid_passes_over_the_damaged(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step=step, ranks=2)
    flip(step_directory(tmp_path, 20) / "rank00000.safetensors")
    truncate(step_directory(tmp_path, 15) / "rank00001.safetensors")
    (tmp_path / "checkpoints" / ".writing_step_00000025").mkdir()
    (tmp_path / "checkpoints" / "step_25").mkdir()
    directory, reasons = newest_valid(tmp_path)
    assert directory == step_directory(tmp_path, 10)
    assert [("step_00000020" in r, "checksum" in r) for r in reasons[:1]] == [(True, True)]
    assert [("step_00000015" in r, "truncated" in r) for r in reasons[1:]] == [(True, True)]
    assert steps_present(tmp_path) == [5, 10, 15, 20]
    for step in (5, 10):
        (step_directory(tmp_path, step) / "index.json").unlink()
    directory, reasons = newest_valid(tmp_path)
    assert directory is None
    assert len(reasons) == 4
    with pytest.raises(UserError, match=r"no checkpoint here \(.*step_00000020.*; .*step_00000015"):
        find_checkpoint(tmp_path)


def test_find_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a run directory"):
        find_checkpoint(tmp_path / "nowhere")
    older, newer = write(tmp_path, step=5, ranks=1), write(tmp_path, step=6, ranks=1)
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == newer
    assert find_checkpoint(older) == older
    assert find_checkpoint(older.rename(tmp_path / "kept")) == tmp_path / "kept"


def test_prune(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step=step, ranks=1)
    prune(tmp_path, 0)
    assert steps_present(tmp_path) == [5, 10, 15]
    prune(tmp_path, 2)
    assert steps_present(tmp_path) == [10, 15]
    prune(tmp_path, 5)
    assert steps_present(tmp_path) == [10, 15]


def test_write_and_read_back(alone: None, tmp_path: Path) -> None:
    """Pieces that are views of one buffer, as an engine's are; twice, since a run that starts over replaces."""
    directory = step_directory(tmp_path, 3)
    buffer = torch.cat([value.flatten() for value in STATE["student"].values()])
    pieces, at = [], 0
    for name, value in STATE["student"].items():
        half = value.numel() // 2
        pieces.append(Piece("student", name, 0, buffer[at : at + half]))
        pieces.append(Piece("student", name, half, buffer[at + half : at + value.numel()]))
        at += value.numel()
    for _ in range(2):
        write_checkpoint(directory, pieces, **index_fields(CONFIG, SHAPES, 3))
    checkpoint = Checkpoint(directory)
    checkpoint.verify()
    assert checkpoint.index.config == index_fields(CONFIG, SHAPES, 3)["config"]
    assert all(torch.equal(value, STATE["student"][name]) for name, value in checkpoint.tensors("student"))
    assert len(checkpoint.names("student")) == len(SHAPES)
    assert {path.name for path in directory.parent.iterdir()} == {"step_00000003", "latest"}
    assert (directory.parent / "latest").read_text() == "step_00000003\n"
    modes = {path.stat().st_mode for path in directory.iterdir()}
    assert len(modes) == 1, "a colleague who may read the index may read the weights"


def test_empty_pieces_and_ranks_without_any(alone: None, tmp_path: Path) -> None:
    directory = step_directory(tmp_path, 1)
    fields = index_fields(CONFIG, {"a": (3,)}, 1)
    values = torch.arange(3.0)
    write_checkpoint(directory, [Piece("student", "a", 0, values[:0]), Piece("student", "a", 0, values)], **fields)
    assert torch.equal(Checkpoint(directory).full("student", "a"), values)
    write_checkpoint(directory, [], **fields)
    assert Checkpoint(directory).names("student") == []


def test_extras_are_part_of_the_checkpoint(alone: None, tmp_path: Path) -> None:
    """A tokenizer travels with the weights: listed, checked, and damaged means invalid."""
    directory, fields = step_directory(tmp_path, 1), index_fields(CONFIG, {"a": (3,)}, 1)
    pieces, files = [Piece("student", "a", 0, torch.arange(3.0))], {"tokenizer/deep/vocab.json": b"{}", "note": b""}
    write_checkpoint(directory, pieces, extras=files, **fields)
    checkpoint = Checkpoint(directory)
    checkpoint.verify()
    assert checkpoint.extras == list(files)
    assert {name: checkpoint.extra(name) for name in files} == files
    with pytest.raises(UserError, match=r"holds no vocab\.json \(but tokenizer/deep/vocab\.json, note\)"):
        checkpoint.extra("vocab.json")

    flip(directory / "tokenizer/deep/vocab.json", 0)
    for use in (
        lambda: Checkpoint(directory).verify(),
        lambda: Checkpoint(directory).extra("tokenizer/deep/vocab.json"),
    ):
        with pytest.raises(UserError, match=r"vocab\.json does not match its checksum"):
            use()
    (directory / "note").unlink()
    with pytest.raises(UserError, match="note is missing"):
        Checkpoint(directory)

    for name in ("../a", "/a", "index.json", "rank00000.safetensors", "", "a/../b", "a//b"):
        with pytest.raises(CheckpointError, match="no name for an extra file"):
            write_checkpoint(step_directory(tmp_path, 2), pieces, extras={name: b"x"}, **fields)
    assert steps_present(tmp_path) == [1]


def test_extras_outside_the_folder_are_not_opened(tmp_path: Path) -> None:
    directory = write(tmp_path)
    index = Index.load(directory / "index.json")
    assert index.extras == []
    outside = directory.parent / "elsewhere"
    outside.write_bytes(b"x")
    index.extras.append(ExtraRecord("../elsewhere", 1, checksum_of(outside)))
    (directory / "index.json").write_text(index.dumps())
    with pytest.raises(UserError, match="missing"):
        Checkpoint(directory)


def test_the_first_format_is_read(tmp_path: Path) -> None:
    """As the first version wrote it: SHA-256, one row per kind, no extras, a checksum of the canonical JSON."""
    directory = write(tmp_path)
    index = Index.load(directory / "index.json")
    body = {"format": 1, **index_fields(CONFIG, SHAPES, 7), "files": []}
    for record in index.files:
        digest = hashlib.sha256((directory / record.file).read_bytes()).hexdigest()
        rows = [[kind, *rest] for kinds, *rest in record.fragments for kind in kinds]
        body["files"].append({"file": record.file, "bytes": record.bytes, "sha256": digest, "fragments": rows})
    sealed = {**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}
    (directory / "index.json").write_text(json.dumps(sealed, indent=1))
    checkpoint = Checkpoint(directory)
    checkpoint.verify()
    for kind, tensors in STATE.items():
        assert all(torch.equal(value, tensors[name]) for name, value in checkpoint.tensors(kind))
    flip(directory / "rank00001.safetensors")
    with pytest.raises(UserError, match="does not match its checksum"):
        checkpoint.verify()
    (directory / "index.json").write_text(json.dumps({**sealed, "step": 8}))
    with pytest.raises(UserError, match="its checksum does not match its content"):
        Checkpoint(directory)


def test_safetensors_reads_what_was_streamed(tmp_path: Path) -> None:
    """Written by hand, read by the library, whatever the lengths of names and tensors (its header is padded)."""
    for number in range(1, 9):
        values = {"n" * number: torch.randn(number), "b": torch.randn(3 * (1 << 18) + 1)}
        pieces = [Piece("student", name, 5, value) for name, value in values.items()]
        size, checksum = write_tensors(tmp_path / "file", pieces)
        assert size == (tmp_path / "file").stat().st_size
        assert checksum == checksum_of(tmp_path / "file")
        read = load_file(tmp_path / "file")
        assert len(read) == 2
        assert all(torch.equal(read[fragment_key("student", name, 5)], value) for name, value in values.items())
    for wrong in ([Piece("student", "a", 0, torch.ones(2, dtype=torch.bfloat16))], [pieces[0], pieces[0]]):
        with pytest.raises(ValueError, match="float32, once"):
            write_tensors(tmp_path / "file", wrong)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), MemoryError("No space left")], ids=repr)
@pytest.mark.parametrize("fails", ["write_tensors", "sync_directory", "write_file"])
def test_a_failed_write_leaves_what_was_there(
    fails: str, error: Exception, alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error may pass the exchange, wherever it comes up."""
    directory = step_directory(tmp_path, 2)
    fields = index_fields(CONFIG, {"a": (3,)}, 2)
    old, new = (Piece("student", "a", 0, torch.full((3,), value)) for value in (1.0, 2.0))
    write_checkpoint(directory, [old], **fields)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(writer, fails, full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(directory, [new], **fields)
    monkeypatch.undo()
    assert torch.equal(Checkpoint(directory).full("student", "a"), old.values)
    assert {path.name for path in directory.parent.iterdir()} == {"step_00000002", "latest"}


def test_the_rename_is_the_commit(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it fails, a step that was being replaced comes back; what fails after it is only said."""
    directory = step_directory(tmp_path, 2)
    fields = index_fields(CONFIG, {"a": (3,)}, 2)
    old, new = (Piece("student", "a", 0, torch.full((3,), value)) for value in (1.0, 2.0))
    write_checkpoint(directory, [old], **fields)
    rename, sync = Path.rename, writer.sync_directory

    def fail_to_commit(path: Path, target: Path) -> Path:
        if path.name.startswith(".writing_"):
            raise OSError(28, "No space left")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail_to_commit)
        with pytest.raises(CheckpointError, match="No space left"):
            write_checkpoint(directory, [new], **fields)
    assert torch.equal(Checkpoint(directory).full("student", "a"), old.values)
    assert {path.name for path in directory.parent.iterdir()} == {"step_00000002", "latest"}

    def fail_behind(folder: Path) -> None:
        if folder == directory.parent:
            raise OSError(28, "No space left")
        sync(folder)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "sync_directory", fail_behind)
        write_checkpoint(directory, [new], **fields)
    assert "is saved, but" in capsys.readouterr().out
    assert torch.equal(Checkpoint(directory).full("student", "a"), new.values)
    assert {path.name for path in directory.parent.iterdir()} == {"step_00000002", "latest"}


def test_folders_are_nobody_elses(alone: None, tmp_path: Path) -> None:
    """A rank that outlives its run, or writes twice, spoils no file of another; a failed start leaves no folder."""
    directory = step_directory(tmp_path, 2)
    first, second = writer.prepare(directory), writer.prepare(directory)
    assert first != second
    piece = Piece("student", "a", 0, torch.ones(3))
    writer.write_own_file(first, [piece])
    with pytest.raises(FileExistsError):
        writer.write_own_file(first, [piece])
    with pytest.raises(ValueError, match="float32"):
        writer.write_own_file(second, [Piece("student", "a", 0, torch.ones(3, dtype=torch.float64))])
    assert [path.name for path in first.iterdir()] == ["rank00000.safetensors"] and not list(second.iterdir())

    def fail() -> None:
        raise MemoryError("no memory")

    with pytest.raises(CheckpointError, match="no memory"):
        writer.prepare(directory, fail)
    assert {path.name for path in directory.parent.iterdir()} == {first.name, second.name}


def test_helper_cuts_are_odd() -> None:
    """The tests above mean something only if the pieces are."""
    pieces: list[list[Piece]] = cut(STATE, 3)
    lengths: set[int] = {piece.values.numel() for rank in pieces for piece in rank}
    assert len(lengths) > 20
    value: Tensor = STATE["student"]["encoder.relative_bias.table"]
    starts = [p.start for rank in pieces for p in rank if p.name == "encoder.relative_bias.table"]
    assert any(start % value.shape[1] for start in starts)
