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
        self.eos: int = entry["eos_token_id"]
        self.pad: int = entry["pad_token_id"]
        self._backend: Any = _guarded(f"{path} cannot be read", lambda: Backend.from_file(str(path)))
        self._backend.no_truncation()
        self._backend.no_padding()

    def __call__(self, prompts: Sequence[str]) -> Array:
        return np.stack([self._ids(prompt) for prompt in prompts])

    def _ids(self, prompt: str) -> Array:
        if len(prompt.encode("utf-8", "replace")) > MAX_PROMPT_BYTES:
            raise UsageError(f"a prompt of {len(prompt)} characters; allowed are {MAX_PROMPT_BYTES} bytes")
        clean = prompt.encode("utf-8", "replace").decode()  # a lone surrogate is not text
        encoding = _guarded(f"the tokenizer fails on {prompt[:40]!r}", lambda: self._backend.encode(clean))
        ids: list[int] = encoding.ids
        if len(ids) > self.max_length:
            kept = encoding.offsets[self.max_length - 2][1]
            warnings.warn(
                f"the prompt has {len(ids) - 2} tokens, the model reads {self.max_length - 2}; "
                f"left out: {prompt[kept:].strip()!r}",
                stacklevel=4,
            )
            ids = [*ids[: self.max_length - 1], self.eos]
        row = np.full(self.max_length, self.pad, np.int32)
        row[: len(ids)] = ids
        return row


def _guarded(what: str, call: Any) -> Any:
    """`call()`, with a panic of the library (a BaseException) turned into a BundleError."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BundleError(f"{what}: {error}; export the bundle again") from error
