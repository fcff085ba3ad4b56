"""Audio bytes -> waveforms: exact where nothing has to change, close to formulas and to scipy where something does;
lengths from headers; what is refused, and what happens without the libraries."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import resample_poly

from megad2v.modalities.sample import BadSample
from megad2v.modalities.speech.decode import (
    HEADER_BYTES,
    header_length,
    read_waveform,
    resampled_length,
)
from megad2v.modalities.speech.geometry import SAMPLE_RATE
from tests import tolerances

soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")

REPOSITORY = Path(__file__).resolve().parents[2]


def audio(samples: np.ndarray, rate: int = SAMPLE_RATE, kind: str = "FLAC", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


def noise(count: int = 5_000, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(1).integers(-20_000, 20_000, (count, channels), dtype=np.int16)


@pytest.mark.parametrize("kind", ["FLAC", "WAV", "WAVEX", "RF64"])
def test_what_shards_hold_is_exact(kind: str) -> None:
    samples = noise()
    waveform = read_waveform(audio(samples, kind=kind))
    assert waveform.dtype == np.float32
    assert waveform.flags.c_contiguous
    assert np.array_equal(waveform, samples[:, 0] / np.float32(32768))


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_channels_are_averaged(channels: int) -> None:
    samples = noise(channels=channels)
    error = read_waveform(audio(samples)) - samples.mean(axis=1) / 32768
    assert np.abs(error).max() < 1e-7


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000])
def test_other_rates_against_the_formula(rate: int) -> None:
    """Tones below both Nyquist frequencies are the same tones at 16 kHz."""
    tones = [(hertz, 0.1 * place) for place, hertz in enumerate((110.0, 997.0, 2_503.0, 3_300.0))]
    if rate > 12_000:
        tones.append((0.42 * min(rate, SAMPLE_RATE), 0.3))
    wave = lambda at: sum(0.15 * np.sin(2 * np.pi * hertz * at + phase) for hertz, phase in tones)
    waveform = read_waveform(audio(wave(np.arange(rate) / rate), rate, "WAV", "FLOAT"))
    assert len(waveform) == SAMPLE_RATE
    error = (waveform - wave(np.arange(SAMPLE_RATE) / SAMPLE_RATE))[800:-800]  # both ends lack neighbours
    assert np.abs(error).max() < tolerances.RESAMPLED_TONE


def test_real_speech_against_scipy(shared: Callable[[str], Path]) -> None:
    for path in sorted(shared("data/speech/fsdd").glob("7/*_0.wav")):
        source, rate = soundfile.read(path)
        reference = resample_poly(source, SAMPLE_RATE, rate)
        waveform = read_waveform(path.read_bytes())
        assert len(waveform) == len(reference) == 2 * len(source)
        assert np.corrcoef(waveform, reference)[0, 1] > tolerances.RESAMPLED_SPEECH


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("count", [1, 100, 12_345])
def test_resampled_length_is_soxrs(rate: int, count: int) -> None:
    assert resampled_length(count, rate) == len(soxr.resample(np.zeros(count, np.float32), rate, SAMPLE_RATE, "HQ"))


def with_list_chunk(wav: bytes, size: int = 501) -> bytes:
    """A WAV file with some words before its samples; their chunk has an odd size, so a pad byte."""
    at = wav.index(b"data")
    return wav[:at] + b"LIST" + struct.pack("<I", size) + bytes(size + size % 2) + wav[at:]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "kind,subtype",
    [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "FLOAT"), ("WAV", "ULAW"),
     ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("WAV", "list")],
)  # fmt: skip
def test_length_from_header(rate: int, channels: int, kind: str, subtype: str) -> None:
    listed = subtype == "list"
    data = audio(noise(4_321, channels), rate, kind, None if listed else subtype)
    data = with_list_chunk(data) if listed else data
    assert header_length(data[:HEADER_BYTES]) == resampled_length(4_321, rate) == len(read_waveform(data))


def test_length_unknown() -> None:
    flac, wav = audio(noise()), audio(noise(), kind="WAV")
    piped = wav[:40] + b"\xff" * 4 + wav[44:]
    unsaid = flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]  # an encoder that wrote into a pipe
    adpcm = audio(noise(), kind="WAV", subtype="IMA_ADPCM")
    far = with_list_chunk(wav, 3 * HEADER_BYTES)[:HEADER_BYTES]
    rate_zero = wav[:24] + bytes(4) + wav[28:]
    broken = (b"", b"fLaC", b"RIFF1234WAVE", wav[:30], b"junk" * 99, flac[:20])
    for head in (piped, unsaid, adpcm, far, rate_zero, *broken):
        assert header_length(head) == 0
    for whole in (piped, unsaid):
        assert np.array_equal(read_waveform(whole), read_waveform(flac))


def absurd(flac: bytes) -> bytes:
    """A FLAC file that declares 2^36 - 1 samples."""
    return flac[:21] + bytes([flac[21] | 0x0F]) + b"\xff" * 4 + flac[26:]


@pytest.mark.parametrize(
    "data,reason",
    [
        (b"", "cannot be decoded: Format not recognised"),
        (b"junk" * 1_000, "cannot be decoded: Format not recognised"),
        (audio(noise())[:6_000], "cannot be decoded|truncated: 0 of 5000"),
        (absurd(audio(noise())), "68719476735 samples x 1 channels are more than the 134217728 allowed"),
        (audio(np.zeros(0, np.int16), kind="WAV"), "no samples"),
        (audio(np.array([0.1, np.nan] * 50), kind="WAV", subtype="FLOAT"), "holds NaN or infinite samples"),
        (audio(np.array([0.1, np.inf] * 50), kind="WAV", subtype="FLOAT"), "holds NaN or infinite samples"),
        (audio(noise(), rate=3), "sample rate 3 Hz is not within 4000 to 768000"),
    ],
    ids=["empty", "junk", "cut", "absurd", "no samples", "nan", "inf", "rate"],
)
def test_bad_samples(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        read_waveform(data)


def test_damage_inside_is_noticed() -> None:
    flac = bytearray(audio(noise(40_000)))
    flac[len(flac) // 2] ^= 0x55
    with pytest.raises(BadSample, match="cannot be decoded"):
        read_waveform(bytes(flac))


REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"soundfile", "soxr", "torchaudio"}:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Refuse())
"""


def test_without_the_libraries(tmp_path: Path) -> None:
    """Lengths are known, indexes are built, and the message says what to install."""
    (tmp_path / "x.flac").write_bytes(audio(noise()))
    program = REFUSE + (
        "from pathlib import Path; from megad2v.data import index\n"
        "from megad2v.errors import UserError; from megad2v.modalities.speech.decode import *\n"
        "data = Path(sys.argv[1]).read_bytes(); print(header_length(data))\n"
        "try: read_waveform(data)\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "x.flac")], cwd=REPOSITORY, capture_output=True, text=True
    )
    length, message, *rest = done.stdout.splitlines()
    assert (length, rest) == ("5000", []), done.stderr
    assert "soundfile does not import" in message
    assert "pip install 'megad2v[speech]'" in message
    command = REFUSE + "import runpy; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = ["tools/make_shards.py", "speech", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", command, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "megad2v[speech]" in done.stderr
    assert not (tmp_path / "out").exists()
