"""The affine map from latents to colours that previews need, fitted to the checkpoint's own VAE.

The latents of the fit are encoded from a fixed set of random pictures. These have a few colours, smooth or with hard
edges, and a little noise. Random latents would not do, because the latents of pictures cover a small part of the space,
and the map has to be best there. The colours of the fit are what the decoder makes of the latents, averaged over each
cell of factor x factor pixels. A quarter of the pictures is left out of the fit. The figures in the manifest are
measured on that quarter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sdopt.bundle.files import Component
from sdopt.bundle.format import Latents, Manifest, Preview
from sdopt.bundle.specs import Array, Float32
from sdopt.metrics import psnr

if TYPE_CHECKING:
    from sdopt.engine.ort import OrtEngine

PICTURES = 16
EDGE = 16  # latents a side of each picture
GRIDS = (2, 3, 5, 8)  # cells a side of the small picture that is enlarged


def fit(folder: Path, manifest: Manifest) -> Preview | None:
    """The `preview` entry of the manifest: the matrix [channels + 1, 3], its PSNR in dB, and its R2.

    None if the VAE cannot encode, does not take three channels, or has outputs that are not finite.
    """
    if not {"vae_encoder", "vae_decoder"} <= set(manifest.components):
        return None
    factor = manifest.latents.factor
    encoded: list[Float32] = []
    with _engine(folder, manifest, "vae_encoder") as encoder:
        if encoder.inputs[0].shape[1] != 3:
            return None
        for picture in pictures(factor * EDGE):
            encoded.append(encoder(sample=picture * 2 - 1)["mean"])
    averaged: list[Float32] = []
    with _engine(folder, manifest, "vae_decoder") as decoder:
        for mean in encoded:
            decoded = decoder(latent_sample=mean)["sample"]
            cells = decoded.reshape(1, 3, EDGE, factor, EDGE, factor)
            averaged.append(np.clip(np.mean(cells, (3, 5)) / 2 + 0.5, 0, 1))
    latents = _samples(_scaled(np.concatenate(encoded), manifest.latents))
    colours = _samples(np.concatenate(averaged))
    if not (np.isfinite(latents).all() and np.isfinite(colours).all()):
        return None
    with_constant = np.concatenate([latents, np.ones((len(latents), 1))], 1)
    return _fitted(with_constant, colours)


def pictures(edge: int) -> list[Float32]:
    """The pictures of the fit, each [1, 3, edge, edge] in 0..1; the same on every machine."""
    rng = np.random.default_rng(0)
    made: list[Float32] = []
    for i in range(PICTURES):
        cells = GRIDS[i % len(GRIDS)]
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        has_hard_edges = i % 8 >= 6
        filtering = Image.Resampling.NEAREST if has_hard_edges else Image.Resampling.BICUBIC
        unit = np.asarray(small.resize((edge, edge), filtering), np.float32) / np.float32(255)
        noisy = np.clip(unit + 0.02 * rng.standard_normal(unit.shape), 0, 1)
        made.append(np.ascontiguousarray(np.transpose(noisy, (2, 0, 1))[None], np.float32))
    return made


def _scaled(latents: Array, entry: Latents) -> Array:
    """The VAE's latents, scaled as the denoiser takes them."""
    scale = np.asarray(entry.scaling_factor, np.float32).reshape(-1, 1, 1)
    shift = np.asarray(entry.shift_factor, np.float32).reshape(-1, 1, 1)
    return (latents - shift) * scale


def _fitted(latents: Array, colours: Array) -> Preview:
    """Fit the map to the first three quarters of the pictures by least squares, and measure it on the last quarter."""
    split = EDGE * EDGE * (PICTURES * 3 // 4)
    matrix = np.linalg.lstsq(latents[:split], colours[:split], rcond=None)[0]
    predicted, target = latents[split:] @ matrix, colours[split:]
    spread = np.sum(np.square(target - np.mean(target, 0)))
    r2 = 1 - np.sum(np.square(predicted - target)) / spread if spread else 0.0
    rows = [[float(f"{value:.7g}") for value in row] for row in matrix.tolist()]
    return Preview(
        matrix=tuple((red, green, blue) for red, green, blue in rows),
        psnr_db=round(psnr(target, np.clip(predicted, 0, 1)), 1),
        r2=round(float(r2), 3),
    )


def _samples(maps: Array) -> Array:
    """[images, channels, h, w] as float64 rows of channels."""
    return np.transpose(maps, (0, 2, 3, 1)).reshape(-1, maps.shape[1]).astype(np.float64)


def _engine(folder: Path, manifest: Manifest, name: str) -> OrtEngine:
    from sdopt.engine.ort import OrtEngine  # the export side imports without ONNX Runtime

    entry = manifest.components[name]
    return OrtEngine(Component(name, folder / entry.graph, entry.inputs, entry.outputs))
