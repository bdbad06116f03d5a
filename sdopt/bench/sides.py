"""The sides that are measured: what a side offers, and sdopt as a side.

The components that a side may have:

text_encoder   from the prompt to embeddings, tokenizer included; with guidance also from the empty prompt
unet           one call; with guidance on both halves
step           UNet, guidance and sampler in one launch, instead of `unet`; only `sdopt.bench.built` has it
host_step      the host's time for a step of that loop, without waiting for the GPU
loop_step      one step of the loop without the UNet's time: guidance, sampler, checks
vae_decoder    from latents to a picture in 0..1
picture        from prompt and latents to a picture in 0..1, end to end
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from sdopt.bench.cases import Case
from sdopt.bench.timing import Call, timed
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Float32, TensorSpec
from sdopt.dataclass import dataclass
from sdopt.engine import BACKENDS
from sdopt.engine.pool import EnginePool
from sdopt.pipeline import Pipeline

COMPONENTS = ("text_encoder", "unet", "step", "loop_step", "host_step", "vae_decoder", "picture")
OURS = "sdopt"


@dataclass(frozen=True)
class Inputs:
    """The inputs of every side: standard normal latents, and the UNet's inputs by name, which the reference made."""

    latents: Float32
    unet: Mapping[str, Float32]


class Side(Protocol):
    """A loaded program that makes the case's picture. Its components can be timed."""

    name: str
    kind: str
    backend: str
    precision: str
    note: str
    versions: Mapping[str, str]
    engine_bytes: Mapping[str, int]
    half_level: float  # half the step between the levels of a rounded picture, else 0; see `harness.parity_db`

    def calls(self, inputs: Inputs) -> Mapping[str, Call]:
        """The side's components as timed calls, by name."""
        ...

    def close(self) -> None: ...


def latents_of(case: Case, bundle: Bundle, seed: int = 0) -> Float32:
    """The case's standard normal latents [batch, channels, height / factor, width / factor]."""
    entry = bundle.manifest.latents
    shape = (case.batch, entry.channels, case.height // entry.factor, case.width // entry.factor)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class SdoptSide:
    """sdopt on the case's backend."""

    name = kind = OURS
    note = "its cold starts, and their memory, are those that find the cache of an earlier start"
    half_level = 0.0

    def __init__(self, case: Case, bundle: Path, threads: int) -> None:
        self._case = case
        opened = Bundle.open(bundle)
        settings: dict[str, Any] = {"precision": precision_for(case), "memory": case.memory, "threads": threads}
        self._pipe = Pipeline(EnginePool(opened, case.backend, **settings))
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
        instant_unet = _InstantUnet(np.zeros_like(inputs.unet["sample"]))
        loop = Pipeline(EnginePool(self.bundle, given={"unet": instant_unet}))
        embeds = embeds_of(case, inputs)
        unet_inputs = _unet_inputs(self.bundle, inputs.unet, case.batch)

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
    """The precision to open a pipeline with. It is "auto" for built engines, because they have their own."""
    backend = BACKENDS.get(case.backend.partition(":")[0])
    has_built_engines = backend is not None and not backend.precisions
    return "auto" if has_built_engines else case.precision


def picture(pipe: Pipeline, case: Case, latents: Float32) -> Array:
    """The case's pictures as sdopt makes them, [batch, height, width, 3] in 0..1."""
    return pipe([case.prompt] * case.batch, latents=latents, output_type="np", **options(case)).images


def loop_steps(loop: Pipeline, case: Case, inputs: Inputs) -> Sequence[Any]:
    """The steps of the case's loop. Some samplers call the UNet more than once for each step of the case."""
    return list(loop.denoise(None, latents=inputs.latents, **options(case), **embeds_of(case, inputs)))


def options(case: Case) -> Any:
    """The case as arguments of a pipeline."""
    return {
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "height": case.height,
        "width": case.width,
        "seed": 0,
    }


def embeds_of(case: Case, inputs: Inputs) -> Any:
    """The embeddings among the UNet's inputs, as arguments of a pipeline."""
    names = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "text_embeds"}
    embeds = {name: inputs.unet[key] for name, key in names.items() if key in inputs.unet}
    if not case.guided:
        return embeds
    halves: dict[str, Float32] = {}
    for name, both in embeds.items():
        halves[f"negative_{name}"], halves[name] = np.split(both, 2)
    return halves


def _unet_inputs(bundle: Bundle, arrays: Mapping[str, Float32], images: int) -> dict[str, Float32]:
    """The inputs as this bundle's UNet takes them: those that both halves of guidance share are cut to one half."""
    shared = {spec.name for spec in bundle.component("unet").inputs if spec.shape[0] == "images"}
    return {name: array[:images] if name in shared else array for name, array in arrays.items()}


class _InstantUnet:
    """A UNet that answers at once, so that only the loop's own time is measured."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, answer: Array) -> None:
        self._answer = answer

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        return {"noise_pred": self._answer}

    def close(self) -> None: ...
    def __enter__(self) -> _InstantUnet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
