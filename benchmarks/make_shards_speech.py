"""How fast recordings become samples, and shards waveforms again: seconds of audio per second, on one core.

    python benchmarks/make_shards_speech.py [--librispeech DIR] [--digits DIR] [--output FILE]

Cases: FLACs that are copied after a check (--librispeech: a folder of 16 kHz FLACs), short 8 kHz WAVs (--digits), and
a generated hour of 44.1 kHz stereo. Time is the process's own CPU time, so that other jobs on the machine count little;
tars are not written. The peak is that of the process that converts, above what it has after its imports.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import numpy as np

from megad2v.modalities.speech.decode import SAMPLE_RATE, audio_library, read_waveform
from megad2v.modalities.speech.shards import SpeechOptions, make_samples, speech_corpus


def _peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def convert(folder: Path, limit: int) -> dict[str, Any]:
    """Make samples of up to `limit` files, and read them back as a worker of the training does."""
    corpus = speech_corpus(folder, SpeechOptions(), labels="none")
    before, begin = _peak_megabytes(), time.process_time()
    made = [make_samples(folder, file, corpus.options) for file in corpus.files[:limit]]
    seconds = time.process_time() - begin
    peak = _peak_megabytes() - before
    audio = sum(outcome.totals.get("hours", 0) for outcome in made) * 3600
    samples = [parts["flac"] for outcome in made for parts in outcome.samples]
    begin = time.process_time()
    read = sum(len(read_waveform(data)) for data in samples) / SAMPLE_RATE
    reading = time.process_time() - begin
    return {
        "files": len(made),
        "samples": len(samples),
        "audio_seconds": round(audio, 1),
        "make_cpu_seconds": round(seconds, 3),
        "make_audio_per_cpu_second": round(audio / seconds),
        "read_audio_per_cpu_second": round(read / reading),
        "peak_megabytes": round(peak),
    }


def write_hour(path: Path) -> None:
    """An hour of 44.1 kHz stereo noise, 635 MB: the most expensive to encode that there is."""
    block = np.random.default_rng(0).integers(-3_000, 3_000, (441_000, 2), dtype=np.int16)
    with audio_library("soundfile").SoundFile(path, "w", 44_100, 2, subtype="PCM_16") as file:
        for number in range(360):
            file.write(block * np.int16(1 + number % 5))


def main() -> None:
    """Measure, print, and append JSON lines where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--librispeech", type=Path)
    parser.add_argument("--digits", type=Path)
    parser.add_argument("--limit", type=int, default=1_000, help="files of a folder")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, help="append JSON lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as hour:
        write_hour(Path(hour) / "hour.wav")
        cases = {"16 kHz FLAC, copied": arguments.librispeech, "8 kHz WAV, under a second": arguments.digits}
        cases["an hour of 44.1 kHz stereo WAV"] = Path(hour)
        for name, folder in cases.items():
            if folder is None:
                continue
            # A process of its own for each, or the peak of one would hide that of the next.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                row = {"case": name, **pool.submit(convert, folder, arguments.limit).result(), "note": arguments.note}
            print(json.dumps(row))
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
