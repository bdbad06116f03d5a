"""Keywords that a request gives and that nothing would read: refused, or remarked on.

Each row of RULES says who reads some keywords. Where nobody does, the call is refused. A keyword that diffusers' own
pipelines take without effect, such as a negative prompt where guidance is off, costs one line in the log instead.
A value that leaves everything as it is, such as the default, is no mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdopt.bundle.format import Conditioning
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError
from sdopt.image.pil import is_latents
from sdopt.request.keywords import KEYWORDS, checked


class UnusedError(UsageError):
    """A keyword that has no effect on this bundle, or beside the others."""


@dataclass(frozen=True)
class Reads:
    """What of the keywords is read on a bundle.

    `given`: the keywords, checked. `entry`: what the denoiser takes. `size`: height and width in pixels. `steps` and
    `scales` as they were resolved. `guided`: any call has a negative half. `stochastic`: the steps draw noise.
    """

    given: Mapping[str, Any]
    entry: Conditioning
    size: tuple[int, int]
    steps: int
    scales: Sequence[float]
    guided: bool
    stochastic: bool

    @property
    def scaled(self) -> bool:
        """Whether guidance would be on without an interval."""
        if self.entry.true_guidance:
            return self.guided or self.given["true_cfg_scale"] > 1
        return bool(self.entry.guidance_embedding) or max(self.scales) > 1

    @property
    def prompt(self) -> bool:
        """Whether the prompt is encoded."""
        return self.given["prompt_embeds"] is None

    @property
    def negative_text(self) -> bool:
        """Whether a negative text, which may be empty, is encoded."""
        given = self.given
        zeros = self.entry.zeros_for_empty and given["negative_prompt"] is None and not given["negative_prompt_2"]
        return self.guided and given["negative_prompt_embeds"] is None and not zeros

    @property
    def noise(self) -> bool:
        """Whether any noise may be drawn: to begin with, in the steps, or to encode a picture."""
        given = self.given
        continues = given["denoising_start"] is not None and given["mask_image"] is None
        has_start = given["latents"] is not None or (continues and is_latents(given["image"]))
        return self.stochastic or not has_start or given["hires"] is not None

    def is_given(self, name: str) -> bool:
        """Whether a keyword has a value that would change something."""
        value, own = self.given[name], self.size
        same: dict[str, Any] = {
            "prompt_2": self.given["prompt"],
            "negative_prompt_2": self.given["negative_prompt"],
            "prompt_3": self.given["prompt"],
            "negative_prompt_3": self.given["negative_prompt"],
            "max_sequence_length": self.entry.sequence,
            "original_size": own,
            "target_size": own,
            "negative_original_size": own,
            "negative_target_size": own,
            "negative_crops_coords_top_left": (0, 0),
            "guidance_interval": (0.0, 1.0),
            "num_inference_steps": self.steps,
        }
        if value is None or hasattr(value, "shape"):
            return value is not None
        if "prompt" in name and not any(value):  # empty texts
            return False
        return value not in (KEYWORDS[name].default, same.get(name), "")


@dataclass(frozen=True)
class Rule:
    """`keywords` have an effect where `read` says so. `needs` is the end of the sentence otherwise.

    `remark`: diffusers takes them without effect, so that they cost a line in the log and not the picture.
    """

    keywords: tuple[str, ...]
    read: Callable[[Reads], bool]
    needs: str
    remark: bool = False


def _numbered(*names: str) -> tuple[Rule, ...]:
    """The rules of SDXL's numbers: a UNet takes those that its `time_ids` name."""
    needs = "this model does not take it (SDXL and its refiner do); leave it out"
    return tuple(
        Rule((name, f"negative_{name}"), lambda reads, name=name: name in reads.entry.time_ids, needs) for name in names
    )


