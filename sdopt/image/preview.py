"""A look at latents without the decoder: one colour for each, by a small affine map that the bundle carries.

    rgb = latents @ matrix[:-1] + matrix[-1]            matrix [channels + 1, 3], fitted to the model's own VAE

It takes microseconds, so every step of the loop can be shown; `sdopt.export.preview` fits it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Float32
from sdopt.errors import BundleError, UsageError, choices

OUTPUT_TYPES = ("pil", "np")


def pictures(bundle: Bundle, latents: Float32, scale: int = 1, output_type: str = "pil") -> Any:
    """Small pictures of latents: a pixel, or `scale` a side, for each of them.

    PIL images or, with output_type="np", uint8 [images, height, width, 3].
    Raises: BundleError for a bundle that has no map for it.
    """
    if output_type not in OUTPUT_TYPES:
        raise UsageError(f"output_type = {output_type!r}; allowed are {choices(output_type, OUTPUT_TYPES)}")
    colours = rgb(latents, matrix_of(bundle))
    return to_pil(colours, scale) if output_type == "pil" else colours.repeat(scale, 1).repeat(scale, 2)


def matrix_of(bundle: Bundle) -> Float32:
    """The map of a bundle, [channels + 1, 3].

    Raises: BundleError if it has none: no VAE encoder to fit it with, or one whose numbers overflow.
    """
    entry = bundle.manifest.preview
    if entry is None:
        raise BundleError(
            f"{bundle.path} has no previews; export it again, or decode the latents: pipe.decode(latents)"
        )
    return np.asarray(entry.matrix, np.float32)


def rgb(latents: Float32, matrix: Float32) -> Array:
    """The colours of latents [images, channels, h, w], uint8 [images, h, w, 3]."""
    unit: Float32 = np.transpose(latents, (0, 2, 3, 1)) @ matrix[:-1] + matrix[-1]
    return np.round(np.clip(unit, 0, 1) * 255).astype(np.uint8)


def to_pil(colours: Array, scale: int = 1) -> list[Image.Image]:
    """The colours as pictures, `scale` times as large."""
    found = [Image.fromarray(one) for one in colours]
    return [one.resize((one.width * scale, one.height * scale), Image.Resampling.BICUBIC) for one in found]
