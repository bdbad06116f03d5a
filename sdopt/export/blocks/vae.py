"""The VAE's two sides, and what its configuration says of latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from sdopt.bundle.format import Latents
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.part import Part

LATENT = ("latent_height", "latent_width")
# No power of two divides the sizes of the trace, so that upsampling follows the skip connection and one graph takes
# every size that diffusers takes. Its batch is 2, because a batch of 1 would be taken for a constant.
LATENT_SIZES = (
    {"batch": 2, "latent_height": 11, "latent_width": 13},
    {"batch": 1, "latent_height": 16, "latent_width": 24},
    {"batch": 3, "latent_height": 9, "latent_width": 8},
)
COMPONENTS = ("vae_decoder", "vae_encoder")
VAE = "vae"  # as a pipeline's folder calls the model


class VaeDecoder(torch.nn.Module):
    """Latents, already divided by the scaling factor, to a picture in -1..1."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latent_sample, return_dict=False)[0]


class VaeEncoder(torch.nn.Module):
    """A picture in -1..1 to the mean and log-variance of its posterior, so that the caller samples it.

    A tiny autoencoder has no posterior: its latents are the mean, and there is no log-variance.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoded = self.model.encode(sample, return_dict=False)[0]
        return (encoded,) if isinstance(encoded, torch.Tensor) else (encoded.mean, encoded.logvar)


def decoder(checkpoint: Checkpoint, component: str = VAE) -> Part:
    config = checkpoint.config(component)
    return Part(
        name="vae_decoder",
        module=VaeDecoder(checkpoint.load(component)),
        inputs=(TensorSpec("latent_sample", "float32", ("batch", config["latent_channels"], *LATENT)),),
        outputs=(TensorSpec("sample", "float32", ("batch", config["out_channels"], "height", "width")),),
        sizes=LATENT_SIZES,
        unused=dict.fromkeys(("encoder.", "quant_conv."), "the encoder's"),
    )


def encoder(checkpoint: Checkpoint, component: str = VAE) -> Part:
    config = checkpoint.config(component)
    pixels = factor(config)
    outputs = ("mean",) if is_tiny(config) else ("mean", "logvar")
    return Part(
        name="vae_encoder",
        module=VaeEncoder(checkpoint.load(component)),
        inputs=(TensorSpec("sample", "float32", ("batch", config["in_channels"], "height", "width")),),
        outputs=tuple(TensorSpec(name, "float32", ("batch", config["latent_channels"], *LATENT)) for name in outputs),
        sizes=tuple(
            {"batch": s["batch"], "height": pixels * s["latent_height"], "width": pixels * s["latent_width"]}
            for s in LATENT_SIZES
        ),
        unused=dict.fromkeys(("decoder.", "post_quant_conv."), "the decoder's"),
    )


def check(checkpoint: Checkpoint, component: str = VAE) -> None:
    """Raises: CheckpointError that names the key of a VAE whose pictures are no RGB pictures of its factor."""
    config, where = checkpoint.config(component), checkpoint.folder / component
    for key in ("in_channels", "out_channels"):
        if config[key] != 3:
            raise CheckpointError(f"{where}: {key} is {config[key]!r}; pictures have 3 channels")
    growth = config.get("upsampling_scaling_factor", 2)
    if growth != 2:
        raise CheckpointError(f"{where}: upsampling_scaling_factor is {growth!r}; what is exported has 2")


def is_tiny(config: Mapping[str, Any]) -> bool:
    """Whether a VAE's configuration is that of TAESD, which has no posterior. Ref: github.com/madebyollin/taesd."""
    return config.get("_class_name") == "AutoencoderTiny"


def factor(config: Mapping[str, Any]) -> int:
    """How many pixels a latent spans: each block of the VAE but the last halves the picture."""
    blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return 2 ** (len(blocks) - 1)


def latents(checkpoint: Checkpoint) -> Latents:
    """How the VAE's latents become the denoiser's, for the manifest; a factor for all channels, or one for each.

    Raises: CheckpointError for numbers by which latents cannot be scaled.
    """
    config, where = checkpoint.config("vae"), checkpoint.folder / "vae"
    channels: int = config["latent_channels"]
    scale = _scaling_factor(where, config)
    means, deviations = config.get("latents_mean"), config.get("latents_std")
    if means is None or deviations is None:  # one without the other is not read
        return Latents(channels, factor(config), scale, shift_factor=0.0)
    _require_numbers(where, "latents_mean", means, channels)
    _require_numbers(where, "latents_std", deviations, channels)
    if min(deviations) <= 0:
        raise CheckpointError(f"{where}: latents_std is {deviations}; its numbers must be above 0")
    scales = tuple(scale / deviation for deviation in deviations)
    return Latents(channels, factor(config), scales, shift_factor=tuple(map(float, means)))


def scaled_latents(checkpoint: Checkpoint, component: str = VAE) -> Latents:
    """The same for pipelines that read the scaling factor alone, as those of Stable Diffusion 1 and 2 do."""
    config = checkpoint.config(component)
    scale = _scaling_factor(checkpoint.folder / component, config)
    return Latents(config["latent_channels"], factor(config), scale, shift_factor=0.0)


def _scaling_factor(where: Path, config: Mapping[str, Any]) -> float:
    """Raises: CheckpointError if it is no positive number."""
    scale = config.get("scaling_factor", 1.0 if is_tiny(config) else 0.18215)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale <= 0:
        raise CheckpointError(f"{where}: scaling_factor is {scale!r}; it must be a positive number")
    return float(scale)


def _require_numbers(where: Path, key: str, values: Any, count: int) -> None:
    """Raises: CheckpointError if `values` is not a list of `count` finite numbers."""
    listed = cast("Sequence[Any]", values) if isinstance(values, (list, tuple)) else ()
    numbers = [v for v in listed if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    if len(listed) != count or len(numbers) != count:
        raise CheckpointError(f"{where}: {key} is {values!r}; it must be a list of {count} finite numbers")
