"""From a prompt to the token ids of a text encoder, CLIP's or T5's, over the `tokenizers` library."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from sdopt.bundle.format import TokenizerEntry
from sdopt.bundle.specs import Array
from sdopt.errors import BundleError, UsageError
from sdopt.request.kinds import MAX_PROMPT_BYTES
from sdopt.text.tokenizer_file import read


class Tokenizer:
    """A bundle's tokenizer: text in, `[len(prompts), max_length]` int32 ids out, begun, ended, cut and padded.

    CLIP's begins a text with a token, T5's with the text. `first` is the place of a text's first id, `room` how many
    ids it may have.
    Raises: BundleError if the file cannot be read; UsageError for a prompt over 8 KiB.
    """

    def __init__(self, path: Path, entry: TokenizerEntry) -> None:
        self.max_length = entry.max_length
        self.bos = entry.bos_token_id
        self.eos = entry.eos_token_id
        self.pad = entry.pad_token_id
        self._begin = [] if self.bos is None else [self.bos]
        self.first = len(self._begin)
        self.room = self.max_length - self.first - 1
        self._backend: Any = _guarded(f"{path} cannot be read", lambda: Backend.from_str(read(path)))
        self._backend.no_truncation()
        self._backend.no_padding()
        self._first_row = entry.vocab_size  # ids from here on are rows of extra embeddings
        self._rows: dict[int, int] = {}  # the library's id of an added token -> ours
        self._words = self._several_vectors()

    def __call__(self, prompts: Sequence[str]) -> Array:
        return np.stack([self.framed(self.cut(prompt)) for prompt in prompts])

    def cut(
        self, prompt: str, length: int | None = None, advice: str = "prompt_style='a1111' reads all of it"
    ) -> list[int]:
        """The ids of a prompt that fit into `length` tokens, neither begun nor ended; by default into max_length.

        A warning quotes what is left out, and ends with `advice`.
        """
        prompt = self._spelt_out(prompt)
        encoding = self._encoded(prompt)
        ids = self._ours(encoding.ids)
        room = self.room_in(length)
        if len(ids) > room:
            kept = encoding.offsets[room - 1][1] if room else 0
            warnings.warn(
                f"the prompt has {len(ids)} tokens, the model reads {room}; left out: {prompt[kept:].strip()!r}. "
                f"{advice}.",
                stacklevel=5,
            )
        return ids[:room]

    def room_in(self, length: int | None = None) -> int:
        """How many ids of a text fit into so many tokens; by default into max_length."""
        return self.room if length is None else max(0, length - self.first - 1)

    def fragment(self, text: str) -> list[int]:
        """The ids of a piece of a prompt, neither begun nor ended."""
        return self._ours(self._encoded(self._spelt_out(text)).ids)

    def refuse_taken(self, token: str, count: int) -> None:
        """Raises UsageError if `token` of `count` vectors cannot be added: it is there already, or too long."""
        if count > self.room:
            raise UsageError(f"the embedding {token!r} has {count} vectors; a prompt has {self.room} tokens")
        for name in _names(token, max(count, 2)):
            if self._backend.token_to_id(name) is not None:
                raise UsageError(f"token {name!r} is a word that this model has already; choose another with token=...")

    def add(self, token: str, count: int) -> None:
        """Let `token` mean the next `count` rows of the extra embeddings, as diffusers names them."""
        self.refuse_taken(token, count)
        assert self._first_row is not None  # a bundle that takes extra embeddings has it
        names = _names(token, count)
        self._backend.add_tokens(names)
        for name in names:
            self._rows[self._backend.token_to_id(name)] = self._first_row + len(self._rows)
        self._words = self._several_vectors()

    def _several_vectors(self) -> dict[str, list[str]]:
        """The names of the vectors of every learnt word that has more than one: the checkpoint's, and those added."""
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        words: dict[str, list[str]] = {}
        for token in added:
            names = [token]
            while f"{token}_{len(names)}" in added:
                names.append(f"{token}_{len(names)}")
            if len(names) > 1:
                words[token] = names
        return words

    def has_row(self, number: int) -> bool:
        """Whether the text encoder has a row for an id of the checkpoint's tokenizer."""
        return self._first_row is None or number < self._first_row

    def _ours(self, ids: list[int]) -> list[int]:
        for i in ids:
            if i not in self._rows and not self.has_row(i):
                raise UsageError(
                    f"this model's text encoder has no row for the word {self._backend.id_to_token(i)!r}, which its "
                    "tokenizer has; leave the word out, or export a checkpoint that was saved with its embedding"
                )
        return [self._rows.get(i, i) for i in ids]

    def _spelt_out(self, prompt: str) -> str:
        """The prompt with `<token> <token>_1 ...` in place of every learnt word of several vectors.

        As in diffusers, a word whose spelling is not the token's, e.g. in capitals, is its first vector alone.
        """
        if not self._words:
            return prompt
        for token in dict.fromkeys(self._encoded(prompt).tokens):
            if token in self._words:
                prompt = prompt.replace(token, " ".join(self._words[token]))
        return prompt

    def framed(self, ids: Sequence[int], length: int | None = None) -> Array:
        """`[length]` int32: the beginning, the ids, the end, and padding; by default of max_length."""
        row = np.full(length or self.max_length, self.pad, np.int32)
        framed = [*self._begin, *ids, self.eos]
        row[: len(framed)] = framed
        return row

    def _encoded(self, prompt: str) -> Any:
        if len(prompt.encode("utf-8", "replace")) > MAX_PROMPT_BYTES:
            raise UsageError(f"a prompt of {len(prompt)} characters; allowed are {MAX_PROMPT_BYTES} bytes")
        clean = prompt.encode("utf-8", "replace").decode()  # a lone surrogate is not text
        return _guarded(
            f"the tokenizer fails on {prompt[:40]!r}", lambda: self._backend.encode(clean, add_special_tokens=False)
        )


def _names(token: str, count: int) -> list[str]:
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def _guarded(what: str, call: Any) -> Any:
    """`call()`, with a panic of the library (a BaseException) turned into a BundleError."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BundleError(f"{what}: {error}; export the bundle again") from error
