"""What a caller asks for, checked once and resolved against a bundle, so that the loop needs no `if`."""

from __future__ import annotations

import json
import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import numpy as np

from sdopt import images, masks
from sdopt.bundle import Bundle
from sdopt.errors import UsageError, choices
from sdopt.samplers import SAMPLERS, SamplerTable, sampler_table
from sdopt.specs import Array
from sdopt.tiling import MIN_TILE

MAX_IMAGES = 64
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
    prompt_style: str  # "plain": as diffusers reads it; "a1111": (word:1.3), [word], and prompts of any length
    clip_skip: int | None  # 0; how many of the text encoder's last layers are left out
    vae_tile: int | None  # decode (and encode) in tiles of so many latents a side, in the memory of one
    vae_slice: bool  # False; decode (and encode) a batch image by image, in the memory of one
    image: Any  # what the picture begins from: PIL, an array [height, width, 3] in 0..1, one per image; or latents
    mask_image: Any  # of the same size, white where the picture is to be painted anew
    mask_blur: float | None  # 0; radius in pixels of the Gaussian that blurs the mask, as VaeImageProcessor.blur
    padding_mask_crop: int | None  # paint only the region around the mask, so many pixels wider, at full size
    strength: float | None  # how much of `image` is replaced: 0.8, with a mask 1
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


