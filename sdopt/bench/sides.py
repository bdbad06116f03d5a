"""What is measured: sdopt itself, and what every side has to offer.

text_encoder   the prompt (and the empty one, with guidance) to embeddings, tokenizer and all
unet           one call, with guidance for both halves
step           in place of `unet` where a whole step is one launch (`sdopt.bench.built`): guidance and sampler too
host_step      the host's time for a step of such a loop, in which it waits for nothing
loop_step      one step of the loop when the UNet answers at once: guidance, sampler, checks
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
    """A program that makes the case's picture, loaded, and its parts as timed calls."""

    name: str
    kind: str
    backend: str
    precision: str
    note: str
    versions: Mapping[str, str]
    engine_bytes: Mapping[str, int]
    half_level: float  # half a step of a picture that has few bits: it is compared up to that

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
        how: dict[str, Any] = {"precision": precision_for(case), "memory": case.memory, "threads": threads}
        self._pipe = Pipeline(EnginePool(Bundle.open(bundle), case.backend, **how))
        self.backend, self.precision = self._pipe.backend, self._pipe.precision
        self.versions: Mapping[str, str] = {}
        self.engine_bytes: Mapping[str, int] = {
            name: self._pipe.bundle.nbytes(name) for name in self._pipe.bundle.components
        }

    @property
    def bundle(self) -> Bundle:
        return self._pipe.bundle

    def calls(self, inputs: Inputs) -> Mapping[str, Call]:
        case, pipe = self._case, self._pipe
        zeros = self.bundle.manifest.conditioning.zeros_for_empty
        texts = [case.prompt, ""] if case.guided and not zeros else [case.prompt]
        loop = Pipeline(EnginePool(self.bundle, given={"unet": _Instant(np.zeros_like(inputs.unet["sample"]))}))
        embeds, steps = embeds_of(case, inputs), len(loop_steps(loop, case, inputs))
        unet = _once(self.bundle, inputs.unet, case.batch)
        return {
            "text_encoder": timed(lambda: pipe.encode(texts)),
            "unet": timed(lambda: pipe.engine("unet")(**unet)["noise_pred"]),
            "loop_step": timed(
                lambda: loop(None, output_type="latent", latents=inputs.latents, **options(case), **embeds).images,
                per=steps,
            ),
            "vae_decoder": timed(lambda: pipe.decode(inputs.latents, "np")),
            "picture": timed(lambda: picture(pipe, case, inputs.latents)),
        }

    def close(self) -> None:
        self._pipe.close()


def precision_for(case: Case) -> str:
    """What a pipeline is told: a backend whose engines are built runs them in the precision that they have."""
    entry = BACKENDS.get(case.backend.partition(":")[0])
    return "auto" if entry is not None and not entry.precisions else case.precision


def picture(pipe: Pipeline, case: Case, latents: Float32) -> Array:
    """The case's pictures by sdopt, [batch, height, width, 3] in 0..1."""
    return pipe([case.prompt] * case.batch, latents=latents, output_type="np", **options(case)).images


def loop_steps(loop: Pipeline, case: Case, inputs: Inputs) -> Sequence[Any]:
    """The steps of the case's loop; some samplers call the UNet more often than they are asked to."""
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
    """The embeddings in the UNet's inputs, under the names that a pipeline takes them by."""
    names = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "text_embeds"}
    found = {name: inputs.unet[key] for name, key in names.items() if key in inputs.unet}
    if not case.guided:
        return found
    halves = {name: np.split(both, 2) for name, both in found.items()}
    return {name: cond for name, (_, cond) in halves.items()} | {
        f"negative_{name}": uncond for name, (uncond, _) in halves.items()
    }


def _once(bundle: Bundle, arrays: Mapping[str, Float32], images: int) -> dict[str, Float32]:
    """The UNet's inputs, those that both halves of guidance share only once where its graph takes them so."""
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
