"""Textual inversion: learnt words as rows of numbers, from a file or from arrays.

    {"<cat-toy>": [n, width]}                      as diffusers writes it; the key is the token
    {"emb_params": [n, width]}                     as AUTOMATIC1111 writes it; the token is the file's name
    {"clip_l": [n, width], "clip_g": [n, width]}   SDXL: rows for each of its two text encoders

The first of the n rows belongs to the token itself, the others to `<token>_1`, `<token>_2` and so on. A prompt needs
only the token. Only small safetensors files are read. Pickles are refused, because they can run code.
Ref: Gal et al. 2022, arXiv:2208.01618.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdopt.bundle.specs import Array, Float32
from sdopt.bundle.tensors import read_tensor_file
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, refuse_no_path, refuse_other, shown

MAX_BYTES = 64 << 20
FLOATS = ("F32", "F16", "BF16")
SDXL_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # a file's names -> the bundle's
KNOWN_FORMS = "known are one tensor named by its token, 'emb_params', or 'clip_l' and 'clip_g' for SDXL"


@dataclass(frozen=True)
class Embedding:
    """A token and its rows: `rows[component]` is [n, width] for each text encoder."""

    token: str
    rows: Mapping[str, Float32]

    @property
    def size(self) -> tuple[int, int]:
        """How many rows it has for its first text encoder, and their width."""
        rows = next(iter(self.rows.values()))
        return int(rows.shape[0]), int(rows.shape[1])

    @property
    def digest(self) -> str:
        """Ten hex digits that depend on the numbers alone, and not on the token."""
        numbers = (self.rows[name].tobytes() for name in sorted(self.rows))
        return hashlib.sha256(b"".join(numbers)).hexdigest()[:10]


def embedding(
    source: str | os.PathLike[str] | Array | Mapping[str, Array], token: str | None, widths: Mapping[str, int]
) -> Embedding:
    """The embedding in a file, in an array [n, width], or in arrays by the names that a file uses.

    `token`: the word for it in prompts; if None, the file's own token or its name. `widths`: how many numbers a token
    has in each text encoder of the bundle.
    Raises: UsageError for a file that cannot be read, a wrong width, or no token.
    """
    if isinstance(source, (str, os.PathLike)):
        refuse_no_path("embedding", source)
        path = Path(source)
        file_name, arrays, where = path.stem, read_safetensors(path), str(path)
    else:
        named_arrays: Mapping[str, Any] = source if isinstance(source, Mapping) else {"emb_params": source}
        arrays = {_key(key): _numbers(value) for key, value in named_arrays.items()}
        file_name, where = "", "the embedding"
    stored_token, array_of_encoder = _by_encoder(arrays, widths, where)
    token = token or stored_token or file_name
    if not token or token != token.strip() or not token.isprintable():
        raise UsageError(f"{where}: token = {token!r}; give the word that prompts use for it, token='<cat-toy>'")
    rows = {name: _checked_rows(array_of_encoder[name], width, name, where) for name, width in widths.items()}
    return Embedding(token, rows)


def _key(name: Any) -> str:
    refuse_other("the name of an embedding's array", name, str, "are texts")
    return name


def _numbers(value: Any) -> Float32:
    """Rows as float32. Raises: UsageError for what is no array of numbers."""
    try:
        array = np.asarray(value)
        if isinstance(value, np.ma.MaskedArray) or array.dtype.kind not in "fiu":
            raise ValueError(f"an array of {array.dtype}")
        with np.errstate(over="ignore"):  # infinity is refused with its rows
            return array.astype(np.float32)
    except Exception as error:  # any object may be given, and may raise anything when it is looked at
        text = f"the embedding is {shown(value)}; allowed are a .safetensors file, and arrays of numbers [n, width]"
        raise UsageError(text) from error


def _by_encoder(
    arrays: Mapping[str, Float32], widths: Mapping[str, int], where: str
) -> tuple[str | None, Mapping[str, Float32]]:
    """The token that the arrays name, if any, and the array for each text encoder."""
    is_sdxl = bool(arrays) and set(arrays) <= set(SDXL_ENCODERS)
    if is_sdxl:
        array_of_encoder = {SDXL_ENCODERS[key]: array for key, array in arrays.items()}
        fits = set(widths) <= set(array_of_encoder)
        if not fits or (set(widths) == {"text_encoder"} and len(array_of_encoder) > 1):  # SDXL's refiner has the second
            raise UsageError(f"{where} is for {', '.join(arrays)}; this model has {_encoders_text(widths)}")
        return None, array_of_encoder
    if len(arrays) != 1:
        raise UsageError(f"{where} holds {', '.join(sorted(arrays)[:8]) or 'nothing'}; {KNOWN_FORMS}")
    [(key, array)] = arrays.items()
    if len(widths) != 1:
        raise UsageError(f"{where} is for one text encoder; this model has {_encoders_text(widths)}: clip_l and clip_g")
    [encoder] = widths
    return None if key == "emb_params" else key, {encoder: array}


def _encoders_text(widths: Mapping[str, int]) -> str:
    return " and ".join(f"{name} [n, {width}]" for name, width in widths.items())


def _checked_rows(array: Float32, width: int, encoder: str, where: str) -> Float32:
    """The array as rows [n, width]. Raises: UsageError for another shape, or for numbers that are not finite."""
    rows = np.atleast_2d(array)
    fits = rows.ndim == 2 and len(rows) > 0 and rows.shape[1] == width
    if not fits:
        raise UsageError(
            f"{where}: rows {list(array.shape)}; this model's {encoder} takes [n, {width}]. "
            "It was made for another model."
        )
    if not np.isfinite(rows).all():
        raise UsageError(f"{where}: it has NaN or infinity, so it is damaged")
    return np.ascontiguousarray(rows, np.float32)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Float32]:
    """The float tensors of a small file, as float32.

    Raises: UsageError if the file is missing, large, a pickle, or not a valid safetensors file, and for other tensors.
    """
    file = read_tensor_file(path, MAX_BYTES, "an embedding")
    for name, stored in file.tensors.items():
        if stored.dtype not in FLOATS:
            raise UsageError(f"{file.path}: {name} is {stored.dtype}; read are {', '.join(FLOATS)}")
    return {name: stored.float32() for name, stored in file.tensors.items()}
