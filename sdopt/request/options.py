"""The keywords of a request: what each may be, and what leaving it out means.

Every error says what was given and what is allowed.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

import numpy as np

from sdopt.bundle.files import Bundle
from sdopt.bundle.format import Defaults
from sdopt.bundle.specs import Array
from sdopt.errors import UsageError, choices
from sdopt.image import masks
from sdopt.image import pil as images

MAX_IMAGES = 64
Sizes = Mapping[str, tuple[float, ...]]
MAX_SIZE = 1 << 14  # pixels a side
MAX_BLUR = 1000  # pixels
PROMPT_STYLES = ("plain", "a1111")


class Options(TypedDict, total=False):
    """The keywords of `Pipeline.__call__` and `Pipeline.denoise`: diffusers' names, and what leaving one out means."""

    negative_prompt: str | Sequence[str] | None  # nothing to steer away from
    prompt_2: str | Sequence[str] | None  # for the second text encoder; the prompt
    negative_prompt_2: str | Sequence[str] | None
    original_size: tuple[int, int] | None  # SDXL's sizes, (height, width); the picture's
    crops_coords_top_left: tuple[int, int]  # (0, 0)
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None  # the same for the negative prompt; as above
    negative_crops_coords_top_left: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    aesthetic_score: float  # 6, for SDXL's refiner
    negative_aesthetic_score: float  # 2.5
    prompt_style: str  # "plain": as diffusers reads it; "a1111": (word:1.3), [word], and prompts of any length
    clip_skip: int | None  # 0; how many of the text encoder's last layers are left out
    vae_tile: int | None  # decode (and encode) in tiles of so many latents a side, in the memory of one
    vae_slice: bool  # False; decode (and encode) a batch image by image, in the memory of one
    image: Any  # what to begin from: PIL, or an array [height, width, 3] in 0..1; or one per image; or latents
    mask_image: Any  # of the same size, white where the picture is to be painted anew
    mask_blur: float | None  # 0; radius in pixels of the Gaussian that blurs the mask, as VaeImageProcessor.blur
    padding_mask_crop: int | None  # paint only the region around the mask, so many pixels wider, at full size
    strength: float | None  # how much of `image` is replaced: the bundle's own (0.8, with a mask 1)
    denoising_start: float | None  # go on from here, 0 to 1 of the way: `image` has noise already (SDXL's refiner)
    denoising_end: float | None  # stop here, for a refiner
    num_inference_steps: int | None  # the bundle's own
    guidance_scale: float | Sequence[float] | None  # the bundle's own; 1 or less runs without; or one per call
    guidance_interval: tuple[float, float] | None  # (0, 1); the part of the calls that is guided
    height: int | None  # pixels; the image's, or the bundle's own
    width: int | None
    num_images_per_prompt: int  # 1
    seed: int | Sequence[int] | None  # drawn and reported; one number s gives image i the seed s + i
    guidance_rescale: float  # 0; share of the guided output rescaled to the conditional's spread
    sampler: str | None  # the checkpoint's own; `sdopt samplers` lists them
    schedule: str | None  # the sampler's own: karras, exponential, beta, leading, trailing, linspace, ...
    eta: float | None  # 0; noise of DDIM and TCD
    timesteps: Sequence[float] | None  # in place of num_inference_steps, for samplers that take them
    sigmas: Sequence[float] | None
    rng: str  # "cpu": torch's CPU generator; "cuda:a100", ...: its CUDA generator on that GPU; "numpy"
    latents: Array | None  # [images, channels, height / factor, width / factor], standard normal; drawn from the seed
    prompt_embeds: Array | None  # [images, tokens, features]; takes the place of the prompt
    negative_prompt_embeds: Array | None
    pooled_prompt_embeds: Array | None  # beside prompt_embeds, for models that take pooled text
    negative_pooled_prompt_embeds: Array | None
    guidance_batch: int  # 2: both halves of guidance in one call; 1: one after the other in half the memory


def sampling(options: Options, default_steps: int) -> dict[str, Any]:
    """What decides the table: the number of steps, and those of the caller's wishes that are set."""
    steps = given_or(options.get("num_inference_steps"), default_steps)
    wishes = {key: options.get(key) for key in ("sampler", "schedule", "eta")}
    wishes |= {key: inside(key, options.get(key)) for key in ("denoising_start", "denoising_end")}
    start, end = wishes["denoising_start"], wishes["denoising_end"]
    if start is not None and end is not None and start >= end:
        raise UsageError(f"denoising_start = {start} and denoising_end = {end}; the start comes before the end")
    lists = {key: numbers(key, value) for key in ("timesteps", "sigmas") if (value := options.get(key)) is not None}
    set_ones = {key: value for key, value in {**wishes, **lists}.items() if value is not None}
    return {"num_inference_steps": whole("num_inference_steps", steps, 1), **set_ones}


