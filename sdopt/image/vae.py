"""The autoencoder: pictures to latents and back, with the bundle's scaling, in tiles or one by one if asked for.

Ref: Rombach et al. 2022, arXiv:2112.10752, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from sdopt.bundle.adapter import DECODER, ENCODER, adapter_component
from sdopt.bundle.format import Latents
from sdopt.bundle.specs import Float32
from sdopt.dataclass import dataclass
from sdopt.engine.finite import refuse_nan
from sdopt.engine.pool import EnginePool
from sdopt.errors import BundleError
from sdopt.image.tiling import decode_tiled, encode_tiled, sliced


@dataclass(frozen=True, eq=False)
class Coder:
    """One autoencoder: the pool's names of its two components, and how its latents become the UNet's."""

    decoder: str
    encoder: str
    scale: Float32
    shift: Float32

    @staticmethod
    def of(decoder: str, encoder: str, latents: Latents) -> Coder:
        return Coder(decoder, encoder, by_channel(latents.scaling_factor), by_channel(latents.shift_factor))


class Vae:
    """The autoencoder of the bundle of `pool`, and the tiny ones beside it by their names (`name`, below)."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool, entry = pool, pool.bundle.manifest.latents
        self._channels, self._factor = entry.channels, entry.factor
        self._own = Coder.of(DECODER, ENCODER, entry)

    def decode(
        self, latents: Float32, tile: int | None = None, one_by_one: bool = False, name: str | None = None
    ) -> Float32:
        """Pictures [images, 3, height, width] in -1..1 of scaled latents [images, channels, h, w]."""
        coder = self._coder(name)
        scaled, decoded = latents / coder.scale + coder.shift, partial(self._decoded, coder.decoder)
        run = sliced(decoded) if one_by_one else decoded
        return run(scaled) if tile is None else decode_tiled(run, scaled, tile, self._factor)

    def encode(
        self, images: Float32, tile: int | None = None, one_by_one: bool = False, name: str | None = None
    ) -> tuple[Float32, Float32 | None]:
        """Mean and, where the encoder gives one, standard deviation of the scaled latents of pictures in -1..1."""
        coder = self._coder(name)
        encoded = partial(self._encoded, coder.encoder)
        run = sliced(encoded) if one_by_one else encoded
        moments = run(images) if tile is None else encode_tiled(run, images, tile, self._factor)
        mean, logvar = np.split(moments, [self._channels], 1)
        mean = (mean - coder.shift) * coder.scale
        return mean, np.exp(logvar / 2) * coder.scale if logvar.size else None

    def refuse_unbuilt(self, name: str | None) -> None:
        """Raises: BackendError, before the loop, if this backend runs built engines alone and lacks a tiny decoder."""
        decoder = self._coder(name).decoder
        if name is not None and self._pool.runs_only_built and decoder not in self._pool.built:
            self._pool.open(decoder)

    def _coder(self, name: str | None) -> Coder:
        if name is None:
            return self._own
        latents = self._pool.adapter(name).manifest.latents
        assert latents is not None  # a request names nothing but tiny autoencoders, which have them
        return Coder.of(adapter_component(name, DECODER), adapter_component(name, ENCODER), latents)

    def _decoded(self, component: str, latents: Float32) -> Float32:
        with self._pool.using(component) as decoder:
            decoded: Float32 = decoder(latent_sample=latents)["sample"]
        refuse_nan(decoded, component)
        self._refuse_other_size(component, decoded, latents)
        return decoded

    def _encoded(self, component: str, images: Float32) -> Float32:
        """Mean and log-variance of the latents of pictures, beside each other in the channels."""
        with self._pool.using(component) as encoder:
            posterior: dict[str, Any] = encoder(sample=images)
        refuse_nan(posterior["mean"], component)
        self._refuse_other_size(component, images, posterior["mean"])
        return np.concatenate([posterior["mean"], *([posterior["logvar"]] if "logvar" in posterior else [])], 1)

    def _refuse_other_size(self, component: str, pictures: Float32, latents: Float32) -> None:
        """Raises: BundleError where pictures are not as many times larger than their latents as the manifest says."""
        (height, width), (rows, columns) = pictures.shape[2:], latents.shape[2:]
        if (height, width) != (rows * self._factor, columns * self._factor):
            raise BundleError(
                f"{self._pool.bundle.path}: {component} has pictures of {width}x{height} for latents of "
                f"{columns}x{rows}, and the manifest says latents.factor = {self._factor}; copy the bundle again, or "
                "export it again"
            )


def by_channel(value: float | Sequence[float]) -> Float32:
    """One number for all channels, or one for each, to be multiplied with latents [images, channels, h, w]."""
    return np.asarray(value, np.float32).reshape(-1, 1, 1)
