"""One recording -> samples: formats, every reason to skip a file, cutting, memory."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from megad2v.modalities.speech.decode import read_waveform
from megad2v.modalities.speech.recording import BLOCK_VALUES, open_recording
from megad2v.modalities.speech.shards import SpeechFile, SpeechOptions, make_samples
from megad2v.modalities.speech.synthetic import demo_clip

soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")

REPOSITORY = Path(__file__).resolve().parents[2]
PLAIN = SpeechOptions()
CLIP = demo_clip("boris", 0, 1)


def write(path: Path, samples: np.ndarray = CLIP, rate: int = 16_000, **how: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **how)
    return path


def pcm(parts: Mapping[str, bytes]) -> np.ndarray:
    return soundfile.read(io.BytesIO(parts["flac"]), dtype="int16")[0]


@pytest.mark.parametrize("rate,channels", [(8_000, 1), (16_000, 2), (22_050, 1), (44_100, 2), (48_000, 3)])
@pytest.mark.parametrize(
    "kind,subtype,least",
    [("WAV", "PCM_16", 0.9999), ("WAV", "FLOAT", 0.9999), ("WAVEX", "PCM_24", 0.9999), ("W64", "PCM_16", 0.9999),
     ("AIFF", "PCM_16", 0.9999), ("AU", "PCM_16", 0.9999), ("NIST", "PCM_16", 0.9999), ("CAF", "ALAC_16", 0.9999),
     ("FLAC", "PCM_24", 0.9999), ("WAV", "MS_ADPCM", 0.99), ("OGG", "VORBIS", 0.98), ("OGG", "OPUS", 0.9),
     ("MP3", "MPEG_LAYER_III", 0.97)],
)  # fmt: skip
def test_formats(tmp_path: Path, kind: str, subtype: str, least: float, rate: int, channels: int) -> None:
    """Every format, rate and number of channels comes out as the sound that went in, at its place."""
    if subtype == "OPUS" and rate % 8_000:
        rate = 24_000  # Opus has few
    if subtype in ("MPEG_LAYER_III", "MS_ADPCM"):
        channels = min(channels, 2)
    time = np.arange(2 * rate) / rate
    sound = 0.3 * np.sin(2 * np.pi * (300 + 400 * time) * time) * (0.5 + 0.4 * np.sin(9 * time))
    gains = np.array([1.0, 0.5, 0.2])[:channels]
    write(tmp_path / "in/x.wav", sound[:, None] * gains, rate, format=kind, subtype=subtype)
    outcome = make_samples(tmp_path / "in", SpeechFile("x.wav", -1), PLAIN)
    assert outcome.action == "converted", outcome.reason
    assert outcome.reason.startswith(f"{kind} {subtype}, {rate} Hz, "), "what a file is, its bytes tell"
    (parts,) = outcome.samples
    assert set(parts) == {"flac", "json"}
    info = soundfile.info(io.BytesIO(parts["flac"]))
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
    waveform = read_waveform(parts["flac"])
    exact = least > 0.999 and subtype != "MPEG_LAYER_III"
    assert abs(len(waveform) - 32_000) <= (0 if exact else 1_600)
    time = np.arange(32_000) / 16_000
    expected = gains.mean() * 0.3 * np.sin(2 * np.pi * (300 + 400 * time) * time) * (0.5 + 0.4 * np.sin(9 * time))
    count = min(len(waveform), 32_000)
    assert np.corrcoef(waveform[:count], expected[:count])[0, 1] > least


def constant(value: float) -> np.ndarray:
    return np.full(16_000, float(value))


def cut(path: Path, keep: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "name,samples,how,reason",
    [
        ("x.wav", CLIP[:1_000], {}, "0.062 s, shorter than --min-seconds"),
        ("x.wav", CLIP[:0], {}, "no samples"),
        ("x.wav", constant(0), {}, "silent"),
        ("x.flac", constant(0), {}, "silent"),
        ("x.wav", constant(0.25), {}, "silent"),
        ("x.wav", np.append(CLIP / 32768, np.nan), {"subtype": "FLOAT"}, "holds NaN or infinite samples"),
        ("x.wav", CLIP.astype(float), {"subtype": "FLOAT"}, r"\d\d% of the samples lie outside \[-1, 1\]; scale"),
    ],
    ids=["short", "empty", "silent", "silent flac", "constant", "nan", "not in -1..1"],
)
def test_skipped(tmp_path: Path, name: str, samples: np.ndarray, how: dict[str, str], reason: str) -> None:
    write(tmp_path / name, samples, **how)
    outcome = make_samples(tmp_path, SpeechFile(name, -1), PLAIN)
    assert (outcome.action, outcome.samples) == ("skipped", ())
    assert re.match(reason, outcome.reason), outcome.reason


@pytest.mark.parametrize(
    "kind,subtype",
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"),
     ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("AU", "PCM_16"),
     ("NIST", "PCM_16"), ("CAF", "PCM_16"), ("WAV", "MS_ADPCM")],
)  # fmt: skip
@pytest.mark.parametrize("keep", [0.6, 0.95])
def test_truncated_files(tmp_path: Path, kind: str, subtype: str, keep: float) -> None:
    """libsndfile shortens most of these in silence."""
    path = write(tmp_path / "x.wav", CLIP / 32768, format=kind, subtype=subtype)
    assert make_samples(tmp_path, SpeechFile("x.wav", -1), PLAIN).samples
    cut(path, keep)
    outcome = make_samples(tmp_path, SpeechFile("x.wav", -1), PLAIN)
    assert outcome.action == "skipped"
    assert re.search("truncated|cannot be decoded", outcome.reason), outcome.reason


def test_odd_headers_are_not_truncation(tmp_path: Path) -> None:
    """WAVs from a pipe, and from programs that count their header as sound."""
    wav = write(tmp_path / "x.wav").read_bytes()
    for size in (0xFFFFFFFF, 0x7FFFFFDB, len(wav)):
        (tmp_path / "x.wav").write_bytes(wav[:40] + size.to_bytes(4, "little") + wav[44:])
        outcome = make_samples(tmp_path, SpeechFile("x.wav", -1), PLAIN)
        assert np.array_equal(pcm(outcome.samples[0]), CLIP), outcome.reason
    flac = write(tmp_path / "y.flac").read_bytes()
    (tmp_path / "y.flac").write_bytes(flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:])
    for text in ("", "transcribed"):
        outcome = make_samples(tmp_path, SpeechFile("y.flac", -1, text), PLAIN)
        assert outcome.action == "converted", "so that what is stored declares its length"
    assert np.array_equal(pcm(outcome.samples[0]), CLIP)


def test_damaged_flac(tmp_path: Path) -> None:
    flac = write(tmp_path / "x.flac").read_bytes()
    middle = len(flac) // 2
    (tmp_path / "x.flac").write_bytes(flac[:middle] + bytes([flac[middle] ^ 0x55]) + flac[middle + 1 :])
    assert "cannot be decoded" in make_samples(tmp_path, SpeechFile("x.flac", -1), PLAIN).reason
    (tmp_path / "x.flac").write_bytes(flac[:26] + bytes([flac[26] ^ 1]) + flac[27:])
    assert "MD5" in make_samples(tmp_path, SpeechFile("x.flac", -1), PLAIN).reason
    (tmp_path / "x.flac").write_bytes(flac[:26] + bytes(16) + flac[42:])
    assert make_samples(tmp_path, SpeechFile("x.flac", -1), PLAIN).action == "copied", "no MD5 to compare with"
    assert (
        make_samples(tmp_path, SpeechFile("gone.wav", -1), PLAIN).reason == "cannot be read: No such file or directory"
    )


def test_long_recordings_are_cut_in_pauses(tmp_path: Path) -> None:
    loud = np.random.default_rng(0).integers(-9_000, 9_000, 40 * 16_000, dtype=np.int16)
    pauses = [int(second * 16_000) for second in (7.5, 16.2, 24.1, 33.0)]
    for at in pauses:
        loud[at - 1_200 : at + 1_200] //= 300
    write(tmp_path / "x.wav", loud)
    outcome = make_samples(tmp_path, SpeechFile("x.wav", 3), SpeechOptions(max_seconds=10))
    assert outcome.reason.endswith("cut into 5 pieces")
    pieces = [pcm(parts) for parts in outcome.samples]
    assert np.array_equal(np.concatenate(pieces), loud)
    starts = [json.loads(parts["json"])["start"] for parts in outcome.samples]
    assert starts == [sum(map(len, pieces[:place])) / 16_000 for place in range(5)]
    for start, pause in zip(starts[1:], pauses):
        assert abs(start * 16_000 - pause) <= 400, "in the middle of the pause"
    assert all(parts["cls"] == b"3" for parts in outcome.samples)
    text = make_samples(tmp_path, SpeechFile("x.wav", -1, "words"), SpeechOptions(max_seconds=10))
    assert text.reason.endswith("40.0 s, longer than --max-seconds, but transcribed: not cut")
    assert np.array_equal(pcm(text.samples[0]), loud)
    assert len(make_samples(tmp_path, SpeechFile("x.wav", -1), SpeechOptions(max_seconds=0)).samples) == 1


def test_blocks_are_resampled_as_one(tmp_path: Path) -> None:
    """Several blocks give what soxr gives for the whole, to the bit."""
    whole = np.random.default_rng(0).integers(-9_000, 9_000, (BLOCK_VALUES * 3 // 2, 2), dtype=np.int16)
    path = write(tmp_path / "x.wav", whole, 44_100)
    with open_recording(path) as recording:
        blocks = list(recording.waveform())
    assert len(blocks) > 3
    expected = soxr.resample((whole[:, 0] / 2 + whole[:, 1] / 2).astype(np.float32) / 32768, 44_100, 16_000, "HQ")
    assert np.array_equal(np.concatenate(blocks), expected)


@pytest.mark.parametrize("seconds", [2.99, 3.0, 3.00007, 3.5, 4.1, 6.0, 9.7])
@pytest.mark.parametrize("rate,channels", [(16_000, 1), (44_100, 2)])
def test_pieces_are_the_whole(tmp_path: Path, seconds: float, rate: int, channels: int) -> None:
    """Whatever the length, no sample is lost, and no piece is longer than the limit or shorter than a third of it."""
    rng = np.random.default_rng(0)
    write(tmp_path / "x.wav", rng.uniform(-0.5, 0.5, (round(seconds * rate), channels)), rate)
    whole = make_samples(tmp_path, SpeechFile("x.wav", -1), SpeechOptions(max_seconds=0))
    parts = make_samples(tmp_path, SpeechFile("x.wav", -1), SpeechOptions(max_seconds=3))
    pieces = [pcm(part) for part in parts.samples]
    assert np.array_equal(np.concatenate(pieces), pcm(whole.samples[0]))
    assert max(map(len, pieces)) <= 48_000
    assert len(pieces) == 1 or min(map(len, pieces)) >= 16_000
    assert (len(pieces) == 1) == (sum(map(len, pieces)) <= 48_000)


@pytest.mark.slow
def test_an_hour_in_bounded_memory(tmp_path: Path) -> None:
    """One hour of 44.1 kHz stereo (635 MB), in the process that converts it."""
    block = np.random.default_rng(0).integers(-3_000, 3_000, (441_000, 2), dtype=np.int16)
    with soundfile.SoundFile(tmp_path / "x.wav", "w", 44_100, 2, subtype="PCM_16") as file:
        for number in range(360):
            file.write(block * np.int16(1 + number % 5))
    program = (
        "import sys; from pathlib import Path; from megad2v.modalities.speech.shards import *\n"
        "import soundfile, soxr\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) / 1024\n"
        "before = peak()\n"
        "options = SpeechOptions(max_seconds=float(sys.argv[2]))\n"
        "outcome = make_samples(Path(sys.argv[1]), SpeechFile('x.wav', -1), options)\n"
        "print(peak() - before, len(outcome.samples), outcome.totals['hours'])\n"
    )
    for seconds, least, most in (("60", 60, 90), ("0", 1, 1)):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), seconds], cwd=REPOSITORY, capture_output=True, text=True
        )
        megabytes, pieces, hours = (float(word) for word in done.stdout.split())
        assert megabytes < 200, done.stderr
        assert least <= pieces <= most
        assert hours == 1.0
