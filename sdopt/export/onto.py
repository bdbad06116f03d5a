"""Export a model beside a bundle: an adapter, such as a ControlNet, in `BUNDLE/adapters/NAME`.

    add_adapter("lllyasviel/sd-controlnet-canny", "sd15", "canny")
    add_adapter("madebyollin/taesd", "sd15", "tiny")
    add_adapter("h94/IP-Adapter/models/ip-adapter_sd15.safetensors", "sd15", "face")

The bundle stays as it is. What kind of adapter a folder is, its config.json says; of a file, its tensors do.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sdopt import __version__
from sdopt.bundle.adapter import (
    ADAPTERS,
    COMPONENTS,
    CONTROLLED,
    CONTROLNET,
    IP_ADAPTER,
    T2I_ADAPTER,
    TINY_VAE,
    UNION,
    AdapterManifest,
    check_name,
)
from sdopt.bundle.files import Bundle
from sdopt.bundle.format import UNET, ComponentEntry
from sdopt.bundle.write import check_target, new_folder, require_space, write_manifest
from sdopt.dataclass import dataclass
from sdopt.engine import choose_backend
from sdopt.engine.failures import foreign_in_words, of_caller
from sdopt.errors import BundleError, CheckpointError, UsageError, refuse_no_path, refuse_no_switch, shown
from sdopt.export import component, ip_adapter, parity
from sdopt.export.blocks import controlnet, controlnet_union, t2i_adapter, tiny_vae
from sdopt.export.checkpoint import MODEL, Checkpoint
from sdopt.export.component import Phases, Progress, Report
from sdopt.export.offline import offline as no_connection
from sdopt.export.one_model import open_model
from sdopt.export.part import Part
from sdopt.logs import logger

log = logger(__name__)


LESS_MEMORY = "An export needs about three times the model in float32: close other programs"


@dataclass(frozen=True)
class Kind:
    """One kind of adapter: its parts, each loaded when it is traced, and its own fields of the manifest."""

    name: str
    parts: Callable[[Any, Bundle], Iterator[Part]]
    described: Callable[[Any, Bundle], Mapping[str, Any]]


KINDS: Mapping[str, Kind] = {  # by the class that its config.json names
    "ControlNetModel": Kind(
        CONTROLNET, lambda c, bundle: iter([controlnet.part(c, bundle)]), lambda c, _: controlnet.described(c)
    ),
    "ControlNetUnionModel": Kind(UNION, controlnet_union.parts, lambda c, _: controlnet_union.described(c)),
    "T2IAdapter": Kind(
        T2I_ADAPTER, lambda c, bundle: iter([t2i_adapter.part(c, bundle)]), lambda c, _: t2i_adapter.described(c)
    ),
    "AutoencoderTiny": Kind(TINY_VAE, tiny_vae.parts, lambda c, _: tiny_vae.described(c)),
}
OF_FILES = Kind(IP_ADAPTER, ip_adapter.parts, ip_adapter.described)


def add_adapter(
    source: str | os.PathLike[str],
    onto: str | os.PathLike[str] | Bundle,
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    image_encoder: str | os.PathLike[str] | None = None,
    offline: bool = False,
    config: str | os.PathLike[str] | None = None,
    verify: bool = True,
    floor_db: float = parity.FLOOR_DB,
    force: bool = False,
    report: Report = log.info,
    progress: Progress | None = None,
) -> Path:
    """Export the model at `source` as the adapter `name` of the bundle `onto`. Returns the adapter's folder.

    `source`: a folder of diffusers with one model, its id on the hub, or one .safetensors file: of a ControlNet, of a
    Control-LoRA, which is merged with the bundle's UNet, of a tiny autoencoder, or of an IP-Adapter (see
    `sdopt.export.ip_adapter`).
    `config`: a folder with the config.json that a file of a ControlNet lacks; without it, that of the published model
    which the file's tensors are like. `image_encoder`: what an IP-Adapter sees with, if it is not the folder beside
    its file.
    `force` replaces an adapter of this name. The other options are those of `export`.
    Raises: as `export` does; CheckpointError too for a model that does not fit the bundle.
    """
    refuse_no_path("source", source)
    refuse_no_switch(offline=offline, verify=verify, force=force)
    check_name(name)
    bundle = onto if isinstance(onto, Bundle) else Bundle.open(onto)
    is_unet = bundle.manifest.denoiser == UNET
    if is_unet and CONTROLLED not in bundle.components:
        raise BundleError(
            f"{bundle.path} has no component {CONTROLLED}: an earlier sdopt has written it. Export it again: "
            f"`sdopt export CHECKPOINT -o {bundle.path} --force`"
        )
    target = check_target(bundle.path / ADAPTERS / name, force)
    choose_backend("ort")
    configured = None if config is None else os.fspath(config)
    opened = _open(
        os.fspath(source), image_encoder, configured, bundle, revision=revision, variant=variant, offline=offline
    )
    with (
        foreign_in_words(f"{source} is not exported", CheckpointError, LESS_MEMORY),
        no_connection(offline),
        new_folder(target, force=force) as folder,
        opened as checkpoint,
    ):
        require_space(folder.parent, checkpoint.nbytes)
        kind = KINDS[checkpoint.classes[MODEL].rpartition(".")[2]] if isinstance(checkpoint, Checkpoint) else OF_FILES
        if not is_unet and kind.name != TINY_VAE:
            raise CheckpointError(
                f"{source} is a {kind.name}: it steers a UNet, and {bundle.path} is {bundle.manifest.family}, whose "
                "transformer takes none; allowed is a tiny autoencoder"
            )
        phase = Phases(progress, len(COMPONENTS[kind.name]))
        phase("reading the weights")
        own = kind.described(checkpoint, bundle)
        opset, components = bundle.manifest.components[bundle.manifest.denoiser].opset, dict[str, ComponentEntry]()
        for part in kind.parts(checkpoint, bundle):
            if not components:
                report(component.HEADER)
            components |= component.write_part(
                part, folder, opset, floor_db if verify else None, of_caller(report), phase
            )
        libraries = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
        manifest = AdapterManifest(
            kind=kind.name,
            family=bundle.manifest.family,
            factor=bundle.factor,
            source={key: str(value) for key, value in checkpoint.provenance.items() if value is not None},
            versions={"sdopt": __version__, **libraries},
            components=components,
            verified=verify,
            files={},
            **own,
        )
        write_manifest(folder, manifest)
    return target


def _open(
    source: str, image_encoder: str | os.PathLike[str] | None, config: str | None, bundle: Bundle, **how: Any
) -> AbstractContextManager[Checkpoint | ip_adapter.IpAdapter]:
    """The model that `source` names. Raises: UsageError for an image encoder of what is no IP-Adapter."""
    if image_encoder is not None:
        refuse_no_path("image_encoder", image_encoder)
    path = Path(source).expanduser()
    if path.suffix == ".safetensors" and not path.exists() and not ip_adapter.ON_HUB.fullmatch(source):
        kinds = "a ControlNet, an IP-Adapter or a tiny autoencoder"
        raise CheckpointError(f"{source}: there is no such file; give the .safetensors file of {kinds}, or a folder")
    if ip_adapter.is_file(source):
        if config is not None:
            raise UsageError(
                f"config = {shown(config)}: {source} is an IP-Adapter, which needs none; leave it out", "config"
            )
        return ip_adapter.open_ip_adapter(source, None if image_encoder is None else os.fspath(image_encoder), **how)
    ip_adapter.refuse_folder(source)
    if image_encoder is not None:
        raise UsageError(
            f"image_encoder = {shown(image_encoder)}: {source} is no file of an IP-Adapter, and only these need one; "
            "leave it out",
            "image_encoder",
        )
    return open_model(source, KINDS, config=config, base=bundle, **how)
