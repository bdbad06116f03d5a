"""The keywords of a request. Each is declared once, in `Options`: type, check, default, flag, help and record.

A keyword that is added here, or in one of the two parts, has all that `sdopt.request.keywords` makes of the table.
"""

# no `from __future__ import annotations`: `keywords` reads these, and as text each would be compiled first

from collections.abc import Sequence
from typing import Annotated, Literal, get_args

from sdopt.bundle.specs import Array
from sdopt.image.tiling import MIN_TILE
from sdopt.request.arrays import Tensor
from sdopt.request.keyword import Flag, Keyword
from sdopt.request.kinds import (
    FRACTION,
    MAX_IMAGES,
    MAX_SIZE,
    Choice,
    Integer,
    Interval,
    Name,
    Number,
    OneOrMore,
    Several,
    Switch,
    Word,
)
from sdopt.request.options_cache import CacheOptions
from sdopt.request.options_control import ControlOptions
from sdopt.request.options_picture import PictureOptions
from sdopt.request.options_text import TextOptions
from sdopt.samplers import SCHEDULES, find_sampler
from sdopt.samplers.names import RngName, SamplerName, ScheduleName
from sdopt.samplers.noise import RNGS, generator
from sdopt.samplers.resolve import find_schedule

PromptStyle = Literal["plain", "a1111"]
SEEDS = Integer(0, 2**64 - 1)
PIXELS = Integer(1, MAX_SIZE, "512")
SCALE = Number(-1e4, 1e4, "finite numbers", example="7.5")
LEVEL = Number(0, 1e6, "finite numbers")
EMBEDS = Tensor(("prompts", "tokens", "features"))
POOLED = Tensor(("prompts", "features"))