@dataclass(frozen=True)
class Plan:
    """A request, resolved: one entry per image in `prompts`, `negative_prompts` and `seeds`."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    prompts_2: tuple[str, ...]
    negative_prompts_2: tuple[str, ...]
    negative_given: bool
    time_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    guidance: tuple[float, ...]
    guidance_rescale: float
    guidance_batch: int
    rng: str
    sampling: Mapping[str, Any]
    table: SamplerTable
    latents: Array | None
    prompt_embeds: Array | None
    negative_prompt_embeds: Array | None
    pooled_prompt_embeds: Array | None
    negative_pooled_prompt_embeds: Array | None
    prompt_style: str
    clip_skip: int
    vae_tile: int | None
    vae_slice: bool
    image: Array | None
    image_latents: Array | None
    mask: Array | None
    overlays: tuple[masks.Overlay, ...]
    strength: float
    wishes: Mapping[str, Any]

    @property
    def guided(self) -> bool:
        """Whether the unconditional half ever runs. Ref: Ho & Salimans 2022, arXiv:2207.12598, section 3.2."""
        return max(self.guidance) > 1

    def parameters(self, image: int) -> dict[str, Any]:
        """What makes image `image` again, alone."""
        return {
            "prompt": self.prompts[image],
            "negative_prompt": self.negative_prompts[image] if self.negative_given else None,
            **({"prompt_2": self.prompts_2[image]} if self.prompts_2 != self.prompts else {}),
            **(
                {"negative_prompt_2": self.negative_prompts_2[image]}
                if self.negative_prompts_2 != self.negative_prompts
                else {}
            ),
            "original_size": list(self.time_ids[:2]),
            "crops_coords_top_left": list(self.time_ids[2:4]),
            "target_size": list(self.time_ids[4:]),
            "prompt_style": self.prompt_style,
            "clip_skip": self.clip_skip,
            "vae_tile": self.vae_tile,
            **({"vae_slice": True} if self.vae_slice else {}),
            "guidance_rescale": self.guidance_rescale,
            "seed": self.seeds[image],
            "rng": self.rng,
            "width": self.width,
            "height": self.height,
            "sampled_by": SAMPLERS[self.table.name].title if self.table.name in SAMPLERS else self.table.name,
            **self.sampling,
            **self.wishes,
        }


def make_plan(bundle: Bundle, prompt: str | Sequence[str] | None, options: Options) -> Plan:
    """The plan for `prompt` on this bundle.

    Raises: UsageError naming the argument, its value and what is allowed.
    """
    unknown = set(options) - set(Options.__annotations__)
    if unknown:
        raise UsageError(
            f"unknown argument {', '.join(sorted(unknown))}; there are {', '.join(Options.__annotations__)}"
        )
    defaults: Mapping[str, Any] = bundle.manifest["defaults"]
    embeds, negative_embeds = options.get("prompt_embeds"), options.get("negative_prompt_embeds")
    each = _whole("num_images_per_prompt", options.get("num_images_per_prompt", 1), 1, MAX_IMAGES)
    prompts = _prompts("prompt", prompt if embeds is None else [""] * len(embeds), each)
    sampling = _sampling(options, defaults["num_inference_steps"])
    factor: int = bundle.manifest["latents"]["factor"]
    image, mask, strength = _picture(options)
    height, width = _pixels(options, defaults, factor)
    table = make_table(bundle, sampling, strength)
    guidance, wishes = _guidance(options, defaults["guidance_scale"], len(table))
    if embeds is not None and negative_embeds is None and max(guidance) > 1:
        raise UsageError("prompt_embeds without negative_prompt_embeds: give both, or guidance_scale=1")
    shape = (len(prompts), bundle.manifest["latents"]["channels"], height // factor, width // factor)
    latents = options.get("latents")
    if latents is not None and (latents.shape != shape or latents.dtype != "float32"):
        raise UsageError(f"latents: got {latents.dtype} {latents.shape}; these sizes and prompts take float32 {shape}")
    negatives = _negatives(options.get("negative_prompt"), len(prompts), each)
    second, against = options.get("prompt_2"), options.get("negative_prompt_2")
    return Plan(
        prompts=prompts,
        negative_prompts=negatives,
        prompts_2=prompts if second is None else _negatives(second, len(prompts), each),
        negative_prompts_2=negatives if against is None else _negatives(against, len(prompts), each),
        negative_given=options.get("negative_prompt") is not None or against is not None,
        time_ids=(
            *_pair("original_size", _or(options.get("original_size"), (height, width))),
            *_pair("crops_coords_top_left", options.get("crops_coords_top_left", (0, 0))),
            *_pair("target_size", _or(options.get("target_size"), (height, width))),
        ),
        seeds=_seeds(options.get("seed"), len(prompts)),
        height=height,
        width=width,
        guidance=guidance,
        guidance_rescale=_share("guidance_rescale", options.get("guidance_rescale", 0.0)),
        guidance_batch=_whole("guidance_batch", options.get("guidance_batch", 2), 1, 2),
        rng=options.get("rng", "cpu"),
        sampling=sampling,
        table=table,
        latents=latents,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative_embeds,
        pooled_prompt_embeds=options.get("pooled_prompt_embeds"),
        negative_pooled_prompt_embeds=options.get("negative_pooled_prompt_embeds"),
        prompt_style=_one_of("prompt_style", options.get("prompt_style", "plain"), PROMPT_STYLES),
        clip_skip=_whole("clip_skip", _or(options.get("clip_skip"), 0), 0, 100),
        vae_tile=None if options.get("vae_tile") is None else _whole("vae_tile", options.get("vae_tile"), MIN_TILE),
        vae_slice=bool(options.get("vae_slice")),
        **_begun(options, image, mask, height, width, shape),
        strength=strength,
        wishes=wishes if image is None else {**wishes, "strength": strength, **_mask_wishes(options)},
    )


def make_table(bundle: Bundle, sampling: Mapping[str, Any], strength: float = 1.0) -> SamplerTable:
    """The table that a bundle's scheduler and the caller's wishes come to.

    A checkpoint whose scheduler sdopt does not know by name brings its tables along, one for each number of steps.
    Raises: UsageError as `sampler_table` does, and for a number of steps that such a bundle has no table for.
    """
    options = dict(sampling)
    steps = options.pop("num_inference_steps")
    probed = bundle.manifest.get("sampler_tables")
    if probed is None or options.get("sampler") is not None:
        return sampler_table(bundle.manifest["scheduler"], steps, strength=strength, **options)
    tables = json.loads(bundle.file(probed).read_bytes())
    name = bundle.manifest["scheduler"].get("_class_name")
    if str(steps) not in tables:
        raise UsageError(f"num_inference_steps = {steps}; for {name} this bundle has tables for {', '.join(tables)}")
    given = [key for key, value in options.items() if value is not None] + ["strength"] * (strength < 1)
    if given:
        raise UsageError(f"{', '.join(given)}: {name} takes no options here; name another sampler to use them")
    return SamplerTable.from_json(tables[str(steps)])


def _sampling(options: Options, default_steps: int) -> dict[str, Any]:
    """What decides the table: the number of steps, and those of the caller's wishes that are set."""
    steps = _or(options.get("num_inference_steps"), default_steps)
    wishes = {key: options.get(key) for key in ("sampler", "schedule", "eta")}
    lists = {key: _numbers(key, value) for key in ("timesteps", "sigmas") if (value := options.get(key)) is not None}
    set_ones = {key: value for key, value in {**wishes, **lists}.items() if value is not None}
    return {"num_inference_steps": _whole("num_inference_steps", steps, 1), **set_ones}


