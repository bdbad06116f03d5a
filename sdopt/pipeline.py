"""Text to pictures on engines: encode, denoise, decode.

    pipe = sdopt.load("bundle")
    pipe("a red apple", seed=1).images[0].save("apple.png")

    for step in pipe.denoise("a red apple", seed=1):      # the same, with the loop in the caller's hands
        print(step.index, step.sigma)                     # to cancel, stop iterating
    image = pipe.decode(step.sample)

Ref: Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from sdopt import images as pictures
from sdopt.bundle import Bundle, embedded
from sdopt.conditioning import TextEncoders
from sdopt.engine import Engine, built_components, choose_backend, open_engine
from sdopt.errors import UsageError, choices
from sdopt.guidance import Denoiser
from sdopt.noise import batch, generator
from sdopt.request import Options, Plan, make_plan
from sdopt.specs import Float32, Scalar
from sdopt.stepper import Step, fused_component, fused_steps, host_steps, refuse_nan
from sdopt.tasks import begin
from sdopt.tiling import decode_tiled

if TYPE_CHECKING:
    from typing_extensions import Unpack

OUTPUT_TYPES = ("pil", "np", "latent")


@dataclass(frozen=True)
class Result:
    """The pictures (`images`, in the form that `output_type` names), their seeds, and what makes each one again."""

    images: Any
    seeds: tuple[int, ...]
    parameters: tuple[dict[str, Any], ...]


Callback = Callable[["Pipeline", int, float, dict[str, Float32]], "dict[str, Float32] | None"]


def load(
    path: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    *,
    threads: int | None = None,
    verify: bool = True,
    trust_engines: bool = False,
) -> Pipeline:
    """The pipeline of the bundle at `path`; the embedded text-to-emoji model if None.

    Engines that `sdopt build` made are loaded if this user built them; `trust_engines` takes anybody's: they are code.
    Raises: BundleError for a bundle that is damaged or unsafe; BackendError if no engine library is installed.
    """
    bundle = Bundle.open(embedded() if path is None else path, verify=verify)
    return Pipeline(bundle, backend, threads=threads, trust_engines=trust_engines)


class Pipeline:
    """A bundle and its engines, each loaded when first needed and kept until `release`."""

    def __init__(
        self, bundle: Bundle, backend: str = "auto", *, threads: int | None = None, trust_engines: bool = False
    ) -> None:
        self.bundle = bundle
        self.backend = choose_backend(backend)
        self.threads, self.trust_engines = threads, trust_engines
        self._built = built_components(bundle, self.backend)
        self._engines: dict[str, Engine] = {}
        self._text = TextEncoders(bundle, self.engine)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Pictures of `prompt`; `sdopt.request.Options` lists the other keywords.

        `callback_on_step_end(pipe, index, timestep, {"latents": sample})` may return other latents, as in diffusers.
        Raises: UsageError for a wrong argument; NumericsError rather than a black picture.
        """
        if output_type not in OUTPUT_TYPES:
            raise UsageError(f"output_type = {output_type!r}; allowed are {choices(output_type, OUTPUT_TYPES)}")
        plan = make_plan(self.bundle, prompt, options)
        step = None
        for step in self.steps(plan):
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step.index, step.timestep, {"latents": step.sample}) or {}
                step.sample[...] = changed.get("latents", step.sample)
        assert step is not None  # a table has rows
        sample = step.sample
        images = sample if output_type == "latent" else self.decode(sample, output_type, vae_tile=plan.vae_tile)
        return Result(images, plan.seeds, tuple(plan.parameters(i) for i in range(len(plan.seeds))))

    def denoise(self, prompt: str | Sequence[str] | None = None, **options: Unpack[Options]) -> Iterator[Step]:
        """The steps of one call, one by one; takes what `__call__` takes."""
        return self.steps(make_plan(self.bundle, prompt, options))

    def steps(self, plan: Plan) -> Iterator[Step]:
        """The loop: predict the noise, take the sampler's row, move the sample."""
        draw = self._drawing(plan)
        cond, negative = self._text.conditions(plan)
        canvas = begin(plan, self._joins, draw, self._posterior)
        fused = fused_component(plan, negative is not None, self._built)
        if fused is None:
            denoiser = Denoiser(
                self.engine("unet"), cond, negative, canvas.extra, plan.guidance_batch, plan.guidance_rescale
            )
            yield from host_steps(plan, canvas, denoiser, draw)
        else:
            yield from fused_steps(plan, canvas, self.engine(fused), cond, negative, draw)

    def encode(self, prompts: Sequence[str], prompt_style: str = "plain", clip_skip: int = 0) -> Float32:
        """The prompts' embeddings, [prompts, tokens, features]; equal prompts are encoded once."""
        return self._text.encode(prompts, prompts, prompt_style, clip_skip)[0]

    def decode(self, sample: Float32, output_type: str = "pil", *, vae_tile: int | None = None) -> Any:
        """The pictures of latents [images, channels, latent_height, latent_width]; see `vae_tile` in Options."""
        entry = self.bundle.manifest["latents"]
        scaled = sample / entry["scaling_factor"] + entry["shift_factor"]
        if vae_tile is None:
            decoded = self._decoded(scaled)
        else:
            decoded = decode_tiled(self._decoded, scaled, vae_tile, entry["factor"])
        return pictures.to_pil(decoded) if output_type == "pil" else pictures.to_unit(decoded)

    def _decoded(self, latents: Float32) -> Float32:
        decoded = self.engine("vae_decoder")(latent_sample=latents)["sample"]
        refuse_nan(decoded, "vae_decoder")
        return decoded

    def engine(self, component: str) -> Engine:
        """The engine of a component, loaded if it is not."""
        if component not in self._engines:
            self._engines[component] = open_engine(
                self.bundle, component, self.backend, threads=self.threads, trust=self.trust_engines
            )
        return self._engines[component]

    def release(self, component: str) -> None:
        """Free the memory of a component that is no longer needed; it loads again when asked for."""
        engine = self._engines.pop(component, None)
        if engine is not None:
            engine.close()

    def close(self) -> None:
        for component in list(self._engines):
            self.release(component)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drawing(self, plan: Plan) -> Callable[[], Float32]:
        """Draws standard normal noise, each image's from its own seed, so that a batch equals its images made alone."""
        entry = self.bundle.manifest["latents"]
        shape = (len(plan.seeds), entry["channels"], plan.height // entry["factor"], plan.width // entry["factor"])
        generators = [generator(seed, plan.rng) for seed in plan.seeds]
        return lambda: batch(generators, shape)

    @property
    def _joins(self) -> bool:
        """Whether the UNet takes more channels than the latents have: a mask and a masked picture beside them."""
        return self.bundle.component("unet").inputs[0].shape[1] != self.bundle.manifest["latents"]["channels"]

    def _posterior(self, images: Float32) -> tuple[Float32, Float32]:
        """Mean and standard deviation of the scaled latents of pictures in -1..1."""
        entry = self.bundle.manifest["latents"]
        posterior = self.engine("vae_encoder")(sample=images)
        refuse_nan(posterior["mean"], "vae_encoder")
        scale: Scalar = entry["scaling_factor"]
        mean, half = posterior["mean"] - entry["shift_factor"], posterior["logvar"] / 2
        return mean * scale, np.exp(half) * scale
