"""The image prompts of a request: which pictures each IP-Adapter sees, and how strong it is in each cross-attention.

Ref: Ye et al. 2023, arXiv:2308.06721; diffusers, IPAdapterMixin.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from sdopt.bundle.adapter import IMAGE_ENCODER, IMAGE_PROJECTION, IMAGE_PROMPTED, IP_ADAPTER, Adapter
from sdopt.bundle.adapter import ImagePrompt as Described
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Float32
from sdopt.dataclass import dataclass
from sdopt.errors import BundleError, UsageError, choices
from sdopt.image.clip import pixel_values
from sdopt.request.named import OpenAdapter, named

PICTURE, EMBEDS, SCALE = "ip_adapter_image", "ip_adapter_image_embeds", "ip_adapter_scale"
LAYER = re.compile(r"(down|up|mid)_blocks?(?:\.(\d+))?\.attentions\.(\d+)\.")
ADD = "sdopt export IP_ADAPTER --onto {bundle} --name {name}"


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """One IP-Adapter in a plan.

    `pixels` [pictures, 3, height, width]: what its image encoder sees; or `embeds` [rows, pictures, ...]: what the
    encoder gives, with guidance a row of the negative half first. `patches`: see `sdopt.bundle.adapter`.
    `scales`: one for each cross-attention. `digest`: its files'.
    """

    name: str
    digest: str
    patches: bool
    pixels: Float32 | None
    embeds: Float32 | None
    scales: Float32

    @property
    def pictures(self) -> int:
        """How many pictures it sees."""
        return len(self.pixels) if self.pixels is not None else cast(Float32, self.embeds).shape[1]

    def described(self) -> dict[str, Any]:
        """What a PNG carries: its name, the digest of its files, and the SHA-256 of each picture that it saw."""
        seen = self.pixels if self.pixels is not None else self.embeds
        assert seen is not None  # it has one of the two
        pictures = [hashlib.sha256(np.ascontiguousarray(one).tobytes()).hexdigest() for one in seen]
        return {"name": self.name, "digest": self.digest, "pictures": pictures}


def image_prompts(
    given: Mapping[str, Any], bundle: Bundle, open_adapter: OpenAdapter, guided: bool
) -> tuple[ImagePrompt, ...]:
    """The IP-Adapters of a request: those for which there is a picture.

    Raises: UsageError for keywords that do not fit together, a name that the bundle does not have, embeddings of
    another shape, and scales of other layers; BundleError for an adapter that is made for another model.
    """
    pictures, embeds = given[PICTURE], given[EMBEDS]
    if pictures is None and embeds is None:
        if given[SCALE] is not None:
            raise UsageError(f"{SCALE} needs {PICTURE}: give {PICTURE}=...", SCALE)
        return ()
    if pictures is not None and embeds is not None:
        raise UsageError(f"{PICTURE} and {EMBEDS}: give one of the two", EMBEDS)
    keyword, seen = (PICTURE, pictures) if embeds is None else (EMBEDS, embeds)
    seen = named(keyword, (IP_ADAPTER,), cast("Mapping[str, Any]", seen), bundle, open_adapter)
    made: list[ImagePrompt] = []
    for (name, one), scale in zip(seen.items(), _each(given[SCALE], len(seen)), strict=True):
        adapter = open_adapter(name)
        entry = _fitting(keyword, bundle, adapter)
        pixels = own = None
        if keyword == PICTURE:
            side = adapter.component(IMAGE_ENCODER).inputs[0].shape[-1]
            pixels = pixel_values(PICTURE, one, cast(int, side), entry.pixels)
        else:
            own = _checked(name, one, adapter, guided)
        scales = layer_scales(entry.layers, scale)
        made.append(ImagePrompt(name, adapter.digest, entry.patches, pixels, own, scales))
    return tuple(made)


def _each(scale: Any, count: int) -> list[Any]:
    """The scale of each adapter: one for all, or as many as there are."""
    if not isinstance(scale, list):
        return [1.0 if scale is None else scale] * count
    scales = cast("list[Any]", scale)
    if len(scales) != count:
        raise UsageError(f"{SCALE}: {len(scales)} scales for {count} IP-Adapters; give one, or as many", SCALE)
    return scales


def _fitting(keyword: str, bundle: Bundle, adapter: Adapter) -> Described:
    """What the adapter's manifest says of it.

    Raises: UsageError if it is no IP-Adapter; BundleError if it is made for another UNet.
    """
    entry = adapter.manifest.image_prompt
    if adapter.manifest.kind != IP_ADAPTER or entry is None:
        raise UsageError(f"{keyword}: {adapter.name} is no IP-Adapter, but a {adapter.manifest.kind}", keyword)
    inputs = bundle.component(IMAGE_PROMPTED).inputs if IMAGE_PROMPTED in bundle.components else ()
    takes = {spec.name: spec.shape[-1] for spec in inputs}
    gives = {spec.name: spec.shape[-1] for spec in adapter.component(IMAGE_PROJECTION).outputs}
    gives["image_scales"] = len(entry.layers)
    if any(takes.get(name) != length for name, length in gives.items()):
        raise BundleError(
            f"{adapter.path} is made for another model: it has {len(entry.layers)} layers, of {gives['image_keys']} "
            "features together. Delete it, or make it again: "
            f"{ADD.format(bundle=bundle.path, name=adapter.name)} --force"
        )
    return entry


def _checked(name: str, embeds: Array, adapter: Adapter, guided: bool) -> Float32:
    """Embeddings of the shape that the adapter reads. Raises: UsageError for others."""
    rows = 2 if guided else 1
    tail = adapter.component(IMAGE_PROJECTION).inputs[0].shape[1:]
    if len(embeds) != rows or embeds.shape[2:] != tail:
        wanted = ", ".join(map(str, (rows, "pictures", *tail)))
        halves = "with guidance, the row of the negative half first" if guided else "without guidance"
        raise UsageError(f"{EMBEDS}: {name} got {embeds.shape}; allowed are float32 [{wanted}] {halves}", EMBEDS)
    return embeds


def layer_scales(layers: Sequence[str], scale: Any) -> Float32:
    """The scale of each cross-attention, [layers], from one number, or from a table of blocks.

        {"down": 0.5, "mid": 1.0, "up": {"block_0": [0.0, 1.0, 0.0]}}

    Ref: diffusers, set_ip_adapter_scale. What a table leaves out has the scale 0.
    Raises: UsageError for a block that there is not, and for another number of scales than it has attentions.
    """
    if not isinstance(scale, dict):
        return np.full(len(layers), scale, np.float32)
    places = [_place(name) for name in layers]
    scales = np.zeros(len(layers), np.float32)
    for part, of_part in cast("dict[str, Any]", scale).items():
        blocks = {
            block: 1 + max(at for p, b, at in places if (p, b) == (part, block)) for p, block, _ in places if p == part
        }
        if not blocks:
            raise UsageError(f"{SCALE}: {part!r}: the UNet has no cross-attention there; leave it out", SCALE)
        table = cast("dict[str, Any]", of_part) if isinstance(of_part, dict) else dict.fromkeys(blocks, of_part)
        for block, given in table.items():
            if block not in blocks:
                text = f"{SCALE}: {part!r}: there is no {block!r} with cross-attentions; there are"
                raise UsageError(f"{text} {choices(block, blocks)}", SCALE)
            numbers = cast("list[float]", given) if isinstance(given, list) else [cast(float, given)]
            if len(numbers) not in (1, blocks[block]):
                where = part if block == part else f"{part}.{block}"
                raise UsageError(
                    f"{SCALE}: {len(numbers)} scales for {where}, which has {blocks[block]} attentions; give one, or "
                    "as many",
                    SCALE,
                )
            numbers = numbers * blocks[block] if len(numbers) == 1 else numbers
            for i, place in enumerate(places):
                if place[:2] == (part, block):
                    scales[i] = numbers[place[2]]
    return scales


def _place(layer: str) -> tuple[str, str, int]:
    """Part, block and attention of a layer: ("up", "block_1", 2); of the middle ("mid", "mid", 0)."""
    match = LAYER.match(layer)
    if match is None:
        raise BundleError(f"{layer} is no cross-attention of a UNet; add the IP-Adapter to the bundle again")
    part, block, attention = match.groups()
    return part, part if block is None else f"block_{block}", int(attention)
