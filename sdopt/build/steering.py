"""What adapters want built: which engines of a step, which engines beside it, and for which sizes.

--adapter canny    a ControlNet       unet_step.canny
--adapter depth    a T2I-Adapter      unet_step+t2i_adapter, adapters/depth/t2i_adapter
--adapter face     an IP-Adapter      unet_step+ip_adapter, adapters/face/image_encoder, .../image_projection
all three of them                     unet_step.canny+ip_adapter+t2i_adapter, and those beside it
--adapter tiny     a tiny autoencoder adapters/tiny/vae_decoder, adapters/tiny/vae_encoder
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from sdopt import graph
from sdopt.build.features import feature_levels
from sdopt.bundle.adapter import (
    COMPONENTS,
    CONTROLLED,
    CONTROLNET,
    IMAGE_PROJECTION,
    IMAGE_PROMPTED,
    IP_ADAPTER,
    T2I_ADAPTER,
    TINY_VAE,
    UNION,
    Adapter,
    adapter_component,
    adapter_names,
    open_adapter,
)
from sdopt.bundle.files import Bundle
from sdopt.bundle.joined import GIVING, PICTURES, Steering, divided
from sdopt.bundle.specs import Profile, Range
from sdopt.errors import UsageError, choices

GRAPHS = {CONTROLNET: CONTROLLED, T2I_ADAPTER: CONTROLLED, IP_ADAPTER: IMAGE_PROMPTED}  # of the UNet, by kind
_UNION = (
    "{name} is a union ControlNet, which is not joined with the UNet; it runs with ONNX Runtime and OpenVINO, without "
    "a build: sdopt generate --backend ort"
)
ADD = "sdopt export IP_ADAPTER --onto {bundle} --name NAME"


def steering_of(bundle: Bundle, names: Iterable[str]) -> Steering:
    """What these adapters of a bundle are to the engine of a step.

    Raises: UsageError for a name that the bundle does not have, and for a union ControlNet; BundleError for a damaged
    adapter.
    """
    kinds = {name: open_adapter(bundle, name).manifest.kind for name in names}
    for name in (name for name, kind in kinds.items() if kind == UNION):
        raise UsageError(_UNION.format(name=name))
    nets = sorted(name for name, kind in kinds.items() if kind == CONTROLNET)
    return Steering(tuple(nets), tuple(sorted({kind for kind in kinds.values() if kind in GIVING})))


def beside(bundle: Bundle, names: Iterable[str]) -> list[str]:
    """The components of these adapters that run before or after the loop, each in an engine of its own."""
    adapters = [open_adapter(bundle, name) for name in names]
    apart = [adapter for adapter in adapters if adapter.manifest.kind in (*GIVING, TINY_VAE)]
    return [adapter_component(one.name, own) for one in apart for own in COMPONENTS[one.manifest.kind]]


def autoencoders(bundle: Bundle, names: Iterable[str]) -> list[str]:
    """Those of these adapters that are tiny autoencoders, which steer no step."""
    return [name for name in names if open_adapter(bundle, name).manifest.kind == TINY_VAE]


def steered_graph(bundle: Bundle, steering: Steering) -> str:
    """The component whose graph of the UNet takes all of this.

    Raises: UsageError where the bundle lacks it, for a kind that there is not, and for a net that is no ControlNet.
    """
    for kind in steering.kinds:
        if kind not in GIVING:
            raise UsageError(
                f"+{kind}: an engine takes what adapters of a kind give; there are {choices(kind, GIVING)}"
            )
    for net in steering.nets:
        kind = open_adapter(bundle, net).manifest.kind
        if kind == UNION:
            raise UsageError(_UNION.format(name=net))
        if kind != CONTROLNET:
            text = f"{net} is no ControlNet, but a {kind}; its engine is called unet_step+{kind}"
            raise UsageError(f"{text}, or give --adapter {net}")
    name = IMAGE_PROMPTED if IP_ADAPTER in steering.kinds else CONTROLLED
    if name not in bundle.components:
        raise UsageError(
            f"{bundle.path} has no component {name}: an earlier sdopt has written it, or such adapters do not fit its "
            "UNet. Export the checkpoint again"
        )
    if IP_ADAPTER in steering.kinds and not _prompting(bundle):
        raise UsageError(f"+{IP_ADAPTER}: {bundle.path} has no IP-Adapter; add one: {ADD.format(bundle=bundle.path)}")
    return name


def steering_ranges(bundle: Bundle, steering: Steering, profile: Profile) -> dict[str, Range]:
    """The ranges of those dimensions of a step that its adapters bring. `profile`: completed, in pixels."""
    ranges: dict[str, Range] = {}
    if IP_ADAPTER in steering.kinds:
        adapters = _prompting(bundle)
        tokens = [cast(int, one.component(IMAGE_PROJECTION).outputs[0].shape[1]) for one in adapters]
        fewest, usual, most = profile.ranges.get("pictures", PICTURES)
        ranges["image_tokens"] = (fewest * min(tokens), usual * max(tokens), most * max(tokens))
        ranges["adapters"] = profile.ranges.get("adapters", (1, 1, len(adapters)))
    if T2I_ADAPTER in steering.kinds:
        model = graph.load(bundle.component(steered_graph(bundle, steering)).graph)
        for by in {2**level for level in feature_levels(model).values()}:
            for side in ("height", "width"):
                low, best, high = (-(-length // (bundle.factor * by)) for length in profile.ranges[side])
                ranges[divided(f"latent_{side}", by)] = (low, best, high)
    return ranges


def pictures_range(profile: Profile) -> Range:
    """How many rows the image encoder and the projection of an IP-Adapter take: with guidance two for each picture."""
    fewest, usual, most = profile.ranges.get("pictures", PICTURES)
    return fewest, 2 * usual, 2 * most


def _prompting(bundle: Bundle) -> Sequence[Adapter]:
    """The IP-Adapters of a bundle."""
    adapters = [open_adapter(bundle, name) for name in adapter_names(bundle)]
    return [one for one in adapters if one.manifest.kind == IP_ADAPTER]
