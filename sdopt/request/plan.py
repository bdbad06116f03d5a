"""What a caller asks for, checked once and resolved against a bundle, so that the loop needs no `if`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array
from sdopt.errors import UsageError
from sdopt.image.masks import Overlay
from sdopt.image.tiling import MIN_TILE
from sdopt.request import options as read
from sdopt.request.options import MAX_IMAGES, PROMPT_STYLES, Options, Sizes
from sdopt.samplers import SAMPLERS, SamplerTable, sampler_table


@dataclass(frozen=True)
class Plan:
    """A request, resolved: one entry per image in `prompts`, `negative_prompts` and `seeds`."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    prompts_2: tuple[str, ...]
    negative_prompts_2: tuple[str, ...]
    negative_given: bool
    sizes: Sizes
    negative_sizes: Sizes
    seeds: tuple[int, ...]
    height: int
    width: int
    guidance: tuple[float, ...]
    guidance_embedding: int
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
    overlays: tuple[Overlay, ...]
    strength: float
    wishes: Mapping[str, Any]

    @property
    def guided(self) -> bool:
        """Whether the unconditional half ever runs. Ref: Ho & Salimans 2022, arXiv:2207.12598, section 3.2."""
        return max(self.guidance) > 1 and not self.guidance_embedding

    @property
    def continues(self) -> bool:
        """Whether the image has the noise already that the loop begins with."""
        return "denoising_start" in self.sampling

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
            **{name: list(self.sizes[name]) for name in ("original_size", "crops_coords_top_left", "target_size")},
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
    defaults, of_latents = bundle.manifest.defaults, bundle.manifest.latents
    embeds, negative_embeds = options.get("prompt_embeds"), options.get("negative_prompt_embeds")
    each = read.whole("num_images_per_prompt", options.get("num_images_per_prompt", 1), 1, MAX_IMAGES)
    prompts = read.prompts("prompt", prompt if embeds is None else [""] * len(embeds), each)
    sampling = read.sampling(options, defaults.num_inference_steps)
    factor = of_latents.factor
    image, mask, strength = read.picture(options, defaults)
    height, width = read.pixels(options, defaults, factor)
    table = make_table(bundle, sampling, strength)
    guidance, wishes = read.guidance(options, defaults.guidance_scale, len(table))
    embedding = bundle.manifest.conditioning.guidance_embedding
    if embeds is not None and negative_embeds is None and max(guidance) > 1 and not embedding:
        raise UsageError("prompt_embeds without negative_prompt_embeds: give both, or guidance_scale=1")
    shape = (len(prompts), of_latents.channels, height // factor, width // factor)
    latents = options.get("latents")
    if latents is not None and (latents.shape != shape or latents.dtype != "float32"):
        raise UsageError(f"latents: got {latents.dtype} {latents.shape}; these sizes and prompts take float32 {shape}")
    negatives = read.negatives(options.get("negative_prompt"), len(prompts), each)
    second, against = options.get("prompt_2"), options.get("negative_prompt_2")
    if embedding and (any(negatives) or against):
        raise UsageError(
            "negative_prompt: this model takes the guidance scale as an input, and has no negative half; leave it out"
        )
    sizes, negative_sizes, asked = read.sizes(bundle, options, (height, width), image is not None)
    return Plan(
        prompts=prompts,
        negative_prompts=negatives,
        prompts_2=prompts if second is None else read.negatives(second, len(prompts), each),
        negative_prompts_2=negatives if against is None else read.negatives(against, len(prompts), each),
        negative_given=options.get("negative_prompt") is not None or against is not None,
        sizes=sizes,
        negative_sizes=negative_sizes,
        seeds=read.seeds(options.get("seed"), len(prompts)),
        height=height,
        width=width,
        guidance=guidance,
        guidance_embedding=embedding,
        guidance_rescale=read.share("guidance_rescale", options.get("guidance_rescale", 0.0)),
        guidance_batch=read.whole("guidance_batch", options.get("guidance_batch", 2), 1, 2),
        rng=options.get("rng", "cpu"),
        sampling=sampling,
        table=table,
        latents=latents,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative_embeds,
        pooled_prompt_embeds=options.get("pooled_prompt_embeds"),
        negative_pooled_prompt_embeds=options.get("negative_pooled_prompt_embeds"),
        prompt_style=read.one_of("prompt_style", options.get("prompt_style", "plain"), PROMPT_STYLES),
        clip_skip=read.whole("clip_skip", read.given_or(options.get("clip_skip"), 0), 0, 100),
        vae_tile=None if options.get("vae_tile") is None else read.whole("vae_tile", options.get("vae_tile"), MIN_TILE),
        vae_slice=bool(options.get("vae_slice")),
        **read.begun(options, image, mask, height, width, shape),
        strength=strength,
        wishes={**wishes, **asked, **({} if image is None else {"strength": strength, **read.mask_wishes(options)})},
    )


def make_table(bundle: Bundle, sampling: Mapping[str, Any], strength: float = 1.0) -> SamplerTable:
    """The table that a bundle's scheduler and the caller's wishes come to.

    A checkpoint whose scheduler sdopt does not know by name brings its tables along, one for each number of steps.
    Raises: UsageError as `sampler_table` does, and for a number of steps that such a bundle has no table for.
    """
    options = dict(sampling)
    steps = options.pop("num_inference_steps")
    scheduler, probed = bundle.manifest.scheduler, bundle.manifest.sampler_tables
    if probed is None or options.get("sampler") is not None:
        cuts = bundle.manifest.defaults.strength_cuts
        return sampler_table(scheduler, steps, strength=strength, strength_cuts=cuts, **options)
    tables = json.loads(bundle.file(probed).read_bytes())
    name = scheduler["_class_name"]
    if str(steps) not in tables:
        raise UsageError(f"num_inference_steps = {steps}; for {name} this bundle has tables for {', '.join(tables)}")
    given = [key for key, value in options.items() if value is not None] + ["strength"] * (strength < 1)
    if given:
        raise UsageError(f"{', '.join(given)}: {name} takes no options here; name another sampler to use them")
    return SamplerTable.from_json(tables[str(steps)])