def numbers(name: str, value: Any) -> list[float]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise UsageError(f"{name} = {value!r}; allowed is a list of numbers")
    return [finite(name, number) for number in value]


def pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(listed(value)) != 2:
        raise UsageError(f"{name} = {value!r}; allowed is (height, width)")
    first, second = listed(value)
    return whole(name, first, 0), whole(name, second, 0)


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise UsageError(f"{name} = {value!r}; allowed are {choices(str(value), allowed)}")
    return value


def share(name: str, value: Any) -> float:
    if not 0 <= finite(name, value) <= 1:
        raise UsageError(f"{name} = {value!r}; allowed are numbers from 0 to 1")
    return float(value)


def inside(name: str, value: Any) -> float | None:
    if value is not None and not 0 < finite(name, value) < 1:
        raise UsageError(f"{name} = {value!r}; allowed are numbers above 0 and below 1")
    return value


def sizes(
    bundle: Bundle, options: Options, own: tuple[int, int], pictured: bool
) -> tuple[Sizes, Sizes, dict[str, Any]]:
    """The numbers that SDXL's UNet is told, by their argument; those of the negative half; and what to record of them.

    As in diffusers: a negative size is the positive one unless it is given, and so is the negative crop, but (0, 0)
    beside given sizes in text to image, and for the refiner.
    """
    zero = (0, 0)
    sizes: Sizes = {
        name: pair(name, given_or(cast(Any, options.get(name)), default))
        for name, default in (("original_size", own), ("crops_coords_top_left", zero), ("target_size", own))
    }
    scores = {
        name: finite(name, given_or(cast(Any, options.get(name)), default))
        for name, default in (("aesthetic_score", 6.0), ("negative_aesthetic_score", 2.5))
    }
    given = {
        name: pair(f"negative_{name}", value)
        for name in sizes
        if (value := cast(Any, options.get(f"negative_{name}"))) is not None
    }
    scored = "aesthetic_score" in bundle.manifest.conditioning.time_ids
    if not pictured and len({"original_size", "target_size"} & set(given)) == 1:
        raise UsageError("negative_original_size and negative_target_size: in text to image give both, or neither")
    resets = scored or (not pictured and "original_size" in given)
    negative = {**sizes, **({"crops_coords_top_left": zero} if resets else {}), **given}
    asked = {f"negative_{name}": list(pair) for name, pair in given.items()}
    return (
        {**sizes, "aesthetic_score": (scores["aesthetic_score"],)},
        {**negative, "aesthetic_score": (scores["negative_aesthetic_score"],)},
        {**asked, **(scores if scored else {})},
    )


def picture(options: Options, defaults: Defaults) -> tuple[Any, Any, float]:
    """The image to begin from, the mask, and the strength, as they fit together."""
    image, mask, strength = options.get("image"), options.get("mask_image"), options.get("strength")
    for name in ("mask_image", "strength", "denoising_start"):
        if image is None and options.get(name) is not None:
            raise UsageError(f"{name} needs an image: give image=...")
    if image is not None and options.get("latents") is not None:
        raise UsageError("image and latents: give one, a picture to begin from or the noise itself")
    for name in ("mask_blur", "padding_mask_crop"):
        if options.get(name) and mask is None:
            raise UsageError(f"{name} needs a mask: give mask_image=...")
    if image is None:
        return None, None, 1.0
    own = defaults.strength if mask is None else defaults.inpaint_strength
    return image, mask, share("strength", given_or(strength, own))


