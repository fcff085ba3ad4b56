"""Fixtures of several files of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.text_corpora import BYTES


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain bytes: no library, and tokens that can be read."""
    folder = tmp_path_factory.mktemp("vocabulary")
    BYTES.save(folder)
    return folder
