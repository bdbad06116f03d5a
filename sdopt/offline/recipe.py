"""How a pipeline is opened, as plain data: each process of a run opens the same one."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

from sdopt.errors import UsageError
from sdopt.pipeline import Pipeline, load
from sdopt.serve.models import Model
from sdopt.serve.orders import Weight
from sdopt.serve.settings import Settings

NAME = "bundle"  # of the only model
NO_LIMIT = 1 << 40  # pixels: a list is its user's own


@dataclass(frozen=True)
class Recipe:
    """What `sdopt.load` takes, and what is loaded then: LoRAs as (file, name, weight), embeddings as (file, token)."""

    path: str | None = None
    backend: str = "auto"
    precision: str = "auto"
    memory: str = "fast"
    threads: int | None = None
    paranoid: bool = False
    trust_engines: bool = False
    cache: bool = True
    loras: tuple[tuple[str, str, Weight], ...] = ()
    embeddings: tuple[tuple[str, str | None], ...] = ()

    def open(self) -> Pipeline:
        """The pipeline. Raises: SdoptError as `sdopt.load` does, and for a LoRA or an embedding that does not fit."""
        pipe = load(
            self.path,
            self.backend,
            precision=self.precision,
            memory=self.memory,
            threads=self.threads,
            paranoid=self.paranoid,
            trust_engines=self.trust_engines,
            cache=self.cache,
        )
        for file, token in self.embeddings:
            pipe.load_embedding(file, token)
        for file, name, _ in self.loras:
            pipe.load_lora_weights(file, name)
        if self.loras:
            pipe.set_adapters([name for _, name, _ in self.loras], [weight for _, _, weight in self.loras])
        return pipe

    def models(self, settings: Settings) -> dict[str, Model]:
        """What a worker of these settings opens: the backend there names the worker's own device."""
        pipe = replace(self, backend=settings.backend).open()
        open_engines(pipe)
        return {NAME: model_of(pipe)}


def open_engines(pipe: Pipeline) -> None:
    """Open what a picture needs, so that what is missing is said before the first one, and not of every line.

    Raises: BackendError where a backend or an engine is missing.
    """
    with suppress(UsageError):  # a model that needs a picture and a mask is opened by its first line
        plan = pipe.plan("a photograph", seed=0)
        ready = pipe.prepare(plan.passes[0])
        for name in (*ready.program.engines, "vae_decoder"):
            with pipe.pool.using(name, overlay=plan.adapters):
                pass


def model_of(pipe: Pipeline) -> Model:
    """A pipeline as a step loop has it. Its LoRAs in use are those of all orders."""
    return Model(NAME, pipe, max_pixels=NO_LIMIT)
