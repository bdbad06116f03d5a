"""What ControlNets and T2I-Adapters have in common in a request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from sdopt.bundle.adapter import COMPONENTS, CONTROLLED, Adapter
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Float32
from sdopt.dataclass import dataclass
from sdopt.errors import BundleError, UsageError
from sdopt.image import masked, masks, pil
from sdopt.image.control import Prepared
from sdopt.image.masks import Overlay
from sdopt.request.pictures import for_every_image
from sdopt.request.together import given_or

PICTURE = "control_image"


@dataclass(frozen=True, eq=False)
class Seen:
    """What an adapter sees: `planes` [images, channels, height, width] in 0..1, where masked pixels are -1.

    With several pictures for each image, as union ControlNets have them, [images, pictures, channels, height, width].
    `records`: of each image, how each of its pictures was prepared, or None; see `sdopt.image.control.Prepared`.
    """

    planes: Float32
    records: Sequence[Sequence[Mapping[str, Any] | None]]

    @staticmethod
    def stacked(parts: Sequence[Seen]) -> Seen:
        """Several pictures for each image, as one."""
        records = [[part.records[i][0] for part in parts] for i in range(len(parts[0].records))]
        return Seen(np.stack([part.planes for part in parts], axis=1), records)

    def described(self, name: str, digest: str, image: int) -> dict[str, Any]:
        """What a PNG carries: the name, the digest of its files, the SHA-256 of what it saw, and how that was made."""
        picture = hashlib.sha256(np.ascontiguousarray(self.planes[image]).tobytes()).hexdigest()
        records = [record and dict(record) for record in self.records[image]]
        prepared = {"prepared": records} if any(records) else {}
        return {"name": name, "digest": digest, "picture": picture, **prepared}


def seen(
    given: Mapping[str, Any],
    pictures: Any,
    overlays: Sequence[Overlay],
    size: tuple[int, int],
    images: int,
    channels: int,
) -> Seen:
    """What an adapter of so many channels sees for each image. With overlays, those of padding_mask_crop, the regions.

    Raises: UsageError for another number of pictures, for pictures of another size than the image where there are
    overlays, and for masked pixels that the adapter or the overlay cannot have.
    """
    own = pil.each(PICTURE, for_every_image(pictures, images, given["num_images_per_prompt"]), images)
    regions: Sequence[Overlay | None] = overlays or [None] * images
    planes = [_planes(one, region, size, channels) for one, region in zip(own, regions, strict=True)]
    return Seen(np.stack(planes), [[one.record if isinstance(one, Prepared) else None] for one in own])


def _planes(picture: Any, region: Overlay | None, size: tuple[int, int], channels: int) -> Float32:
    """One picture as an adapter sees it: [channels, height, width]."""
    made = picture if isinstance(picture, Prepared) else None
    has_mask = masked.is_masked(picture) if made is None else made.mask is not None
    if has_mask and channels != 3:
        raise UsageError(f"{PICTURE}: masked pixels for an adapter that sees shades of grey; give a picture", PICTURE)
    if made is not None and has_mask:
        return made.planes(*size, region)
    if has_mask:
        if region is not None:
            raise UsageError(
                f"{PICTURE}: an array with masked pixels is not cropped, as padding_mask_crop wants it; give "
                f"{PICTURE}=sdopt.control.inpaint(picture, mask)",
                PICTURE,
            )
        return masked.fitted(cast("Array", picture), *size)
    picture = picture if made is None else made.picture
    if region is not None:
        picture = masks.same_region(PICTURE, picture, region, *size)
    return pil.to_planes(picture, *size, 1, PICTURE, channels)[0]


def refuse_other_unet(adapter: Adapter, bundle: Bundle) -> None:
    """Raises: BundleError if the bundle's UNet does not take what an adapter gives."""
    component = COMPONENTS[adapter.manifest.kind][0]
    gives = {spec.name: spec.shape[1] for spec in adapter.component(component).outputs}
    takes = {spec.name: spec.shape[1:2] for spec in bundle.component(CONTROLLED).inputs}
    if any(takes.get(name) != (channels,) for name, channels in gives.items()):
        raise BundleError(
            f"{adapter.path} is made for another model: what it gives has {list(gives.values())} channels. Delete it, "
            f"or make it again: sdopt export {component.upper()} --onto {bundle.path} --name {adapter.name} --force"
        )


def each_of(given: Mapping[str, Any], keyword: str, default: float, count: int, what: str) -> Sequence[float]:
    """The value of a keyword for each of `count` adapters: one for all, or as many as there are. `what`: their kind.

    Raises: UsageError for another number of values.
    """
    value = given_or(given[keyword], default)
    if not isinstance(value, list):
        return [value] * count
    values = cast("list[float]", value)
    if len(values) != count:
        raise UsageError(f"{keyword}: {len(values)} numbers for {count} {what}; give one, or as many", keyword)
    return values
