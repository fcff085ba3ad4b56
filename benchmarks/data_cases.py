"""What benchmarks/data.py reads: the same bytes in tars and in loose files, and the configurations that read them."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import webdataset

from megad2v.config.load import load_config
from megad2v.config.schema import Config, MicroBatchConfig
from megad2v.data.blocks import BlockSet
from megad2v.data.shardset import ShardSet
from megad2v.modalities.speech.decode import header_length
from megad2v.modalities.speech.geometry import SAMPLE_RATE

REPOSITORY = Path(__file__).resolve().parents[1]
SHARDS = 10
CASES = ("images_small", "images_full", "speech", "text", "text_blocks")


@dataclass(frozen=True)
class Case:
    """One data set, in tars and in loose files, and how a run reads it."""

    name: str
    config: Config
    tars: Path
    files: list[Path] | None
    """None: samples of the tars are parts of their members."""
    extension: str
    turn: int
    """Micro-batches."""


def write_case(name: str, files: dict[str, bytes], folder: Path, extension: str) -> list[Path]:
    """The same bytes in tars (NAME/shards), by webdataset's own writer, and in loose files (NAME/files)."""
    tars, loose = folder / name / "shards", folder / name / "files"
    tars.mkdir(parents=True)
    loose.mkdir()
    paths, size = [], sum(map(len, files.values())) / SHARDS
    with webdataset.ShardWriter(str(tars / "%06d.tar"), maxsize=size, verbose=False) as writer:
        for key, data in files.items():
            writer.write({"__key__": key, extension: data})
            paths.append(loose / f"{key}.{extension}")
            paths[-1].write_bytes(data)
    return paths


def numbered(paths: list[Path], total: int) -> dict[str, bytes]:
    """So many samples; where there are fewer files they come again under other keys."""
    if not paths:
        raise SystemExit("SHARED does not hold what the docstring says")
    return {f"{number:06d}": path.read_bytes() for number, path in zip(range(total), cycle(paths))}


def text_shards(books: Path, folder: Path) -> Path:
    """The novels as our tools write them, one document each."""
    vocabulary, shards = str(folder / "tokenizer"), folder / "documents"
    train = ["tools/train_tokenizer.py", "--input", str(books), "--output", vocabulary, "--vocab-size", "8000"]
    make = ["tools/make_shards.py", "text", "--input", str(books), "--output", str(shards), "--tokenizer", vocabulary]
    for program in (train, [*make, "--max-shard-size", "1MB"]):
        subprocess.run([sys.executable, *program], check=True, cwd=REPOSITORY, capture_output=True)
    return shards


def make_cases(shared: Path, folder: Path, wanted: list[str]) -> Iterator[Case]:
    """Write and describe what was asked for."""
    shuffled = random.Random(0)
    for name, where, size, total, batch, turn in (
        ("images_small", "image/clothing/train", 64, 2000, 64, 4),
        ("images_full", "image/clothing_fullsize", 224, 340, 16, 2),
    ):
        if name not in wanted:
            continue
        paths = sorted((shared / where).rglob("*.jpg"))
        shuffled.shuffle(paths)
        files = write_case(name, numbered(paths, total), folder, "jpg")
        recipe = "vision_tiny" if size == 64 else "vision_base"
        config = load_config(recipe, data__shards=str(folder / name / "shards"))
        config = replace(config, data=replace(config.data, micro_batch=MicroBatchConfig(samples=batch)))
        yield Case(name, config, folder / name / "shards", files, "jpg", turn)
    if "speech" in wanted:
        found = sorted((shared / "speech/librispeech_140spk").rglob("*.flac"))
        # Ours leaves out what is too short, by the index; a plain pipeline would stop there.
        paths = [path for path in found if header_length(path.read_bytes()) >= 2 * SAMPLE_RATE]
        shuffled.shuffle(paths)
        files = write_case("speech", numbered(paths, 280), folder, "flac")
        config = load_config("speech_base", data__shards=str(folder / "speech" / "shards"))
        config = replace(config, data=replace(config.data, micro_batch=MicroBatchConfig(samples=None, seconds=100.0)))
        yield Case("speech", config, folder / "speech" / "shards", files, "flac", 4)
    if {"text", "text_blocks"} & set(wanted):
        yield from _text_cases(text_shards(shared / "text/books", folder), folder, wanted)


def _text_cases(documents: Path, folder: Path, wanted: list[str]) -> Iterator[Case]:
    """Novels as documents whose blocks are the rows, and the same rows as samples of their own."""
    budget = MicroBatchConfig(samples=None, tokens=16_384)
    config = load_config("text_base", data__shards=str(documents), text__vocabulary=8000)
    config = replace(config, data=replace(config.data, micro_batch=budget))
    if "text_blocks" in wanted:
        yield Case("text_blocks", config, documents, None, "tokens.npy", 8)
    if "text" in wanted:
        blocks = BlockSet(ShardSet(str(documents), "text"), config.text.max_tokens)
        rows = {f"{index:06d}": blocks.read(index).data for index in range(len(blocks))}
        files = write_case("text", rows, folder, "tokens.npy")
        tars = folder / "text" / "shards"
        config = replace(
            config, text=replace(config.text, blocks="document"), data=replace(config.data, shards=str(tars))
        )
        yield Case("text", config, tars, files, "tokens.npy", 8)
