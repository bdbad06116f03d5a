"""The calibrations of a bundle's components, made once and kept for later builds.

    ~/.cache/sdopt/calibration/unet-5f0c91d2ab34.safetensors

The name says what a calibration was made from: the component, prompts, steps and seed. The file may be deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sdopt.build.calibrate import HELD_OUT, STEPS, SUBJECTS, Calibration, Opened, calibrate
from sdopt.build.choices import Choice
from sdopt.build.int8 import Arithmetic, Scaling
from sdopt.bundle.disk import user_folder, write_new
from sdopt.bundle.files import Bundle
from sdopt.bundle.format import data_file
from sdopt.bundle.specs import Array
from sdopt.engine.ort import OrtEngine
from sdopt.errors import BackendError

FORM = 3  # of the file; another one is not read
Report = Callable[[str], None]


class Calibrations:
    """Finds the scalings of components. What was measured once is kept for the other engines and for later builds.

    `opened`: the library that will run the graph, and judges the layers.
    """

    def __init__(self, bundle: Bundle, arithmetic: Arithmetic, opened: Opened = OrtEngine) -> None:
        self._bundle, self._arithmetic, self._opened = bundle, arithmetic, opened
        self._made: dict[tuple[str, tuple[str, ...]], Calibration] = {}
        self._searched: dict[Any, tuple[Mapping[str, Scaling], float, float]] = {}

    def searched(
        self, name: str, prompts: Sequence[str], floor: float, report: Report
    ) -> tuple[Mapping[str, Scaling], float, float]:
        """(scalings of component `name`, the part of its multiply-adds that they cover, the dB that it reaches)."""
        asked = (name, tuple(prompts) or SUBJECTS)
        if (asked, floor) not in self._searched:
            calibration = self._calibration(*asked, report)
            scalings, reached = calibration.searched(floor, report, self._opened)
            self._searched[asked, floor] = scalings, calibration.part(scalings), reached
        return self._searched[asked, floor]

    def _calibration(self, name: str, prompts: tuple[str, ...], report: Report) -> Calibration:
        if (name, prompts) not in self._made:
            path = self._path(name, prompts)
            kept = None if path is None else _read(self._bundle, name, path)
            if kept is None:
                report(f"{name}: making {len(prompts)} pictures in float32, to find the scales")
                latents = () if name == self._bundle.manifest.denoiser else self._latents(prompts)
                kept = calibrate(
                    self._bundle, name, prompts, arithmetic=self._arithmetic, latents=latents, report=report
                )
                if path is not None:
                    _write(kept, path)
            self._made[name, prompts] = kept
        return self._made[name, prompts]

    def _latents(self, prompts: tuple[str, ...]) -> tuple[Array, ...]:
        """What the prompts became when the denoiser was calibrated; nothing if it was not."""
        denoiser = self._bundle.manifest.denoiser
        path, made = self._path(denoiser, prompts), self._made.get((denoiser, prompts))
        if made is None and path is not None:
            made = _read(self._bundle, denoiser, path)
        return made.latents if made is not None else ()

    def _path(self, name: str, prompts: Sequence[str]) -> Path | None:
        """Where the calibration is kept; None for a user without a place."""
        entries, files = self._bundle.manifest.components, self._bundle.manifest.files
        # what is upstream of a component shapes what it multiplies
        sources = {
            file: files[file].sha256
            for component, entry in entries.items()
            for file in (entry.graph, data_file(entries, component))
            if file in files
        }
        made_from = [FORM, asdict(self._arithmetic), name, list(prompts), STEPS, HELD_OUT, sorted(sources.items())]
        digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
        with suppress(BackendError):
            return user_folder("XDG_CACHE_HOME", ".cache") / "calibration" / f"{name}-{digest}.safetensors"
        return None


def _write(calibration: Calibration, path: Path) -> None:
    """Keep a calibration; where nothing can be written, the next build makes it again."""
    tensors: dict[str, Array] = {}
    layers: dict[str, Any] = {}
    for name, choice in calibration.choices.items():
        scaling = choice.scaling
        how = [scaling.scale, scaling.zero, scaling.kind, scaling.largest_weight]
        layers[name] = [*how, choice.noise, choice.error, choice.products, choice.harm]
        if scaling.factors is not None:
            tensors[f"factors/{name}"] = scaling.factors
        if scaling.shift is not None:
            tensors[f"shift/{name}"] = scaling.shift
    for k, (arrays, output) in enumerate(calibration.held_out):
        tensors |= {f"input/{k}/{name}": array for name, array in arrays.items()}
        tensors[f"output/{k}"] = output
    tensors |= {f"latents/{k}": array for k, array in enumerate(calibration.latents)}
    with suppress(OSError, BackendError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # one that could not be read
        write_new(path, lambda: save(tensors, {"layers": json.dumps(layers)}))


def _read(bundle: Bundle, name: str, path: Path) -> Calibration | None:
    """A calibration that was kept; None where there is none that can be read."""
    try:
        opened: Any = safe_open(path, "numpy")  # it is not typed
        with opened as file:
            layers: dict[str, Any] = json.loads(file.metadata()["layers"])
            arrays: dict[str, Array] = {str(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        choices: dict[str, Choice] = {}
        for layer, (scale, zero, kind, largest, noise, error, products, harm) in layers.items():
            factors, shift = arrays.get(f"factors/{layer}"), arrays.get(f"shift/{layer}")
            scaling = Scaling(float(scale), factors, int(zero), shift, str(kind), float(largest))
            choices[layer] = Choice(scaling, float(noise), float(error), int(products), float(harm))
        held_out: list[tuple[dict[str, Array], Array]] = []
        while (output := arrays.get(f"output/{len(held_out)}")) is not None:
            prefix = f"input/{len(held_out)}/"
            held_out.append(({k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}, output))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    latents = tuple(arrays[f"latents/{k}"] for k in range(sum(key.startswith("latents/") for key in arrays)))
    return Calibration(bundle.component(name), choices, tuple(held_out), latents)
