"""Prompts as AUTOMATIC1111 writes them: weights in brackets, and more tokens than the text encoder reads at once.

    a (red:1.3) apple     red weighs 1.3        (word) 1.1, ((word)) 1.21        [word] 1 / 1.1        \\( a bracket

A prompt of more tokens than one call takes is cut into chunks, each begun and ended like a prompt of its own; their
embeddings stand one after another. Chunks are filled to the last token, as compel fills them. A token's embedding is
multiplied by its weight, and the chunk is then scaled back to the mean that it had.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sdopt.bundle.specs import Array, Float32
from sdopt.errors import UsageError
from sdopt.text.tokenizer import Tokenizer

MAX_WEIGHT = 1e6
ROUND, SQUARE = 1.1, 1 / 1.1
TOKEN = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|[:\\]")
Piece = tuple[str, float]
Chunks = tuple[Array, Float32]  # token ids and weights


def parse(prompt: str, name: str = "prompt") -> list[Piece]:
    """The prompt as (text, weight) pieces; a bracket that is never closed counts as closed at the end.

    Raises: UsageError for a weight beyond a million; `name` is the keyword that the prompt was given as.
    """
    pieces: list[Piece] = []
    opened: list[tuple[str, int]] = []  # bracket, and the first piece inside it

    def multiply(first: int, factor: float) -> None:
        pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]

    for match in TOKEN.finditer(prompt):
        text, weight = match[0], match[1]
        if text in ("(", "["):
            opened.append((text, len(pieces)))
        elif weight is not None and opened and opened[-1][0] == "(":
            multiply(opened.pop()[1], float(weight))
        elif text == ")" and opened and opened[-1][0] == "(":
            multiply(opened.pop()[1], ROUND)
        elif text == "]" and opened and opened[-1][0] == "[":
            multiply(opened.pop()[1], SQUARE)
        else:
            pieces.append((text[1:] if len(text) == 2 and text[0] == "\\" else text, 1.0))
    for bracket, first in opened:
        multiply(first, ROUND if bracket == "(" else SQUARE)
    for text, weight in pieces:
        if not abs(weight) <= MAX_WEIGHT:
            raise UsageError(
                f"{name}: the weight of {text[:40]!r} is {weight:.3g}; allowed are {-MAX_WEIGHT:,.0f} to "
                f"{MAX_WEIGHT:,.0f}, e.g. (word:1.3): take brackets away, or a smaller number",
                name,
            )
    return _joined(pieces)


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
    """(ids, weights) of a prompt, each [chunks, max_length]: int32 token ids and float32 weights."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse(prompt):
        piece_ids = tokenizer.fragment(text)
        ids += piece_ids
        weights += [weight] * len(piece_ids)
    room = tokenizer.max_length - 2
    starts = range(0, max(len(ids), 1), room)
    rows = [tokenizer.framed(ids[i : i + room]) for i in starts]
    weight_rows = np.ones((len(rows), tokenizer.max_length), np.float32)
    for row, i in zip(weight_rows, starts, strict=True):
        of_chunk = weights[i : i + room]
        row[1 : 1 + len(of_chunk)] = of_chunk
    return np.stack(rows), weight_rows


def stacked(tokenizer: Tokenizer, cut: Sequence[Chunks], count: int) -> Chunks:
    """(ids, weights), each [prompts, count, max_length]: shorter prompts are filled up with empty chunks."""
    empty = tokenizer.framed([])[None]
    plain = np.ones(empty.shape, np.float32)
    ids = np.stack([np.concatenate([i, *[empty] * (count - len(i))]) for i, _ in cut])
    weights = np.stack([np.concatenate([w, *[plain] * (count - len(w))]) for _, w in cut])
    return ids, weights


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