def _numbers(name: str, value: Any) -> list[float]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise UsageError(f"{name} = {value!r}; allowed is a list of numbers")
    return [_finite(name, number) for number in value]


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(_list(value)) != 2:
        raise UsageError(f"{name} = {value!r}; allowed is (height, width)")
    first, second = _list(value)
    return _whole(name, first, 0), _whole(name, second, 0)


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise UsageError(f"{name} = {value!r}; allowed are {choices(str(value), allowed)}")
    return value


def _share(name: str, value: Any) -> float:
    if not 0 <= _finite(name, value) <= 1:
        raise UsageError(f"{name} = {value!r}; allowed are numbers from 0 to 1")
    return float(value)


def _picture(options: Options) -> tuple[Any, Any, float]:
    """The image to begin from, the mask, and the strength, as they fit together."""
    image, mask, strength = options.get("image"), options.get("mask_image"), options.get("strength")
    if image is None and (mask is not None or strength is not None):
        raise UsageError(f"{'mask_image' if mask is not None else 'strength'} needs an image: give image=...")
    if image is not None and options.get("latents") is not None:
        raise UsageError("image and latents: give one, a picture to begin from or the noise itself")
    for name in ("mask_blur", "padding_mask_crop"):
        if options.get(name) and mask is None:
            raise UsageError(f"{name} needs a mask: give mask_image=...")
    if image is None:
        return None, None, 1.0
    return image, mask, _share("strength", _or(strength, 0.8 if mask is None else 1.0))


