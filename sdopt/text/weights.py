"""Prompts as AUTOMATIC1111 writes them: weights in brackets, and more tokens than the text encoder reads at once.

    a (red:1.3) apple     red weighs 1.3        (word) 1.1, ((word)) 1.21        [word] 1 / 1.1        \\( a bracket

    BREAK   the words behind it begin a new chunk

What AUTOMATIC1111 does with AND, [from:to:when] and [one|other] is refused: they need another prompt in each step.

A prompt of more tokens than one call takes is cut into chunks, each begun and ended like a prompt of its own; their
embeddings stand one after another. Chunks are filled to the last token, as compel fills them. A token's embedding is
multiplied by its weight, and the chunk is then scaled back to the mean that it had.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sdopt.bundle.specs import Array, Float32
from sdopt.errors import UsageError
from sdopt.request.kinds import MAX_PROMPT_BYTES
from sdopt.text.tokenizer import Tokenizer

MAX_WEIGHT = 1e6
ROUND, SQUARE = 1.1, 1 / 1.1
TOKEN = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*([)\]])|[()\[\]]|[^\\()\[\]:]+|[:\\]")
BREAK = re.compile(r"\bBREAK\b")
AND = re.compile(r"\bAND\b")
Piece = tuple[str, float]


class Chunks(NamedTuple):
    """The chunks of a prompt: `ids` int32 and `weights` float32, each [chunks, max_length].

    `ends`, [chunks] int32, has the position of each chunk's end token. What follows it is padding.
    """

    ids: Array
    weights: Float32
    ends: Array


def parse(prompt: str, name: str = "prompt") -> list[Piece]:
    """The prompt as (text, weight) pieces; a bracket that is never closed counts as closed at the end.

    The time that it takes grows with the length of the prompt alone, however deep its brackets are.
    Raises: UsageError for a prompt over 8 KiB, a weight beyond a million, and syntax that needs another prompt in each
    step; `name` is the keyword that the prompt was given as.
    """
    size = len(prompt.encode("utf-8", "replace"))
    if size > MAX_PROMPT_BYTES:
        raise UsageError(f"{name}: {size} bytes; allowed are {MAX_PROMPT_BYTES}", name)
    if AND.search(prompt):
        raise UsageError(f'{name}: AND joins prompts in AUTOMATIC1111, which sdopt does not do; write "and"', name)
    if "<lora:" in prompt:
        raise UsageError(
            f"{name}: a prompt of Python names no files; use pipe.load_lora_weights(FILE) and pipe.set_adapters(name, "
            "0.8) instead of <lora:...>, or on the command line --lora-dir DIR",
            name,
        )
    texts: list[str] = []
    opened: list[_Bracket] = []
    closed: list[_Bracket] = []

    def close(factor: float) -> None:
        bracket = opened.pop()
        bracket.last, bracket.factor = len(texts), factor
        closed.append(bracket)

    for match in TOKEN.finditer(prompt):
        text, number, closer = match.group(0, 1, 2)
        inside = opened[-1] if opened else None
        if text in ("(", "["):
            opened.append(_Bracket(text, len(texts)))
        elif inside is not None and inside.opener == "[" and closer == "]":
            raise _needs_steps(name, "[from:to:when]")
        elif inside is not None and inside.opener == "(" and closer == ")":
            close(float(number))
        elif inside is not None and inside.opener == "(" and text == ")":
            close(ROUND)
        elif inside is not None and inside.opener == "[" and text == "]":
            if inside.alternates:
                raise _needs_steps(name, "[one|other]")
            close(SQUARE)
        else:
            if inside is not None and "|" in text:
                inside.alternates = True
            texts.append(text[1:] if len(text) == 2 and text[0] == "\\" else text)
    while opened:
        close(ROUND if opened[-1].opener == "(" else SQUARE)
    pieces = list(zip(texts, _weights(len(texts), closed), strict=True))
    for text, weight in pieces:
        if not abs(weight) <= MAX_WEIGHT:
            raise UsageError(
                f"{name}: the weight of {text[:40]!r} is {weight:.3g}; allowed are {-MAX_WEIGHT:,.0f} to "
                f"{MAX_WEIGHT:,.0f}, e.g. (word:1.3): take brackets away, or a smaller number",
                name,
            )
    return _joined(pieces)


@dataclass(eq=False)
class _Bracket:
    """A pair of brackets around the pieces `first` to `last`, whose weights it multiplies by `factor`."""

    opener: str
    first: int
    last: int = 0
    factor: float = 1.0
    alternates: bool = False


def _weights(count: int, brackets: Sequence[_Bracket]) -> list[float]:
    """The weight of each of `count` pieces: the product of the factors of all brackets around it."""
    opening: list[list[_Bracket]] = [[] for _ in range(count + 1)]
    for bracket in reversed(brackets):  # outer ones close after inner ones
        if bracket.last > bracket.first:
            opening[bracket.first].append(bracket)
    weights: list[float] = []
    around: list[tuple[int, float]] = []  # where each bracket ends, and the product of all factors down to it
    for i in range(count):
        while around and around[-1][0] <= i:
            around.pop()
        for bracket in opening[i]:
            around.append((bracket.last, bracket.factor * (around[-1][1] if around else 1.0)))
        weights.append(around[-1][1] if around else 1.0)
    return weights


def _needs_steps(name: str, syntax: str) -> UsageError:
    return UsageError(
        f"{name}: {syntax} changes the prompt from step to step in AUTOMATIC1111, which sdopt does not do; "
        r"write one prompt, or \[ and \] for brackets that are text",
        name,
    )


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of equal weight as one piece."""
    joined: list[Piece] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


