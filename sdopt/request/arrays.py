"""The kinds of values that are arrays or pictures; see `sdopt.request.kinds`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdopt.bundle.specs import Array
from sdopt.dataclass import dataclass
from sdopt.request.kinds import Kind, Schema


@dataclass(frozen=True)
class Tensor(Kind):
    """A float32 array of finite numbers with these axes."""

    axes: tuple[str, ...]
    example: str = "np.asarray(..., np.float32)"

    def allowed(self) -> str:
        return f"are NumPy arrays of finite float32 [{', '.join(self.axes)}]"

    def read(self, value: Any) -> Array:
        if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
            raise ValueError
        array: Array = np.asarray(cast(Array, value))
        if array.dtype != np.float32 or array.ndim != len(self.axes) or not array.size:
            raise ValueError
        if not np.isfinite(array).all():
            raise ValueError("it has NaN or infinity")
        return array

    def schema(self) -> Schema:
        return {"type": "tensor", "dtype": "float32", "shape": list(self.axes)}


@dataclass(frozen=True)
class Picture(Kind):
    """Pictures, one or one for each image that is made; `latents`: or the latents of pictures; `mask`: masks."""

    name: str
    latents: bool = False
    mask: bool = False
    example: str = 'PIL.Image.open("photo.png")'

    def allowed(self) -> str:
        return "are PIL images and arrays [height, width, 3] in 0..1, or a list of them" + (
            ", or latents [images, channels, height, width]" if self.latents else ""
        )

    def read(self, value: Any) -> Any:
        from sdopt.image import masks, pil

        return masks.read(value) if self.mask else pil.read_pictures(self.name, value, self.latents)

    def schema(self) -> Schema:
        return {"type": "picture"}

    def flag(self) -> dict[str, Any]:
        return {"type": Path}

    def from_flag(self, value: Any) -> Any:
        from sdopt.image.pil import open_image

        return open_image(value)


@dataclass(frozen=True)
class PicturesByName(Kind):
    """Pictures as `Picture` has them, or several of these by name; read as a table, without a name under "".

    `several`: each entry is a list of pictures, which may be in a list of one as diffusers takes it: [[a, b]]. Without
    it, an entry may be a list of lists too: a union ControlNet's pictures, by mode and image.
    Each picture may be prepared then, or have masked pixels; see `sdopt.image.control`.
    """

    name: str
    several: bool = False
    example: str = '{"canny": PIL.Image.open("edges.png")}'

    def allowed(self) -> str:
        return f"{Picture(self.name).allowed()}, or {{name: these}}"

    def read(self, value: Any) -> dict[str, Any]:
        from sdopt.image import pil

        given = cast("Mapping[Any, Any]", value) if isinstance(value, Mapping) else {"": value}
        if not given or not all(isinstance(name, str) for name in given):
            raise ValueError
        if self.several:
            given = {name: _unpacked(pictures) for name, pictures in given.items()}
        table = {name: pil.read_pictures(self.name, pictures, read=self._item) for name, pictures in given.items()}
        if not self.several:
            return table
        return {name: pictures if isinstance(pictures, list) else [pictures] for name, pictures in table.items()}

    def _item(self, name: str, value: Any) -> Any:
        """A picture, or where lists may be nested a list of pictures."""
        from sdopt.image import control, pil

        if self.several:
            return pil.read_picture(name, value)
        nested = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 4
        return pil.read_pictures(name, value, read=control.read) if nested else control.read(name, value)

    def schema(self) -> Schema:
        return {"type": "picture", "named": True}

    def flag(self) -> dict[str, Any]:
        return {"action": "append"}


def _unpacked(pictures: Any) -> Any:
    """The list in a list of one list, else what was given."""
    if isinstance(pictures, (list, tuple)):
        several = cast("Sequence[Any]", pictures)
        if len(several) == 1 and isinstance(several[0], (list, tuple)):
            return cast(Any, several[0])
    return cast(Any, pictures)


@dataclass(frozen=True)
class EmbedsByName(Kind):
    """Float32 [rows, pictures, features] or [rows, pictures, tokens, features], alone, in a list of one, or by name."""

    example: str = '{"face": np.asarray(..., np.float32)}'

    def allowed(self) -> str:
        return (
            "are NumPy arrays of finite float32 [rows, pictures, features] or [rows, pictures, tokens, features], one "
            "in a list, or {name: these}"
        )

    def read(self, value: Any) -> dict[str, Array]:
        if isinstance(value, (list, tuple)):
            (value,) = cast("Sequence[Any]", value)
        given = cast("Mapping[Any, Any]", value) if isinstance(value, Mapping) else {"": value}
        if not given or not all(isinstance(name, str) for name in given):
            raise ValueError
        return {name: Tensor(("",) * (4 if np.ndim(array) == 4 else 3)).read(array) for name, array in given.items()}

    def schema(self) -> Schema:
        return {"type": "tensor", "dtype": "float32", "named": True}
