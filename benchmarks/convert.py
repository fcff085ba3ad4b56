"""What `--to hf`, fairseq or beit costs: the time of the whole command, and the peak of its memory above its imports.

    python benchmarks/convert.py [--to hf] [--recipes vision_base speech_base ...] [--output FILE]

Checkpoints of random weights as 64 ZeRO-3 ranks leave them, student and teacher, without Adam's moments. Time: `python
tools/convert_checkpoint.py` in a new process, imports included. Memory: another process exports a model of one narrow
block first, so that all is imported that will be, resets the kernel's mark of its peak, and exports the checkpoint.
Text has a vocabulary of 50,265 ids, as many as the released model's, made of letters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import torch

from megad2v.checkpoint.catalog import step_directory
from megad2v.checkpoint.layout import INDEX, ExtraRecord, FileRecord, Index, Piece, fragments_of
from megad2v.checkpoint.stream import checksum_of, write_tensors
from megad2v.config.load import parse_command_line
from megad2v.config.schema import Config
from megad2v.convert.foreign import parameter_shapes
from megad2v.modalities.text.byte_level import import_byte_level
from megad2v.modalities.text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = ("vision_base", "speech_base", "text_base", "vision_large", "text_large")
RANKS = 64
VOCABULARY = 50_265


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--weights", default="student", choices=("student", "teacher"))
    parser.add_argument("--to", default="hf", choices=("hf", "fairseq", "beit"))
    parser.add_argument("--folder", type=Path, help="for the checkpoints (default: the system's for temporary files)")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, help="append JSON lines")
    parser.add_argument("--memory-of", nargs=3, type=Path, metavar=("SMALL", "RUN", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(memory(*arguments.memory_of, to=arguments.to, weights=arguments.weights)))
        return
    for recipe in arguments.recipes:
        with tempfile.TemporaryDirectory(prefix="convert_benchmark_", dir=arguments.folder) as folder:
            row = {**measure(recipe, Path(folder), arguments.to, arguments.weights), "note": arguments.note}
        print(json.dumps(row, indent=1), flush=True)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(row) + "\n")


def measure(recipe: str, folder: Path, to: str, weights: str) -> dict[str, Any]:
    """One line of the record."""
    config, tokenizer = configured(recipe, folder)
    heads = config.speech.position_groups if config.modality == "speech" else 4
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, width=16 * heads, depth=1, heads=heads))
    small = dataclasses.replace(small, targets=dataclasses.replace(small.targets, layers=1))
    write(folder / "run", config, tokenizer)
    write(folder / "small", small, tokenizer)
    start, spent = time.perf_counter(), _cpu_seconds()
    how = ("--to", to, "--weights", weights)
    command = ["--checkpoint", folder / "run", *how, "--output", folder / "out"]
    run(REPOSITORY / "tools" / "convert_checkpoint.py", *command)
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - spent
    sizes = {name: 4 * p.numel() for name, p in parameter_shapes(config).items()}
    parity = json.loads((folder / "out" / "parity.json").read_text())
    said = run(__file__, "--memory-of", folder / "small", folder / "run", folder / "again", *how)
    largest = max(sizes, key=sizes.__getitem__)
    return {
        "recipe": recipe,
        "to": to,
        "weights": weights,
        "parameters": sum(sizes.values()) // 4,
        "model_mb": sum(sizes.values()) / 1e6,
        "shards": RANKS,
        "largest_tensor": largest,
        "largest_tensor_mb": sizes[largest] / 1e6,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        **json.loads(said.splitlines()[-1]),
        "input": parity["input"],
        "relative_float64": parity["relative_float64"],
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def _cpu_seconds() -> float:
    """Of all processes that ended: what the command takes where nothing else runs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(program: Path | str, *arguments: object) -> str:
    """What a new Python printed. Raises CalledProcessError with its errors shown."""
    command = [sys.executable, str(program), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def memory(small: Path, checkpoint: Path, output: Path, *, to: str, weights: str) -> dict[str, float]:
    """MB resident with everything imported, and the peak above that while `checkpoint` is exported."""
    from tools.convert_checkpoint import main as convert

    def export(run: Path, where: Path) -> None:
        assert convert(["--checkpoint", str(run), "--to", to, "--weights", weights, "--output", str(where)]) == 0

    export(small, output.with_name("small_out"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = _resident("VmRSS")
    export(checkpoint, output)
    assert "deepspeed" not in sys.modules
    return {"imports_mb": before, "peak_above_imports_mb": _resident("VmHWM") - before}


def _resident(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e6


def configured(recipe: str, folder: Path) -> tuple[Config, Tokenizer | None]:
    """The recipe's configuration, and what text needs besides."""
    config = parse_command_line(["--deepspeed", "none", "--config", recipe, "--data.shards", "none"]).config
    if config.modality != "text":
        return config, None
    tokenizer = vocabulary_of_letters(folder / "vocabulary")
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocabulary=VOCABULARY)), tokenizer


def vocabulary_of_letters(folder: Path) -> Tokenizer:
    """A byte-level BPE of as many ids as the released one's: bytes, and words of two to four letters."""
    from tokenizers.pre_tokenizers import ByteLevel

    specials, singles = ["<s>", "<pad>", "</s>", "<unk>"], sorted(ByteLevel.alphabet())
    pairs = list(product(ascii_lowercase, repeat=2))
    triples = [(a + b, c) for (a, b), c in product(pairs, ascii_lowercase)]
    fours = [(a + b, c) for (a, b), c in product(triples, ascii_lowercase)]
    merges = [*pairs, *triples, *fours][: VOCABULARY - 5 - len(singles)]
    pieces = [*specials, *singles, *(a + b for a, b in merges), "<mask>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(f"{a} {b}" for a, b in merges) + "\n")
    return import_byte_level(folder)


def write(run: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """A checkpoint of random weights, one file after the other."""
    directory = step_directory(run, 1)
    directory.mkdir(parents=True)
    kinds = {kind: parameter_shapes(config, kind) for kind in ("student", "teacher")}
    records = []
    for rank in range(RANKS):
        generator = torch.Generator().manual_seed(rank)
        pieces = []
        for kind, parameters in kinds.items():
            for name, parameter in parameters.items():
                share = math.ceil(parameter.numel() / RANKS)
                start = min(rank * share, parameter.numel())
                values = 0.02 * torch.randn(min(share, parameter.numel() - start), generator=generator)
                is_scale = name.endswith("norm.weight")
                pieces.append(Piece(kind, name, start, values + 1 if is_scale else values))
        path = directory / f"rank{rank:05d}.safetensors"
        records.append(FileRecord(path.name, *write_tensors(path, pieces), fragments_of(pieces)))
    extras = []
    for name, content in (tokenizer.core_files if tokenizer else {}).items():
        (directory / "tokenizer").mkdir(exist_ok=True)
        path = directory / "tokenizer" / name
        path.write_bytes(content)
        extras.append(ExtraRecord(f"tokenizer/{name}", len(content), checksum_of(path)))
    index = Index(
        step=1,
        shapes={name: list(p.shape) for name, p in kinds["student"].items()},
        files=records,
        extras=extras,
        state={},
        config=json.loads(json.dumps(dataclasses.asdict(config))),
        layout={"ranks": RANKS, "zero_stage": 3},
        code={},
    )
    (directory / INDEX).write_text(index.dumps())
    (run / "checkpoints" / "latest").write_text(directory.name + "\n")


if __name__ == "__main__":
    main()
