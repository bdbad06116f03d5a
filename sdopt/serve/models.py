"""The bundles that a worker serves, each with its pipeline and the LoRAs of the startup table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from sdopt.bundle.adapter import adapter_names
from sdopt.errors import UsageError, choices
from sdopt.logs import logger
from sdopt.pipeline import Pipeline, load
from sdopt.request.plan import Plan
from sdopt.request.presets import keywords_of_presets
from sdopt.request.unused import without_effect
from sdopt.serve.orders import Order
from sdopt.serve.settings import Settings

log = logger(__name__)


@dataclass(eq=False)
class Model:
    """A pipeline with the name under which it is served."""

    name: str
    pipe: Pipeline
    loras: tuple[str, ...] = ()
    max_pixels: int = 4 << 20
    _lock: Lock = field(default_factory=Lock)
    _said: set[str] = field(default_factory=set[str])

    def plan(self, order: Order) -> Plan:
        """The plan of an order. Raises: UsageError for a wrong keyword, or a LoRA that is not served."""
        for name in order.loras:
            if name not in self.loras:
                there = choices(name, self.loras) if self.loras else "none; sdopt serve --lora NAME=FILE adds one"
                raise UsageError(f"lora: {name!r} is not served by {self.name}; there are {there}", "lora")
        if not self.loras:
            return self._planned(order)
        with self._lock:  # what is in use belongs to the pipeline, and a plan keeps it
            self.pipe.set_adapters(list(order.loras), list(order.loras.values()))
            return self._planned(order)

    def _planned(self, order: Order) -> Plan:
        """The plan, if its picture is not too large: its size may be the bundle's, or that of `image`."""
        options: Any = {**order.options}
        plan = self.pipe.plan(options.pop("prompt", None), **options)
        self._say(plan)
        defaults, last = self.pipe.bundle.manifest.defaults, plan.passes[-1]
        most = max(self.max_pixels, defaults.width * defaults.height)
        if last.width * last.height > most:
            text = f"{last.width}x{last.height} pixels; this server makes pictures of up to {most} pixels"
            raise UsageError(text, "size")
        return plan

    def _say(self, plan: Plan) -> None:
        """Log what there is to say of a preset, once for each preset."""
        name = plan.options["preset"]
        if plan.measured is not None and plan.remarks and name not in self._said:
            self._said.add(name)
            log.warning("%s: preset %s: %s", self.name, name, "; ".join(plan.remarks))

    def describe(self) -> dict[str, Any]:
        """What clients may know of it, as JSON."""
        manifest = self.pipe.bundle.manifest
        defaults = manifest.defaults
        return {
            "name": self.name,
            "family": manifest.family,
            "digest": self.pipe.bundle.digest,
            "backend": self.pipe.backend,
            "precision": self.pipe.precision,
            "factor": manifest.latents.factor,
            "defaults": {
                "height": defaults.height,
                "width": defaults.width,
                "num_inference_steps": defaults.num_inference_steps,
                "guidance_scale": defaults.guidance_scale,
            },
            "scheduler": manifest.scheduler.get("_class_name", ""),
            "needs_mask": self.pipe.bundle.denoiser.inputs[0].shape[1] != manifest.latents.channels,
            "denoiser": manifest.denoiser,
            "text_encoders": sum(name.startswith("text_encoder") for name in self.pipe.bundle.components),
            "has_previews": manifest.preview is not None,
            "without_effect": sorted(without_effect(manifest.conditioning)),
            "loras": list(self.loras),
            "presets": keywords_of_presets(self.pipe.bundle),
            "embeddings": {token: one.size for token, one in self.pipe.embeddings.items()},
            "adapters": {name: self._kind(name) for name in adapter_names(self.pipe.bundle)},
        }

    def _kind(self, name: str) -> str:
        return self.pipe.pool.adapter(name).manifest.kind


def open_models(settings: Settings) -> dict[str, Model]:
    """The pipelines of a startup table, by name. Raises: SdoptError as `sdopt.load` and the loading of a LoRA do."""
    models: dict[str, Model] = {}
    for name, path in settings.bundles.items():
        pipe = load(
            path or None,  # the embedded one, wherever it is on this machine
            settings.backend,
            precision=settings.precision,
            memory=settings.memory,
            threads=settings.threads,
            trust_engines=settings.trust_engines,
        )
        loaded = tuple(pipe.load_lora_weights(file, word) for word, file in _loras_of(settings, name).items())
        if loaded:
            pipe.set_adapters([], [])
        models[name] = Model(name, pipe, loaded, settings.max_pixels)
    return models


def _loras_of(settings: Settings, bundle: str) -> Mapping[str, str]:
    """The LoRA files of one bundle: NAME=FILE is for all, BUNDLE/NAME=FILE for one."""
    own: dict[str, str] = {}
    for key, file in settings.loras.items():
        owner, _, name = key.rpartition("/")
        if owner in ("", bundle):
            own[name] = file
    return own
