"""Generated speech for demos and tests, no download: a formant synthesiser that reads sentences of a small language.

What a small model can learn from context: pitch and formants run smoothly through masked stretches, sounds make up few
words, and words sentences (language.py). What tells speakers apart is pitch, length of the vocal tract and breath.

The synthesiser is of the kind of Klatt, "Software for a cascade/parallel formant synthesizer", JASA 67 (1980): glottal
pulses and breath through resonators in a row, noise of constrictions beside them. The resonators work on
overlapping short spectra instead of sample by sample, which numpy does a hundred times faster than real time.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megad2v.modalities.demo import in_processes, write_demo
from megad2v.modalities.draws import generator
from megad2v.modalities.speech import espeak
from megad2v.modalities.speech.geometry import SAMPLE_RATE
from megad2v.modalities.speech.language import LEXICON, PAUSE, Sound, sentence, sounds_of
from megad2v.modalities.speech.transcripts import TABLE

Floats = npt.NDArray[np.float64]

SHORTEST, LONGEST = 2.0, 4.0
"""Range of clips in seconds."""
HOP, WINDOW, SPECTRUM = 80, 320, 1024
"""Samples: parameters every 5 ms, 20 ms windows; the longer transform holds the ringing of the resonators."""
BANDWIDTHS = (70.0, 90.0, 130.0, 250.0, 300.0)
"""Hz, of the five formants."""
UPPER = (3500.0, 4500.0)
"""Hz: the fourth and fifth formant hardly move."""
CHUNK = 8
"""Clips that a process makes at a time."""
VOICES = ("auto", "formant", "espeak-ng")


@dataclass(frozen=True)
class Speaker:
    """A voice."""

    pitch: float
    """Hz, on average."""
    tract: float
    """Factor on the formants: shorter vocal tracts have higher ones."""
    breath: float
    """Noise that goes with the voice."""
    speed: float
    espeak: str
    """espeak-ng's variant of about this kind."""


SPEAKERS = {
    "alma": Speaker(205, 1.16, 0.030, 1.00, "f1"),
    "boris": Speaker(98, 0.96, 0.012, 0.92, "m1"),
    "clara": Speaker(228, 1.20, 0.050, 1.08, "f2"),
    "david": Speaker(122, 1.02, 0.015, 1.05, "m3"),
    "edith": Speaker(178, 1.11, 0.022, 0.94, "f3"),
    "felix": Speaker(138, 1.05, 0.035, 1.12, "m5"),
    "greta": Speaker(250, 1.25, 0.040, 1.02, "f4"),
    "henry": Speaker(86, 0.92, 0.020, 0.98, "m7"),
}


def demo_text(speaker: str, number: int, seed: int) -> str:
    """What is said in a clip: phrases with commas between; a pure function of its arguments."""
    rng = generator(seed, "demo sentence", speaker, number)
    lengthy = 1900 + 1300 * rng.random()
    phrases: list[list[str]] = []
    while not phrases or _milliseconds(phrases) * SPEAKERS[speaker].speed < lengthy:
        phrases.append(sentence(rng))
    return ", ".join(" ".join(words) for words in phrases)


def _milliseconds(phrases: Sequence[Sequence[str]]) -> float:
    return sum(sound.ms for words in phrases for word in words for sound in sounds_of(word)) + PAUSE.ms * len(phrases)


def demo_clip(speaker: str, number: int, seed: int) -> npt.NDArray[np.int16]:
    """(samples,) 16 kHz mono, 2 to 4 s; a pure function of its arguments."""
    rng = generator(seed, "demo clip", speaker, number)
    voice = SPEAKERS[speaker]
    sounds, stresses = _score(demo_text(speaker, number, seed))
    ms = np.array([sound.ms for sound in sounds]) * rng.uniform(0.9, 1.1, len(sounds)) / voice.speed
    ms *= np.clip(ms.sum(), SHORTEST * 1000 + 50, LONGEST * 1000 - 50) / ms.sum()
    frames = np.maximum(1, np.diff(np.round(np.concatenate([[0], np.cumsum(ms)]) * SAMPLE_RATE / 1000 / HOP))).astype(
        int
    )
    tracks = _tracks(sounds, frames)
    pitch = _pitch(np.repeat(stresses, frames), voice, rng)
    waveform = _synthesise(tracks, pitch, voice, rng)
    waveform *= rng.uniform(0.25, 0.7) / np.abs(waveform).max()
    waveform += 10 ** rng.uniform(-3.6, -2.8) * rng.standard_normal(len(waveform))  # a room is never silent
    return (waveform * 32767).astype(np.int16)


