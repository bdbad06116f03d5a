"""The T2I-Adapters of a request: which picture each sees, how strong it is, and in how many calls.

    features = sum over adapters of adapter_conditioning_scale * adapter(picture)      once, before the loop
    they are added in call k where k < int(calls * adapter_conditioning_factor)

Ref: Mou et al. 2023, arXiv:2302.08453; diffusers, StableDiffusionAdapterPipeline and StableDiffusionXLAdapterPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sdopt.bundle.adapter import T2I_ADAPTER, Adapter
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Float32
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError
from sdopt.image.masks import Overlay
from sdopt.request.seen import PICTURE, Seen, each_of, refuse_other_unet, seen
from sdopt.request.together import given_or

SCALE, FACTOR = KEYWORDS = ("adapter_conditioning_scale", "adapter_conditioning_factor")


@dataclass(frozen=True, eq=False)
class Feature:
    """One T2I-Adapter in a plan.

    `calls`: in so many calls, from the first on, it counts. `digest`: its files'.
    """

    name: str
    digest: str
    seen: Seen
    scale: float
    calls: int

    @property
    def picture(self) -> Float32:
        """[images, channels, height, width]; see `Seen`."""
        return self.seen.planes

    def described(self, image: int) -> dict[str, Any]:
        """What a PNG carries; see `Seen`."""
        return self.seen.described(self.name, self.digest, image)


def features(
    given: Mapping[str, Any],
    named: Mapping[str, tuple[Adapter, Any]],
    bundle: Bundle,
    size: tuple[int, int],
    images: int,
    calls: int,
    overlays: Sequence[Overlay],
) -> tuple[Feature, ...]:
    """The T2I-Adapters of a request, `named`, each with its picture. `size`: height and width in pixels.

    `overlays`: see `planes`.
    Raises: UsageError for keywords without an adapter, and sizes that it does not take; BundleError for one that is
    made for another UNet.
    """
    if not named:
        for name in KEYWORDS:
            if given[name] is not None:
                raise UsageError(f"{name} needs a T2I-Adapter: give {PICTURE}={{NAME: picture}}", name)
        return ()
    scales = each_of(given, SCALE, 1.0, len(named), "T2I-Adapters")
    last = int(calls * given_or(given[FACTOR], 1.0))
    made: list[Feature] = []
    for scale, (name, (adapter, pictures)) in zip(scales, named.items(), strict=True):
        _refuse_misfit(adapter, bundle, size)
        channels = cast(int, adapter.component(T2I_ADAPTER).inputs[0].shape[1])
        own = seen(given, pictures, overlays, size, images, channels)
        made.append(Feature(name, adapter.digest, own, scale, last))
    return tuple(made)


def _refuse_misfit(adapter: Adapter, bundle: Bundle, size: tuple[int, int]) -> None:
    """Raises: BundleError if the UNet does not take its features; UsageError if it does not take this size."""
    refuse_other_unet(adapter, bundle)
    assert adapter.manifest.features is not None  # a manifest of this kind has them
    multiple = adapter.manifest.features.multiple
    for keyword, length in zip(("height", "width"), size, strict=True):
        if length % multiple:
            near = max(multiple, length // multiple * multiple)
            raise UsageError(
                f"{keyword} = {length}: {adapter.name} takes multiples of {multiple} pixels; give {near} or "
                f"{near + multiple}",
                keyword,
            )
