"""An adapter of a bundle: a ControlNet, say, in a folder of its own, which may be added and deleted at any time.

    BUNDLE/adapters/canny/
        manifest.json              what it is (`AdapterManifest`), with the size and SHA-256 of every file; written last
        controlnet.onnx            its graphs and their weights, as in a bundle
        controlnet.onnx.data

The bundle's own files and its digest stay as they are. An adapter is opened when it is used.
"""

# no `from __future__ import annotations`: `decode` reads annotations, and as text each would be compiled first

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from sdopt.bundle.decode import DecodeError, decode, encode, integer, one_of
from sdopt.bundle.disk import parse_json, read_plain
from sdopt.bundle.files import MANIFEST, MAX_MANIFEST_BYTES, Bundle, ModelFolder
from sdopt.bundle.format import FAMILIES, ComponentEntry, Count, Factor, File, FilePath, Latents, Positive
from sdopt.bundle.manifest import of_components
from sdopt.bundle.specs import Name
from sdopt.dataclass import dataclass
from sdopt.errors import BundleError, UsageError, choices, shown

ADAPTERS = "adapters"  # the folder in a bundle
ADAPTER_VERSION = 1
CONTROLNET, T2I_ADAPTER = "controlnet", "t2i_adapter"  # kinds of adapters, and their components
UNION, CONDITION = "controlnet_union", "control_condition"  # a ControlNet of several modes, and what sees its pictures
CONTROLLED = "unet_controlled"  # the component of a bundle that takes what they give
IP_ADAPTER, IMAGE_PROMPTED = "ip_adapter", "unet_ip_adapter"  # a kind of adapter, and the bundle's component for it
IMAGE_ENCODER, IMAGE_PROJECTION = "image_encoder", "image_projection"  # components of an IP-Adapter
TINY_VAE = "tiny_vae"  # a kind of adapter that takes the place of the bundle's own autoencoder
DECODER, ENCODER = "vae_decoder", "vae_encoder"  # its components, which have the names of the bundle's
COMPONENTS = {  # by the adapter's kind
    CONTROLNET: (CONTROLNET,),
    UNION: (CONTROLNET, CONDITION),
    T2I_ADAPTER: (T2I_ADAPTER,),
    IP_ADAPTER: (IMAGE_ENCODER, IMAGE_PROJECTION),
    TINY_VAE: (DECODER, ENCODER),
}
KINDS = tuple(COMPONENTS)
NETS = (CONTROLNET, UNION)  # kinds whose residuals are added in the UNet
NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Control:
    """What the loop must know of a ControlNet.

    `pooled`: its residuals are means over height and width, and it runs in guess mode whatever the caller says (the
    ControlNet of `shuffle`). `modes`: the kinds of pictures that a union ControlNet sees, by their numbers.
    """

    pooled: bool
    modes: tuple[Name, ...] = ()


@dataclass(frozen=True)
class Pixels:
    """How a picture becomes what an image encoder sees, as CLIPImageProcessor does it.

    It is resized so that its shorter side has `shortest_edge` pixels, or to the encoder's size where that is null; then
    the middle is cut out, and each channel of 0..1 becomes (x - mean) / std. `resample` is Pillow's number of a filter.
    """

    shortest_edge: Positive | None
    resample: Annotated[int, integer(0, 5)]
    mean: tuple[float, float, float]
    std: tuple[Factor, Factor, Factor]


@dataclass(frozen=True)
class ImagePrompt:
    """What a request must know of an IP-Adapter.

    `layers`: the names of the UNet's cross-attentions, in the order in which keys and values stand side by side.
    `patches`: its encoder gives the states of all patches, and the negative half of guidance sees zeros as pixels;
    else the encoder gives one vector, and the negative half has zeros in its place.
    """

    layers: tuple[Name, ...]
    patches: bool
    pixels: Pixels


@dataclass(frozen=True)
class Features:
    """What a request must know of a T2I-Adapter. `multiple`: what its picture's height and width are multiples of."""

    multiple: Annotated[int, integer(1, 1024)]


@dataclass(frozen=True, kw_only=True)
class AdapterManifest:
    """All of it. `files` is filled in when the manifest is written. `latents`: those of a tiny autoencoder."""

    adapter_version: Annotated[int, integer(ADAPTER_VERSION, ADAPTER_VERSION)] = ADAPTER_VERSION
    kind: Annotated[str, one_of(*KINDS)]
    family: Annotated[str, one_of(*FAMILIES)]
    factor: Annotated[int, integer(1, 1024)]
    source: Mapping[Name, str]
    versions: Mapping[Name, str]
    components: Mapping[Name, ComponentEntry]
    control: Control | None = None
    image_prompt: ImagePrompt | None = None
    features: Features | None = None
    latents: Latents | None = None
    verified: bool
    random_weights: Count | None = None
    files: Mapping[FilePath, File]


