"""A request, checked once and resolved against a bundle, so that the loop has nothing left to decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from sdopt.bundle import adapter
from sdopt.bundle.adapter import Adapter
from sdopt.bundle.files import Bundle
from sdopt.bundle.format import UNET, Defaults
from sdopt.bundle.joined import PICTURES
from sdopt.bundle.presets import Preset
from sdopt.bundle.specs import Array
from sdopt.bundle.weights import Overlay
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices, shown
from sdopt.image.masks import Overlay as PictureOverlay
from sdopt.request import hires, pictures, presets, together, unused
from sdopt.request.autoencoder import autoencoder
from sdopt.request.cache import FeatureCache, feature_cache
from sdopt.request.control import Control, steering
from sdopt.request.features import Feature
from sdopt.request.image_prompt import ImagePrompt, image_prompts
from sdopt.request.keywords import checked, recorded
from sdopt.request.named import OpenAdapter
from sdopt.request.options import Options
from sdopt.request.sampling import make_labels, make_table
from sdopt.request.together import Sizes
from sdopt.samplers import SamplerTable
from sdopt.samplers.labels import Labels


@dataclass(frozen=True)
class Plan:
    """A request, resolved: one entry per image in `prompts`, `negative_prompts` and `seeds`.

    A field with the name of a keyword holds its value. `options` are all keywords as they were given. `resolved` has
    the values that some of them took on this bundle. `second` is the second pass of hires fix, whose `image_latents`
    the first pass makes. `autoencoder`: the tiny one that `vae` names. `remarks` are sentences about keywords that have
    no effect. `measured`: the preset. `denoiser`: the component that predicts. `guidance` is the scale of each call
    between its two halves, `guidance_input` the scale that the denoiser is told, empty for one that takes none.
    `sequence`: the tokens of the text encoder that reads one sequence, 0 without one.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    prompts_2: tuple[str, ...]
    negative_prompts_2: tuple[str, ...]
    prompts_3: tuple[str, ...]
    negative_prompts_3: tuple[str, ...]
    negative_given: bool
    sizes: Sizes
    negative_sizes: Sizes
    seeds: tuple[int, ...]
    height: int
    width: int
    denoiser: str
    guidance: tuple[float, ...]
    guidance_input: tuple[float, ...]
    guidance_embedding: int
    guidance_rescale: float
    guidance_batch: int
    rng: str
    sampling: Mapping[str, Any]
    table: SamplerTable
    labels: Labels
    latents: Array | None
    prompt_embeds: Array | None
    negative_prompt_embeds: Array | None
    pooled_prompt_embeds: Array | None
    negative_pooled_prompt_embeds: Array | None
    prompt_style: str
    clip_skip: int
    sequence: int
    vae: str | None
    vae_tile: int | None
    vae_slice: bool
    image: Array | None
    image_latents: Array | None
    mask: Array | None
    overlays: tuple[PictureOverlay, ...]
    strength: float
    options: Mapping[str, Any]
    resolved: Mapping[str, Any]
    adapters: Overlay | None = None
    controls: tuple[Control, ...] = ()
    guess_mode: bool = False
    image_prompts: tuple[ImagePrompt, ...] = ()
    features: tuple[Feature, ...] = ()
    cache: FeatureCache | None = None
    autoencoder: Adapter | None = None
    second: Plan | None = None
    remarks: tuple[str, ...] = ()
    measured: Preset | None = None

    @property
    def passes(self) -> tuple[Plan, ...]:
        """The plan of each pass: one or, with hires fix, two. Latents that the first one makes begin the second."""
        return (self,) if self.second is None else (replace(self, second=None), self.second)

    @property
    def calls(self) -> int:
        """The number of calls of the sampler, in all passes."""
        return sum(len(one.table) for one in self.passes)

    @property
    def guided(self) -> bool:
        """Whether the unconditional half ever runs. Ref: Ho & Salimans 2022, arXiv:2207.12598, section 3.2."""
        return max(self.guidance) > 1

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The texts of every image, one for each text encoder."""
        return list(zip(self.prompts, self.prompts_2, self.prompts_3, strict=True))

    @property
    def negative_texts(self) -> list[tuple[str, ...]]:
        """The negative ones."""
        return list(zip(self.negative_prompts, self.negative_prompts_2, self.negative_prompts_3, strict=True))

    @property
    def continues(self) -> bool:
        """Whether the image already has the noise that the loop begins with."""
        return "denoising_start" in self.sampling

    def parameters(self, image: int) -> dict[str, Any]:
        """The parameters that make image number `image` again, alone."""
        own: dict[str, Any] = {
            "prompt": self.prompts[image],
            "negative_prompt": self.negative_prompts[image] if self.negative_given else None,
            "seed": self.seeds[image],
        }
        for n in (2, 3):
            for name in (f"prompt_{n}", f"negative_prompt_{n}"):
                texts, first = (getattr(self, key.replace("prompt", "prompts")) for key in (name, name[:-2]))
                own[name] = texts[image] if texts != first else None
        sampled_by = {"sampled_by": self.labels.sampler, "schedule_type": self.labels.schedule}
        second = {} if self.second is None else {"hires_calls": len(self.second.table)}
        seen = [one.described(image) for one in (*self.controls, *self.features)]
        controls = {"controls": seen} if seen else {}
        prompts = {"image_prompts": [prompt.described() for prompt in self.image_prompts]} if self.image_prompts else {}
        decoded_by = {} if self.autoencoder is None else {"vae_digest": self.autoencoder.digest}
        options = recorded({**self.options, **own}, self.resolved)
        return {**options, **sampled_by, **second, **controls, **prompts, **decoded_by}


OUTPUT_TYPES = ("pil", "np", "latent")


def check_output_type(output_type: str, overlays: Sequence[PictureOverlay] = ()) -> None:
    """Raises: UsageError for a word that is unknown, or where pictures are laid over their originals."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:  # pyright: ignore[reportUnnecessaryIsInstance]
        text = f"output_type = {shown(output_type)}; allowed are {choices(output_type, OUTPUT_TYPES)}"
        raise UsageError(text, "output_type")
    if overlays and output_type != "pil":
        text = f"output_type = {output_type!r}; with padding_mask_crop pictures are PIL images: 'pil'"
        raise UsageError(text, "output_type")