def chunks(tokenizer: Tokenizer, prompt: str) -> Chunks:
    """The chunks of a prompt in AUTOMATIC1111's syntax: as many as its tokens need."""
    sections: list[list[tuple[int, float]]] = [[]]  # token ids and weights between BREAKs
    for text, weight in parse(prompt):
        for i, part in enumerate(BREAK.split(text)):
            if i:
                sections.append([])
            sections[-1] += [(token, weight) for token in tokenizer.fragment(part)]
    room = tokenizer.room
    cut = [section[i : i + room] for section in sections for i in range(0, max(len(section), 1), room)]
    rows = [tokenizer.framed([token for token, _ in chunk]) for chunk in cut]
    weight_rows = np.ones((len(rows), tokenizer.max_length), np.float32)
    for row, chunk in zip(weight_rows, cut, strict=True):
        row[1 : 1 + len(chunk)] = [weight for _, weight in chunk]
    return Chunks(np.stack(rows), weight_rows, _ends(map(len, cut)))


def single(tokenizer: Tokenizer, tokens: Sequence[int]) -> Chunks:
    """One chunk of at most max_length - 2 token ids, all of weight 1."""
    ids = tokenizer.framed(tokens)[None]
    return Chunks(ids, np.ones(ids.shape, np.float32), _ends([len(tokens)]))


def first(of_text: Chunks) -> Chunks:
    """The first chunk of a text alone."""
    return Chunks(*(array[:1] for array in of_text))


def sequence(tokenizer: Tokenizer, prompt: str, length: int, style: str) -> Chunks:
    """A prompt as one sequence of `length` tokens, as T5 reads it; what is longer is cut with a warning.

    With `style` "a1111" its tokens have the weights of their brackets, and BREAK is left out.
    """
    advice = f"max_sequence_length={tokenizer.max_length} reads {tokenizer.max_length} tokens"
    if length >= tokenizer.max_length:
        advice = "write a shorter prompt"
    if style != "a1111":
        tokens = tokenizer.cut(prompt, length, advice)
        weights = [1.0] * len(tokens)
    else:
        pieces = [(BREAK.sub(" ", text), weight) for text, weight in parse(prompt)]
        pairs = [(token, weight) for text, weight in pieces for token in tokenizer.fragment(text)]
        kept = pairs[: tokenizer.room_in(length)]
        tokens, weights = [token for token, _ in kept], [weight for _, weight in kept]
        if len(pairs) > len(tokens):
            warnings.warn(f"the prompt has {len(pairs)} tokens, the model reads {len(tokens)}. {advice}.", stacklevel=5)
    row = np.ones(length, np.float32)
    row[tokenizer.first : tokenizer.first + len(weights)] = weights
    return Chunks(tokenizer.framed(tokens, length)[None], row[None], _ends([len(tokens)]))


def _ends(lengths: Iterable[int]) -> Array:
    """The positions of the end tokens of chunks with so many tokens between the beginning and the end."""
    return np.array([length + 1 for length in lengths], np.int32)


def stacked(tokenizer: Tokenizer, cut: Sequence[Chunks], count: int) -> Chunks:
    """All chunks of several prompts, `count` of each: shorter prompts are filled up with empty chunks."""
    empty = single(tokenizer, [])
    filled = [part for chunks_of_one in cut for part in (chunks_of_one, *[empty] * (count - len(chunks_of_one.ids)))]
    return Chunks(*(np.concatenate(arrays) for arrays in zip(*filled, strict=True)))


def weighted(hidden: Float32, weights: Float32) -> Float32:
    """Embeddings [n, tokens, features] times weights [n, tokens]; each of the n then gets back its old mean."""
    if (weights == 1).all():
        return hidden
    scaled = hidden * weights[:, :, None]
    old_means = np.mean(hidden, (1, 2), keepdims=True)
    means = np.mean(scaled, (1, 2), keepdims=True)
    changes = (weights != 1).any(1)[:, None, None] & (means != 0)
    restored = scaled * (old_means / np.where(changes, means, 1))
    return np.where(changes, restored, hidden)
