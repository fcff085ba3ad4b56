"""Raw speech folders -> samples: which recordings, which class and transcript, and with which bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np

from megad2v.errors import UserError
from megad2v.modalities.corpus import Corpus, Outcome, SourceFile, class_folders, find_files, label_ids, printable
from megad2v.modalities.sample import BadSample
from megad2v.modalities.speech.cutting import Pcm, Pieces
from megad2v.modalities.speech.geometry import SAMPLE_RATE
from megad2v.modalities.speech.recording import DECODERS, Recording, open_recording, require_decoder
from megad2v.modalities.speech.transcripts import find_transcripts

LIBSNDFILE = """
    .wav .flac .ogg .oga .opus .mp3 .mp2 .aif .aiff .aifc .au .snd .sph .nist .wv1 .wv2 .w64 .rf64 .caf
"""
OTHERS = ".m4a .aac .wma .webm"
"""torchaudio may read these; soundfile does not, and they are reported."""
EXTENSIONS = frozenset(LIBSNDFILE.split() + OTHERS.split())
LABELS = ("auto", "folders", "none")
SHORTEST_LIMIT = 1.0
"""Seconds: less than this is no piece of speech to cut to."""
SILENT_RANGE = 8
"""16-bit steps between the lowest and the highest sample of a silent file: 78 dB below full scale."""
MAX_CLIPPED = 0.01
"""Share of samples outside [-1, 1] from which a file is no audio in that range: MP3s overshoot, by far less."""


@dataclass(frozen=True)
class SpeechFile(SourceFile):
    """One recording."""

    text: str = ""
    """Its transcript; empty: none."""
    sidecar: str = ""
    """The file that holds its transcript, if `text` does not."""

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.path, self.sidecar) if self.sidecar else (self.path,)


@dataclass(frozen=True)
class SpeechOptions:
    """What is done to a recording on its way into a shard."""

    max_seconds: float = 60.0
    """Longer recordings without a transcript are cut into pieces of at most this; 0: none is."""
    min_seconds: float = 0.1
    """Shorter recordings are left out. Training has its own limit; this only keeps out what holds no sound of speech:
    0.1 s is five positions of the encoder, and a plosive with its vowel."""
    decoder: str = "soundfile"


def speech_corpus(
    folder: Path,
    options: SpeechOptions,
    *,
    labels: str = "auto",
    classes: Sequence[str] | None = None,
    transcripts: Path | None = None,
) -> Corpus:
    """All recordings under `folder`, with classes and transcripts.

    `labels`: "folders" takes the first-level folder as the class, "none" takes none, "auto" takes folders where every
    recording lies exactly one folder deep and there are several: nested folders are speakers and chapters, as a rule.
    `classes` fixes names and ids beforehand and implies "folders". Raises UserError for wrong options or input, and
    where a library is missing.
    """
    _check(options)
    require_decoder(options.decoder)
    audio, others = find_files(folder, EXTENSIONS, "recording")
    found = class_folders(folder, audio) if labels != "none" else []
    flat = all(path.count("/") == 1 for path in audio) and len(found) > 1
    if labels == "auto" and classes is None and not flat:
        found = []
    ids = label_ids(folder, found, classes)
    said = find_transcripts(folder, audio, others, transcripts)
    files = [
        SpeechFile(
            path,
            ids[path.split("/", 1)[0]] if found and "/" in path else -1,
            said.texts.get(path, ""),
            said.sidecars.get(path, ""),
        )
        for path in audio
    ]
    return Corpus(
        name="speech",
        modality="speech",
        noun="recordings",
        folder=folder,
        files=files,
        classes=list(ids) if found else [],
        others=[path for path in others if path not in said.sources],
        why_not="no audio file by its name, or hidden",
        make_samples=make_samples,
        options=options,
    )


def _check(options: SpeechOptions) -> None:
    if options.decoder not in DECODERS:
        raise UserError(f"--decoder {options.decoder}: expected {' or '.join(DECODERS)}")
    if not 0 <= options.min_seconds < np.inf:
        raise UserError(f"--min-seconds: expected 0 or more, got {options.min_seconds}")
    least = max(SHORTEST_LIMIT, 3 * options.min_seconds)
    # Pieces are a third of the limit or longer, and none may be too short.
    if options.max_seconds != 0 and not least <= options.max_seconds < np.inf:
        raise UserError(
            f"--max-seconds: expected 0 (no cutting), or {least:g} or more (1, and three times --min-seconds), "
            f"got {options.max_seconds:g}"
        )


def make_samples(folder: Path, file: SpeechFile, options: SpeechOptions) -> Outcome:
    """Read one recording, to its end: what gets into a shard is known to be whole.

    FLACs of 16 bits, 16 kHz, mono that need no cutting are copied byte for byte; all else is averaged over channels,
    resampled and encoded as such a FLAC.
    """
    try:
        notes: list[str] = []
        text = _transcript(folder, file, notes)
        with open_recording(folder / file.path, options.decoder) as recording:
            return _convert(folder, file, recording, text, options, notes)
    except OSError as error:
        return Outcome(file, "skipped", f"cannot be read: {error.strerror}")
    except BadSample as error:
        return Outcome(file, "skipped", str(error))


def _transcript(folder: Path, file: SpeechFile, notes: list[str]) -> str:
    if not file.sidecar:
        return file.text
    try:
        return " ".join((folder / file.sidecar).read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        notes.append("transcript left out: not UTF-8")
        return ""


def _convert(
    folder: Path, file: SpeechFile, recording: Recording, text: str, options: SpeechOptions, notes: list[str]
) -> Outcome:
    limit = round(options.max_seconds * SAMPLE_RATE) if options.max_seconds and not text else None
    sound = _Sound(recording)
    # One that does not declare its length is written anew, so that the index can know it.
    copy = recording.is_shard_format and 0 < (recording.frames or 0) <= (limit or np.inf)
    if copy:
        data = (folder / file.path).read_bytes()
        copy = data[:4] == b"fLaC"  # not an ID3 tag, which other readers stumble over
    if copy:
        checksum = md5(usedforsecurity=False)
        for block in sound.blocks():
            checksum.update(block.astype("<i2", copy=False))
        # STREAMINFO's sum of the samples (RFC 9639, section 8.2); zeros: the encoder left it out.
        if data[26:42] not in (checksum.digest(), bytes(16)):
            raise BadSample("damaged: samples do not fit the file's MD5")
        pieces = [(0, sound.samples, data)]
    else:
        cutter = Pieces(limit)
        for block in sound.blocks():
            cutter.add(block)
        pieces = cutter.finish()
        notes.insert(0, recording.description)
    sound.check(options.min_seconds)
    if sound.clipped:
        notes.append(f"{sound.clipped} samples outside [-1, 1] clipped")
    if len(pieces) > 1:
        notes.append(f"cut into {len(pieces)} pieces")
    if text and 0 < options.max_seconds * SAMPLE_RATE < sound.samples:
        notes.append(f"{sound.samples / SAMPLE_RATE:.1f} s, longer than --max-seconds, but transcribed: not cut")
    samples = tuple(_parts(file, recording, text, piece, len(pieces)) for piece in pieces)
    hours = {"hours": sound.samples / SAMPLE_RATE / 3600}
    return Outcome(file, "copied" if copy else "converted", ", ".join(notes), samples, hours)


def _parts(
    file: SpeechFile, recording: Recording, text: str, piece: tuple[int, int, bytes], count: int
) -> dict[str, bytes]:
    start, length, flac = piece
    meta: dict[str, Any] = {
        "path": printable(file.path),
        "seconds": length / SAMPLE_RATE,
        "rate": recording.rate,
        "channels": recording.channels,
    }
    if count > 1:
        meta["start"] = start / SAMPLE_RATE
    parts = {"flac": flac, "json": json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()}
    if text:
        parts["txt"] = text.encode()
    if file.label >= 0:
        parts["cls"] = str(file.label).encode()
    return parts


class _Sound:
    """The recording as 16-bit samples, with what has to be known of all of them."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._low, self._high = 0, 0
        self.samples = 0
        self.clipped = 0

    def blocks(self) -> Iterator[Pcm]:
        """(T,) int16 blocks at 16 kHz; rounded, so that what had 16 bits keeps them."""
        for block in self._recording.waveform():
            if not len(block):
                continue
            scaled = np.rint(block * np.float32(32768))
            # +1.0 is full scale to some programs, 32767 / 32768 to others: one step too many is nobody's fault.
            self.clipped += int(np.count_nonzero((scaled > 32768) | (scaled < -32768)))
            pcm = np.clip(scaled, -32768, 32767).astype(np.int16)
            low, high = int(pcm.min()), int(pcm.max())
            self._low, self._high = (min(self._low, low), max(self._high, high)) if self.samples else (low, high)
            self.samples += len(pcm)
            yield pcm

    def check(self, min_seconds: float) -> None:
        """Once all blocks were taken. Raises BadSample for what is no recording of speech."""
        if self.samples == 0:
            raise BadSample("no samples")
        if self.samples < min_seconds * SAMPLE_RATE:
            raise BadSample(f"{self.samples / SAMPLE_RATE:.3f} s, shorter than --min-seconds")
        if self._high - self._low <= SILENT_RANGE:
            raise BadSample("silent")
        if self.clipped > MAX_CLIPPED * self.samples:
            share = self.clipped / self.samples
            raise BadSample(f"{share:.0%} of the samples lie outside [-1, 1]; scale the file to that range")
