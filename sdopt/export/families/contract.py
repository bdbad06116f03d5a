"""What a family is: all that sets one kind of model apart from another, as data where that is possible.

A new family is one module beside this one, whose FAMILY is filled in, and one row of FAMILIES in `__init__`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdopt.bundle.format import Conditioning, Latents
from sdopt.export.blocks import vae
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.part import Part

Build = Callable[[Checkpoint], Part]
Known = Mapping[str, Any]  # some of the fields of the manifest's Defaults


@dataclass(frozen=True)
class PipelineClass:
    """One pipeline class of diffusers whose checkpoints are read.

    `defaults`: where its arguments' defaults differ from those of its family.
    `scheduler_corrections`: what it sets in the configuration of every scheduler that has such an option.
    """

    defaults: Known = field(default_factory=dict[str, Any])
    scheduler_corrections: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class TracedComponent:
    """One component of the bundle: the model of the checkpoint that it comes from, and how it becomes a part."""

    model: str
    build: Build


def none_unsafe(checkpoint: Checkpoint) -> tuple[str, ...]:
    """For a family whose components compute in fp16 without an overflow."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family; a class of diffusers or transformers is written with its library, "diffusers.AutoencoderKL".

    What is read of a checkpoint
        `pipelines`           the pipeline classes of diffusers
        `models`              components that have weights, and the classes that each may be of; first the usual one
        `tokenizers`          the same for tokenizers
        `optional`            models and tokenizers that may be null or missing
        `not_used`            other components that a checkpoint may have, and that are left out
        `denoiser`            the model that predicts; its configuration has the size of pictures
        `single_file`         the pipeline class that reads its checkpoints of one file, if any
    What is written into the bundle
        `components`          in order of their export
        `conditioning`        what the denoiser takes beside the sample and the timestep
        `latents`             how the VAE's latents become the denoiser's
        `float16_unsafe`      the components that overflow in fp16
        `float16_attention_unsafe`  those of which only the attention does
        `has_safety_checker`  whether its pipelines may ask for one
    Defaults of pictures, each over those before it; a checkpoint's generation_config.json comes after them
        `defaults`            of the family
        `schedulers`          by the class of the scheduler
        `guidance_embedding`  of a denoiser that takes the guidance scale as an input
        `pipelines`           by the class of the pipeline
        `named_models`        by the model's id on the hub, as its model card runs it
    """

    name: str
    pipelines: Mapping[str, PipelineClass]
    models: Mapping[str, tuple[str, ...]]
    tokenizers: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    not_used: tuple[str, ...] = ()
    denoiser: str
    single_file: str | None = None
    components: Mapping[str, TracedComponent]
    conditioning: Callable[[Checkpoint], Conditioning]
    latents: Callable[[Checkpoint], Latents] = vae.latents
    float16_unsafe: Callable[[Checkpoint], tuple[str, ...]] = none_unsafe
    float16_attention_unsafe: Callable[[Checkpoint], tuple[str, ...]] = none_unsafe
    has_safety_checker: bool = False
    defaults: Known
    schedulers: Mapping[str, Known] = field(default_factory=dict[str, Known])
    guidance_embedding: Known = field(default_factory=dict[str, Any])
    named_models: Mapping[str, Known] = field(default_factory=dict[str, Known])

    def builds(self, checkpoint: Checkpoint) -> dict[str, Build]:
        """How each component is made of which this checkpoint has the model, in order."""
        return {name: traced.build for name, traced in self.components.items() if checkpoint.has(traced.model)}
