"""index_shards: the indexes of many tars at once, and what they hold. The command line is tools/index_shards.py."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megad2v.data.format import KINDS, LABEL_EXTENSION, MODALITY_KINDS
from megad2v.data.index import CACHE_VARIABLE, ShardIndex, build_all, index_path, keep, stored_index
from megad2v.data.shardset import resolve
from megad2v.data.team import start_worker
from megad2v.errors import UserError

UNITS = {"vision": (1, "pixels"), "speech": (16_000, "seconds"), "text": (1, "tokens")}
"""Modality -> (lengths in a unit, the unit's name)."""
NAMED = 10
"""Warnings, and unused extensions, that are printed."""


@dataclass
class Holding:
    """The samples of one modality: in a tar, or in many."""

    tars: int = 0
    samples: int = 0
    bytes: int = 0
    length: int = 0
    unknown: int = 0
    """Samples whose length is not known."""
    shortest: int | None = None
    longest: int = 0

    @staticmethod
    def of(index: ShardIndex) -> Holding:
        """What one index says."""
        known = index.lengths[index.lengths > 0]
        return Holding(
            tars=int(len(index) > 0),
            samples=len(index),
            bytes=int(index.records["size"].sum()),
            length=int(known.sum(dtype="u8")),
            unknown=len(index) - len(known),
            shortest=int(known.min()) if len(known) else None,
            longest=int(known.max(initial=0)),
        )

    def add(self, other: Holding) -> None:
        """Take in another tar's."""
        for name in ("tars", "samples", "bytes", "length", "unknown"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        shortest = [n for n in (self.shortest, other.shortest) if n is not None]
        self.shortest, self.longest = min(shortest, default=None), max(self.longest, other.longest)


@dataclass
class Looked:
    """What became of one tar."""

    path: Path
    new: bool = False
    place: Path | None = None
    """Where new indexes went; None: nowhere, or there are none."""
    holdings: dict[str, Holding] = field(default_factory=dict)
    extensions: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    error: str = ""


@dataclass
class Survey:
    """What `index_shards` did and found."""

    tars: int = 0
    new: int = 0
    holdings: dict[str, Holding] = field(default_factory=dict)
    extensions: Counter[str] = field(default_factory=Counter)
    """Of the files in the tars that were read now."""
    places: set[Path] = field(default_factory=set)
    """Folders that new indexes were written to, other than index/ beside the tars."""
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    homeless: int = 0
    """Tars whose indexes could be written nowhere."""

    def add(self, looked: Looked) -> None:
        """Take in what became of a tar."""
        self.tars += 1
        self.new += looked.new
        self.extensions += looked.extensions
        self.warnings += looked.warnings
        self.errors += [looked.error] if looked.error else []
        self.homeless += looked.new and looked.place is None
        if looked.place is not None and looked.place != index_path(looked.path, "").parent:
            self.places.add(looked.place)
        for modality, holding in looked.holdings.items():
            self.holdings.setdefault(modality, Holding()).add(holding)

    def lines(self) -> list[str]:
        """For people: what there is, and what is odd."""
        kept = self.tars - self.new - len(self.errors)
        lines = [f"{self.tars} tars: {self.new} indexed now, {kept} unchanged since they were"]
        lines += [_about(modality, holding) for modality, holding in self.holdings.items() if holding.samples]
        unused = [f"{n:,} .{e}" for e, n in self.extensions.most_common() if e not in (*KINDS, LABEL_EXTENSION)]
        if unused:
            lines.append("not used: " + ", ".join(unused[:NAMED]))
        lines += [f"indexes are in {place}: index/ cannot be written there" for place in sorted(self.places)]
        # The first one is the problem; who has to copy tars again wants to know which, at once.
        lines += [f"not usable either: {error}" for error in self.errors[1 : NAMED + 1]]
        lines += [f"warning: {warning}" for warning in self.warnings[:NAMED]]
        if len(self.warnings) > NAMED:
            lines.append(f"warning: and {len(self.warnings) - NAMED} more such tars")
        return lines

    def problem(self) -> str | None:
        """One line where something is wrong that training would stumble over."""
        if self.errors:
            more = f" (and {len(self.errors) - 1} more tars are not usable)" if len(self.errors) > 1 else ""
            return self.errors[0] + more
        if self.homeless:
            return (
                f"the indexes of {self.homeless} tars could be written neither beside them nor in the cache; set "
                f"{CACHE_VARIABLE} to a folder that can be written, here and for training"
            )
        if not any(holding.samples for holding in self.holdings.values()):
            found = ", ".join(extension for extension, _ in self.extensions.most_common(5)) or "nothing"
            kinds = "|".join(kind for kinds in MODALITY_KINDS.values() for kind in kinds)
            return f"no samples found; expected files KEY.{kinds}, found extensions: {found}"
        return None


def index_shards(
    patterns: Sequence[str],
    *,
    modalities: Sequence[str] = tuple(MODALITY_KINDS),
    workers: int = 0,
    again: bool = False,
    progress: bool = False,
) -> Survey:
    """Index every tar that the patterns name, `workers` of them at a time (0: in this process).

    A tar is walked once for all modalities, and not at all where all its indexes fit (`again`: anyway). Modalities that
    it does not hold get an empty index, which says so. A tar that cannot be read spoils none of the others.
    Raises UserError for a pattern that names nothing.
    """
    paths = list(dict.fromkeys(path for pattern in patterns for path in resolve(pattern)))
    survey = Survey()
    look = partial(_look, modalities=tuple(modalities), again=again)
    for looked in tqdm(_each(look, paths, workers), total=len(paths), unit=" tars", disable=not progress):
        survey.add(looked)
    return survey


def _each(look: partial[Looked], paths: list[Path], workers: int) -> Iterator[Looked]:
    if workers == 0:
        yield from map(look, paths)
        return
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(os.getpid(),))
    try:
        yield from pool.map(look, paths)
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed (out of memory?); start again: finished tars are kept") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _look(path: Path, modalities: tuple[str, ...], again: bool) -> Looked:
    looked = Looked(path)
    try:
        stored = {} if again else {modality: stored_index(path, modality) for modality in modalities}
        indexes = {modality: index for modality, index in stored.items() if index is not None}
        if len(indexes) < len(modalities):
            indexes, found = build_all(path, modalities)
            looked.new, looked.extensions = True, found.extensions
            places = [keep(index, path, modality) for modality, index in indexes.items()]
            looked.place = places[0].parent if places[0] is not None else None
            if found.apart:
                looked.warnings.append(
                    f"{path}: the files of {len(found.apart)} keys do not follow each other (first: {found.apart[0]}): "
                    "one sample each for megad2v, several for webdataset"
                )
            looked.warnings += [f"{path}: {n} files are left out: {why}" for why, n in found.skipped.items()]
    except UserError as error:
        looked.error = str(error)
        return looked
    looked.holdings = {modality: Holding.of(index) for modality, index in indexes.items()}
    return looked


def _about(modality: str, holding: Holding) -> str:
    per, unit = UNITS[modality]
    line = f"{modality}: {holding.samples:,} samples in {holding.tars:,} tars, {holding.bytes / 1e9:,.3g} GB"
    if holding.shortest is not None:
        shortest, longest, total = (n / per for n in (holding.shortest, holding.longest, holding.length))
        line += f"; {shortest:,.6g} to {longest:,.6g} {unit}"
        if modality != "vision":
            line += f", {total / 3600:,.3g} hours" if modality == "speech" else f", {total:,.0f} in all"
    return line + (f"; {holding.unknown:,} of unknown length" if holding.unknown else "")
