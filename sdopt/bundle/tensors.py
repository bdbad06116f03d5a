"""Tensors of a safetensors file that a user brings: checked by the library, read as float32.

The whole file is read into memory at once, so nothing changes under a reader, and no byte past the file's own header
is believed.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdopt.bundle.disk import parse_json
from sdopt.bundle.specs import Array, Float32
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, refuse_no_path, shown

STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
          "I8": "i1", "U8": "u1", "BOOL": "?"}  # fmt: skip
MAX_NAME = 1000  # characters of a tensor's name, which errors repeat
PICKLES = (b"PK", b"\x80\x02", b"\x80\x04")


@dataclass(frozen=True)
class Stored:
    """One tensor: its type as the file names it, its shape, and where its numbers are."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def float32(self) -> Float32:
        """Its numbers. Raises: ValueError for a type that is not read, e.g. F8_E4M3."""
        if self.dtype not in STORED:
            raise ValueError(f"its numbers are {self.dtype}; read are {', '.join(STORED)}")
        array: Array = np.frombuffer(self.data, np.dtype(STORED[self.dtype])).reshape(self.shape)
        if self.dtype == "BF16":  # its bits are the upper half of a float32's
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)


@dataclass(frozen=True)
class TensorFile:
    """A file in memory. `sha256` is that of the file, `data_sha256` that of all behind its header."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, Stored]
    sha256: str
    data_sha256: str


def read_tensor_file(path: str | os.PathLike[str], max_bytes: int, what: str) -> TensorFile:
    """The tensors of the file at `path`, which is to be `what`, e.g. "a LoRA".

    Raises: UsageError if the file is missing, larger than `max_bytes`, a pickle, or not a sound safetensors file.
    """
    refuse_no_path("path", path)
    path = Path(path)
    try:
        if not path.is_file():
            raise UsageError(f"{path}: {'this is not a plain file' if path.exists() else 'there is no such file'}")
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > max_bytes:
                raise UsageError(
                    f"{path} has {size:,} bytes; {what} has up to {max_bytes:,}. Is it another kind of file?"
                )
            content = stream.read(size)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if path.suffix.lower() != ".safetensors" or content.startswith(PICKLES):
        raise UsageError(
            f"{path}: only .safetensors files are read; a pickle (.pt, .bin, .ckpt) can run code when it is opened. "
            "Convert it where you trust it: load it with torch.load(FILE, weights_only=True), and write the tensors "
            "with safetensors.torch.save_file"
        )
    if content.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a pointer of Git LFS and not the file itself; fetch it: git lfs pull")
    try:
        metadata, tensors = _parsed(content)
    except ValueError as error:
        raise UsageError(f"{path} is not a sound safetensors file: {str(error)[:300]}") from error
    behind_header = memoryview(content)[8 + struct.unpack_from("<Q", content)[0] :]
    sha256 = (hashlib.sha256(data).hexdigest() for data in (content, behind_header))
    return TensorFile(path, metadata, tensors, *sha256)


def _parsed(content: bytes) -> tuple[dict[str, str], dict[str, Stored]]:
    """The metadata and the tensors.

    Raises: ValueError for what the library refuses, and for a name that stands twice, or is longer than any model's.
    """
    import safetensors  # late: most pictures need no file of tensors

    library = cast(Any, safetensors)  # it is not typed
    try:
        entries = library.deserialize(content)  # checks types, shapes and offsets against the file's length
    except library.SafetensorError as error:
        raise ValueError(str(error)) from error
    header: dict[str, Any] = parse_json(content[8 : 8 + struct.unpack_from("<Q", content)[0]])
    long = next((name for name in header if len(name) > MAX_NAME), None)
    if long is not None:
        raise ValueError(f"a name of {len(long)} characters, {shown(long)}; allowed are {MAX_NAME}")
    metadata = cast("dict[str, str]", header.get("__metadata__") or {})
    return metadata, {name: Stored(e["dtype"], tuple(e["shape"]), memoryview(e["data"])) for name, e in entries}
