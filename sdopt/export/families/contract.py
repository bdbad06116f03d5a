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
SomeDefaults = Mapping[str, Any]  # some of the fields of the manifest's Defaults


@dataclass(frozen=True)
class PipelineClass:
    """One pipeline class of diffusers whose checkpoints are read.

    `defaults`: where its arguments' defaults differ from those of its family.
    `scheduler_corrections`: what it sets in the configuration of every scheduler that has such an option.
    """

    defaults: SomeDefaults = field(default_factory=dict[str, Any])
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
    """One family. A class of diffusers or transformers is written with its library: "diffusers.AutoencoderKL"."""

    name: str  # as the manifest has it

    # what is read of a checkpoint
    pipelines: Mapping[str, PipelineClass]  # by the name of the class
    models: Mapping[str, tuple[str, ...]]  # components with weights, and their allowed classes; first the usual one
    tokenizers: Mapping[str, tuple[str, ...]]  # in the same way
    optional: tuple[str, ...] = ()  # models and tokenizers that a checkpoint may lack
    not_used: tuple[str, ...] = ()  # other components that a checkpoint may have
    denoiser: str  # the model that predicts; its configuration has the size of pictures
    single_file: str | None = None  # the pipeline class that reads checkpoints of one file, if any does

    # what is written into the bundle
    components: Mapping[str, TracedComponent]  # in the order of their export
    conditioning: Callable[[Checkpoint], Conditioning]  # what the denoiser takes beside sample and timestep
    latents: Callable[[Checkpoint], Latents] = vae.latents  # how the VAE's latents become the denoiser's
    float16_unsafe: Callable[[Checkpoint], tuple[str, ...]] = none_unsafe  # components that overflow in fp16
    float16_attention_unsafe: Callable[[Checkpoint], tuple[str, ...]] = none_unsafe  # those whose attention does
    has_safety_checker: bool = False  # whether its pipelines may require one

    # defaults of pictures; a later line wins, then `pipelines`, then `named_models`
    defaults: SomeDefaults  # of all models; a size only if the denoiser's configuration has none
    schedulers: Mapping[str, SomeDefaults] = field(default_factory=dict[str, SomeDefaults])  # by the scheduler's class
    guidance_embedding: SomeDefaults = field(default_factory=dict[str, Any])  # if that is an input of the denoiser
    named_models: Mapping[str, SomeDefaults] = field(default_factory=dict[str, SomeDefaults])  # by id on the hub

    def builds(self, checkpoint: Checkpoint) -> dict[str, Build]:
        """How each component is made of which this checkpoint has the model, in order."""
        return {name: traced.build for name, traced in self.components.items() if checkpoint.has(traced.model)}
