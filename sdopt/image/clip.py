"""Pictures as CLIP's image encoders see them: resized, the middle cut out, each channel normalized.

As transformers' CLIPImageProcessor does it with Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from sdopt.bundle.adapter import Pixels
from sdopt.bundle.specs import Array, Float32
from sdopt.image.pil import converted, unit_shades


def pixel_values(name: str, pictures: Sequence[Any], side: int, how: Pixels) -> Float32:
    """Pictures, PIL or arrays, as [pictures, 3, side, side].

    Raises: UsageError for one that cannot be read; `name` is that of the keyword.
    """
    cut = np.stack([_cut(_resized(_as_rgb(name, one), side, how), side) for one in pictures])
    mean, std = (np.array(values, np.float32) for values in (how.mean, how.std))
    unit = cut.astype(np.float32) * np.float32(1 / 255)
    return np.ascontiguousarray(np.transpose((unit - mean) / std, (0, 3, 1, 2)), np.float32)


def _as_rgb(name: str, picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return converted(name, picture, "RGB")
    return Image.fromarray(np.round(unit_shades(name, picture) * 255).astype(np.uint8)).convert("RGB")


def _resized(picture: Image.Image, side: int, how: Pixels) -> Array:
    """[height, width, 3] in bytes; the shorter side has `shortest_edge` pixels, the longer one in proportion."""
    width, height = side, side
    if how.shortest_edge is not None:
        shorter, longer = sorted(picture.size)
        edge = how.shortest_edge
        other = max(1, int(edge * longer / shorter))
        width, height = (edge, other) if picture.width <= picture.height else (other, edge)
    return np.asarray(picture.resize((width, height), Image.Resampling(how.resample)))


def _cut(pixels: Array, side: int) -> Array:
    """The middle of a picture that is as large or larger."""
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]