def _begun(options: Options, image: Any, mask: Any, height: int, width: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the plan holds of a picture to begin from; `shape` is that of the latents."""
    found: dict[str, Any] = {"image": None, "image_latents": None, "mask": None, "overlays": ()}
    if image is None:
        return found
    if images.is_latents(image):
        return {**found, "image_latents": _latents_of(image, mask, shape)}
    if mask is None:
        return {**found, "image": images.to_array(image, height, width, shape[0])}
    blur, padding = _or(options.get("mask_blur"), 0.0), options.get("padding_mask_crop")
    if not 0 <= _finite("mask_blur", blur) <= MAX_BLUR:
        raise UsageError(f"mask_blur = {blur!r}; allowed are 0 to {MAX_BLUR} pixels")
    if padding is not None:
        padding = _whole("padding_mask_crop", padding, 0, MAX_SIZE)
    found["image"], found["mask"], found["overlays"] = masks.prepare(
        image, mask, height, width, shape[0], float(blur), padding
    )
    return found


def _mask_wishes(options: Options) -> dict[str, Any]:
    wishes = {key: options.get(key) for key in ("mask_blur", "padding_mask_crop")}
    return {key: value for key, value in wishes.items() if value is not None}


def _latents_of(image: Array, mask: Any, shape: tuple[int, ...]) -> Array:
    """`image` as latents to begin from, one for each image."""
    if mask is not None:
        raise UsageError("image: latents begin image to image; with mask_image give the picture itself")
    allowed = (shape, (1, *shape[1:]))
    if image.shape not in allowed or image.dtype != "float32" or not np.isfinite(image).all():
        raise UsageError(
            f"image: got latents {image.dtype} {image.shape}; allowed are finite float32 {shape}, as "
            "output_type='latent' gives them, or a picture [height, width, 3]"
        )
    return np.repeat(image, shape[0] // len(image), 0)


def _pixels(options: Options, defaults: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """Height and width: as given; else, without a mask, the image's rounded down; else the bundle's."""
    own = (defaults["height"], defaults["width"])
    if options.get("image") is not None and options.get("mask_image") is None:
        height, width = images.size_of(options.get("image"), factor=factor)
        own = (height // factor * factor, width // factor * factor)
    given = (options.get("height"), options.get("width"))
    height, width = (_or(value, default) for value, default in zip(given, own, strict=True))
    return _size("height", height, factor), _size("width", width, factor)


def _guidance(options: Options, default: float, calls: int) -> tuple[tuple[float, ...], dict[str, Any]]:
    """The scale of every call, 1 outside the interval, and the caller's wishes as they were given.

    Ref: Kynkaanniemi et al. 2024, arXiv:2404.07724: guidance in a limited interval.
    """
    given = _or(options.get("guidance_scale"), default)
    scales = (
        _numbers("guidance_scale", given) if isinstance(given, (list, tuple)) else [_finite("guidance_scale", given)]
    )
    if len(scales) not in (1, calls):
        raise UsageError(f"guidance_scale: {len(scales)} scales; give one, or one for each of the {calls} calls")
    scales = scales * (calls if len(scales) == 1 else 1)
    wishes = {"guidance_scale": scales[0] if len(set(scales)) == 1 else scales}
    interval = options.get("guidance_interval")
    if interval is None:
        return tuple(scales), wishes
    edges = [_share("guidance_interval", edge) for edge in _numbers("guidance_interval", interval)]
    if len(edges) != 2 or edges[0] >= edges[1]:
        raise UsageError(f"guidance_interval = {interval!r}; allowed is (from, to), from below to, both from 0 to 1")
    low, high = edges
    inside = [low <= k / calls < high for k in range(calls)]
    return tuple(s if i else 1.0 for s, i in zip(scales, inside, strict=True)), {
        **wishes,
        "guidance_interval": [low, high],
    }


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _list(value: Any) -> list[Any]:
    return list(cast(Sequence[Any], value)) if isinstance(value, (list, tuple)) else []


def _whole(name: str, value: Any, low: int, high: int = 1 << 31) -> int:
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)  # NumPy's integers are welcome
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise UsageError(f"{name} = {value!r}; allowed are whole numbers from {low} to {high}")
    return number


def _finite(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or not math.isfinite(value):
        raise UsageError(f"{name} = {value!r}; allowed are finite numbers")
    return float(value)


def _size(name: str, value: Any, factor: int) -> int:
    pixels = _whole(name, value, factor, MAX_SIZE)
    if pixels % factor:
        near = pixels // factor * factor
        raise UsageError(f"{name} = {pixels}; this model makes multiples of {factor} pixels: {near} or {near + factor}")
    return pixels


def _prompts(name: str, value: Any, each: int) -> tuple[str, ...]:
    texts: list[Any] = [value] if isinstance(value, str) else _list(value)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} = {value!r}; allowed are a text or a list of texts")
    if len(texts) * each > MAX_IMAGES:
        raise UsageError(f"{len(texts) * each} images in one call; allowed are {MAX_IMAGES}. Call more than once.")
    return tuple(text for text in texts for _ in range(each))


def _negatives(value: Any, images: int, each: int) -> tuple[str, ...]:
    if value is None or isinstance(value, str):
        return (value or "",) * images
    negatives = _prompts("negative_prompt", value, each)
    if len(negatives) != images:
        raise UsageError(
            f"{len(negatives) // each} negative prompts for {images // each} prompts; give one, or as many"
        )
    return negatives


def _seeds(value: Any, images: int) -> tuple[int, ...]:
    if value is None:
        value = secrets.randbits(32)
    if isinstance(value, (list, tuple)):
        seeds = tuple(_whole("seed", seed, 0, 2**64 - 1) for seed in _list(value))
        if len(seeds) != images:
            raise UsageError(f"seed: {len(seeds)} seeds for {images} images; give one seed, or one per image")
        return seeds
    first = _whole("seed", value, 0, 2**64 - images)
    return tuple(first + i for i in range(images))
