"""The small language of the demo speech: sounds, words, sentences. The same for every seed, so that what is trained on
one set is understood in another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megad2v.modalities.draws import generator


@dataclass(frozen=True)
class Sound:
    """A stretch of steady articulation. Frequencies are an adult man's, in Hz; amplitudes are relative."""

    ms: float
    f1: float
    f2: float
    f3: float
    voice: float = 0.0
    """Amplitude of the glottal pulses."""
    breath: float = 0.0
    """Amplitude of noise at the glottis, which the formants shape."""
    noise: float = 0.0
    """Amplitude of noise at a constriction, which passes by the formants."""
    noise_hz: float = 3000.0
    noise_width: float = 2000.0
    damping: float = 1.0
    """Factor on the bandwidths of the formants: nasals lose energy in the nose."""


VOWELS = {
    "a": Sound(95, 720, 1240, 2500, voice=1.0),
    "e": Sound(85, 480, 1880, 2520, voice=1.0),
    "i": Sound(80, 290, 2230, 2950, voice=0.9),
    "o": Sound(90, 500, 900, 2400, voice=1.0),
    "u": Sound(80, 320, 800, 2250, voice=0.9),
}
"""Formants near those of Peterson and Barney (1952), rounded."""
_STOPS = {  # letter -> F2 and F3 that its transitions point to, centre and width of its burst, voiced
    "p": (850, 2200, 1000, 1200, False),
    "b": (850, 2200, 1000, 1200, True),
    "t": (1800, 2700, 4200, 2200, False),
    "d": (1800, 2700, 4000, 2200, True),
    "k": (2000, 2400, 1900, 900, False),
    "g": (2000, 2400, 1900, 900, True),
}
_FRICATIVES = {  # letter -> F2, F3, centre and width of its noise, amplitude, voice
    "f": (1000, 2300, 5200, 4500, 0.16, 0.0),
    "v": (1000, 2300, 5000, 4500, 0.10, 0.35),
    "s": (1700, 2600, 6000, 1800, 0.42, 0.0),
    "z": (1700, 2600, 5800, 1800, 0.22, 0.35),
    "x": (1800, 2500, 3100, 1500, 0.42, 0.0),  # as in "ship"
}
_SONORANTS = {
    "m": Sound(70, 270, 950, 2200, voice=0.55, damping=2.5),
    "n": Sound(65, 270, 1650, 2550, voice=0.55, damping=2.5),
    "l": Sound(60, 370, 1250, 2800, voice=0.7, damping=1.3),
    "r": Sound(60, 430, 1250, 1650, voice=0.7, damping=1.2),
    "w": Sound(60, 310, 700, 2200, voice=0.7),
    "y": Sound(60, 280, 2250, 3050, voice=0.7),
}
CONSONANTS = "ptkbdgfsxvzmnlrwyh"
PAUSE = Sound(130, 500, 1500, 2500)


def sounds_of(word: str) -> list[Sound]:
    """The articulations of a word, letter by letter."""
    sounds: list[Sound] = []
    for letter, after in zip(word, word[1:] + "a"):
        vowel = VOWELS.get(after, VOWELS["a"])
        if letter in VOWELS:
            sounds.append(VOWELS[letter])
        elif letter in _SONORANTS:
            sounds.append(_SONORANTS[letter])
        elif letter in _STOPS:
            f2, f3, centre, width, voiced = _STOPS[letter]
            closed = Sound(50, 220, f2, f3, voice=0.12 if voiced else 0.0, damping=2.0)
            burst = Sound(12, 300, f2, f3, noise=0.5, noise_hz=centre, noise_width=width, voice=0.2 if voiced else 0.0)
            sounds += [closed, burst]
            if not voiced:
                sounds.append(replace(vowel, ms=28, voice=0.0, breath=0.5))
        elif letter == "h":
            sounds.append(replace(vowel, ms=60, voice=0.0, breath=0.6))
        else:
            f2, f3, centre, width, noise, voice = _FRICATIVES[letter]
            sounds.append(Sound(90, 300, f2, f3, voice=voice, noise=noise, noise_hz=centre, noise_width=width))
    return sounds


def _words(count: int, syllables: tuple[int, int], taken: set[str], rng: np.random.Generator) -> tuple[str, ...]:
    words: list[str] = []
    while len(words) < count:
        word = ""
        for _ in range(rng.integers(syllables[0], syllables[1] + 1)):
            word += CONSONANTS[rng.integers(len(CONSONANTS))] + "aeiou"[rng.integers(5)]
        if rng.random() < 0.3:
            word += "nslr"[rng.integers(4)]
        if word not in taken:
            taken.add(word)
            words.append(word)
    return tuple(words)


PARTS_OF_SPEECH = (
    ("article", 4, (1, 1)),
    ("noun", 24, (2, 3)),
    ("verb", 12, (2, 2)),
    ("adjective", 10, (2, 2)),
    ("at", 4, (1, 1)),
)
"""Name, how many words, fewest and most syllables."""


def _lexicon() -> dict[str, tuple[str, ...]]:
    rng = generator("demo language", 1)
    taken: set[str] = set()
    sizes = {
        "article": (4, (1, 1)),
        "noun": (24, (2, 3)),
        "verb": (12, (2, 2)),
        "adjective": (10, (2, 2)),
        "at": (4, (1, 1)),
    }
    return {kind: _words(count, syllables, taken, rng) for kind, (count, syllables) in sizes.items()}


LEXICON = _lexicon()
"""Part of speech -> its words, the commoner first."""
PATTERNS = (
    "article noun verb",
    "article adjective noun verb",
    "article noun verb article noun",
    "article noun verb at article noun",
    "article adjective noun verb article noun",
)


def sentence(rng: np.random.Generator) -> list[str]:
    """The words of one sentence. Common words come often (Zipf), and articles go with certain nouns."""
    words: list[str] = []
    for kind in PATTERNS[rng.integers(len(PATTERNS))].split():
        choices = LEXICON[kind]
        weights = 1 / np.arange(1, len(choices) + 1)
        words.append(choices[rng.choice(len(choices), p=weights / weights.sum())])
    for place, word in enumerate(words[:-1]):
        if word in LEXICON["article"]:
            noun = next(other for other in words[place + 1 :] if other in LEXICON["noun"])
            words[place] = LEXICON["article"][LEXICON["noun"].index(noun) % len(LEXICON["article"])]
    return words