@dataclass(frozen=True)
class Adapter(ModelFolder):
    """An opened adapter: its folder and its manifest, both checked."""

    manifest: AdapterManifest

    @staticmethod
    def read_manifest(folder: Path) -> AdapterManifest:
        path = folder / MANIFEST
        try:
            return decode_adapter(parse_json(read_plain(path, MAX_MANIFEST_BYTES)))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} is not the manifest of an adapter: {error}. {_again(folder)}") from error

    @property
    def factor(self) -> int:
        return self.manifest.factor

    @property
    def name(self) -> str:
        return self.path.name

    def __repr__(self) -> str:
        size = sum(file.bytes for file in self.manifest.files.values())
        return f"<Adapter {self.path}: {self.manifest.kind}, {size / 1e6:.0f} MB>"


def decode_adapter(entry: Any) -> AdapterManifest:
    """The manifest that `entry` is, as json.loads gives it.

    Raises: DecodeError that names the first field that is wrong, and what is allowed.
    """
    manifest: AdapterManifest = decode(AdapterManifest, entry)
    for error in of_components(manifest.components, manifest.files):
        raise error
    for name in COMPONENTS[manifest.kind]:
        if name not in manifest.components:
            raise DecodeError(f"components.{name} is missing; allowed is the component that the adapter runs")
    if manifest.kind in NETS and manifest.control is None:
        raise DecodeError(f"control is null; a {manifest.kind} has one")
    if manifest.control is not None and bool(manifest.control.modes) != (manifest.kind == UNION):
        raise DecodeError(f"control.modes has {len(manifest.control.modes)} names; only a {UNION} has some")
    if manifest.kind == IP_ADAPTER and manifest.image_prompt is None:
        raise DecodeError("image_prompt is null; an ip_adapter has one")
    if manifest.kind == T2I_ADAPTER and manifest.features is None:
        raise DecodeError("features is null; a t2i_adapter has them")
    if manifest.kind == TINY_VAE and manifest.latents is None:
        raise DecodeError("latents is null; a tiny_vae has them")
    return manifest


def to_json(manifest: AdapterManifest) -> dict[str, Any]:
    """The manifest as json.dumps takes it; what `decode_adapter` refuses is not written."""
    entry = cast("dict[str, Any]", encode(manifest))
    decode_adapter(entry)
    return entry


def adapter_names(bundle: Bundle) -> tuple[str, ...]:
    """The names of the adapters in a bundle's folder, in alphabetical order."""
    try:
        with os.scandir(bundle.path / ADAPTERS) as entries:
            return tuple(sorted(e.name for e in entries if NAMES.fullmatch(e.name) and e.is_dir(follow_symlinks=False)))
    except OSError:
        return ()


def adapter_component(adapter: str, component: str) -> str:
    """How the pool of a bundle's engines calls a component of an adapter: "adapters/canny/controlnet"."""
    return f"{ADAPTERS}/{adapter}/{component}"


def adapter_of(component: str) -> tuple[str, str] | None:
    """Adapter and component of "adapters/canny/controlnet"; None for a component of the bundle itself."""
    parts = component.split("/")
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == ADAPTERS else None


def located(bundle: Bundle, component: str) -> tuple[ModelFolder, str]:
    """The folder that has a component, which may be an adapter's, and the component's name there.

    Raises: UsageError for an adapter that there is not; BundleError for a damaged one.
    """
    own = adapter_of(component)
    return (bundle, component) if own is None else (open_adapter(bundle, own[0]), own[1])


def check_name(name: str) -> None:
    """Raises: UsageError for what no adapter can be called."""
    if not isinstance(name, str) or not NAMES.fullmatch(name):  # pyright: ignore[reportUnnecessaryIsInstance]
        text = f"name = {shown(name)}; allowed are up to 64 letters, digits, '-' and '_', e.g. name='canny'"
        raise UsageError(text, "name")


def open_adapter(bundle: Bundle, name: str) -> Adapter:
    """An adapter of a bundle, checked as the bundle was.

    Raises: UsageError for a name that there is not; BundleError for a damaged adapter, or one of another model.
    """
    there = adapter_names(bundle)
    if name not in there:
        known = f"there are {choices(name, there)}" if there else "it has none"
        raise UsageError(
            f"{bundle.path} has no adapter {shown(name)}; {known}. "
            f"To add one: sdopt export ADAPTER --onto {bundle.path} --name NAME"
        )
    adapter = Adapter.open(bundle.path / ADAPTERS / name, verify=bundle.verified, paranoid=bundle.paranoid)
    if adapter.manifest.family != bundle.manifest.family:
        raise BundleError(f"{adapter.path} is for {adapter.manifest.family}, this bundle is {bundle.manifest.family}")
    return adapter


def _again(folder: Path) -> str:
    return f"Copy it again, delete it, or make it again: sdopt export SOURCE --onto BUNDLE --name {folder.name} --force"