def _score(text: str) -> tuple[list[Sound], list[float]]:
    """The sounds of a text, with pauses around its phrases, and how much each is stressed."""
    sounds, stresses = [PAUSE], [0.0]
    for phrase in text.split(", "):
        for word in phrase.split():
            stressed = 1.0 if word in LEXICON["noun"] or word in LEXICON["verb"] else 0.0
            spoken = sounds_of(word)
            sounds += spoken
            # The first syllable carries the accent.
            stresses += [stressed * (place < 4) for place in range(len(spoken))]
        sounds.append(PAUSE)
        stresses.append(0.0)
    return sounds, stresses


def _tracks(sounds: Sequence[Sound], frames: npt.NDArray[np.int_]) -> dict[str, Floats]:
    """Each parameter over time (frames,): targets held for each sound, with transitions between them."""
    tracks: dict[str, Floats] = {}
    for name in Sound.__dataclass_fields__:
        held = np.repeat(np.array([getattr(sound, name) for sound in sounds], dtype=float), frames)
        # Tongue and lips take about 50 ms, the glottis 15; noise begins and ends at once.
        width = 11 if name in ("f1", "f2", "f3", "damping") else 3
        kernel = np.hanning(width + 2)[1:-1]
        tracks[name] = np.convolve(np.pad(held, width // 2, mode="edge"), kernel / kernel.sum(), mode="valid")
    return tracks


def _pitch(stress: Floats, voice: Speaker, rng: np.random.Generator) -> Floats:
    """(frames,) Hz: falling over the clip, raised by accents, never quite steady."""
    count = len(stress)
    kernel = np.hanning(35)
    accent = np.convolve(stress, kernel / kernel.sum(), mode="same")
    wander = np.convolve(rng.standard_normal(count + 40), np.ones(41) / 41, mode="valid")
    fall = np.linspace(0.12, -0.14, count)
    return voice.pitch * np.exp(fall + 0.22 * accent + 0.12 * wander)


def _synthesise(tracks: dict[str, Floats], pitch: Floats, voice: Speaker, rng: np.random.Generator) -> Floats:
    """(samples,) from parameters (frames,)."""
    count = len(pitch)
    samples = count * HOP
    at = np.arange(samples) / HOP
    smooth = lambda track: np.interp(at, np.arange(count), track)
    breath = smooth(tracks["breath"] + voice.breath * tracks["voice"])
    glottis = smooth(tracks["voice"]) * _pulses(smooth(pitch), rng) + breath * rng.standard_normal(samples)
    constriction = smooth(tracks["noise"]) * rng.standard_normal(samples)
    formants = _filter(glottis, _resonances(tracks, voice.tract))
    hertz = np.linspace(0, SAMPLE_RATE / 2, SPECTRUM // 2 + 1)
    centre, width = (tracks[name][:, None] * voice.tract**0.5 for name in ("noise_hz", "noise_width"))
    shape = 1 / (1 + ((hertz - centre) / (width / 2)) ** 2)
    # Radiation from the lips is part of the pulses, which are a derivative.
    return formants + 0.5 * _filter(constriction, shape)


def _pulses(pitch: Floats, rng: np.random.Generator) -> Floats:
    """(samples,) derivative of Rosenberg's glottal pulse, each period a little stronger or weaker."""
    phase = np.cumsum(pitch / SAMPLE_RATE)
    strength = 1 + 0.06 * rng.standard_normal(int(phase[-1]) + 2)
    turn = phase % 1
    rising, falling = 0.40, 0.16
    opening = np.sin(np.pi * turn / rising) * 0.5 * np.pi / rising
    closing = -np.sin(0.5 * np.pi * (turn - rising) / falling) * 0.5 * np.pi / falling
    pulse = np.where(turn < rising, opening, np.where(turn < rising + falling, closing, 0.0))
    return pulse * strength[phase.astype(int)] / 8


def _resonances(tracks: dict[str, Floats], tract: float) -> npt.NDArray[np.complex128]:
    """(frames, frequencies) response of five resonators in a row, each 1 at 0 Hz (Klatt 1980, equation 2)."""
    z = np.exp(-1j * np.linspace(0, np.pi, SPECTRUM // 2 + 1))
    count = len(tracks["f1"])
    upper = [np.full(count, hertz) for hertz in UPPER]
    response = np.ones((count, len(z)), dtype=complex)
    for centre, width in zip([tracks["f1"], tracks["f2"], tracks["f3"], *upper], BANDWIDTHS):
        radius = np.exp(-np.pi * width * tracks["damping"] / SAMPLE_RATE)[:, None]
        cosine = np.cos(2 * np.pi * np.minimum(centre * tract, 7500) / SAMPLE_RATE)[:, None]
        b, c = 2 * radius * cosine, -(radius**2)
        response *= (1 - b - c) / (1 - b * z - c * z * z)
    return response


def _filter(signal: Floats, response: npt.NDArray[np.generic]) -> Floats:
    """A filter that changes every HOP samples: windows of the signal, each with its own response, added up again."""
    padded = np.pad(signal, WINDOW // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: len(signal) : HOP]
    spectra = np.fft.rfft(windows * np.hanning(WINDOW + 1)[:-1], SPECTRUM)
    pieces = np.fft.irfft(spectra * response, SPECTRUM)
    out = np.zeros(len(padded) + SPECTRUM)
    for start, piece in zip(range(0, len(signal), HOP), pieces):
        out[start : start + SPECTRUM] += piece
    return out[WINDOW // 2 : WINDOW // 2 + len(signal)] / (WINDOW / HOP / 2)


def write_demo_speech(
    folder: Path, per_speaker: int, seed: int, *, workers: int, voice: str = "auto", overwrite: bool = False
) -> str:
    """Write folder/<speaker>/<speaker>_00000.wav, ... and transcripts.tsv (path, text); returns the voice that spoke.

    `voice` "auto" is espeak-ng where it is installed, else the formant synthesiser. Raises UserError when the folder
    exists (with `overwrite`: when it holds anything else), cannot be written, or espeak-ng is asked for and missing.
    """
    if voice == "auto":
        voice = "espeak-ng" if espeak.available() else "formant"
    if voice == "espeak-ng":
        espeak.require()

    def fill(aside: Path) -> None:
        for name in SPEAKERS:
            (aside / name).mkdir()
        rows = [
            row for some in in_processes(_write_some, _jobs(aside, per_speaker, seed, voice), workers) for row in some
        ]
        (aside / TABLE).write_text("path\ttext\n" + "".join(f"{path}\t{text}\n" for path, text in rows))

    write_demo(folder, {*SPEAKERS, TABLE}, fill, overwrite=overwrite)
    return voice


Jobs = tuple[Path, str, range, int, str]


def _jobs(folder: Path, per_speaker: int, seed: int, voice: str) -> Iterator[Jobs]:
    for name in SPEAKERS:
        for start in range(0, per_speaker, CHUNK):
            yield folder, name, range(start, min(start + CHUNK, per_speaker)), seed, voice


def _write_some(job: Jobs) -> list[tuple[str, str]]:
    folder, speaker, numbers, seed, voice = job
    rows: list[tuple[str, str]] = []
    for number in numbers:
        path, text = f"{speaker}/{speaker}_{number:05d}.wav", demo_text(speaker, number, seed)
        if voice == "espeak-ng":
            traits = SPEAKERS[speaker]
            pcm = espeak.speak(text, traits.espeak, traits.pitch, traits.speed, (SHORTEST + 0.2, LONGEST - 0.2))
        else:
            pcm = demo_clip(speaker, number, seed)
        with wave.open(str(folder / path), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(SAMPLE_RATE)
            file.writeframes(pcm.astype("<i2").tobytes())
        rows.append((path, text))
    return rows
