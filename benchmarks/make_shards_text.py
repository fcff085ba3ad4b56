"""How fast text becomes tokens: megabytes per second on one core, beside sentencepiece alone; and a corpus of 2 GB.

    python benchmarks/make_shards_text.py --books DIR [--gigabytes 2] [--output FILE]

The first cases are CPU time of one process, so that other jobs on the machine count little, on all .txt of --books.
"encode alone" is sentencepiece's own `encode` on the lines, already decoded, in a list. The last case is the whole
command, wall time, on one generated file (paragraphs of the books, drawn at random), with the peaks of its processes.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import numpy as np

from megad2v.data.writer import DatasetWriter
from megad2v.modalities.text.decode import write_tokens
from megad2v.modalities.text.documents import TextOptions
from megad2v.modalities.text.reading import Lines, find_inputs
from megad2v.modalities.text.shards import text_corpus
from megad2v.modalities.text.train import TrainingOptions, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
PARAGRAPHS = 8
"""Of the books, in a document of the big file: about 2 kB."""


def _cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def single(books: Path, folder: Path) -> list[dict[str, Any]]:
    """The cases of one process."""
    files = find_inputs([str(books)])
    size = sum(path.stat().st_size for path in files) / 1e6
    seconds, tokenizer = _cpu(lambda: train_tokenizer(Lines(files), TrainingOptions(8_000)))
    tokenizer.save(folder / "tokenizer")
    rows = [{"case": "train bpe, 8,000 ids", "megabytes": round(size, 2), "cpu_seconds": round(seconds, 2)}]
    lines = [line for line in Lines(files) if line.strip()]
    encode = tokenizer.codec.processor.encode
    for name, work in {
        "encode alone": lambda: [encode(line) for line in lines],
        "make_samples": lambda: _made(books, folder, TextOptions()),
        "make_samples, clean and dedupe": lambda: _made(books, folder, TextOptions(clean=True, dedupe=True)),
        "make_samples, a line a document": lambda: _made(books, folder, TextOptions(document="line")),
    }.items():
        seconds = min(_cpu(work)[0] for _ in range(3))
        rows.append({"case": name, "megabytes": round(size, 2), "megabytes_per_cpu_second": round(size / seconds, 2)})
    return rows


def _made(books: Path, folder: Path, options: TextOptions) -> int:
    corpus = text_corpus(books, folder / "tokenizer", options, labels="none")
    return sum(len(outcome.samples) for file in corpus.files for outcome in corpus.outcomes(file))


def writing(folder: Path, documents: int = 40_000) -> dict[str, Any]:
    """What the main process does for each document, of 500 tokens: tar, checksum, index."""
    parts = {"tokens.npy": write_tokens(np.zeros(500, np.uint16)), "json": b'{"line": 1, "path": "a.txt"}'}

    def write() -> None:
        with DatasetWriter(folder / "written", "text", "text", 512 * 10**6) as writer:
            for number in range(documents):
                writer.write(f"{number:09d}", parts)
            writer.finish()

    seconds, _ = _cpu(write)
    return {"case": "write and index", "documents": documents, "documents_per_cpu_second": round(documents / seconds)}


def large(books: Path, folder: Path, gigabytes: float) -> dict[str, Any]:
    """The command on one big file."""
    paragraphs = [
        part for path in find_inputs([str(books)]) for part in path.read_bytes().split(b"\n\n") if part.strip()
    ]
    rng, size = random.Random(0), 0
    with (folder / "large.txt").open("wb") as file:
        while size < gigabytes * 1e9:
            size += file.write(b"\n".join(rng.choices(paragraphs, k=PARAGRAPHS)) + b"\n\n")
    words = ["text", "--input", folder / "large.txt", "--tokenizer", folder / "tokenizer", "--document", "blank-lines"]
    command = [sys.executable, ROOT / "tools/make_shards.py", *words, "--output", folder / "out"]
    begin = time.time()
    # The main process reports its own peak and that of the largest of its processes.
    program = (
        "import resource, runpy, sys; sys.argv[:] = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([resource.getrusage(who).ru_maxrss // 1024 for who in (0, -1)])\n"
    )
    command = [sys.executable, "-c", program, *map(str, command[1:]), "--workers", str(WORKERS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.time() - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary, peaks = done.stdout.strip().splitlines()
    main, worker = json.loads(peaks)
    return {
        "case": f"one file, --document blank-lines, {WORKERS} workers",
        "megabytes": round(size / 1e6),
        "wall_seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "megabytes_per_cpu_second": round(size / 1e6 / (used.ru_utime + used.ru_stime), 2),
        "main_peak_megabytes": main,
        "worker_peak_megabytes": worker,
        "made": summary.partition(": ")[2],
    }


def main() -> None:
    """Measure, print, and append JSON lines where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, help="append JSON lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [*single(arguments.books, Path(folder)), writing(Path(folder))]
        for row in rows:
            print(json.dumps(row), flush=True)
        if arguments.gigabytes:
            rows.append(large(arguments.books, Path(folder), arguments.gigabytes))
            print(json.dumps(rows[-1]))
    if arguments.output:
        with arguments.output.open("a") as file:
            file.writelines(json.dumps({**row, "note": arguments.note}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
