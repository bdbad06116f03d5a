"""From a prompt to the token ids of a CLIP text encoder, over the `tokenizers` library."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from sdopt.errors import BundleError, UsageError
from sdopt.specs import Array

MAX_PROMPT_BYTES = 8192


class Tokenizer:
    """A bundle's tokenizer: text in, `[len(prompts), max_length]` int32 ids out, begun, ended, cut and padded.

    Raises: BundleError if the file cannot be read; UsageError for a prompt over 8 KiB.
    """

    def __init__(self, path: Path, entry: Mapping[str, Any]) -> None:
        self.max_length: int = entry["max_length"]
        self.bos: int = entry["bos_token_id"]
        self.eos: int = entry["eos_token_id"]
        self.pad: int = entry["pad_token_id"]
        self._backend: Any = _guarded(f"{path} cannot be read", lambda: Backend.from_file(str(path)))
        self._backend.no_truncation()
        self._backend.no_padding()

    def __call__(self, prompts: Sequence[str]) -> Array:
        return np.stack([self._ids(prompt) for prompt in prompts])

    def _ids(self, prompt: str) -> Array:
        encoding = self._encoded(prompt)
        ids: list[int] = encoding.ids
        room = self.max_length - 2
        if len(ids) > room:
            kept = encoding.offsets[room - 1][1]
            warnings.warn(
                f"the prompt has {len(ids)} tokens, the model reads {room}; left out: {prompt[kept:].strip()!r}. "
                "prompt_style='a1111' reads all of it.",
                stacklevel=5,
            )
        return self.framed(ids[:room])

    def fragment(self, text: str) -> list[int]:
        """The ids of a piece of a prompt, neither begun nor ended."""
        return self._encoded(text).ids

    def framed(self, ids: Sequence[int]) -> Array:
        """`[max_length]` int32: the beginning, at most max_length - 2 ids, the end, and padding."""
        row = np.full(self.max_length, self.pad, np.int32)
        row[: len(ids) + 2] = [self.bos, *ids, self.eos]
        return row

    def _encoded(self, prompt: str) -> Any:
        if len(prompt.encode("utf-8", "replace")) > MAX_PROMPT_BYTES:
            raise UsageError(f"a prompt of {len(prompt)} characters; allowed are {MAX_PROMPT_BYTES} bytes")
        clean = prompt.encode("utf-8", "replace").decode()  # a lone surrogate is not text
        return _guarded(
            f"the tokenizer fails on {prompt[:40]!r}", lambda: self._backend.encode(clean, add_special_tokens=False)
        )


def _guarded(what: str, call: Any) -> Any:
    """`call()`, with a panic of the library (a BaseException) turned into a BundleError."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BundleError(f"{what}: {error}; export the bundle again") from error