_OFF = "guidance is off, so that there is no negative half; give guidance_scale=7.5, or leave it out"
_NEGATIVE = (
    "negative_prompt", "negative_prompt_2", "negative_prompt_3", "negative_prompt_embeds",
    "negative_pooled_prompt_embeds", "negative_original_size", "negative_crops_coords_top_left",
    "negative_target_size", "negative_aesthetic_score", "guidance_rescale", "guidance_batch",
)  # fmt: skip
RULES = (
    Rule(
        ("prompt_2", "negative_prompt_2"),
        lambda reads: len(reads.entry.encoders) > 1,
        "this model has one text encoder; leave it out, and write all into prompt or negative_prompt",
    ),
    Rule(
        ("prompt_3", "negative_prompt_3"),
        lambda reads: len(reads.entry.encoders) > 2,
        "this model has no third text encoder; leave it out, and write all into prompt or negative_prompt",
    ),
    Rule(
        ("max_sequence_length",),
        lambda reads: reads.entry.sequence > 0,
        "this model has no T5, which SD3 and Flux have; leave it out",
    ),
    Rule(
        ("max_sequence_length",),
        lambda reads: reads.prompt or reads.negative_text,
        "the embeddings that are given have their tokens; leave it out",
    ),
    Rule(
        ("true_cfg_scale",),
        lambda reads: reads.entry.true_guidance,
        "this model is guided by guidance_scale; give that in its place",
    ),
    Rule(
        ("true_cfg_scale",),
        lambda reads: reads.guided,
        "there is no negative half without a negative prompt; give negative_prompt, or leave it out",
        remark=True,
    ),
    Rule(
        ("guidance_scale",),
        lambda reads: bool(reads.entry.guidance_embedding) or not reads.entry.true_guidance,
        "this model was distilled without a guidance scale; leave it out, or give negative_prompt and true_cfg_scale=4",
        remark=True,
    ),
    *_numbered("original_size", "crops_coords_top_left", "target_size", "aesthetic_score"),
    Rule(
        ("guidance_interval",),
        lambda reads: reads.scaled,
        "guidance is off in every call; give guidance_scale=7.5, or leave it out",
    ),
    Rule(
        ("guidance_rescale",),
        lambda reads: reads.entry.has_halves,
        "this model takes the guidance scale as an input, and has no second half to compare with; leave it out",
    ),
    Rule(
        ("prompt_style",),
        lambda reads: reads.prompt or reads.negative_text,
        "prompt_embeds take the place of the texts that it is for; leave it out, or give prompt",
    ),
    Rule(
        ("clip_skip",),
        lambda reads: reads.prompt or (reads.given["prompt_style"] == "a1111" and reads.negative_text),
        "prompt_embeds are encoded already; leave it out, and encode with it: pipe.encode(prompts, clip_skip=1)",
    ),
    Rule(
        ("clip_skip",),
        lambda reads: any(encoder.join == "features" for encoder in reads.entry.encoders),
        "this model reads no layer of CLIP, but its pooled text; leave it out",
    ),
    Rule(
        ("cache_depth",),
        lambda reads: reads.given["cache_interval"] > 1 or reads.given["cache_schedule"] is not None,
        "every call is a full one; give cache_interval=2, or leave it out",
    ),
    Rule(
        ("strength",),
        lambda reads: reads.given["denoising_start"] is None,
        "denoising_start says where the loop begins; leave out one of the two",
    ),
    Rule(
        ("num_inference_steps",),
        lambda reads: reads.given["timesteps"] is None and reads.given["sigmas"] is None,
        "timesteps and sigmas decide the number of steps; leave out num_inference_steps",
    ),
    Rule(
        _NEGATIVE,
        lambda reads: reads.guided or reads.entry.true_guidance,
        _OFF,
        remark=True,
    ),
    Rule(
        _NEGATIVE,
        lambda reads: reads.guided or not reads.entry.true_guidance,
        "there is no negative half; give negative_prompt and true_cfg_scale=4.0, or leave it out",
        remark=True,
    ),
    Rule(
        ("seed", "rng"),
        lambda reads: reads.noise,
        "the latents are given, and this sampler draws no noise; every seed makes this picture",
        remark=True,
    ),
)  # fmt: skip


def without_effect(entry: Conditioning) -> set[str]:
    """The keywords that have no effect on a bundle, whatever else a request gives. `entry`: what its UNet takes."""
    reads = Reads(checked({}), entry, (0, 0), 1, [7.5], guided=True, stochastic=True)
    return {name for rule in RULES if not rule.read(reads) for name in rule.keywords}


def remarks(reads: Reads) -> tuple[str, ...]:
    """What to say about keywords that have no effect and are allowed.

    Raises: UnusedError for a keyword that nothing would read.
    """
    lines: list[str] = []
    for rule in RULES:
        for name in rule.keywords:
            if not reads.is_given(name) or rule.read(reads):
                continue
            text = f"{name} has no effect: {rule.needs}"
            if not rule.remark:
                raise UnusedError(text, name)
            lines.append(text)
    return tuple(lines)
