"""The vocabulary that a run's shards were made with, looked up once, before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megad2v.config.schema import Config
from megad2v.data.format import TOKENIZER_FOLDER, read_dataset
from megad2v.data.shardset import about_key, pattern_of, resolve
from megad2v.errors import UserError
from megad2v.modalities.text.tokenizer import Tokenizer


def with_vocabulary(config: Config) -> tuple[Config, Tokenizer]:
    """The configuration with `text.vocabulary` filled in, and the tokenizer that `text.tokenizer` names, or that lies
    beside the training shards of text, also of a joint run. No library that encodes is needed.

    Raises UserError where there is none, where `text.vocabulary` says another number, and where dataset.json beside
    the shards for training or validation names another tokenizer (shards without dataset.json are taken as they are).
    """
    mix = config.data.mix or {}
    patterns = {f"data.mix.{name}.shards": part.shards for name, part in sorted(mix.items())}
    training = {key: _folders(key, value) for key, value in (patterns or {"data.shards": config.data.shards}).items()}
    folder = _tokenizer_folder(config, [folder for folders in training.values() for folder in folders])
    with about_key("text.tokenizer"):
        tokenizer = Tokenizer.load(folder)
    wanted = config.text.vocabulary
    if wanted is not None and wanted != tokenizer.vocabulary:
        raise UserError(
            f"text.vocabulary: {wanted}, but the tokenizer in {folder} has {tokenizer.vocabulary} ids; leave it null"
        )
    keys = training
    if config.data.valid is not None:
        keys["data.valid"] = _folders("data.valid", config.data.valid)
    for key, places in keys.items():
        for place in places:
            _check_made_with(tokenizer, folder, place, key)
    return replace(config, text=replace(config.text, vocabulary=tokenizer.vocabulary)), tokenizer


def _folders(key: str, value: str | dict[str, str] | None) -> list[Path]:
    """Those that hold the shards of configuration key `key`, whose value is given."""
    with about_key(key):
        return sorted({path.parent for path in resolve(pattern_of(value, key, "text"))})


def _tokenizer_folder(config: Config, folders: list[Path]) -> Path:
    if config.text.tokenizer is not None:
        return Path(config.text.tokenizer).expanduser()
    beside = [folder / TOKENIZER_FOLDER for folder in folders]
    for folder in beside:
        if folder.is_dir():
            return folder
    info = read_dataset(folders[0])
    if info is not None and "text" not in info.modalities:
        raise UserError(f"data.shards: expected shards of text, {folders[0]} holds {' and '.join(info.modalities)}")
    raise UserError(f"text.tokenizer: not given, and {beside[0]} is not there; name the tokenizer that made the shards")


def _check_made_with(tokenizer: Tokenizer, folder: Path, shards: Path, key: str) -> None:
    info = read_dataset(shards)
    made_with = info.tokenizer if info is not None else {}
    if made_with and made_with.get("fingerprint") != tokenizer.fingerprint:
        raise UserError(
            f"{key}: {shards} was made with a tokenizer of {made_with.get('vocabulary')} ids (fingerprint "
            f"{made_with.get('fingerprint')}), the one in {folder} has {tokenizer.vocabulary} "
            f"({tokenizer.fingerprint}); name the right one with text.tokenizer, or make the shards again"
        )
