"""The VAE's two sides, and what its configuration says of latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sdopt.bundle.format import Latents
from sdopt.bundle.specs import TensorSpec
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


def decoder(checkpoint: Checkpoint) -> Part:
    config = checkpoint.config("vae")
    return Part(
        name="vae_decoder",
        module=VaeDecoder(checkpoint.load("vae")),
        inputs=(TensorSpec("latent_sample", "float32", ("batch", config["latent_channels"], *LATENT)),),
        outputs=(TensorSpec("sample", "float32", ("batch", config["out_channels"], "height", "width")),),
        sizes=LATENT_SIZES,
        unused=dict.fromkeys(("encoder.", "quant_conv."), "the encoder's"),
    )


def encoder(checkpoint: Checkpoint) -> Part:
    config = checkpoint.config("vae")
    pixels = factor(config)
    outputs = ("mean",) if is_tiny(config) else ("mean", "logvar")
    return Part(
        name="vae_encoder",
        module=VaeEncoder(checkpoint.load("vae")),
        inputs=(TensorSpec("sample", "float32", ("batch", config["in_channels"], "height", "width")),),
        outputs=tuple(TensorSpec(name, "float32", ("batch", config["latent_channels"], *LATENT)) for name in outputs),
        sizes=tuple(
            {"batch": s["batch"], "height": pixels * s["latent_height"], "width": pixels * s["latent_width"]}
            for s in LATENT_SIZES
        ),
        unused=dict.fromkeys(("decoder.", "post_quant_conv."), "the decoder's"),
    )


def is_tiny(config: Mapping[str, Any]) -> bool:
    """Whether a VAE's configuration is that of TAESD, which has no posterior. Ref: github.com/madebyollin/taesd."""
    return config.get("_class_name") == "AutoencoderTiny"


def factor(config: Mapping[str, Any]) -> int:
    """How many pixels a latent spans: each block of the VAE but the last halves the picture."""
    blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return 2 ** (len(blocks) - 1)


def latents(checkpoint: Checkpoint) -> Latents:
    """How the VAE's latents become the denoiser's, for the manifest; a factor for all channels, or one for each."""
    config = checkpoint.config("vae")
    scale = config.get("scaling_factor", 1.0 if is_tiny(config) else 0.18215)
    shift = config.get("shift_factor") or 0.0
    if config.get("latents_mean") and config.get("latents_std"):
        scale = tuple(scale / deviation for deviation in config["latents_std"])
        shift = tuple(config["latents_mean"])
    return Latents(config["latent_channels"], factor(config), scaling_factor=scale, shift_factor=shift)
