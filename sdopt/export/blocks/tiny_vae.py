"""TAESD: a tiny autoencoder for the latents of another one. It takes that one's place, as `pipe.vae` of diffusers does.

Ref: github.com/madebyollin/taesd; diffusers, AutoencoderTiny.
"""

from __future__ import annotations

from collections.abc import Iterator

from sdopt.bundle.files import Bundle
from sdopt.bundle.format import Latents
from sdopt.errors import CheckpointError
from sdopt.export.blocks import vae
from sdopt.export.checkpoint import MODEL, Checkpoint
from sdopt.export.part import Part

PUBLISHED = {4: "madebyollin/taesd, or madebyollin/taesdxl for SDXL", 16: "madebyollin/taesd3"}  # by their channels


def parts(checkpoint: Checkpoint, bundle: Bundle) -> Iterator[Part]:
    """Its decoder and its encoder, each loaded when it is its turn.

    Raises: CheckpointError if it is made for other latents than the bundle's.
    """
    vae.check(checkpoint, MODEL)
    own, latents = vae.scaled_latents(checkpoint, MODEL), bundle.manifest.latents
    for what, given, wanted in (
        ("channels", own.channels, latents.channels),
        ("pixels for each", own.factor, latents.factor),
    ):
        if given != wanted:
            raise CheckpointError(
                f"{checkpoint.folder}: its latents have {given} {what}, and those of {bundle.path} have {wanted}; it "
                f"is made for another model. Give one for {wanted} {what}"
                + (f": {PUBLISHED[wanted]}" if what == "channels" and wanted in PUBLISHED else "")
            )
    yield vae.decoder(checkpoint, MODEL)
    yield vae.encoder(checkpoint, MODEL)


def described(checkpoint: Checkpoint) -> dict[str, Latents]:
    """Its own fields of the manifest."""
    return {"latents": vae.scaled_latents(checkpoint, MODEL)}
