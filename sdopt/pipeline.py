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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sdopt.bundle.files import Bundle, embedded
from sdopt.bundle.specs import Array, Float32
from sdopt.denoise.board import Prepared
from sdopt.denoise.loop import Step, steps
from sdopt.denoise.model import Conditions
from sdopt.denoise.program import compile_program
from sdopt.denoise.start import has_mask_channels, prepare_canvas
from sdopt.engine import Engine
from sdopt.engine.pool import EnginePool
from sdopt.image import pil as pictures
from sdopt.image import preview as previews
from sdopt.image.vae import Vae
from sdopt.request.options import Options
from sdopt.request.plan import Plan, check_output_type, make_plan
from sdopt.samplers.noise import drawing
from sdopt.text.encode import TextEncoders

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    precision: str = "auto",
    memory: str = "fast",
    threads: int | None = None,
    verify: bool = True,
    paranoid: bool = False,
    trust_engines: bool = False,
    cache: bool = True,
) -> Pipeline:
    """The pipeline of the bundle at `path`; the embedded text-to-emoji model if None.

    `precision`: "fp32", or "bf16" where the processor has it; "auto" is fp32, so that pictures are
    diffusers'. Of engines that `sdopt build` made, those in this precision are taken; with "auto" the newest, but on a
    CPU those in fp32.
    `memory`: "fast" keeps every component that was loaded; "low" frees it when another one is needed.
    `cache`: keep what the engine library makes of the graphs in this user's cache folder (for Stable Diffusion 1.5
    about 4 GB), so that the next process starts sooner and takes less memory.
    `paranoid`: compute the hash of every file anew; else that of a file that has not changed is known.
    Engines that `sdopt build` made are loaded if this user built them; `trust_engines` takes anybody's: they are code.
    Raises: BundleError for a bundle that is damaged or unsafe; BackendError if no engine library is installed.
    """
    bundle = Bundle.open(embedded() if path is None else path, verify=verify, paranoid=paranoid)
    how: dict[str, Any] = {"precision": precision, "memory": memory, "threads": threads}
    return Pipeline(EnginePool(bundle, backend, **how, trust=trust_engines, cache=cache))


class Pipeline:
    """Encode, denoise and decode, on the engines of a pool, which is closed with the pipeline."""

    def __init__(self, pool: EnginePool) -> None:
        self.pool, self.bundle = pool, pool.bundle
        self._text, self._vae = TextEncoders(pool), Vae(pool)

    @property
    def backend(self) -> str:
        """The backend that the engines run on, e.g. "ort"."""
        return self.pool.backend

    @property
    def precision(self) -> str:
        """What pictures are computed in, e.g. "fp32" or "fp16 (vae_decoder bf16)"."""
        return self.pool.precision

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Pictures of `prompt`; `sdopt.request.options.Options` lists the other keywords.

        `callback_on_step_end(pipe, index, timestep, {"latents": sample})` may return other latents, as in diffusers.
        Raises: UsageError for a wrong argument; NumericsError rather than a black picture.
        """
        check_output_type(output_type)
        plan = make_plan(self.bundle, prompt, options)
        check_output_type(output_type, plan.overlays)
        step = None
        for step in self.steps(plan):
            if callback_on_step_end is not None:
                data = {"latents": step.sample}
                step.steer(callback_on_step_end(self, step.index, step.timestep, data))
        assert step is not None  # a table has rows
        images = step.sample if output_type == "latent" else self.finish(plan, step.sample, output_type)
        return Result(images, plan.seeds, tuple(self.parameters(plan, i) for i in range(len(plan.seeds))))

    def denoise(self, prompt: str | Sequence[str] | None = None, **options: Unpack[Options]) -> Iterator[Step]:
        """The steps of one call, one by one; takes what `__call__` takes."""
        return self.steps(make_plan(self.bundle, prompt, options))

    def steps(self, plan: Plan) -> Iterator[Step]:
        """The loop: predict the noise, take the sampler's row, move the sample."""
        ready = self.prepare(plan)
        with ExitStack() as stack:
            engines = {name: stack.enter_context(self.pool.using(name)) for name in ready.program.engines}
            yield from steps(ready.program, ready.board(engines))

    def prepare(self, plan: Plan) -> Prepared:
        """A plan with its texts and pictures encoded, and its program: what is left is the loop."""
        entry = self.bundle.manifest.latents
        size = (plan.height // entry.factor, plan.width // entry.factor)
        draw = drawing(plan.seeds, plan.rng, (len(plan.seeds), entry.channels, *size))
        cond, negative = self._text.conditions(plan)
        encode = partial(self._vae.encode, tile=plan.vae_tile, one_by_one=plan.vae_slice)
        canvas = prepare_canvas(plan, has_mask_channels(self.bundle), draw, encode)
        guided, pool = negative is not None, self.pool
        program = compile_program(plan, canvas, guided=guided, built=pool.built, needs_built=pool.runs_only_built)
        return Prepared(program, canvas, Conditions(cond, negative, canvas.extra), draw)

    def encode(self, prompts: Sequence[str], prompt_style: str = "plain", clip_skip: int = 0) -> Float32:
        """The prompts' embeddings, [prompts, tokens, features]; equal prompts are encoded once."""
        return self._text.encode(prompts, prompts, prompt_style, clip_skip)[0]

    def load_embedding(
        self, source: str | os.PathLike[str] | Array | Mapping[str, Array], token: str | None = None
    ) -> str:
        """The token that prompts may use from now on: a textual inversion from a .safetensors file, or an array
        [n, width] (for SDXL `{"clip_l": ..., "clip_g": ...}`).

        Without `token` it is the one that the file names, or the file's own name (see `sdopt.text.textual_inversion`).
        Raises: UsageError for a file that is not what it should be, a token that is taken, or a bundle that takes none.
        """
        return self._text.add(source, token)

    def parameters(self, plan: Plan, image: int) -> dict[str, Any]:
        """What makes image `image` of a plan again, alone; embeddings by token and digest."""
        recorded = plan.parameters(image)
        used = self._text.used(recorded)
        return {**recorded, "embeddings": used} if used else recorded

    def finish(self, plan: Plan, sample: Float32, output_type: str = "pil") -> Any:
        """The pictures of a plan's last sample: decoded and, with `padding_mask_crop`, laid over their originals."""
        images = self.decode(sample, output_type, vae_tile=plan.vae_tile, vae_slice=plan.vae_slice)
        return [o.over(image) for o, image in zip(plan.overlays, images, strict=True)] if plan.overlays else images

    def preview(self, latents: Float32, scale: int = 1, output_type: str = "pil") -> Any:
        """Small pictures of latents such as `step.denoised`, without the decoder; see `sdopt.image.preview`."""
        return previews.pictures(self.bundle, latents, scale, output_type)

    def decode(
        self, sample: Float32, output_type: str = "pil", *, vae_tile: int | None = None, vae_slice: bool = False
    ) -> Any:
        """The pictures of latents [images, channels, latent_height, latent_width]; see `vae_tile` in Options."""
        decoded = self._vae.decode(sample, vae_tile, vae_slice)
        return pictures.to_pil(decoded) if output_type == "pil" else pictures.to_unit(decoded)

    def engine(self, component: str) -> Engine:
        """The engine of a component, opened if it is not: to have it ready before the first picture."""
        return self.pool.open(component)

    def release(self, component: str) -> None:
        """Free the memory of a component that is no longer needed; it loads again when asked for."""
        self.pool.release(component)

    def close(self) -> None:
        """Free the memory of all components; they load again when asked for."""
        self.pool.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
