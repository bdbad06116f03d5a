"""Checks of several keywords of a request together, and their values on a bundle.

Each function takes options that `checked` has read: every keyword is already valid by itself.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from sdopt.bundle.files import Bundle
from sdopt.bundle.format import MAX_SEQUENCE, Conditioning
from sdopt.bundle.specs import Array
from sdopt.errors import UsageError
from sdopt.request.kinds import MAX_IMAGES

Sizes = Mapping[str, tuple[float, ...]]
TABLE_KEYWORDS = ("sampler", "schedule", "eta", "denoising_start", "denoising_end", "timesteps", "sigmas", "mu")
SIZE_KEYWORDS = ("original_size", "crops_coords_top_left", "target_size")
EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")


def given_or(value: Any, default: Any) -> Any:
    return default if value is None else value


def each_times(values: Sequence[Any], each: int) -> tuple[Any, ...]:
    """Every value `each` times in a row: (a, a, b, b)."""
    return tuple(value for value in values for _ in range(each))


# ------------------------------------------------------------------------------------------------ text


def prompts(options: Mapping[str, Any], each: int) -> tuple[str, ...]:
    """The prompt of every image; empty ones where embeddings take its place."""
    prompt, embeds = options["prompt"], options["prompt_embeds"]
    if embeds is not None:
        for name in ("prompt", "prompt_2", "prompt_3"):
            if options[name]:
                raise UsageError(
                    f"{name} and prompt_embeds: give one of the two, as of negative_prompt and negative_prompt_embeds",
                    "prompt_embeds",
                )
        prompt = [""] * len(embeds)
    if prompt is None:
        raise UsageError('prompt = None; allowed are a text or a list of texts, e.g. prompt="a red apple"', "prompt")
    texts = [prompt] if isinstance(prompt, str) else prompt
    count = len(texts) * each
    if count > MAX_IMAGES:
        name = "num_images_per_prompt" if len(texts) <= MAX_IMAGES else "prompt"
        raise UsageError(f"{count} images in one call; allowed are {MAX_IMAGES}. Call more than once.", name)
    return each_times(texts, each)


def texts_beside(options: Mapping[str, Any], name: str, default: tuple[str, ...], each: int) -> tuple[str, ...]:
    """The text of keyword `name` for every image; if it is left out or empty, `default`, as in diffusers."""
    value, count = options[name], len(default)
    if not value:
        return default
    if isinstance(value, str):
        return (value,) * count
    if len(value) * each != count:
        word = "negative prompts" if name == "negative_prompt" else f"texts of {name}"
        raise UsageError(f"{len(value)} {word} for {count // each} prompts; give one, or as many", name)
    return each_times(value, each)


def embeddings(
    options: Mapping[str, Any], images: int, each: int, pooled: bool, negatives: bool
) -> dict[str, Array | None]:
    """The embeddings that the caller gave, with one row for each image.

    Each of them has one row for each prompt. With n images for each prompt, every row is repeated n times.
    `pooled` and `negatives`: whether the model takes pooled text and negative embeddings.
    Raises: UsageError for another number of rows, and for embeddings that do not fit beside the others.
    Ref: diffusers, `encode_prompt` and `check_inputs` of its pipelines.
    """
    embeds: dict[str, Array | None] = {}
    for prefix in ("", "negative_"):
        hidden_name, pooled_name = (f"{prefix}{name}" for name in EMBEDS)
        has_hidden, has_pooled = options[hidden_name] is not None, options[pooled_name] is not None
        if has_pooled and not has_hidden:
            raise UsageError(f"{pooled_name} needs {hidden_name}: give both, or the text itself", pooled_name)
        if has_hidden and pooled and not has_pooled:
            raise UsageError(f"{hidden_name}: this model also takes {pooled_name}; give both", pooled_name)
        if has_pooled and not pooled:
            raise UsageError(f"{pooled_name}: this model takes no pooled text; leave it out", pooled_name)
        for name in (hidden_name, pooled_name):
            embeds[name] = _rows(name, options[name], images, each)
    if options["negative_prompt_embeds"] is not None:
        _refuse_negatives(options, negatives)
    positive, negative = embeds["prompt_embeds"], embeds["negative_prompt_embeds"]
    if positive is not None and negative is not None and positive.shape != negative.shape:
        raise UsageError(
            f"negative_prompt_embeds is {negative.shape} and prompt_embeds {positive.shape}; give as many tokens and "
            "features: pipe.encode of a short text can be filled up with pipe.encode of an empty one",
            "negative_prompt_embeds",
        )
    return embeds


def _refuse_negatives(options: Mapping[str, Any], negatives: bool) -> None:
    """Raises: UsageError for negative embeddings beside a negative text, or for a model that has no negative half."""
    name = "negative_prompt_embeds"
    if not negatives:
        raise UsageError(f"{name}: this model takes the guidance scale as an input; leave it out", name)
    for text in ("negative_prompt", "negative_prompt_2", "negative_prompt_3"):
        if options[text]:
            raise UsageError(f"{text} and {name}: give one of the two", name)


def _rows(name: str, given: Array | None, images: int, each: int) -> Array | None:
    """A row for each image, from one row for each prompt."""
    if given is None:
        return None
    prompts = images // each
    if len(given) == prompts:
        return np.repeat(given, each, 0)
    stretch = f": np.repeat({name}, {prompts}, 0)" if len(given) == 1 else ""
    raise UsageError(f"{name} has {len(given)} rows, and there are {prompts} prompts; give as many rows{stretch}", name)


def sizes(
    options: Mapping[str, Any], own: tuple[int, int], pictured: bool, scored: bool
) -> tuple[Sizes, Sizes, dict[str, Any]]:
    """The size conditioning of SDXL's UNet, by keyword: the positive half, the negative half, and what to record.

    `pictured`: there is a picture to begin from. `scored`: the UNet takes an aesthetic score, as the refiner does.
    As in diffusers, a negative size or crop that is not given is the positive one. There are two exceptions, where the
    negative crop is (0, 0): text to image with negative sizes, and the refiner.
    """
    defaults = {"original_size": own, "crops_coords_top_left": (0, 0), "target_size": own}
    sizes: dict[str, tuple[float, ...]] = {name: given_or(options[name], defaults[name]) for name in SIZE_KEYWORDS}
    negatives = {name: options[f"negative_{name}"] for name in SIZE_KEYWORDS}
    given = {name: pair for name, pair in negatives.items() if pair is not None}
    missing = {"original_size", "target_size"} - set(given)
    if not pictured and len(missing) == 1:
        raise UsageError(
            "negative_original_size and negative_target_size: in text to image give both, or neither",
            f"negative_{missing.pop()}",
        )
    resets_crop = scored or (not pictured and "original_size" in given)
    crop = {"crops_coords_top_left": (0, 0)} if resets_crop else {}
    record: dict[str, Any] = {**sizes, **{f"negative_{name}": pair for name, pair in given.items()}}
    if scored:
        record |= {name: options[name] for name in ("aesthetic_score", "negative_aesthetic_score")}
    positive: Sizes = {**sizes, "aesthetic_score": (options["aesthetic_score"],)}
    negative: Sizes = {**sizes, **crop, **given, "aesthetic_score": (options["negative_aesthetic_score"],)}
    return positive, negative, record


# ------------------------------------------------------------------------------------------------ sampling


def sampling(options: Mapping[str, Any], default_steps: int) -> dict[str, Any]:
    """The keywords that decide the sampler table: the number of steps, and others if they are given."""
    start, end = options["denoising_start"], options["denoising_end"]
    if start is not None and end is not None and start >= end:
        raise UsageError(
            f"denoising_start = {start} and denoising_end = {end}; the start comes before the end", "denoising_start"
        )
    given = {name: options[name] for name in TABLE_KEYWORDS if options[name] is not None}
    return {"num_inference_steps": given_or(options["num_inference_steps"], default_steps), **given}


def guidance(options: Mapping[str, Any], default: float, calls: int) -> tuple[tuple[float, ...], float | list[float]]:
    """The scale of every call, which is 1 outside `guidance_interval`; and the scale as it is recorded.

    Ref: Kynkaanniemi et al. 2024, arXiv:2404.07724: guidance in a limited interval.
    """
    given = given_or(options["guidance_scale"], float(default))
    scales = cast(list[float], given) if isinstance(given, list) else [float(given)]
    if len(scales) not in (1, calls):
        raise UsageError(
            f"guidance_scale: {len(scales)} scales; give one, or one for each of the {calls} calls", "guidance_scale"
        )
    record = scales[0] if len(set(scales)) == 1 else scales
    per_call = scales * calls if len(scales) == 1 else scales
    low, high = given_or(options["guidance_interval"], (0.0, 1.0))
    guided = tuple(scale if low <= k / calls < high else 1.0 for k, scale in enumerate(per_call))
    return guided, record


def scales(
    options: Mapping[str, Any], default: float, calls: int, entry: Conditioning, has_negative: bool
) -> tuple[tuple[float, ...], tuple[float, ...], float | list[float]]:
    """The scale of every call between its two halves, the one that the denoiser is told, and what is recorded.

    `entry`: what the denoiser takes. `has_negative`: the caller gave a negative text. A model that is told the scale
    has no halves, or has them by `true_cfg_scale` where there is a negative text.
    """
    guided, record = guidance(options, default, calls)
    if entry.true_guidance:
        scale = float(options["true_cfg_scale"]) if has_negative else 1.0
        low, high = given_or(options["guidance_interval"], (0.0, 1.0))
        halves = tuple(scale if low <= k / calls < high else 1.0 for k in range(calls))
        told, _ = guidance({**options, "guidance_interval": None}, default, calls)
        return halves, told if entry.guidance_embedding else (), record
    if entry.guidance_embedding:
        return (1.0,) * calls, guided, record
    return guided, (), record


def sequence(options: Mapping[str, Any], bundle: Bundle) -> int:
    """The tokens of the text encoder that reads one sequence, 0 where the bundle has none of its kind.

    Raises: UsageError for more tokens than it reads.
    """
    manifest, given = bundle.manifest, options["max_sequence_length"]
    if given is None or not manifest.sequence:
        return manifest.sequence
    encoders = [encoder for encoder in manifest.conditioning.encoders if encoder.join == "tokens"]
    most = min((manifest.tokenizers[encoder.tokenizer].max_length for encoder in encoders), default=MAX_SEQUENCE)
    if given > most:
        text = f"max_sequence_length = {given}; this model's text encoder reads up to {most} tokens"
        raise UsageError(text, "max_sequence_length")
    return given


def seeds(value: int | list[int] | None, images: int) -> tuple[int, ...]:
    """The seed of every image; one is drawn if none is given."""
    first = secrets.randbits(32) if value is None else value
    if isinstance(first, list):
        if len(first) != images:
            raise UsageError(f"seed: {len(first)} seeds for {images} images; give one seed, or one per image", "seed")
        return tuple(first)
    if first + images > 2**64:
        raise UsageError(
            f"seed = {first}; allowed are whole numbers from 0 to {2**64 - images} for {images} images", "seed"
        )
    return tuple(first + i for i in range(images))
