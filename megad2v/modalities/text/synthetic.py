"""Generated texts for demos and tests, no download: short stories in simple English, each on one topic.

What a model can learn from context: subjects agree with their verbs, pronouns with the person who was named, the
determiner with the noun; a story keeps to the words of its topic, its two people and its place from the first sentence
to the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megad2v.modalities.demo import in_processes, write_demo
from megad2v.modalities.vision.transforms import generator

STORIES = 200
"""In a file."""
SHORTEST, LONGEST = 5, 16
"""Sentences of a story."""
PEOPLE = {
    "she": ["Alma", "Clara", "Edith", "Greta", "Irene", "Karin", "Maria", "Olga", "Ruth", "Sarah"],
    "he": ["Boris", "David", "Felix", "Henry", "Jonas", "Leo", "Martin", "Oscar", "Peter", "Simon"],
}
OTHER_FORMS = {"she": ("her", "her"), "he": ("him", "his")}
"""Pronoun -> (object, possessive)."""


@dataclass(frozen=True)
class Topic:
    """Words that go together."""

    places: tuple[str, ...]
    things: tuple[str, ...]
    """Singular; all take -s in the plural."""
    verbs: tuple[str, ...]
    """Stems that take -s and -ed."""
    qualities: tuple[str, ...]


def _topic(places: str, things: str, verbs: str, qualities: str) -> Topic:
    return Topic(*(tuple(words.split()) for words in (places, things, verbs, qualities)))


TOPICS = {
    "garden": _topic(
        "garden orchard greenhouse meadow",
        "rose apple spade seed hedge tulip root",
        "plant water pick rake",
        "ripe green sweet wild tall",
    ),
    "sea": _topic(
        "harbour island beach lighthouse",
        "boat sail anchor shell rope wave net",
        "row haul moor repair",
        "salty deep stormy blue wet",
    ),
    "kitchen": _topic(
        "kitchen bakery inn pantry",
        "loaf pan spoon onion kettle cake oven",
        "cook boil roast season",
        "hot fresh sour crisp warm",
    ),
    "station": _topic(
        "station tunnel depot platform",
        "train ticket whistle wagon engine signal rail",
        "board order inspect unload",
        "late early loud fast crowded",
    ),
    "school": _topic(
        "school library classroom hall",
        "book lesson pencil letter poem map number",
        "learn explain repeat correct",
        "difficult easy long clever short",
    ),
    "mountain": _topic(
        "mountain valley glacier hut",
        "peak stone path cliff cloud tent boot",
        "climb cross mark reach",
        "steep cold high narrow icy",
    ),
}


class _Story:
    """What stays the same in a story, and how its sentences are made."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self.topic = TOPICS[self._one(tuple(TOPICS))]
        self.pronouns = [self._one(("she", "he")), self._one(("she", "he"))]
        self.names = [self._one(PEOPLE[self.pronouns[0]]), self._one(PEOPLE[self.pronouns[1]])]
        while self.names[1] == self.names[0]:
            self.names[1] = self._one(PEOPLE[self.pronouns[1]])
        self.place = self._one(self.topic.places)
        self._who = 0

    def _one(self, words: tuple[str, ...] | list[str]) -> str:
        return words[self._rng.integers(len(words))]

    def _thing(self) -> tuple[str, bool]:
        """(noun phrase, whether it is plural)"""
        plural = bool(self._rng.random() < 0.5)
        noun, quality = self._one(self.topic.things), self._one(self.topic.qualities)
        words = [quality, noun] if self._rng.random() < 0.6 else [noun]
        article = self._one(("the", "these", "three", "many")) if plural else self._one(("the", "this", "every", "a"))
        if article == "a" and words[0][0] in "aeio":
            article = "an"
        return " ".join([article, *words]) + ("s" if plural else ""), plural

    def sentence(self, number: int) -> str:
        """The next one; the first names people and place."""
        if number == 0:
            return f"{self.names[0]} and {self.names[1]} met at the {self.place}."
        named = number == 1 or self._rng.random() < 0.35
        if named:
            self._who = int(self._rng.integers(2))
        subject = self.names[self._who] if named else self.pronouns[self._who].capitalize()
        verb, (thing, plural) = self._one(self.topic.verbs), self._thing()
        person, possessive = OTHER_FORMS[self.pronouns[self._who]]
        other = self.names[1 - self._who]
        does, did = _present(verb), _past(verb)
        it, is_, was = ("them", "are", "were") if plural else ("it", "is", "was")
        return (
            f"{subject} {did} {thing} near the {self.place}.",
            f"{thing.capitalize()} {was} {self._one(self.topic.qualities)}, but {other} {did} {it}.",
            f"{subject} {did} {thing}, and {other} thanked {person}.",
            f'"Who will {verb} {thing}?" asked {other}.',
            f"Every day {subject if named else subject.lower()} {does} {thing} with {possessive} own hands.",
            f"At the {self.place} there {is_} {thing}, and {other} {does} {it}.",
        )[self._rng.integers(6)]


def _past(verb: str) -> str:
    return verb + ("d" if verb.endswith("e") else "ed")


def _present(verb: str) -> str:
    return verb + ("es" if verb.endswith(("ch", "ss", "sh")) else "s")


def demo_story(number: int, seed: int) -> list[str]:
    """Sentences of a story; a pure function of its arguments."""
    rng = generator(seed, "demo story", number)
    story = _Story(rng)
    return [story.sentence(i) for i in range(int(rng.integers(SHORTEST, LONGEST + 1)))]


def write_demo_text(folder: Path, stories: int, seed: int, *, workers: int, overwrite: bool = False) -> int:
    """Write folder/stories_000.txt, ...: a sentence a line, a blank line between stories; returns the bytes.

    Raises UserError when the folder exists (with `overwrite`: when it holds anything else) or cannot be written.
    """
    starts = range(0, stories, STORIES)
    names = [f"stories_{i:03d}.txt" for i in range(len(starts))]
    sizes: list[int] = []

    def fill(aside: Path) -> None:
        jobs = [(aside / name, range(start, min(start + STORIES, stories)), seed) for name, start in zip(names, starts)]
        sizes.extend(in_processes(_write_file, jobs, min(workers, len(jobs))))

    # Also those of an earlier, longer corpus may be replaced.
    known = {path.name for path in folder.glob("stories_[0-9][0-9][0-9].txt")} if folder.is_dir() else set()
    write_demo(folder, {*names, *known}, fill, overwrite=overwrite)
    return sum(sizes)


def _write_file(job: tuple[Path, range, int]) -> int:
    path, numbers, seed = job
    text = "\n\n".join("\n".join(demo_story(number, seed)) for number in numbers) + "\n"
    return path.write_bytes(text.encode())
