"""A tokenizer's configuration is read as transformers reads it, or refused by the name of its key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdopt.errors import CheckpointError
from sdopt.export import families
from sdopt.export.source import open_folder
from sdopt.export.tokenizer import write_tokenizer, write_tokenizers
from sdopt.text.tokenizer import Tokenizer
from tests import tiny
from tests.export.test_configurations import edit

TEXTS = [
    "", "a CAT b", "apple!! 5%", "a <|endoftext|> b", "x  y\tz", "a b c d e f g h i j", "ünï 日本", "apple apple",
    "<|startoftext|>a", " a ",
]  # fmt: skip


def written(checkpoint: Path, folder: Path, change: Callable[[Path], None]) -> tuple[Any, Tokenizer]:
    """A changed tokenizer: that of transformers, and that of the bundle."""
    copy = tiny.variant(checkpoint, folder / "checkpoint")
    change(copy / "tokenizer")
    (folder / "bundle").mkdir()
    opened = open_folder(copy, None, {})
    encoder = families.of(opened).conditioning(opened).encoders[0]
    entry = write_tokenizer(opened, folder / "bundle", encoder)
    return opened.tokenizer("tokenizer"), Tokenizer(folder / "bundle" / entry.file, entry)


WORD = {"content": "!", "lstrip": True, "rstrip": True, "single_word": False, "normalized": False, "special": True}


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_max_length", 5),
        ("model_max_length", 100),
        ("bos_token", "a</w>"),
        ("eos_token", "b</w>"),
        ("pad_token", "!"),
        ("unk_token", "!"),
        ("do_lower_case", False),
        ("add_prefix_space", True),
        ("clean_up_tokenization_spaces", True),
        ("errors", "ignore"),
        ("additional_special_tokens", ["!", "apple</w>"]),
        ("extra_special_tokens", ["!"]),
        ("added_tokens_decoder", {"58": WORD}),
        ("add_bos_token", False),
        ("add_eos_token", False),
        ("tokenizer_class", "PreTrainedTokenizerFast"),
        ("model_input_names", ["input_ids"]),
        ("truncation_strategy", "do_not_truncate"),
        ("max_length", 4),
        ("stride", 1),
        ("padding", False),
        ("pad_to_multiple_of", 8),
        ("cls_token", "!"),
        ("sep_token", "!"),
        ("mask_token", "!"),
    ],
)
def test_a_key_of_a_tokenizer_means_what_it_means_in_transformers(
    key: str, value: Any, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    theirs, ours = written(
        tiny_checkpoint, tmp_path, lambda folder: edit(folder / "tokenizer_config.json", **{key: value})
    )
    for text in TEXTS:
        expected = theirs(text, padding="max_length", max_length=ours.max_length, truncation=True)["input_ids"]
        assert ours([text])[0].tolist() == expected, text


def test_both_text_encoders_read_as_many_tokens(tmp_path: Path, sdxl_checkpoint: Path) -> None:
    copy = tiny.variant(sdxl_checkpoint, tmp_path / "checkpoint")
    edit(copy / "tokenizer_2/tokenizer_config.json", model_max_length=5)
    (tmp_path / "bundle").mkdir()
    opened = open_folder(copy, None, {})
    message = "{'tokenizer': 7, 'tokenizer_2': 5} tokens of a prompt are read .*; its text encoders must read as many"
    with pytest.raises(CheckpointError, match=message):
        write_tokenizers(opened, tmp_path / "bundle", families.of(opened).conditioning(opened).encoders)


def pads_left(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", padding_side="left")


def cuts_left(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", truncation_side="left")


def splits_special_tokens(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", split_special_tokens=True)


def reads_few(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", model_max_length=2)


def reads_a_text(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", model_max_length="many")


def has_no_row_to_pad_with(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token="<pad>")


def has_no_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def is_no_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pads_left, "padding_side is 'left'; what is exported has 'right'"),
        (cuts_left, "truncation_side is 'left'; what is exported has 'right'"),
        (splits_special_tokens, "split_special_tokens is true; what is exported reads them as one token each"),
        (reads_few, "model_max_length is 2; it must be a whole number from 3"),
        (reads_a_text, "model_max_length is 'many'; it must be"),
        (has_no_row_to_pad_with, r"pad_token_id is 59; it must be a row of its text encoder, which has 59"),
        (has_no_file, "tokenizer: has neither tokenizer.json nor vocab.json"),
        (is_no_json, "tokenizer: cannot be read: "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_tokenizer_that_would_be_read_otherwise_is_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        written(tiny_checkpoint, tmp_path, damage)
