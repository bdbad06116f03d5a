"""The affine map from latents to colours that previews need, fitted to the checkpoint's own VAE.

Its latents are those of the encoder for a fixed set of random pictures: a few colours spread smoothly, with hard edges
in some and a little noise in all. Pictures, not random latents: a VAE's latents cover a small part of the space, and
the map is best there. The target is what the decoder makes of them, each cell of factor x factor pixels averaged.
A quarter of the pictures is kept from the fit, and the figures in the manifest are measured on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sdopt.bundle.files import Component
from sdopt.bundle.format import Manifest, Preview
from sdopt.bundle.specs import Array, Float32
from sdopt.metrics import psnr

if TYPE_CHECKING:
    from sdopt.engine.ort import OrtEngine

PICTURES, EDGE = 16, 16  # how many, and latents a side
GRIDS = (2, 3, 5, 8)  # cells a side of the colours that are spread


def fit(folder: Path, manifest: Manifest) -> Preview | None:
    """`preview` of the manifest: the matrix [channels + 1, 3], its PSNR in dB and share of variance explained (R2).

    None for a VAE whose outputs are not finite, or that cannot encode.
    """
    if not {"vae_encoder", "vae_decoder"} <= set(manifest.components):
        return None
    entry = manifest.latents
    factor = entry.factor
    means: list[Float32] = []
    with _engine(folder, manifest, "vae_encoder") as encoder:
        channels = encoder.inputs[0].shape[1]
        if channels != 3:
            return None
        for picture in pictures(factor * EDGE):
            means.append(encoder(sample=picture * 2 - 1)["mean"])
    colours: list[Float32] = []
    with _engine(folder, manifest, "vae_decoder") as decoder:
        for mean in means:
            decoded = decoder(latent_sample=mean)["sample"]
            cells = decoded.reshape(1, 3, EDGE, factor, EDGE, factor)
            colours.append(np.clip(np.mean(cells, (3, 5)) / 2 + 0.5, 0, 1))
    scale, shift = (np.asarray(f, np.float32).reshape(-1, 1, 1) for f in (entry.scaling_factor, entry.shift_factor))
    scaled = (np.concatenate(means) - shift) * scale
    latents, wanted = _samples(scaled), _samples(np.concatenate(colours))
    if not (np.isfinite(latents).all() and np.isfinite(wanted).all()):
        return None
    return _fitted(np.concatenate([latents, np.ones((len(latents), 1))], 1), wanted)


def pictures(edge: int) -> list[Float32]:
    """The pictures of the fit, each [1, 3, edge, edge] in 0..1; the same on every machine."""
    rng = np.random.default_rng(0)
    found: list[Float32] = []
    for i in range(PICTURES):
        small = Image.fromarray(rng.integers(0, 256, (GRIDS[i % 4],) * 2 + (3,), np.uint8))
        how = Image.Resampling.NEAREST if i % 8 >= 6 else Image.Resampling.BICUBIC
        unit = np.asarray(small.resize((edge, edge), how), np.float32) / np.float32(255)
        unit = np.clip(unit + 0.02 * rng.standard_normal(unit.shape), 0, 1)
        found.append(np.ascontiguousarray(np.transpose(unit, (2, 0, 1))[None], np.float32))
    return found


def _fitted(latents: Array, wanted: Array) -> Preview:
    kept = EDGE * EDGE * (PICTURES * 3 // 4)
    matrix = np.linalg.lstsq(latents[:kept], wanted[:kept], rcond=None)[0]
    found, target = latents[kept:] @ matrix, wanted[kept:]
    spread = np.sum(np.square(target - np.mean(target, 0)))
    r2 = 1 - np.sum(np.square(found - target)) / spread if spread else 0.0
    rows = [[float(f"{value:.7g}") for value in row] for row in matrix.tolist()]
    return Preview(
        matrix=tuple((red, green, blue) for red, green, blue in rows),
        psnr_db=round(psnr(target, np.clip(found, 0, 1)), 1),
        r2=round(float(r2), 3),
    )


def _samples(maps: Array) -> Array:
    """[images, channels, h, w] as float64 rows of channels."""
    return np.transpose(maps, (0, 2, 3, 1)).reshape(-1, maps.shape[1]).astype(np.float64)


def _engine(folder: Path, manifest: Manifest, name: str) -> OrtEngine:
    from sdopt.engine.ort import OrtEngine  # the export side imports without ONNX Runtime

    entry = manifest.components[name]
    return OrtEngine(Component(name, folder / entry.graph, entry.inputs, entry.outputs))
