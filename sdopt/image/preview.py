"""Previews of latents without the decoder: one colour for each latent, by a small affine map in the bundle.

    rgb = latents @ matrix[:-1] + matrix[-1]            matrix [channels + 1, 3], fitted to the model's own VAE

A preview takes microseconds, so every step of the loop can be shown. `sdopt.export.preview` fits the matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Float32
from sdopt.errors import BundleError


def pictures(bundle: Bundle, latents: Float32, scale: int = 1, output_type: str = "pil") -> Any:
    """Small pictures of latents; every latent becomes `scale` x `scale` pixels.

    PIL images or, with output_type="np", uint8 [images, height, width, 3].
    Raises: BundleError for a bundle without a matrix.
    """
    colours = rgb(latents, matrix_of(bundle))
    if output_type == "pil":
        return to_pil(colours, scale)
    return colours.repeat(scale, 1).repeat(scale, 2)


def matrix_of(bundle: Bundle) -> Float32:
    """The matrix of a bundle, [channels + 1, 3].

    Raises: BundleError if it has none. It could not be fitted without a VAE encoder, or with one that overflows.
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
    height, width = colours.shape[1:3]
    size = (width * scale, height * scale)
    return [Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC) for picture in colours]
