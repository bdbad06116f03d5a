"""The autoencoder of a request: the bundle's own, or a tiny one beside it.

    pipe("a red apple", vae="tiny")     sdopt export TAESD --onto BUNDLE --name tiny

Ref: github.com/madebyollin/taesd; diffusers, AutoencoderTiny.
"""

from __future__ import annotations

from sdopt.bundle.adapter import TINY_VAE, Adapter, adapter_names
from sdopt.bundle.files import Bundle
from sdopt.errors import BundleError, UsageError, choices, shown
from sdopt.request.named import OpenAdapter, of_kinds

VAE = "vae"


def autoencoder(name: str | None, bundle: Bundle, open_adapter: OpenAdapter) -> Adapter | None:
    """The tiny autoencoder of this name; None for the bundle's own.

    Raises: UsageError for a name that no tiny autoencoder of the bundle has; BundleError for one that is damaged or
    made for other latents.
    """
    if name is None:
        return None
    adapter = open_adapter(name) if name in adapter_names(bundle) else None
    if adapter is None or adapter.manifest.kind != TINY_VAE:
        what = "" if adapter is None else f": {name} is a {adapter.manifest.kind}"
        there = tuple(of_kinds((TINY_VAE,), bundle, open_adapter))
        known = f"there are {choices(name, there)}" if there else f"{bundle.path} has none"
        raise UsageError(
            f"{VAE} = {shown(name)}{what}; allowed are the names of tiny autoencoders of the bundle, and {known}. To "
            f"add one: sdopt export TAESD --onto {bundle.path} --name NAME",
            VAE,
        )
    own, latents = adapter.manifest.latents, bundle.manifest.latents
    assert own is not None  # a manifest of this kind has them
    if (own.channels, own.factor) != (latents.channels, latents.factor):
        raise BundleError(
            f"{adapter.path} is made for latents of {own.channels} channels and {own.factor} pixels, and those of "
            f"{bundle.path} have {latents.channels} and {latents.factor}. Delete it, or make it again: "
            f"sdopt export TAESD --onto {bundle.path} --name {name} --force"
        )
    return adapter