def arguments_to_build(plan: Plan, defaults: Defaults) -> str:
    """The arguments of `sdopt build` for a plan: its adapters, and its sizes unless the default profile is enough."""
    controls = [control for control in plan.controls if control.scales.any()]
    tiny = () if plan.autoencoder is None else (plan.autoencoder,)
    used = (*controls, *plan.features, *plan.image_prompts, *tiny)
    adapters = "".join(f" --adapter {one.name}" for one in used)
    images, pictures = len(plan.seeds), max((prompt.pictures for prompt in plan.image_prompts), default=1)
    more = "" if pictures <= PICTURES[2] else f" pictures=1:1:{pictures}"
    if (plan.height, plan.width) == (defaults.height, defaults.width) and images <= 4 and not more:
        return adapters
    return f'{adapters} --profile "batch=1:1:{max(4, images)} height={plan.height} width={plan.width}{more}"'


def make_plan(
    bundle: Bundle,
    prompt: str | Sequence[str] | None,
    options: Options,
    adapters: Overlay | None = None,
    open_adapter: OpenAdapter | None = None,
) -> Plan:
    """The plan for `prompt` on this bundle, whose weights `adapters` change. `open_adapter`: opens one by its name.

    A keyword of a preset that has no effect beside those of the caller is left out, and a remark says so.
    Raises: UsageError naming the argument, its value and what is allowed; BundleError for a damaged preset.
    """
    given = options if prompt is None else {**options, "prompt": prompt}

    def make(keywords: Mapping[str, Any]) -> Plan:
        return _make_plan(bundle, keywords, adapters, open_adapter)

    plan, chosen, notes = presets.applied(bundle, given, make)
    return plan if chosen is None else replace(plan, remarks=(*plan.remarks, *notes), measured=chosen)


def _make_plan(
    bundle: Bundle, options: Mapping[str, Any], adapters: Overlay | None, open_adapter: OpenAdapter | None
) -> Plan:
    """The plan of keywords, those of a preset among them."""
    given = checked(options)
    hires.check(given)
    opens = open_adapter or partial(adapter.open_adapter, bundle)
    plan = _plan(bundle, given, _scaled(adapters, given["lora_scale"]), opens)
    if given["hires"] is not None:
        plan = _with_second_pass(bundle, given, plan, opens)
    scale: float | list[float] = plan.resolved["guidance_scale"]
    reads = unused.Reads(
        given,
        bundle.manifest.conditioning,
        (plan.height, plan.width),
        plan.labels.steps,
        scale if isinstance(scale, list) else [scale],
        any(one.guided for one in plan.passes),
        plan.table.stochastic,
    )
    return replace(plan, remarks=unused.remarks(reads))


