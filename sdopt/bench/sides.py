"""The sides that are measured: what each of them offers, and sdopt itself.

The components that a side may have:

text_encoder   the prompt to embeddings, tokenizer included; with guidance the empty prompt too
unet           one call; with guidance it has both halves
step           UNet, guidance and sampler in one launch, in place of `unet`; only `sdopt.bench.built` has it
host_step      the host's time for a step of that loop, which does not wait for the GPU
loop_step      one step of the loop with a UNet that answers at once: guidance, sampler, checks
vae_decoder    latents to a picture in 0..1
picture        prompt and latents to a picture in 0..1, end to end
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from sdopt.bench.cases import Case
from sdopt.bench.timing import Call, timed
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Float32, TensorSpec
from sdopt.engine import BACKENDS
from sdopt.engine.pool import EnginePool
from sdopt.pipeline import Pipeline

COMPONENTS = ("text_encoder", "unet", "step", "loop_step", "host_step", "vae_decoder", "picture")
OURS = "sdopt"


@dataclass(frozen=True)
class Inputs:
    """What every side is given: standard normal latents, and the UNet's inputs by name, made by the reference."""

    latents: Float32
    unet: Mapping[str, Float32]


class Side(Protocol):
    """A loaded program that makes the case's picture, with its components as timed calls."""

    name: str
    kind: str
    backend: str
    precision: str
    note: str
    versions: Mapping[str, str]
    engine_bytes: Mapping[str, int]
    half_level: float  # half the step between the levels of a rounded picture: smaller differences do not count

    def calls(self, inputs: Inputs) -> Mapping[str, Call]: ...
    def close(self) -> None: ...


def latents_of(case: Case, bundle: Bundle, seed: int = 0) -> Float32:
    """The case's standard normal latents [batch, channels, height / factor, width / factor]."""
    entry = bundle.manifest.latents
    shape = (case.batch, entry.channels, case.height // entry.factor, case.width // entry.factor)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class SdoptSide:
    """sdopt, on the case's backend."""

    name = kind = OURS
    note = "its cold starts, and their memory, are those that find the cache of an earlier start"
    half_level = 0.0

    def __init__(self, case: Case, bundle: Path, threads: int) -> None:
        self._case = case
        opened = Bundle.open(bundle)
        how: dict[str, Any] = {"precision": precision_for(case), "memory": case.memory, "threads": threads}
        self._pipe = Pipeline(EnginePool(opened, case.backend, **how))
        self.backend, self.precision = self._pipe.backend, self._pipe.precision
        self.versions: Mapping[str, str] = {}
        self.engine_bytes: Mapping[str, int] = {name: opened.nbytes(name) for name in opened.components}

    @property
    def bundle(self) -> Bundle:
        return self._pipe.bundle

    def calls(self, inputs: Inputs) -> Mapping[str, Call]:
        case, pipe = self._case, self._pipe
        texts = [case.prompt]
        if case.guided and not self.bundle.manifest.conditioning.zeros_for_empty:
            texts.append("")
        instant_unet = _Instant(np.zeros_like(inputs.unet["sample"]))
        loop = Pipeline(EnginePool(self.bundle, given={"unet": instant_unet}))
        embeds = embeds_of(case, inputs)
        unet_inputs = _shared_once(self.bundle, inputs.unet, case.batch)

        def run_loop() -> Array:
            return loop(None, output_type="latent", latents=inputs.latents, **options(case), **embeds).images

        return {
            "text_encoder": timed(lambda: pipe.encode(texts)),
            "unet": timed(lambda: pipe.engine("unet")(**unet_inputs)["noise_pred"]),
            "loop_step": timed(run_loop, per=len(loop_steps(loop, case, inputs))),
            "vae_decoder": timed(lambda: pipe.decode(inputs.latents, "np")),
            "picture": timed(lambda: picture(pipe, case, inputs.latents)),
        }

    def close(self) -> None:
        self._pipe.close()


def precision_for(case: Case) -> str:
    """The precision to open a pipeline with. Engines that were built have their own, so it is "auto" for them."""
    backend = BACKENDS.get(case.backend.partition(":")[0])
    has_built_engines = backend is not None and not backend.precisions
    return "auto" if has_built_engines else case.precision


def picture(pipe: Pipeline, case: Case, latents: Float32) -> Array:
    """The case's pictures by sdopt, [batch, height, width, 3] in 0..1."""
    return pipe([case.prompt] * case.batch, latents=latents, output_type="np", **options(case)).images


def loop_steps(loop: Pipeline, case: Case, inputs: Inputs) -> Sequence[Any]:
    """The steps of the case's loop. Some samplers call the UNet more than once for each step of the case."""
    return list(loop.denoise(None, latents=inputs.latents, **options(case), **embeds_of(case, inputs)))


def options(case: Case) -> Any:
    return {
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "height": case.height,
        "width": case.width,
        "seed": 0,
    }


def embeds_of(case: Case, inputs: Inputs) -> Any:
    """The embeddings among the UNet's inputs, under the names of a pipeline's arguments."""
    names = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "text_embeds"}
    embeds = {name: inputs.unet[key] for name, key in names.items() if key in inputs.unet}
    if not case.guided:
        return embeds
    halves: dict[str, Float32] = {}
    for name, both in embeds.items():
        halves[f"negative_{name}"], halves[name] = np.split(both, 2)
    return halves


def _shared_once(bundle: Bundle, arrays: Mapping[str, Float32], images: int) -> dict[str, Float32]:
    """The UNet's inputs. An input that its graph takes once for both halves of guidance is cut to one half."""
    shared = {spec.name for spec in bundle.component("unet").inputs if spec.shape[0] == "images"}
    return {name: array[:images] if name in shared else array for name, array in arrays.items()}


class _Instant:
    """A UNet that answers at once, so that what is left is the loop's own time."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, answer: Array) -> None:
        self._answer = answer

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        return {"noise_pred": self._answer}

    def close(self) -> None: ...
    def __enter__(self) -> _Instant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
