"""Textual inversion: learnt words as rows of numbers, read from a file or given as arrays.

    {"<cat-toy>": [n, width]}                      as diffusers writes it; the key is the token
    {"emb_params": [n, width]}                     as AUTOMATIC1111 writes it; the token is the file's name
    {"clip_l": [n, width], "clip_g": [n, width]}   SDXL: rows for each of its two text encoders

Of n rows the first is the token itself, the others `<token>_1`, `<token>_2`, ...; a prompt needs only the token.
Only small safetensors files are read. Pickles, which can run code, are refused.
Ref: Gal et al. 2022, arXiv:2208.01618.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdopt.bundle.specs import Array, Float32
from sdopt.errors import UsageError

MAX_BYTES = 64 << 20
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bf16: its bits are the upper half of a float32's
PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # SDXL's names -> the bundle's
KNOWN = "known are one tensor named by its token, 'emb_params', or 'clip_l' and 'clip_g' for SDXL"


@dataclass(frozen=True)
class Embedding:
    """A token and its rows for each text encoder, `rows[component]` [n, width]; `digest` names them."""

    token: str
    rows: Mapping[str, Float32]

    @property
    def digest(self) -> str:
        """Ten hex digits that name the numbers, whatever the token is called."""
        numbers = (self.rows[name].tobytes() for name in sorted(self.rows))
        return hashlib.sha256(b"".join(numbers)).hexdigest()[:10]


def embedding(
    source: str | os.PathLike[str] | Array | Mapping[str, Array], token: str | None, widths: Mapping[str, int]
) -> Embedding:
    """The embedding in a file, an array [n, width], or arrays by the names that a file uses.

    `widths`: the features of a token, for each text encoder of the bundle.
    Raises: UsageError for a file that is not what it should be, a wrong width, or no token.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        own, arrays, where = path.stem, read_safetensors(path), str(path)
    else:
        given: Mapping[str, Any] = source if isinstance(source, Mapping) else {"emb_params": source}
        arrays = {key: np.asarray(value, np.float32) for key, value in given.items()}
        own, where = "", "the embedding"
    named, parts = _parts(arrays, widths, where)
    token = token or named or own
    if not token or token != token.strip():
        raise UsageError(f"{where}: token = {token!r}; give the word that prompts use for it, token='<cat-toy>'")
    return Embedding(token, {name: _rows(parts[name], widths[name], name, where) for name in widths})


def _parts(
    arrays: Mapping[str, Float32], widths: Mapping[str, int], where: str
) -> tuple[str | None, Mapping[str, Float32]]:
    """The token that a file names, and its array for each text encoder."""
    if arrays and set(arrays) <= set(PARTS):
        parts = {PARTS[key]: array for key, array in arrays.items()}
        if not set(widths) <= set(parts):
            raise UsageError(f"{where} is for {', '.join(arrays)}; this model has {_encoders(widths)}")
        return None, parts
    if len(arrays) != 1:
        raise UsageError(f"{where} holds {', '.join(sorted(arrays)[:8]) or 'nothing'}; {KNOWN}")
    key, array = next(iter(arrays.items()))
    if len(widths) != 1:
        raise UsageError(f"{where} is for one text encoder; this model has {_encoders(widths)}: clip_l and clip_g")
    return None if key == "emb_params" else key, {next(iter(widths)): array}


def _encoders(widths: Mapping[str, int]) -> str:
    return " and ".join(f"{name} [n, {width}]" for name, width in widths.items())


def _rows(array: Float32, width: int, name: str, where: str) -> Float32:
    rows = np.atleast_2d(array)
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
        raise UsageError(
            f"{where}: rows {list(array.shape)}; this model's {name} takes [n, {width}]. It was made for another model."
        )
    if not np.isfinite(rows).all():
        raise UsageError(f"{where}: it has NaN or infinity, so it is damaged")
    return np.ascontiguousarray(rows, np.float32)


# ------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Float32]:
    """The float tensors of a small file, as float32.

    Raises: UsageError if it is missing, large, a pickle, or breaks any rule of the format.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UsageError(f"{path}: {size:,} bytes; an embedding has up to {MAX_BYTES:,}. Is it a model or a LoRA?")
    data = path.read_bytes()
    if path.suffix != ".safetensors" or data[:2] in (b"PK", b"\x80\x02"):
        raise UsageError(
            f"{path}: only .safetensors files are read; a pickle (.pt, .bin) can run code when it is opened. "
            "Convert it where you trust it: load it with torch.load(..., weights_only=True), take the tensor, and "
            "safetensors.torch.save_file({'<token>': tensor}, 'NEW.safetensors')"
        )
    import safetensors  # late: most prompts need no embedding

    library = cast(Any, safetensors)  # it is not typed
    try:
        return {name: _floats(name, entry) for name, entry in library.deserialize(data)}
    except (library.SafetensorError, ValueError) as error:
        raise UsageError(f"{path} is not a sound safetensors file: {error}") from error


def _floats(name: str, entry: Mapping[str, Any]) -> Float32:
    """A tensor as the library describes it: dtype, shape and bytes."""
    dtype = entry["dtype"]
    if dtype not in STORED:
        raise ValueError(f"{name} is {dtype}; read are {', '.join(STORED)}")
    shape: list[int] = entry["shape"]
    array = np.frombuffer(entry["data"], np.dtype(STORED[dtype])).reshape(shape)
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
