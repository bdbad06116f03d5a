"""What a family is: everything in which one kind of model differs from another, as data if possible.

A new family is a module in this folder that defines FAMILY, and an entry in FAMILIES of `__init__`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from sdopt.bundle.format import Conditioning, Latents
from sdopt.dataclass import dataclass
from sdopt.export.blocks import vae
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.part import Part
from sdopt.export.single_file.names import Layout

Build = Callable[[Checkpoint], Part]
SomeDefaults = Mapping[str, Any]  # some of the fields of the manifest's Defaults


@dataclass(frozen=True)
class PipelineClass:
    """One pipeline class of diffusers whose checkpoints are read.

    `defaults`: the defaults in which it differs from its family.
    `scheduler_corrections`: options that it sets in the configuration of every scheduler that has them.
    `corrects_size`: it reads a sample_size below 64, written by diffusers before 0.9, as 64.
    """

    defaults: SomeDefaults = field(default_factory=dict[str, Any])
    scheduler_corrections: Mapping[str, Any] = field(default_factory=dict[str, Any])
    corrects_size: bool = False


@dataclass(frozen=True)
class TracedComponent:
    """One component of the bundle: the checkpoint's model that it comes from, and the function that makes its part."""

    model: str
    build: Build


def none_unsafe(checkpoint: Checkpoint) -> tuple[str, ...]:
    """No component: for a family whose components all compute in fp16 without an overflow."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family. A class of diffusers or transformers is written with its library: "diffusers.AutoencoderKL"."""

    name: str  # as the manifest has it

    # what is read of a checkpoint
    pipelines: Mapping[str, PipelineClass]  # by the name of the class
    models: Mapping[str, tuple[str, ...]]  # components with weights -> their allowed classes, the usual one first
    tokenizers: Mapping[str, tuple[str, ...]]  # in the same way
    optional: tuple[str, ...] = ()  # models and tokenizers that a checkpoint may lack
    not_used: tuple[str, ...] = ()  # other components that a checkpoint may have
    denoiser: str  # the model that predicts; its configuration has the size of pictures
    single_file: Mapping[str, tuple[Layout, ...]]  # models -> the ways in which files of the original code have them

    require_supported: Callable[
        [Checkpoint], None
    ]  # raises CheckpointError for what is not exported, by configurations

    # what is written into the bundle
    components: Mapping[str, TracedComponent]  # in the order of their export
    conditioning: Callable[[Checkpoint], Conditioning]  # what the denoiser takes beside sample and timestep
    latents: Callable[[Checkpoint], Latents] = vae.latents  # how the VAE's latents become the denoiser's
    even_sigmas: bool = False  # its pipelines give the scheduler noise levels from 1 down to 1 / steps, evenly spaced
    float16_unsafe: Callable[[Checkpoint], tuple[str, ...]] = none_unsafe  # components that overflow in fp16
    float16_attention_unsafe: Callable[[Checkpoint], tuple[str, ...]] = none_unsafe  # those whose attention does
    has_safety_checker: bool = False  # whether its pipelines may require one

    # defaults of pictures; a later line wins over an earlier one, and `pipelines` over all of them but `named_models`
    defaults: SomeDefaults  # of all models; a size only if the denoiser's configuration has none
    schedulers: Mapping[str, SomeDefaults] = field(default_factory=dict[str, SomeDefaults])  # by the scheduler's class
    guidance_embedding: SomeDefaults = field(default_factory=dict[str, Any])  # if that is an input of the denoiser
    named_models: Mapping[str, SomeDefaults] = field(default_factory=dict[str, SomeDefaults])  # by id on the hub

    def builds(self, checkpoint: Checkpoint) -> dict[str, Build]:
        """The components whose model this checkpoint has, in order -> the function that makes each."""
        return {name: traced.build for name, traced in self.components.items() if checkpoint.has(traced.model)}