class Options(ControlOptions, PictureOptions, TextOptions, CacheOptions, total=False):
    """The keywords of `Pipeline.__call__` and `Pipeline.denoise`, under diffusers' names.

    control_image: what a ControlNet or T2I-Adapter of the bundle sees: a ready picture, e.g. of edges
    control_mode: which kind of picture a union ControlNet sees: the number or the name of a mode, or a list of them
        (default: none; a union ControlNet needs one for each picture)
    controlnet_conditioning_scale: how strong a ControlNet is; 0 leaves it out (default: 1.0)
    control_guidance_start: from which part of the way on a ControlNet is used (default: 0.0)
    control_guidance_end: up to which part of the way a ControlNet is used (default: 1.0)
    guess_mode: a ControlNet guides without a prompt: only the conditional half sees it (default: False)
    adapter_conditioning_scale: how strong a T2I-Adapter is (default: 1.0)
    adapter_conditioning_factor: up to which part of the way T2I-Adapters are used (default: 1.0)
    ip_adapter_image: a picture that an IP-Adapter of the bundle takes as a prompt
    ip_adapter_image_embeds: takes the place of ip_adapter_image
    ip_adapter_scale: how strong an IP-Adapter is; 0 leaves it out (default: 1.0)
    image: a PNG, JPEG or WebP picture to begin from
    mask_image: with image: white where the picture is painted anew
    mask_blur: blur the mask by a Gaussian of this radius (default: 0.0)
    padding_mask_crop: paint only the mask's region, this much wider, at full size (default: all)
    strength: how much of image is replaced, 0 to 1 (default: the bundle's)
    denoising_start: go on from this part of the way: image has noise already (default: the start)
    denoising_end: stop at this part of the way, for a refiner (default: the end)
    hires: make the picture small first, then so many times larger a side, with new details (default: one pass)
    hires_strength: how much of the enlarged picture is replaced, 0 to 1 (default: 0.7)
    hires_steps: num_inference_steps of the second pass (default: the same)
    negative_prompt: what to steer away from (default: nothing)
    prompt_2: the prompt of the second text encoder (default: prompt)
    negative_prompt_2: the negative prompt of the second text encoder (default: the negative prompt)
    prompt_3: SD3: the prompt of T5 (default: prompt)
    negative_prompt_3: SD3: the negative prompt of T5 (default: the negative prompt)
    max_sequence_length: SD3, Flux: how many tokens T5 reads (default: the bundle's)
    original_size: SDXL: the size that the picture seems to come from (default: the picture's)
    crops_coords_top_left: SDXL: where the picture seems to be cut out (default: (0, 0))
    target_size: SDXL: the size that the picture seems to have (default: the picture's)
    negative_original_size: the same for the negative prompt (default: the same)
    negative_crops_coords_top_left: the same for the negative prompt (default: the same)
    negative_target_size: the same for the negative prompt (default: the same)
    aesthetic_score: SDXL's refiner: how fine the picture is, 1 to 10 (default: 6.0)
    negative_aesthetic_score: the same for the negative prompt (default: 2.5)
    preset: settings of the bundle that `sdopt tune` measured, e.g. exact, balanced or fast; what is given beside it
        takes precedence (default: none)
    cache_interval: every so many calls of the UNet one is full; the others take its deep features and make only the
        last layers: sooner, and not the same picture (default: 1)
    cache_schedule: in place of an interval, which calls are full ones; the first, call 0, always is (default: by the
        interval)
    cache_depth: how many of the last layers the other calls make; `sdopt build` makes the engines of each depth
        (default: 1)
    num_inference_steps: calls that the sampler is asked for (default: the bundle's)
    guidance_scale: guidance scale; 1 turns it off (default: the bundle's)
    true_cfg_scale: Flux: guidance scale between the prompt and negative_prompt, in twice the time (default: 1.0)
    guidance_interval: guide only this part, e.g. 0.1 0.8 (default: all)
    guidance_rescale: how much of the guided output gets the spread of the conditional one, 0 to 1 (default: 0.0)
    guidance_batch: 2 runs both halves of guidance in one call, 1 halves its memory (default: 2)
    seed: 0 to 2**64 - 1; image i of num_images_per_prompt takes seed + i (default: drawn, and reported)
    sampler: `sdopt samplers` lists them (default: the checkpoint's own)
    schedule: of the sampler: karras, exponential, beta, leading, trailing, linspace, ... (default: the sampler's own)
    mu: logarithm of a flow schedule's shift (default: from the size of the picture)
    eta: 0 to 1, the noise of ddim and tcd (default: 0)
    timesteps: in place of num_inference_steps, for samplers that take them (default: spaced by the schedule)
    sigmas: noise levels in place of num_inference_steps (the last one 0), for samplers that take them (default: spaced
        by the schedule)
    rng: whose noise: cpu (torch's), cuda:a100 and other GPUs, numpy (default: 'cpu')
    latents: standard normal noise to begin from (default: drawn from the seed)
    prompt_style: plain, or a1111: (word:1.3), [word], prompts of any length (default: 'plain')
    lora_scale: multiply the weight of every LoRA in use (default: 1.0)
    clip_skip: how many of the text encoder's last layers to leave out (default: 0)
    prompt_embeds: takes the place of the prompt
    negative_prompt_embeds: takes the place of the negative prompt
    pooled_prompt_embeds: beside prompt_embeds, for models that take pooled text
    negative_pooled_prompt_embeds: beside negative_prompt_embeds, for models that take pooled text
    vae: decode (and encode) with this tiny autoencoder of the bundle: sooner, and not the same picture (default: the
        bundle's own)
    vae_tile: decode (and encode) in tiles of so many latents a side, in the memory of one tile (default: in one piece)
    vae_slice: decode (and encode) num_images_per_prompt pictures one by one, in the memory of one (default: False)
    height: pixels, e.g. 512x768 (default: the image's, or the bundle's)
    width: pixels, e.g. 512x768 (default: the image's, or the bundle's)
    num_images_per_prompt: how many pictures (default: 1)
    """

    num_inference_steps: Annotated[
        int | None,
        Keyword(
            "calls that the sampler is asked for",
            Integer(1, example="20"),
            otherwise="the bundle's",
            flag=Flag(("--steps",)),
            record="always",
        ),
    ]
    guidance_scale: Annotated[
        float | Sequence[float] | None,  # or one for each call
        Keyword(
            "guidance scale; 1 turns it off",
            OneOrMore(SCALE, "7.5"),
            otherwise="the bundle's",
            flag=Flag(("--guidance",)),
            record="always",
        ),
    ]
    true_cfg_scale: Annotated[
        float,
        Keyword(
            "Flux: guidance scale between the prompt and negative_prompt, in twice the time",
            SCALE,
            1.0,
            flag=Flag(metavar="SCALE"),
        ),
    ]
    guidance_interval: Annotated[
        tuple[float, float] | None,
        Keyword("guide only this part, e.g. 0.1 0.8", Interval(), otherwise="all", flag=Flag(metavar=("FROM", "TO"))),
    ]
    guidance_rescale: Annotated[
        float,
        Keyword(
            "how much of the guided output gets the spread of the conditional one, 0 to 1",
            FRACTION,
            0.0,
            flag=Flag(metavar="FRACTION"),
            record="always",
        ),
    ]
    guidance_batch: Annotated[
        int,
        Keyword(
            "2 runs both halves of guidance in one call, 1 halves its memory",
            Integer(1, 2),
            2,
            record="never",
            how=True,
        ),
    ]
    seed: Annotated[
        int | Sequence[int] | None,  # or one for each image
        Keyword(
            "0 to 2**64 - 1; image i of -n takes seed + i",
            OneOrMore(SEEDS, "1"),
            otherwise="drawn, and reported",
            record="always",
        ),
    ]
    sampler: Annotated[
        SamplerName | str | None,
        Keyword(
            "`sdopt samplers` lists them",
            Name(find_sampler, "the names that `sdopt samplers` lists", '"euler"'),
            otherwise="the checkpoint's own",
        ),
    ]
    schedule: Annotated[
        ScheduleName | str | None,
        Keyword(
            "of the sampler: karras, exponential, beta, leading, trailing, linspace, ...",
            Name(find_schedule, ", ".join(SCHEDULES), '"karras"'),
            otherwise="the sampler's own",
        ),
    ]
    mu: Annotated[
        float | None,
        Keyword("logarithm of a flow schedule's shift", Number(-10, 10), otherwise="from the size of the picture"),
    ]
    eta: Annotated[float | None, Keyword("0 to 1, the noise of ddim and tcd", FRACTION, otherwise="0")]
    timesteps: Annotated[
        Sequence[float] | None,
        Keyword(
            "in place of --steps, for samplers that take them",
            Several(LEVEL, "[999, 749, 499, 249]"),
            otherwise="spaced by the schedule",
        ),
    ]
    sigmas: Annotated[
        Sequence[float] | None,
        Keyword(
            "noise levels in place of --steps (the last one 0), for samplers that take them",
            Several(LEVEL, "[14.6, 3.2, 0.6, 0.0]"),
            otherwise="spaced by the schedule",
        ),
    ]
    rng: Annotated[
        RngName | str,  # "cpu": torch's CPU generator; "cuda:a100", ...: its CUDA generator on that GPU
        Keyword(
            "whose noise: cpu (torch's), cuda:a100 and other GPUs, numpy",
            Name(lambda rng: generator(0, rng), ", ".join(RNGS), '"cpu"'),
            "cpu",
            record="always",
        ),
    ]
    latents: Annotated[
        Array | None,
        Keyword(
            "standard normal noise to begin from",
            Tensor(("images", "channels", "height / factor", "width / factor")),
            otherwise="drawn from the seed",
            flag=None,
            record="never",
        ),
    ]

    prompt_style: Annotated[
        PromptStyle | str,
        Keyword(
            "plain, or a1111: (word:1.3), [word], prompts of any length",
            Choice(get_args(PromptStyle), '"a1111"'),
            "plain",
            record="always",
        ),
    ]
    lora_scale: Annotated[
        float,
        Keyword("multiply the weight of every LoRA in use", Number(-100, 100, example="0.8"), 1.0, optional=False),
    ]
    clip_skip: Annotated[
        int | None,
        Keyword("how many of the text encoder's last layers to leave out", Integer(0, 100), 0, record="always"),
    ]
    prompt_embeds: Annotated[Array | None, Keyword("takes the place of the prompt", EMBEDS, flag=None, record="never")]
    negative_prompt_embeds: Annotated[
        Array | None, Keyword("takes the place of the negative prompt", EMBEDS, flag=None, record="never")
    ]
    pooled_prompt_embeds: Annotated[
        Array | None,
        Keyword("beside prompt_embeds, for models that take pooled text", POOLED, flag=None, record="never"),
    ]
    negative_pooled_prompt_embeds: Annotated[
        Array | None,
        Keyword("beside negative_prompt_embeds, for models that take pooled text", POOLED, flag=None, record="never"),
    ]

    vae: Annotated[
        str | None,
        Keyword(
            "decode (and encode) with this tiny autoencoder of the bundle: sooner, and not the same picture",
            Word('"tiny"'),
            otherwise="the bundle's own",
            flag=Flag(metavar="NAME"),
        ),
    ]
    vae_tile: Annotated[
        int | None,
        Keyword(
            "decode (and encode) in tiles of so many latents a side, in the memory of one tile",
            Integer(MIN_TILE, example="64"),
            otherwise="in one piece",
            flag=Flag(metavar="LATENTS"),
            record="always",
        ),
    ]
    vae_slice: Annotated[
        bool | None, Keyword("decode (and encode) -n pictures one by one, in the memory of one", Switch(), False)
    ]
    height: Annotated[
        int | None,
        Keyword(
            "pixels, e.g. 512x768",
            PIXELS,
            otherwise="the image's, or the bundle's",
            flag=Flag(("--size",), "WxH", part=1),
            record="always",
        ),
    ]
    width: Annotated[
        int | None,
        Keyword(
            "pixels, e.g. 512x768",
            PIXELS,
            otherwise="the image's, or the bundle's",
            flag=Flag(("--size",), "WxH", part=0),
            record="always",
        ),
    ]
    num_images_per_prompt: Annotated[
        int, Keyword("how many pictures", Integer(1, MAX_IMAGES), 1, flag=Flag(("-n", "--number"), "N"), record="never")
    ]
