"""How fast a tar is indexed for the first time: members and MB per CPU second, beside a plain walk with tarfile.

    python benchmarks/index_walk.py [--members 100000] [--bytes 2000] [--rounds 3] [--note TEXT] [--output FILE]

The tar is of images of so many bytes (a header with a size, then anything) with a KEY.cls each, from the page cache.
The two take turns; the ratio is the median over rounds. `again` is a second call, which finds the index.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import numpy as np
from PIL import Image

from megad2v.data.format import INDEX_FOLDER
from megad2v.data.indexing import index_shards


def write(path: Path, members: int, size: int) -> None:
    """Half of the members are images, half are their classes."""
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(out, "JPEG")
    image = out.getvalue().ljust(size, b"\0")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(members // 2):
            for name, data in ((f"{number:09d}.jpg", image), (f"{number:09d}.cls", b"7")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def walk(path: Path) -> None:
    """What nobody who reads a tar with Python can do without."""
    with tarfile.open(path, "r:") as tar:
        while tar.next() is not None:
            tar.members.clear()


def cpu_seconds(action: Callable[[], Any]) -> float:
    """Of this process."""
    started = time.process_time()
    action()
    return time.process_time() - started


def main() -> None:
    """Measure, print, and append a JSON line where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=100_000)
    parser.add_argument("--bytes", type=int, default=2_000, help="of an image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, help="append the result")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        tar = folder / "x.tar"
        write(tar, arguments.members, arguments.bytes)
        found: list[tuple[float, float, float]] = []
        for _ in range(arguments.rounds):
            shutil.rmtree(folder / INDEX_FOLDER, ignore_errors=True)
            walked = cpu_seconds(lambda: walk(tar))
            indexed = cpu_seconds(lambda: index_shards([str(folder)]))
            found.append((walked, indexed, cpu_seconds(lambda: index_shards([str(folder)]))))
        walked, indexed, again = (median(column) for column in zip(*found, strict=True))
        line = {
            "case": "index_walk",
            "members": arguments.members,
            "megabytes": round(tar.stat().st_size / 1e6, 1),
            "members_per_cpu_second": round(arguments.members / indexed),
            "megabytes_per_cpu_second": round(tar.stat().st_size / 1e6 / indexed, 1),
            "of_tarfile_walk": round(median(walk / index for walk, index, _ in found), 3),
            "again_seconds": round(again, 4),
            "load": [round(load, 1) for load in os.getloadavg()],
            "note": arguments.note,
        }
        print(json.dumps(line))
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
