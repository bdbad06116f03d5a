"""A request, checked once and resolved against a bundle, so that the loop has nothing left to decide."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sdopt.bundle.files import Bundle
from sdopt.bundle.format import Defaults
from sdopt.bundle.specs import Array
from sdopt.errors import UsageError, choices
from sdopt.image.masks import Overlay
from sdopt.request import together
from sdopt.request.keywords import checked, recorded
from sdopt.request.options import Options
from sdopt.request.together import Sizes
from sdopt.samplers import SAMPLERS, SamplerTable, sampler_table
from sdopt.samplers.flow import dynamic_mu


@dataclass(frozen=True)
class Plan:
    """A request, resolved: one entry per image in `prompts`, `negative_prompts` and `seeds`.

    A field with the name of a keyword holds its value. `options` are all keywords as they were given. `resolved` has
    the values that some of them took on this bundle.
    """

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
    options: Mapping[str, Any]
    resolved: Mapping[str, Any]

    @property
    def guided(self) -> bool:
        """Whether the unconditional half ever runs. Ref: Ho & Salimans 2022, arXiv:2207.12598, section 3.2."""
        return max(self.guidance) > 1 and not self.guidance_embedding

    @property
    def continues(self) -> bool:
        """Whether the image already has the noise that the loop begins with."""
        return "denoising_start" in self.sampling

    def parameters(self, image: int) -> dict[str, Any]:
        """The parameters that make image number `image` again, alone."""
        own: dict[str, Any] = {
            "prompt": self.prompts[image],
            "negative_prompt": self.negative_prompts[image] if self.negative_given else None,
            "prompt_2": self.prompts_2[image] if self.prompts_2 != self.prompts else None,
            "negative_prompt_2": (
                self.negative_prompts_2[image] if self.negative_prompts_2 != self.negative_prompts else None
            ),
            "seed": self.seeds[image],
        }
        sampled_by = SAMPLERS[self.table.name].title if self.table.name in SAMPLERS else self.table.name
        return {**recorded({**self.options, **own}, self.resolved), "sampled_by": sampled_by}


OUTPUT_TYPES = ("pil", "np", "latent")


def check_output_type(output_type: str, overlays: Sequence[Overlay] = ()) -> None:
    """Raises: UsageError for a word that is unknown, or where pictures are laid over their originals."""
    if output_type not in OUTPUT_TYPES:
        text = f"output_type = {output_type!r}; allowed are {choices(str(output_type), OUTPUT_TYPES)}"
        raise UsageError(text, "output_type")
    if overlays and output_type != "pil":
        text = f"output_type = {output_type!r}; with padding_mask_crop pictures are PIL images: 'pil'"
        raise UsageError(text, "output_type")


def sizes_to_build(plan: Plan, defaults: Defaults) -> str:
    """The `--profile` argument of `sdopt build` for a plan; empty if the default profile is enough."""
    images = len(plan.seeds)
    if (plan.height, plan.width) == (defaults.height, defaults.width) and images <= 4:
        return ""
    return f' --profile "batch=1:1:{max(4, images)} height={plan.height} width={plan.width}"'


def make_plan(bundle: Bundle, prompt: str | Sequence[str] | None, options: Options) -> Plan:
    """The plan for `prompt` on this bundle.

    Raises: UsageError naming the argument, its value and what is allowed.
    """
    given = checked(options if prompt is None else {**options, "prompt": prompt})
    manifest = bundle.manifest
    defaults, conditioning, factor = manifest.defaults, manifest.conditioning, manifest.latents.factor
    embedding = conditioning.guidance_embedding

    each: int = given["num_images_per_prompt"]
    prompts = together.prompts(given, each)
    count = len(prompts)
    negatives = together.texts_beside(given, "negative_prompt", ("",) * count, each)
    if embedding and (any(negatives) or given["negative_prompt_2"]):
        raise UsageError(
            "negative_prompt: this model takes the guidance scale as an input, and has no negative half; leave it out",
            "negative_prompt",
        )
    embeds = together.embeddings(given, count, each, bool(conditioning.pooled), not embedding)
    _check_widths(bundle, embeds)

    strength = together.picture(given, defaults)
    height, width = together.pixels(given, defaults, factor)
    shape = (count, manifest.latents.channels, height // factor, width // factor)
    sampling = together.sampling(given, defaults.num_inference_steps)
    table = make_table(bundle, sampling, strength, shape[2:])
    guidance, scale = together.guidance(given, defaults.guidance_scale, len(table))
    pictured = given["image"] is not None
    scored = "aesthetic_score" in conditioning.time_ids
    sizes, negative_sizes, sizes_record = together.sizes(given, (height, width), pictured, scored)
    resolved = {"height": height, "width": width, "guidance_scale": scale, **sampling, **sizes_record}
    if pictured:
        resolved["strength"] = strength
    values: dict[str, Any] = {field.name: given[field.name] for field in fields(Plan) if field.name in given}
    values |= {"height": height, "width": width, "strength": strength, **embeds}
    values |= together.prepare_start(given, height, width, shape, each)
    values["latents"] = together.given_latents(given, shape)
    return Plan(
        **values,
        prompts=prompts,
        negative_prompts=negatives,
        prompts_2=together.texts_beside(given, "prompt_2", prompts, each),
        negative_prompts_2=together.texts_beside(given, "negative_prompt_2", negatives, each),
        negative_given=given["negative_prompt"] is not None or bool(given["negative_prompt_2"]),
        sizes=sizes,
        negative_sizes=negative_sizes,
        seeds=together.seeds(given["seed"], count),
        guidance=guidance,
        guidance_embedding=embedding,
        sampling=sampling,
        table=table,
        options=given,
        resolved=resolved,
    )


def _check_widths(bundle: Bundle, embeds: Mapping[str, Any]) -> None:
    """Raises: UsageError for embeddings whose width is not the one that the UNet takes."""
    inputs = {spec.name: spec for spec in bundle.component("unet").inputs}
    for name, array in embeds.items():
        tensor = "text_embeds" if "pooled" in name else "encoder_hidden_states"
        width = inputs[tensor].shape[-1] if tensor in inputs else None
        if array is not None and isinstance(width, int) and array.shape[-1] != width:
            raise UsageError(f"{name}: got float32 {array.shape}; this model takes {width} features", name)


def make_table(
    bundle: Bundle, sampling: Mapping[str, Any], strength: float = 1.0, size: Sequence[int] | None = None
) -> SamplerTable:
    """The sampler table for a bundle's scheduler and the caller's keywords; `size` is the latents' height and width.

    If sdopt does not know the scheduler by name, the bundle holds its tables, one for each number of steps.
    Raises: UsageError as `sampler_table` does, and for a number of steps that the bundle has no table for.
    """
    options = dict(sampling)
    steps = options.pop("num_inference_steps")
    scheduler, probed = bundle.manifest.scheduler, bundle.manifest.sampler_tables
    if probed is None or options.get("sampler") is not None:
        cuts = bundle.manifest.defaults.strength_cuts
        if scheduler.get("use_dynamic_shifting"):
            options.setdefault("mu", _mu(bundle, size))
        elif "mu" in options:
            text = "mu: the noise levels of this model do not depend on the size of the picture; leave it out"
            raise UsageError(text, "mu")
        return sampler_table(scheduler, steps, strength=strength, strength_cuts=cuts, **options)
    tables = json.loads(bundle.file(probed).read_bytes())
    name = scheduler["_class_name"]
    if str(steps) not in tables:
        raise UsageError(
            f"num_inference_steps = {steps}; for {name} this bundle has tables for {', '.join(tables)}",
            "num_inference_steps",
        )
    given = [key for key, value in options.items() if value is not None]
    if strength < 1:
        given.append("strength")
    if given:
        raise UsageError(
            f"{', '.join(given)}: {name} takes no options here; name another sampler to use them", given[0]
        )
    return SamplerTable.from_json(tables[str(steps)])


def _mu(bundle: Bundle, size: Sequence[int] | None) -> float:
    """The shift of a flow schedule that depends on the size of the picture; by default that of the bundle."""
    manifest = bundle.manifest
    latents, defaults = manifest.latents, manifest.defaults
    height, width = size or (defaults.height // latents.factor, defaults.width // latents.factor)
    return dynamic_mu(manifest.scheduler, (height // latents.patch) * (width // latents.patch))
