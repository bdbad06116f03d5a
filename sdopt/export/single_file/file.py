"""One .safetensors file: the names, shapes and dtypes of its header, and its tensors one by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from sdopt.dataclass import dataclass
from sdopt.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SingleFile:
    """An opened file. Its header was read; no tensor was."""

    path: Path
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]  # as safetensors writes them: "F16"
    handle: Any

    @classmethod
    def open(cls, path: Path) -> SingleFile:
        """Raises: CheckpointError if it is not a safetensors file."""
        from safetensors import SafetensorError, safe_open

        try:
            handle = cast(Any, safe_open)(path, "pt")
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
        return cls(path, shapes, dtypes, handle)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of this name, read from the file."""
        return self.handle.get_tensor(name)

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """The rows first..end-1 of a tensor. Only these are read."""
        return self.handle.get_slice(name)[first:end]

    def has(self, prefix: str) -> bool:
        """Whether a name begins with `prefix`."""
        return any(name.startswith(prefix) for name in self.shapes)
