"""Demo sentences spoken by espeak-ng, where it is installed."""

from __future__ import annotations

import io
import shutil
import subprocess
import wave

import numpy as np
import numpy.typing as npt

from megad2v.errors import UserError
from megad2v.modalities.speech.decode import RESAMPLING, audio_library
from megad2v.modalities.speech.geometry import SAMPLE_RATE

PROGRAM = "espeak-ng"
LANGUAGE = "eo"
"""Esperanto reads one sound for each letter, which suits made-up words."""
WORDS_PER_MINUTE = 190
MIDDLE_PITCH = 150.0
"""Hz that stand for espeak-ng's pitch 50 of 0 to 99."""


def available() -> bool:
    """Whether the program is on PATH."""
    return shutil.which(PROGRAM) is not None


def require() -> None:
    """Raises UserError where espeak-ng, or soxr for its 22,050 Hz, is missing."""
    if not available():
        raise UserError("--voice espeak-ng: not on PATH; install it, or take --voice formant")
    audio_library("soxr")


def speak(text: str, variant: str, pitch: float, speed: float, seconds: tuple[float, float]) -> npt.NDArray[np.int16]:
    """(samples,) 16 kHz mono, about `seconds` (shortest, longest) long. Raises UserError when espeak-ng fails."""
    height = int(np.clip(50 + 40 * np.log2(pitch / MIDDLE_PITCH), 0, 99))
    words = WORDS_PER_MINUTE * speed
    pcm, rate = _run("-v", f"{LANGUAGE}+{variant}", "-p", str(height), "-s", str(round(words)), text)
    length = len(pcm) / rate
    if length != (wanted := float(np.clip(length, *seconds))):  # again, faster or slower
        words *= length / wanted
        pcm, rate = _run("-v", f"{LANGUAGE}+{variant}", "-p", str(height), "-s", str(round(words)), text)
    floats = pcm.astype(np.float32) / 32768
    resampled = audio_library("soxr").resample(floats, rate, SAMPLE_RATE, quality=RESAMPLING)
    return np.clip(np.rint(resampled * 32768), -32768, 32767).astype(np.int16)


def _run(*words: str) -> tuple[npt.NDArray[np.int16], int]:
    """(samples, rate) as espeak-ng makes them."""
    done = subprocess.run([PROGRAM, "--stdout", *words], capture_output=True)
    if done.returncode or not done.stdout:
        reason = " ".join(done.stderr.decode(errors="replace").split())[:200]
        raise UserError(f"{PROGRAM} failed ({reason}); take --voice formant")
    with wave.open(io.BytesIO(done.stdout)) as file:
        # The length in the header is a guess, because this is a pipe.
        return np.frombuffer(file.readframes(len(done.stdout)), dtype="<i2"), file.getframerate()
