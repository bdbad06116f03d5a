"""The kinds of values that are arrays or pictures; see `sdopt.request.kinds`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdopt.bundle.specs import Array
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
    """Pictures, one or one for each image that is made; `latents`: or the latents of pictures."""

    name: str
    latents: bool = False
    example: str = 'PIL.Image.open("photo.png")'

    def allowed(self) -> str:
        return "are PIL images and arrays [height, width, 3] in 0..1, or a list of them" + (
            ", or latents [images, channels, height, width]" if self.latents else ""
        )

    def read(self, value: Any) -> Any:
        from sdopt.image.pil import read_pictures

        return read_pictures(self.name, value, self.latents)

    def schema(self) -> Schema:
        return {"type": "picture"}

    def flag(self) -> dict[str, Any]:
        return {"type": Path}

    def from_flag(self, value: Any) -> Any:
        from sdopt.image.pil import open_image

        return open_image(value)
