"""The autoencoder: pictures to latents and back, with the bundle's scaling, in tiles or one by one if asked for.

Ref: Rombach et al. 2022, arXiv:2112.10752, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdopt.bundle.specs import Float32
from sdopt.engine.finite import refuse_nan
from sdopt.engine.pool import EnginePool
from sdopt.image.tiling import decode_tiled, encode_tiled, sliced


class Vae:
    """The decoder and the encoder of the bundle of `pool`."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool, entry = pool, pool.bundle.manifest.latents
        self._channels, self._factor = entry.channels, entry.factor
        self._scale, self._shift = by_channel(entry.scaling_factor), by_channel(entry.shift_factor)

    def decode(self, latents: Float32, tile: int | None = None, one_by_one: bool = False) -> Float32:
        """Pictures [images, 3, height, width] in -1..1 of scaled latents [images, channels, h, w]."""
        scaled = latents / self._scale + self._shift
        run = sliced(self._decoded) if one_by_one else self._decoded
        return run(scaled) if tile is None else decode_tiled(run, scaled, tile, self._factor)

    def encode(
        self, images: Float32, tile: int | None = None, one_by_one: bool = False
    ) -> tuple[Float32, Float32 | None]:
        """Mean and, where the encoder gives one, standard deviation of the scaled latents of pictures in -1..1."""
        run = sliced(self._encoded) if one_by_one else self._encoded
        moments = run(images) if tile is None else encode_tiled(run, images, tile, self._factor)
        mean, logvar = np.split(moments, [self._channels], 1)
        mean = (mean - self._shift) * self._scale
        return mean, np.exp(logvar / 2) * self._scale if logvar.size else None

    def _decoded(self, latents: Float32) -> Float32:
        with self._pool.using("vae_decoder") as decoder:
            decoded: Float32 = decoder(latent_sample=latents)["sample"]
        refuse_nan(decoded, "vae_decoder")
        return decoded

    def _encoded(self, images: Float32) -> Float32:
        """Mean and log-variance of the latents of pictures, beside each other in the channels."""
        with self._pool.using("vae_encoder") as encoder:
            posterior: dict[str, Any] = encoder(sample=images)
        refuse_nan(posterior["mean"], "vae_encoder")
        return np.concatenate([posterior["mean"], *([posterior["logvar"]] if "logvar" in posterior else [])], 1)


def by_channel(value: float | Sequence[float]) -> Float32:
    """One number for all channels, or one for each, to be multiplied with latents [images, channels, h, w]."""
    return np.asarray(value, np.float32).reshape(-1, 1, 1)
