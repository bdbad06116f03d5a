"""Pictures, masks and sizes of a request together, and what they are on a bundle: arrays at the size that is made.

Each function takes options that `checked` has read, as those of `sdopt.request.together` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from sdopt.bundle.format import Defaults, Latents
from sdopt.bundle.specs import Array, Float32
from sdopt.errors import UsageError
from sdopt.image import masks
from sdopt.image import pil as images
from sdopt.request.keywords import KEYWORDS
from sdopt.request.kinds import MAX_PIXELS, MAX_SIZE
from sdopt.request.together import each_times, given_or


def picture(options: Mapping[str, Any], defaults: Defaults) -> float:
    """The strength, after the picture, the mask and the keywords that need them were checked together."""
    image, mask, strength = options["image"], options["mask_image"], options["strength"]
    if image is None:
        for name in ("mask_image", "strength", "denoising_start"):
            if options[name] is not None:
                raise UsageError(f"{name} needs an image: give image=...", name)
    elif options["latents"] is not None:
        raise UsageError("image and latents: give one, a picture to begin from or the noise itself", "latents")
    for name in ("mask_blur", "padding_mask_crop"):
        if _is_given(name, options[name]) and mask is None:
            raise UsageError(f"{name} needs a mask: give mask_image=...", name)
    if image is None:
        return 1.0
    own = defaults.strength if mask is None else defaults.inpaint_strength
    return given_or(strength, own)


def _is_given(name: str, value: Any) -> bool:
    """Whether a keyword of masks has another value than its default; a padding of 0 pixels crops too."""
    return value is not None and value != KEYWORDS[name].default


def prepare_start(
    options: Mapping[str, Any], height: int, width: int, shape: tuple[int, ...], each: int
) -> dict[str, Any]:
    """The fields of a plan that describe a picture to begin from; `shape` is that of the latents.

    Raises: UsageError for pictures, masks and latents that do not fit together.
    """
    start: dict[str, Any] = {"image": None, "image_latents": None, "mask": None, "overlays": ()}
    image, mask = (for_every_image(options[name], shape[0], each) for name in ("image", "mask_image"))
    if image is None:
        return start
    if images.is_latents(image):
        for name in ("mask_blur", "padding_mask_crop"):
            if mask is not None and _is_given(name, options[name]):
                raise UsageError(f"{name}: image is latents; give the picture itself", name)
        start["image_latents"] = latents_of(image, shape, each)
        start["mask"] = None if mask is None else images.to_mask(mask, height, width, shape[0])
    elif mask is None:
        start["image"] = images.to_array(image, height, width, shape[0])
    else:
        blur, padding = options["mask_blur"], options["padding_mask_crop"]
        prepared = masks.prepare(image, mask, height, width, shape[0], blur, padding)
        start["image"], start["mask"], start["overlays"] = prepared
    if mask is not None:
        masks.refuse_vanished(mask, cast(Float32, start["mask"]), height // shape[2])
    return start


def for_every_image(given: Any, count: int, each: int) -> Any:
    """The given pictures; if there is one for each prompt, it is repeated for all images of that prompt."""
    if isinstance(given, list) and len(cast(list[Any], given)) * each == count:
        return list(each_times(cast(list[Any], given), each))
    return cast(Any, given)


def latents_of(image: Array, shape: tuple[int, ...], each: int) -> Array:
    """`image` as latents to begin from, one for each image."""
    prompts, count = shape[0] // each, shape[0]
    if len(image) not in (1, prompts, count) or image.shape[1:] != shape[1:]:
        raise UsageError(
            f"image: got latents {image.dtype} {image.shape}; allowed are finite float32 {shape}, as "
            "output_type='latent' gives them, or a picture [height, width, 3]",
            "image",
        )
    return np.repeat(image, shape[0] // len(image), 0)


def pixels(options: Mapping[str, Any], defaults: Defaults, latents: Latents) -> tuple[int, int]:
    """Height and width in pixels: as given, else from the image, else the bundle's.

    Latents, and pictures without a mask, give their own size, rounded down to what the model makes.
    """
    own, multiple = (defaults.height, defaults.width), latents.pixels
    most = latents.most * latents.factor or MAX_SIZE
    image = options["image"]
    _refuse_unlike(options)
    if image is not None and (options["mask_image"] is None or images.is_latents(image)):
        height, width = images.size_of(image, factor=latents.factor)
        own = (height // multiple * multiple, width // multiple * multiple)
        if None in (options["height"], options["width"]) and not all(multiple <= side <= most for side in own):
            raise UsageError(
                f"image is {width}x{height} pixels; allowed are {multiple} to {most} a side: give height= "
                "and width=, to which it is resized",
                "image",
            )
    height, width = given_or(options["height"], own[0]), given_or(options["width"], own[1])
    for name, size in (("height", height), ("width", width)):
        _check_size(name, size, multiple, min(most, MAX_SIZE))
    if height * width > MAX_PIXELS:
        raise UsageError(
            f"height = {height} and width = {width}: {height * width:,} pixels; allowed are {MAX_PIXELS:,} in all",
            "height",
        )
    return height, width


def _refuse_unlike(options: Mapping[str, Any]) -> None:
    """Raises: UsageError for pictures, or masks, of several sizes, unless the caller names the size that all get.

    With padding_mask_crop each picture keeps its own size.
    """
    if None not in (options["height"], options["width"]) or options["padding_mask_crop"] is not None:
        return
    for name in ("image", "mask_image"):
        given: Any = options[name]
        sizes = [images.size_of(one, name) for one in cast(list[Any], given)] if isinstance(given, list) else []
        for i, (height, width) in enumerate(sizes):
            if (height, width) != sizes[0]:
                raise UsageError(
                    f"{name}: number 0 is {sizes[0][1]}x{sizes[0][0]} pixels and number {i} {width}x{height}; give "
                    "pictures of one size, or one call for each, or height= and width=, to which all are resized",
                    name,
                )


def _check_size(name: str, size: int, factor: int, most: int) -> None:
    low, high = factor, most
    if not low <= size <= high:
        raise UsageError(f"{name} = {size}; allowed are whole numbers from {low} to {high}", name)
    if size % factor:
        near = size // factor * factor
        raise UsageError(
            f"{name} = {size}; this model makes multiples of {factor} pixels: {near} or {near + factor}", name
        )


def given_latents(options: Mapping[str, Any], shape: tuple[int, ...]) -> Array | None:
    """The noise to begin from, if it is given."""
    latents: Array | None = options["latents"]
    if latents is not None and latents.shape != shape:
        raise UsageError(
            f"latents: got {latents.dtype} {latents.shape}; these sizes and prompts take float32 {shape}", "latents"
        )
    return latents
