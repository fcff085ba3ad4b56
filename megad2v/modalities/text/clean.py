"""Modest cleaning of text, and what makes two documents the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
"""Control characters that are no white space, and the byte order mark. Joiners and direction marks are spelling."""


def clean(sentence: str) -> str:
    """Unicode's composed form (NFC), no control characters, one space for each run of white space.

    Empty where no letter is left: page numbers, rules, rows of asterisks.
    """
    tidy = " ".join(CONTROL.sub("", unicodedata.normalize("NFC", sentence)).split())
    return tidy if any(map(str.isalpha, tidy)) else ""


def fingerprint(sentences: Iterable[str]) -> bytes:
    """16 bytes that are the same for documents with the same words: NFC, white space and line ends do not count."""
    digest = blake2b(digest_size=16)
    for sentence in sentences:
        for word in unicodedata.normalize("NFC", sentence).split():
            digest.update(word.encode("utf-8", "surrogatepass") + b" ")
    return digest.digest()
