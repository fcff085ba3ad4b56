"""Which vocabulary a run has, and that it is the one that made the shards."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megad2v.config.schema import Config, MixConfig
from megad2v.data.vocabulary import with_vocabulary
from megad2v.errors import UserError
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.modalities.text.train import TrainingOptions, train_tokenizer
from tests.unit.text_helpers import text_config, write_text

BYTES = train_tokenizer((), TrainingOptions(0, "byte"))
OTHER = Tokenizer("sentencepiece", 1000, b"no model, but read by nobody", "bpe")
DOCUMENT = np.array([10, 11, 2], dtype="<u2")


def shards(folder: Path, tokenizer: Tokenizer = BYTES, *, beside: bool = True) -> Path:
    write_text(folder, [DOCUMENT], tokenizer=tokenizer.about)
    if beside:
        save(tokenizer, folder / "tokenizer")
    return folder


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """As `Tokenizer.save` does, but without vocab.tsv, which takes the library."""
    folder.mkdir()
    (folder / "megad2v.json").write_text(json.dumps({"format": 1, **tokenizer.about}))
    if tokenizer.model:
        (folder / "tokenizer.model").write_bytes(tokenizer.model)


def config(train: Path | str, valid: Path | None = None, **text: Any) -> Config:
    return text_config(Path(train), text={"vocabulary": None, **text}, valid=None if valid is None else str(valid))


def refused(*arguments: Any, **text: Any) -> str:
    with pytest.raises(UserError) as caught:
        with_vocabulary(config(*arguments, **text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_beside_the_shards(tmp_path: Path) -> None:
    found, tokenizer = with_vocabulary(config(shards(tmp_path / "train"), shards(tmp_path / "valid")))
    assert tokenizer == BYTES and tokenizer.files == BYTES.files
    assert found == config(tmp_path / "train", tmp_path / "valid", vocabulary=261), "nothing else has changed"
    assert with_vocabulary(found)[0] == found


def test_named(tmp_path: Path) -> None:
    train = shards(tmp_path / "train", beside=False)
    BYTES.save(tmp_path / "mine")
    found, _ = with_vocabulary(config(train, tokenizer=str(tmp_path / "mine")))
    assert (found.text.vocabulary, found.text.tokenizer) == (261, str(tmp_path / "mine"))


def test_pattern_over_several_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "a", [DOCUMENT], tokenizer=BYTES.about)
    shards(tmp_path / "b")
    (tmp_path / "b" / "text-000000.tar").rename(tmp_path / "b" / "other-000000.tar")
    assert with_vocabulary(config(tmp_path / "*" / "*.tar"))[0].text.vocabulary == 261


def test_mix_of_sets(tmp_path: Path) -> None:
    """Every set of a mix has to be of the one vocabulary."""
    shards(tmp_path / "a")
    shards(tmp_path / "b")
    base = config("unused")

    def mixed(*names: str) -> Config:
        mix = {name: MixConfig(str(tmp_path / name)) for name in names}
        return replace(base, data=replace(base.data, shards=None, mix=mix))

    assert with_vocabulary(mixed("a", "b"))[0].text.vocabulary == 261
    shards(tmp_path / "c", OTHER)
    with pytest.raises(UserError, match=r"data\.mix\.c\.shards: .*was made with a tokenizer of 1000 ids"):
        with_vocabulary(mixed("a", "c"))


def test_no_library_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert with_vocabulary(config(shards(tmp_path / "train", OTHER)))[0].text.vocabulary == 1000


def test_shards_of_others_are_taken_as_they_are(tmp_path: Path) -> None:
    train = shards(tmp_path / "train")
    (train / "dataset.json").unlink()
    assert with_vocabulary(config(train))[0].text.vocabulary == 261


def test_not_there(tmp_path: Path) -> None:
    train = shards(tmp_path / "train", beside=False)
    line = refused(train)
    assert line.startswith(f"text.tokenizer: not given, and {train / 'tokenizer'} is not there; name")
    line = refused(train, tokenizer=str(tmp_path / "nowhere"))
    assert line.startswith(f"text.tokenizer: {tmp_path / 'nowhere'}") and "train_tokenizer.py" in line


def test_another_number(tmp_path: Path) -> None:
    train = shards(tmp_path / "train")
    line = refused(train, vocabulary=300)
    assert line == f"text.vocabulary: 300, but the tokenizer in {train / 'tokenizer'} has 261 ids; leave it null"


def test_other_tokenizer_than_the_shards(tmp_path: Path) -> None:
    train = shards(tmp_path / "train")
    save(OTHER, tmp_path / "other")
    line = refused(train, tokenizer=str(tmp_path / "other"))
    assert line.startswith(f"data.shards: {train} was made with a tokenizer of 261 ids (fingerprint")
    assert BYTES.fingerprint in line and OTHER.fingerprint in line


def test_other_tokenizer_for_validation(tmp_path: Path) -> None:
    line = refused(shards(tmp_path / "train"), shards(tmp_path / "valid", OTHER))
    assert line.startswith(f"data.valid: {tmp_path / 'valid'} was made with")


def test_patterns_that_name_nothing(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing.tar").startswith("data.shards: ")
    assert refused(shards(tmp_path / "train"), tmp_path / "nothing.tar").startswith("data.valid: ")


def test_joint_run(tmp_path: Path) -> None:
    """Of its maps the entries of text; nothing else is opened."""
    text = config(shards(tmp_path / "train"), shards(tmp_path / "valid"))
    maps = {"shards": {"vision": "/nowhere", "text": str(tmp_path / "train")}}
    maps["valid"] = {"vision": "/nowhere", "text": str(tmp_path / "valid")}
    joint = replace(text, modality="joint", data=replace(text.data, **maps))
    found, tokenizer = with_vocabulary(joint)
    assert tokenizer == BYTES and found == replace(joint, text=replace(joint.text, vocabulary=261))
    shards(tmp_path / "other", OTHER)
    joint = replace(joint, data=replace(joint.data, valid={"text": str(tmp_path / "other")}))
    with pytest.raises(UserError, match=r"data\.valid: .*was made with a tokenizer of 1000 ids"):
        with_vocabulary(joint)
