"""Write the tokenizers of a bundle, and prove that the runtime reads prompts as diffusers' pipelines do."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

from sdopt.bundle.format import MAX_SEQUENCE, Encoder, TokenizerEntry
from sdopt.errors import BundleError, CheckpointError
from sdopt.export.checkpoint import Checkpoint
from sdopt.text.tokenizer import Tokenizer

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
FILES = ("tokenizer.json", "vocab.json", "spiece.model")  # any of them
SIDES = ("padding_side", "truncation_side")  # where a prompt is padded and where it is cut
TEXTS = ("", "a photo of a cat", "A Red APPLE, 50% off!  it's ünïcödé 日本 🍎", "one two three " * 60)


def write_tokenizers(checkpoint: Checkpoint, folder: Path, encoders: Sequence[Encoder]) -> dict[str, TokenizerEntry]:
    """Write the tokenizer of each text encoder into `folder`. Returns their entries in the manifest.

    Raises: CheckpointError as `write_tokenizer` does, and if those that stand side by side cut prompts at different
        lengths.
    """
    entries = {encoder.tokenizer: write_tokenizer(checkpoint, folder, encoder) for encoder in encoders}
    beside = [encoder.tokenizer for encoder in encoders if encoder.join == "features"]
    lengths = {name: entries[name].max_length for name in beside}
    if len(set(lengths.values())) > 1:
        raise CheckpointError(
            f"{checkpoint.folder}: {lengths} tokens of a prompt are read (the smaller of model_max_length and "
            "max_position_embeddings); its text encoders must read as many"
        )
    return entries


def write_tokenizer(checkpoint: Checkpoint, folder: Path, encoder: Encoder) -> TokenizerEntry:
    """Write NAME/tokenizer.json. If the checkpoint has CLIP's vocabulary alone, or T5's pieces, it is made of them.

    Raises: CheckpointError if it cannot be read, or would be read otherwise than in diffusers.
    """
    name = encoder.tokenizer
    where = checkpoint.folder / name
    # without these files transformers makes up a tokenizer that knows no words
    if not any((where / file).is_file() for file in FILES):
        raise CheckpointError(f"{where}: has neither {' nor '.join(FILES)}")
    try:
        tokenizer = checkpoint.tokenizer(name)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises whatever its parts raise
        raise CheckpointError(f"{where}: cannot be read: {error}") from error
    path = folder / name / "tokenizer.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**content, "truncation": None, "padding": None}, ensure_ascii=False), encoding="utf-8")
    entry = _entry(where, tokenizer, checkpoint.config(encoder.component), f"{name}/tokenizer.json")
    try:
        ours = Tokenizer(path, entry)
    except BundleError as error:
        reason = error.__cause__ or error  # which names no file of the bundle that is not there yet
        raise CheckpointError(f"{where}: this tokenizer cannot be exported: {reason}") from error
    _prove(where, tokenizer, ours)
    return entry


def _entry(where: Path, tokenizer: Any, config: Any, file: str) -> TokenizerEntry:
    """The tokenizer's entry in the manifest. `config` is that of its text encoder."""
    for side in SIDES:
        if getattr(tokenizer, side) != "right":
            raise CheckpointError(f"{where}: {side} is {getattr(tokenizer, side)!r}; what is exported has 'right'")
    if getattr(tokenizer, "split_special_tokens", False):
        raise CheckpointError(f"{where}: split_special_tokens is true; what is exported reads them as one token each")
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, (int, float)) or not length >= 3:
        raise CheckpointError(f"{where}: model_max_length is {length!r}; it must be a whole number from 3")
    rows: int = config["vocab_size"]
    ids: dict[str, Any] = {key: getattr(tokenizer, key) for key in SPECIAL}
    for key, value in ids.items():
        if value is None and key == "bos_token_id" and config["model_type"] == "t5":
            continue
        if value is None or value >= rows:
            raise CheckpointError(
                f"{where}: {key} is {value}; it must be a row of its text encoder, which has {rows} (vocab_size)"
            )
    most = config.get("max_position_embeddings", MAX_SEQUENCE)
    return TokenizerEntry(file, int(min(length, most)), vocab_size=rows, **ids)


def _prove(where: Path, theirs: Any, ours: Tokenizer) -> None:
    """Raises: CheckpointError that quotes a text whose ids are not those that diffusers' pipelines compute."""
    loader = TextualInversionLoaderMixin()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tokenizer says what it leaves out of a long text
        for text in _texts(theirs):
            converted = loader.maybe_convert_prompt(text, theirs)
            padded = theirs(converted, padding="max_length", max_length=ours.max_length, truncation=True)
            expected: list[int] = padded["input_ids"]
            if not all(map(ours.has_row, expected)):
                continue  # diffusers cannot read it, and sdopt refuses it in a prompt
            found = ours([text])[0].tolist()
            if found != expected:
                raise CheckpointError(
                    f"{where}: transformers reads {text[:40]!r} as {expected[:8]}, sdopt as {found[:8]}; what is "
                    "exported begins a prompt with bos_token if there is one, ends it with eos_token and pads it with "
                    "pad_token"
                )


def _texts(theirs: Any) -> Iterator[str]:
    """Texts of every kind, and each learnt word in two spellings."""
    yield from TEXTS
    for word in theirs.added_tokens_encoder:
        yield f"a {word} b"
        yield f"a {word.upper()} b"
