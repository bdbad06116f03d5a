"""A bundle's tokenizer.json, checked before the `tokenizers` library reads it.

The library runs whatever the file says, also a regular expression that takes for ever. What an export writes is CLIP's
tokenizer, byte pairs, or T5's, pieces with scores; after a few steps that each take time in proportion to the text.
Anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sdopt.bundle.disk import parse_json, read_plain
from sdopt.errors import shown

MAX_BYTES = 64 << 20  # CLIP's has 3.6 MB
MAX_ENTRIES = 1 << 20  # of the vocabulary, and of the merges; CLIP has 49,408
MAX_WORD = 1 << 10  # characters
MAX_ADDED = 1 << 16  # words beside the vocabulary
MAX_STEPS = 16  # of the normalizer and of the pre-tokenizer
# CLIP's, as transformers writes it: first as its converter does, then as its tokenizer
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPACES = r" {2,}"  # as T5's is converted from SentencePiece
PATTERNS = (r"\s+", SPLIT, r"<\|startoftext\|>|<\|endoftext\|>|" + SPLIT, SPACES)
MAX_CHARSMAP = 1 << 20  # base64 of SentencePiece's table of characters; T5's has 300 KB
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Replace", "Precompiled")
PRE_TOKENIZERS = ("Split", "ByteLevel", "Whitespace", "WhitespaceSplit", "Metaspace")
PROCESSORS = ("RobertaProcessing", "ByteLevel", "TemplateProcessing")


def read(path: Path) -> str:
    """The text of a tokenizer.json, checked.

    Raises: ValueError that names what is wrong; OSError.
    """
    text = read_plain(path, MAX_BYTES).decode()
    content = _object("the file", parse_json(text))
    _check_steps("normalizer", content.get("normalizer"), "normalizers", NORMALIZERS)
    _check_steps("pre_tokenizer", content.get("pre_tokenizer"), "pretokenizers", PRE_TOKENIZERS)
    for name, types in (("post_processor", PROCESSORS), ("decoder", ("ByteLevel", "Metaspace"))):
        if content.get(name) is not None:
            _one_of(f"{name}.type", _object(name, content[name]).get("type"), types)
    _check_added(content.get("added_tokens", []))
    _check_model(_object("model", content.get("model")))
    return text


def _check_model(model: Mapping[str, Any]) -> None:
    _one_of("model.type", model.get("type"), ("BPE", "Unigram"))
    if model["type"] == "Unigram":
        pieces = _list("model.vocab", model.get("vocab"))
        _check_pieces(pieces)
        unknown = model.get("unk_id")
        if unknown is not None and not (type(unknown) is int and 0 <= unknown < len(pieces)):
            raise ValueError(
                f"model.unk_id is {shown(unknown)}; allowed is null or a number from 0 below {len(pieces)}"
            )
        return
    if model.get("dropout") is not None:  # a prompt would have other tokens each time
        raise ValueError(f"model.dropout is {shown(model['dropout'])}; allowed is null")
    vocabulary, merges = _object("model.vocab", model.get("vocab")), _list("model.merges", model.get("merges"))
    if not vocabulary or len(vocabulary) > MAX_ENTRIES or len(merges) > MAX_ENTRIES:
        text = f"model has {len(vocabulary):,} words and {len(merges):,} merges"
        raise ValueError(f"{text}; allowed are 1 to {MAX_ENTRIES:,} words, and as many merges")
    if max(map(len, vocabulary)) > MAX_WORD:
        raise ValueError(f"model.vocab has a word of more than {MAX_WORD} characters")


def _check_pieces(pieces: Sequence[Any]) -> None:
    """Raises: ValueError unless they are words of bounded size, each with a score."""
    if not 0 < len(pieces) <= MAX_ENTRIES:
        raise ValueError(f"model has {len(pieces):,} pieces; allowed are 1 to {MAX_ENTRIES:,}")
    for i, piece in enumerate(pieces):
        pair = _list(f"model.vocab[{i}]", piece)
        is_pair = len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) in (int, float)
        if not is_pair or len(pair[0]) > MAX_WORD or not abs(pair[1]) < math.inf:
            allowed = f"a word of at most {MAX_WORD} characters and a finite score"
            raise ValueError(f"model.vocab[{i}] is {shown(pair)}; allowed is {allowed}")


def _check_added(added: Any) -> None:
    words = _list("added_tokens", added)
    if len(words) > MAX_ADDED:
        raise ValueError(f"added_tokens has {len(words):,} words; allowed are {MAX_ADDED:,}")
    for i, word in enumerate(words):
        content = _object(f"added_tokens[{i}]", word).get("content")
        if not isinstance(content, str) or not 0 < len(content) <= MAX_WORD:
            allowed = f"allowed is a text of 1 to {MAX_WORD} characters"
            raise ValueError(f"added_tokens[{i}].content is {shown(content)}; {allowed}")


def _check_steps(where: str, given: Any, key: str, types: tuple[str, ...]) -> None:
    """Raises: ValueError unless it is null, one step of a known type, or a sequence of such steps."""
    if given is None:
        return
    entry = _object(where, given)
    steps: Sequence[Any] = [entry]
    if entry.get("type") == "Sequence":
        steps = _list(f"{where}.{key}", entry.get(key))
        where = f"{where}.{key}"
    if len(steps) > MAX_STEPS:
        raise ValueError(f"{where} has {len(steps)} steps; allowed are {MAX_STEPS}")
    for i, step in enumerate(steps):
        own = _object(f"{where}[{i}]", step)
        _one_of(f"{where}[{i}].type", own.get("type"), types)
        if own["type"] == "Precompiled" and len(str(own.get("precompiled_charsmap"))) > MAX_CHARSMAP:
            raise ValueError(f"{where}[{i}].precompiled_charsmap has more than {MAX_CHARSMAP:,} characters")
        if "pattern" in own:
            _check_pattern(f"{where}[{i}]", own)


def _check_pattern(where: str, step: Mapping[str, Any]) -> None:
    """Raises: ValueError unless a step looks for a pattern that takes time in proportion to the text."""
    pattern = _object(f"{where}.pattern", step["pattern"])
    _one_of(f"{where}.pattern.Regex", pattern.get("Regex"), PATTERNS)
    content = step.get("content", "")
    if not isinstance(content, str) or len(content) > 1:  # more would make the text longer at each step
        raise ValueError(f"{where}.content is {shown(content)}; allowed is a text of at most one character")


def _one_of(where: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{where} is {shown(value)}; allowed is {' or '.join(map(repr, allowed))}")


def _object(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}; allowed is an object")
    return cast("dict[str, Any]", value)


def _list(where: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {shown(value)}; allowed is a list")
    return cast("list[Any]", value)
