"""The breaks of `make mutants` are still there to be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.known_mutants import MUTANTS, Mutant

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_text_is_there_exactly_once(mutant: Mutant) -> None:
    assert (REPOSITORY / mutant.file).read_text().count(mutant.old) == 1, f"{mutant.file}: {mutant.old!r}"
    assert mutant.new != mutant.old
    assert (REPOSITORY / mutant.test.split("::")[0]).is_file()