def begun(options: Options, image: Any, mask: Any, height: int, width: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the plan holds of a picture to begin from; `shape` is that of the latents."""
    found: dict[str, Any] = {"image": None, "image_latents": None, "mask": None, "overlays": ()}
    if image is None:
        return found
    if images.is_latents(image):
        if mask is not None and mask_wishes(options):
            raise UsageError(f"{', '.join(mask_wishes(options))}: image is latents; give the picture itself")
        small = None if mask is None else images.to_mask(mask, height, width, shape[0])
        return {**found, "image_latents": latents_of(image, shape), "mask": small}
    if mask is None:
        return {**found, "image": images.to_array(image, height, width, shape[0])}
    blur, padding = given_or(options.get("mask_blur"), 0.0), options.get("padding_mask_crop")
    if not 0 <= finite("mask_blur", blur) <= MAX_BLUR:
        raise UsageError(f"mask_blur = {blur!r}; allowed are 0 to {MAX_BLUR} pixels")
    if padding is not None:
        padding = whole("padding_mask_crop", padding, 0, MAX_SIZE)
    found["image"], found["mask"], found["overlays"] = masks.prepare(
        image, mask, height, width, shape[0], float(blur), padding
    )
    return found


def mask_wishes(options: Options) -> dict[str, Any]:
    wishes = {key: options.get(key) for key in ("mask_blur", "padding_mask_crop")}
    return {key: value for key, value in wishes.items() if value is not None}


def latents_of(image: Array, shape: tuple[int, ...]) -> Array:
    """`image` as latents to begin from, one for each image."""
    allowed = (shape, (1, *shape[1:]))
    if image.shape not in allowed or image.dtype != "float32" or not np.isfinite(image).all():
        raise UsageError(
            f"image: got latents {image.dtype} {image.shape}; allowed are finite float32 {shape}, as "
            "output_type='latent' gives them, or a picture [height, width, 3]"
        )
    return np.repeat(image, shape[0] // len(image), 0)


def pixels(options: Options, defaults: Defaults, factor: int) -> tuple[int, int]:
    """Height and width: as given; else the latents' or, without a mask, the image's rounded down; else the bundle's."""
    own = (defaults.height, defaults.width)
    image = options.get("image")
    if image is not None and (options.get("mask_image") is None or images.is_latents(image)):
        height, width = images.size_of(image, factor=factor)
        own = (height // factor * factor, width // factor * factor)
    given = (options.get("height"), options.get("width"))
    height, width = (given_or(value, default) for value, default in zip(given, own, strict=True))
    return size("height", height, factor), size("width", width, factor)


def guidance(options: Options, default: float, calls: int) -> tuple[tuple[float, ...], dict[str, Any]]:
    """The scale of every call, 1 outside the interval, and the caller's wishes as they were given.

    Ref: Kynkaanniemi et al. 2024, arXiv:2404.07724: guidance in a limited interval.
    """
    given = given_or(options.get("guidance_scale"), default)
    scales = numbers("guidance_scale", given) if isinstance(given, (list, tuple)) else [finite("guidance_scale", given)]
    if len(scales) not in (1, calls):
        raise UsageError(f"guidance_scale: {len(scales)} scales; give one, or one for each of the {calls} calls")
    scales = scales * (calls if len(scales) == 1 else 1)
    wishes = {"guidance_scale": scales[0] if len(set(scales)) == 1 else scales}
    interval = options.get("guidance_interval")
    if interval is None:
        return tuple(scales), wishes
    edges = [share("guidance_interval", edge) for edge in numbers("guidance_interval", interval)]
    if len(edges) != 2 or edges[0] >= edges[1]:
        raise UsageError(f"guidance_interval = {interval!r}; allowed is (from, to), from below to, both from 0 to 1")
    low, high = edges
    inside = [low <= k / calls < high for k in range(calls)]
    return tuple(s if i else 1.0 for s, i in zip(scales, inside, strict=True)), {
        **wishes,
        "guidance_interval": [low, high],
    }


def given_or(value: Any, default: Any) -> Any:
    return default if value is None else value


def listed(value: Any) -> list[Any]:
    return list(cast(Sequence[Any], value)) if isinstance(value, (list, tuple)) else []


def whole(name: str, value: Any, low: int, high: int = 1 << 31) -> int:
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)  # NumPy's integers are welcome
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise UsageError(f"{name} = {value!r}; allowed are whole numbers from {low} to {high}")
    return number


def finite(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or not math.isfinite(value):
        raise UsageError(f"{name} = {value!r}; allowed are finite numbers")
    return float(value)


def size(name: str, value: Any, factor: int) -> int:
    pixels = whole(name, value, factor, MAX_SIZE)
    if pixels % factor:
        near = pixels // factor * factor
        raise UsageError(f"{name} = {pixels}; this model makes multiples of {factor} pixels: {near} or {near + factor}")
    return pixels


def prompts(name: str, value: Any, each: int) -> tuple[str, ...]:
    texts: list[Any] = [value] if isinstance(value, str) else listed(value)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} = {value!r}; allowed are a text or a list of texts")
    if len(texts) * each > MAX_IMAGES:
        raise UsageError(f"{len(texts) * each} images in one call; allowed are {MAX_IMAGES}. Call more than once.")
    return tuple(text for text in texts for _ in range(each))


def negatives(value: Any, images: int, each: int) -> tuple[str, ...]:
    if value is None or isinstance(value, str):
        return (value or "",) * images
    negatives = prompts("negative_prompt", value, each)
    if len(negatives) != images:
        raise UsageError(
            f"{len(negatives) // each} negative prompts for {images // each} prompts; give one, or as many"
        )
    return negatives


def seeds(value: Any, images: int) -> tuple[int, ...]:
    if value is None:
        value = secrets.randbits(32)
    if isinstance(value, (list, tuple)):
        seeds = tuple(whole("seed", seed, 0, 2**64 - 1) for seed in listed(value))
        if len(seeds) != images:
            raise UsageError(f"seed: {len(seeds)} seeds for {images} images; give one seed, or one per image")
        return seeds
    first = whole("seed", value, 0, 2**64 - images)
    return tuple(first + i for i in range(images))
