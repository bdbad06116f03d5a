"""Example inputs for any component, made from the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sdopt.bundle.format import Manifest
from sdopt.bundle.specs import Array, TensorSpec
from sdopt.samplers.packed import SCALARS


def example(inputs: Sequence[TensorSpec], sizes: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Normal numbers, timesteps in the middle of the schedule, small token ids, the simplest row of a sampler."""
    rng, arrays = np.random.default_rng(seed), dict[str, Array]()
    for spec in inputs:
        shape = tuple(d if isinstance(d, int) else sizes[d] for d in spec.shape)
        if spec.dtype.startswith("int"):
            arrays[spec.name] = rng.integers(0, 50, shape).astype(spec.dtype)
        elif spec.name == "timestep":
            arrays[spec.name] = np.linspace(400.5, 700.0, num=shape[0], dtype=np.float32)
        elif spec.name == "row":
            arrays[spec.name] = np.tile(_plain_row(shape[-1]), (shape[0], 1))
        else:
            arrays[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return arrays


def _plain_row(width: int) -> Array:
    """The row whose next sample is the UNet's guided output; see `sdopt.samplers.packed`."""
    row = np.zeros(width, np.float32)
    for name, number in {"timestep": 500.5, "guidance": 1, "c_in": 1, "c_out": 1, "clean_o": 1}.items():
        row[SCALARS.index(name)] = number
    row[len(SCALARS) + 1] = 1  # update_kept: the next sample is what this call computes
    return row


def sizes_of(manifest: Manifest, latent: int, batch: int = 1) -> dict[str, int]:
    """The lengths of a bundle's named dimensions, for a square picture of `latent` x `latent` latents."""
    factor = manifest.latents.factor
    tokens = max(entry.max_length for entry in manifest.tokenizers.values())
    edges = {"latent_height": latent, "latent_width": latent, "height": latent * factor, "width": latent * factor}
    return {"batch": batch, "images": batch, "tokens": tokens, "extra_tokens": 1, **edges}
