"""Generated speech: equal files for equal seeds, as the contract says; sounds have the pitch and formants meant."""

from __future__ import annotations

import shutil
import wave
from pathlib import Path

import numpy as np
import pytest

from megad2v.modalities.draws import generator
from megad2v.modalities.speech.language import LEXICON, VOWELS, sounds_of
from megad2v.modalities.speech.synthetic import SPEAKERS, _pitch, _synthesise, _tracks, demo_clip, demo_text
from tests.unit.test_make_shards import files, make_demo_data, make_shards

VOICE = SPEAKERS["boris"]


def demo(out: Path, *words: str) -> int:
    return make_demo_data.main([str(out), "--only", "speech", "--clips-per-speaker", "2", "--voice", "formant", *words])


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(tmp_path / "a", "--workers", "2") == 0
    assert "16 clips by 8 speakers (formant)" in capsys.readouterr().out
    folder = tmp_path / "a/speech"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SPEAKERS, "transcripts.tsv"])
    rows = [line.split("\t") for line in (folder / "transcripts.tsv").read_text().splitlines()]
    assert rows[0] == ["path", "text"]
    assert sorted(path for path, _ in rows[1:]) == sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*.wav")
    )
    lexicon = {word for words in LEXICON.values() for word in words}
    for path, text in rows[1:]:
        with wave.open(str(folder / path)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
            assert 2 <= file.getnframes() / 16_000 <= 4
        assert set(text.replace(",", "").split()) <= lexicon
    assert len({path.read_bytes() for path in folder.rglob("*.wav")}) == 16
    assert not (tmp_path / "a/image").exists()
    demo(tmp_path / "b", "--workers", "1")
    assert files(folder) == files(tmp_path / "b/speech"), "same seed, same files"
    demo(tmp_path / "b", "--seed", "2", "--overwrite")
    assert files(folder) != files(tmp_path / "b/speech")


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(tmp_path, "--clips-per-speaker", "0") == 2
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech/mine.wav").touch()
    assert demo(tmp_path, "--overwrite") == 2
    assert "is there already; give another OUT" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "speech").iterdir()] == ["mine.wav"]


def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Speaker folders are classes, the table is found, nothing is left out."""
    pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    demo(tmp_path)
    words = ["speech", "--input", str(tmp_path / "speech"), "--output", str(tmp_path / "out"), "--workers", "0"]
    assert make_shards.main(words) == 0
    assert "(8 classes): 0 copied, 16 converted, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_pitch(speaker: str) -> None:
    """The period with the highest autocorrelation, over the voiced frames of a clip."""
    clip = demo_clip(speaker, 0, 1) / 32768
    assert 0.2 < np.abs(clip).max() < 0.8
    frames = np.lib.stride_tricks.sliding_window_view(clip, 1024)[::256] * np.hanning(1024)
    power = np.abs(np.fft.rfft(frames, 4096)) ** 2
    power[:, int(1_000 / 16_000 * 4096) :] = 0  # below the formants' reach
    correlation = np.fft.irfft(power)[:, : 16_000 // 60]
    correlation /= correlation[:, :1] * np.hanning(2049)[1024 : 1024 + correlation.shape[1]]
    best = correlation[:, 16_000 // 400 :].argmax(axis=1) + 16_000 // 400
    voiced = correlation[np.arange(len(best)), best] > 0.7
    assert voiced.mean() > 0.25
    assert np.median(16_000 / best[voiced]) == pytest.approx(SPEAKERS[speaker].pitch, rel=0.15)


@pytest.mark.parametrize("vowel", VOWELS)
def test_formants(vowel: str) -> None:
    """Linear prediction (autocorrelation method) finds the first two formants that were asked for."""
    rng = generator("test")
    tracks = _tracks(sounds_of(vowel), np.array([200]))
    sound = _synthesise(tracks, _pitch(np.zeros(200), VOICE, rng), VOICE, rng)[4_000:12_000]
    sound = np.append(sound[0], sound[1:] - 0.9 * sound[:-1]) * np.hamming(len(sound))
    order = 18
    correlation = np.correlate(sound, sound, "full")[len(sound) - 1 :][: order + 1]
    matrix = correlation[np.abs(np.subtract.outer(np.arange(order), np.arange(order)))]
    poles = np.roots([1, *-np.linalg.solve(matrix, correlation[1:])])
    hertz = np.angle(poles) / (2 * np.pi) * 16_000
    narrow = sorted(hertz[(hertz > 150) & (-np.log(np.abs(poles)) * 16_000 / np.pi < 500)])
    for formant in (VOWELS[vowel].f1, VOWELS[vowel].f2):
        assert min(abs(found / (formant * VOICE.tract) - 1) for found in narrow) < 0.12, (formant, narrow)


def test_sentences() -> None:
    """Words recur, so that there is something to learn; clips differ."""
    texts = [demo_text(speaker, number, 1) for speaker in SPEAKERS for number in range(10)]
    words = " ".join(texts).replace(",", "").split()
    assert len(words) > 5 * len(set(words))
    assert len(set(texts)) > 0.9 * len(texts)
    assert demo_text("alma", 0, 1) != demo_text("alma", 0, 2)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak(tmp_path: Path) -> None:
    pytest.importorskip("soxr")
    assert demo(tmp_path, "--voice", "espeak-ng") == 0
    for path in tmp_path.rglob("*.wav"):
        with wave.open(str(path)) as file:
            assert file.getframerate() == 16_000
            assert 2 <= file.getnframes() / 16_000 <= 4
            assert np.frombuffer(file.readframes(file.getnframes()), "<i2").std() > 300
