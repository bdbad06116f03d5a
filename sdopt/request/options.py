"""The keywords of a request. Each is declared once, in `Options`: type, check, default, flag, help and record.

A keyword that is added here has all that `sdopt.request.keywords` makes of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

from sdopt.bundle.specs import Array
from sdopt.image.tiling import MIN_TILE
from sdopt.request.arrays import Picture, Tensor
from sdopt.request.keyword import Flag, Keyword
from sdopt.request.kinds import (
    MAX_IMAGES,
    MAX_SIZE,
    Choice,
    Integer,
    Interval,
    Name,
    Number,
    OneOrMore,
    Pair,
    Several,
    Switch,
    Texts,
)
from sdopt.samplers import SCHEDULES, find_sampler
from sdopt.samplers.noise import RNGS, generator
from sdopt.samplers.resolve import find_schedule

Text = str | Sequence[str] | None

SEEDS = Integer(0, 2**64 - 1)
PIXELS = Integer(1, MAX_SIZE, "512")
FRACTION = Number(0, 1)
INSIDE = Number(0, 1, between=True)
SCALE = Number(-1e4, 1e4, "finite numbers", example="7.5")
SCORE = Number(-1e3, 1e3, "finite numbers", example="6.0")
LEVEL = Number(0, 1e6, "finite numbers")
EMBEDS = Tensor(("prompts", "tokens", "features"))
POOLED = Tensor(("prompts", "features"))


class Options(TypedDict, total=False):
    """The keywords of `Pipeline.__call__` and `Pipeline.denoise`, under diffusers' names."""

    image: Annotated[
        Any,  # PIL; an array [height, width, 3] in 0..1; one of these for each image; latents; or None
        Keyword(
            "a PNG, JPEG or WebP picture to begin from",
            Picture("image", latents=True),
            flag=Flag(metavar="FILE"),
            record="never",
        ),
    ]
    mask_image: Annotated[
        Any,
        Keyword(
            "with --image: white where the picture is painted anew",
            Picture("mask_image"),
            flag=Flag(("--mask",), "FILE"),
            record="never",
        ),
    ]
    mask_blur: Annotated[
        float | None,  # as VaeImageProcessor.blur
        Keyword(
            "blur the mask by a Gaussian of this radius",
            Number(0, 1000, unit="pixels", example="8"),
            0.0,
            flag=Flag(metavar="PIXELS"),
        ),
    ]
    padding_mask_crop: Annotated[
        int | None,
        Keyword(
            "paint only the mask's region, this much wider, at full size",
            Integer(0, MAX_SIZE, "32"),
            otherwise="all",
            flag=Flag(metavar="PIXELS"),
        ),
    ]
    strength: Annotated[
        float | None, Keyword("how much of --image is replaced, 0 to 1", FRACTION, otherwise="the bundle's")
    ]
    denoising_start: Annotated[
        float | None,
        Keyword("go on from this part of the way: --image has noise already", INSIDE, otherwise="the start"),
    ]
    denoising_end: Annotated[
        float | None, Keyword("stop at this part of the way, for a refiner", INSIDE, otherwise="the end")
    ]

    negative_prompt: Annotated[
        Text,
        Keyword(
            "what to steer away from",
            Texts(),
            otherwise="nothing",
            flag=Flag(("--negative",), "PROMPT"),
            record="always",
        ),
    ]
    prompt_2: Annotated[
        Text,
        Keyword(
            "SDXL: the prompt of its second text encoder", Texts(), otherwise="PROMPT", flag=Flag(metavar="PROMPT")
        ),
    ]
    negative_prompt_2: Annotated[
        Text,
        Keyword(
            "SDXL: the negative prompt of its second text encoder",
            Texts(),
            otherwise="the negative prompt",
            flag=Flag(metavar="PROMPT"),
        ),
    ]
    original_size: Annotated[
        tuple[int, int] | None,
        Keyword(
            "SDXL: the size that the picture seems to come from",
            Pair(),
            otherwise="the picture's",
            flag=Flag(metavar=("HEIGHT", "WIDTH")),
            record="always",
        ),
    ]
    crops_coords_top_left: Annotated[
        tuple[int, int] | None,
        Keyword(
            "SDXL: where the picture seems to be cut out",
            Pair("(0, 0)"),
            (0, 0),
            flag=Flag(metavar=("TOP", "LEFT")),
            record="always",
        ),
    ]
    target_size: Annotated[
        tuple[int, int] | None,
        Keyword(
            "SDXL: the size that the picture seems to have",
            Pair(),
            otherwise="the picture's",
            flag=Flag(metavar=("HEIGHT", "WIDTH")),
            record="always",
        ),
    ]
    negative_original_size: Annotated[
        tuple[int, int] | None,
        Keyword(
            "the same for the negative prompt", Pair(), otherwise="the same", flag=Flag(metavar=("HEIGHT", "WIDTH"))
        ),
    ]
    negative_crops_coords_top_left: Annotated[
        tuple[int, int] | None,
        Keyword(
            "the same for the negative prompt", Pair("(0, 0)"), otherwise="the same", flag=Flag(metavar=("TOP", "LEFT"))
        ),
    ]
    negative_target_size: Annotated[
        tuple[int, int] | None,
        Keyword(
            "the same for the negative prompt", Pair(), otherwise="the same", flag=Flag(metavar=("HEIGHT", "WIDTH"))
        ),
    ]
    aesthetic_score: Annotated[float | None, Keyword("SDXL's refiner: how fine the picture is, 1 to 10", SCORE, 6.0)]
    negative_aesthetic_score: Annotated[float | None, Keyword("the same for the negative prompt", SCORE, 2.5)]

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
        str | None,
        Keyword(
            "`sdopt samplers` lists them",
            Name(find_sampler, "the names that `sdopt samplers` lists", '"euler"'),
            otherwise="the checkpoint's own",
        ),
    ]
    schedule: Annotated[
        str | None,
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
            "noise levels in place of --steps, for samplers that take them",
            Several(LEVEL, "[14.6, 3.2, 0.6]"),
            otherwise="spaced by the schedule",
        ),
    ]
    rng: Annotated[
        str,  # "cpu": torch's CPU generator; "cuda:a100", ...: its CUDA generator on that GPU
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
        str,
        Keyword(
            "plain, or a1111: (word:1.3), [word], prompts of any length",
            Choice(("plain", "a1111"), '"a1111"'),
            "plain",
            record="always",
        ),
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