def _with_second_pass(bundle: Bundle, given: Mapping[str, Any], first: Plan, opens: OpenAdapter) -> Plan:
    """A plan and the second pass of its hires fix."""
    latents, images = bundle.manifest.latents, len(first.seeds)
    height, width = hires.size(given["hires"], first.height, first.width, latents.pixels)
    shape = (images, latents.channels, height // latents.factor, width // latents.factor)
    try:
        second = _plan(bundle, hires.second_pass(given, first.seeds, height, width, shape), first.adapters, opens)
    except UsageError as error:
        raise hires.renamed(error) from error
    resolved = {"hires_strength": second.strength, "hires_steps": second.sampling["num_inference_steps"]}
    # each pass has sizes of its own: recorded, the first one's would be those of both
    own = {name for name in together.SIZE_KEYWORDS if given[name] is None}
    kept = {name: value for name, value in first.resolved.items() if name not in own}
    return replace(first, second=second, resolved={**kept, **resolved})


def _plan(bundle: Bundle, given: Mapping[str, Any], adapters: Overlay | None, opens: OpenAdapter) -> Plan:
    """The plan of one pass, for keywords that are checked."""
    manifest = bundle.manifest
    defaults, conditioning, factor = manifest.defaults, manifest.conditioning, manifest.latents.factor
    embedding = conditioning.guidance_embedding

    each: int = given["num_images_per_prompt"]
    prompts = together.prompts(given, each)
    count = len(prompts)
    negatives = together.texts_beside(given, "negative_prompt", ("",) * count, each)
    if not conditioning.has_halves and (any(negatives) or given["negative_prompt_2"]):
        raise UsageError(
            "negative_prompt: this model takes the guidance scale as an input, and has no negative half; leave it out",
            "negative_prompt",
        )
    embeds = together.embeddings(given, count, each, bool(conditioning.pooling), conditioning.has_halves)
    _check_widths(bundle, embeds)

    strength = pictures.picture(given, defaults)
    height, width = pictures.pixels(given, defaults, manifest.latents)
    shape = (count, manifest.latents.channels, height // factor, width // factor)
    sampling = together.sampling(given, defaults.num_inference_steps)
    table = make_table(bundle, sampling, strength, shape[2:], masked=given["mask_image"] is not None)
    labels = make_labels(bundle, sampling)
    sampling["num_inference_steps"] = labels.steps
    negative_given = given["negative_prompt"] is not None or any(given[f"negative_prompt_{n}"] for n in (2, 3))
    has_negative = negative_given or given["negative_prompt_embeds"] is not None
    guidance, told, scale = together.scales(given, defaults.guidance_scale, len(table), conditioning, has_negative)
    sequence = together.sequence(given, bundle)
    pictured = given["image"] is not None
    scored = "aesthetic_score" in conditioning.time_ids
    sizes, negative_sizes, sizes_record = together.sizes(given, (height, width), pictured, scored)
    resolved = {"height": height, "width": width, "guidance_scale": scale, **sampling, **sizes_record}
    if sequence:
        resolved["max_sequence_length"] = sequence
    if pictured:
        resolved["strength"] = strength
    cache = feature_cache(given, len(table))
    if cache is not None and manifest.denoiser != UNET:
        keyword = "cache_schedule" if given["cache_schedule"] is not None else "cache_interval"
        text = (
            "a feature cache keeps what the deep layers of a UNet give, and this model has a transformer; leave it out"
        )
        raise UsageError(f"{keyword}: {text}", keyword)
    if cache is not None:
        resolved["cache_depth"] = cache.depth
    values: dict[str, Any] = {field.name: given[field.name] for field in fields(Plan) if field.name in given}
    values |= {"height": height, "width": width, "strength": strength, **embeds}
    values |= pictures.prepare_start(given, height, width, shape, each)
    values["latents"] = pictures.given_latents(given, shape)
    values |= steering(given, bundle, opens, (height, width), count, len(table), values["overlays"])
    values["image_prompts"] = image_prompts(given, bundle, opens, max(guidance) > 1)
    return Plan(
        **values,
        prompts=prompts,
        negative_prompts=negatives,
        prompts_2=together.texts_beside(given, "prompt_2", prompts, each),
        negative_prompts_2=together.texts_beside(given, "negative_prompt_2", negatives, each),
        prompts_3=together.texts_beside(given, "prompt_3", prompts, each),
        negative_prompts_3=together.texts_beside(given, "negative_prompt_3", negatives, each),
        negative_given=negative_given,
        sizes=sizes,
        negative_sizes=negative_sizes,
        seeds=together.seeds(given["seed"], count),
        denoiser=manifest.denoiser,
        guidance=guidance,
        guidance_input=told,
        guidance_embedding=embedding,
        sequence=sequence,
        sampling=sampling,
        table=table,
        labels=labels,
        options=given,
        resolved=resolved,
        adapters=adapters,
        cache=cache,
        autoencoder=autoencoder(given["vae"], bundle, opens),
    )


def _scaled(adapters: Overlay | None, scale: float) -> Overlay | None:
    """Raises: UsageError for a scale where no LoRA is in use."""
    if adapters is not None and adapters.digest:
        return adapters.scaled(scale)
    if scale != 1:
        raise UsageError(
            f"lora_scale = {scale:g}: no LoRA is in use; load one first, pipe.load_lora_weights(FILE)", "lora_scale"
        )
    return None


def _check_widths(bundle: Bundle, embeds: Mapping[str, Any]) -> None:
    """Raises: UsageError for embeddings whose width is not the one that the UNet takes."""
    inputs = {spec.name: spec for spec in bundle.denoiser.inputs}
    for name, array in embeds.items():
        tensor = "text_embeds" if "pooled" in name else "encoder_hidden_states"
        width = inputs[tensor].shape[-1] if tensor in inputs else None
        if array is not None and isinstance(width, int) and array.shape[-1] != width:
            raise UsageError(f"{name}: got float32 {array.shape}; this model takes {width} features", name)
