"""A picture with masked pixels: float32 [height, width, 3] in 0..1, where all channels of a masked pixel are -1.

ControlNets for inpainting see such pictures. A picture of bytes cannot have these pixels.
Ref: diffusers, documentation of ControlNet for inpainting, `make_inpaint_condition`
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from sdopt.bundle.specs import Array, Float32
from sdopt.errors import UsageError
from sdopt.image import pil

MASKED = -1.0


def read(name: str, given: Any) -> Any:
    """One picture that a caller gave: as `pil.read_picture` has it, or one with masked pixels.

    Raises: UsageError for what is neither.
    """
    if not isinstance(given, np.ndarray) or isinstance(given, np.ma.MaskedArray) or given.dtype.kind != "f":
        return pil.read_picture(name, given)
    array: Array = np.asarray(cast("Array", given))
    if array.ndim != 3 or array.shape[2] != 3 or not array.size or not (array == MASKED).any():
        return pil.read_picture(name, array)
    masked = (array == MASKED).all(2)
    kept = array[~masked]
    if not ((kept >= 0) & (kept <= 1)).all():  # NaN is in no range
        return pil.read_picture(name, array)  # which refuses it
    if kept.size and (kept == 1).all():
        raise UsageError(
            f"{name}: an array of -1 and 1 alone. If -1 is black, give ({name} + 1) / 2; if it is a white picture with "
            "masked pixels, sdopt.control.inpaint(picture, mask)",
            name,
        )
    return array.astype(np.float32)


def is_masked(picture: Any) -> bool:
    """Whether a picture that was read has masked pixels."""
    return isinstance(picture, np.ndarray) and bool((cast("Array", picture) == MASKED).any())


def fitted(picture: Array, height: int, width: int) -> Float32:
    """A picture with masked pixels at another size, [3, height, width]: each pixel is the nearest one, as in diffusers.

    Ref: PyTorch, `interpolate` with the mode "nearest"
    """
    rows, columns = (_nearest(*pair) for pair in zip(picture.shape[:2], (height, width), strict=True))
    return np.ascontiguousarray(np.transpose(picture[rows][:, columns], (2, 0, 1)), np.float32)


def _nearest(there: int, wanted: int) -> Array:
    """For each of `wanted` places, which of `there` places it shows."""
    places = np.floor(np.arange(wanted, dtype=np.float32) * np.float32(there / wanted))
    return np.minimum(places, there - 1).astype(np.int64)
