"""The engine of a preset: the one that it was measured with, unless the caller names another."""

from __future__ import annotations

from sdopt.bundle.presets import Preset
from sdopt.engine import installed_backends
from sdopt.engine.pool import EnginePool


def engine_of_preset(preset: Preset, backend: str, precision: str) -> tuple[str, str]:
    """The backend and precision to open for a preset.

    What is not "auto" is the caller's. The preset's precision goes with the preset's backend alone. If its backend is
    not installed, another one is chosen as without a preset.
    """
    if backend == "auto" and preset.backend.partition(":")[0] in installed_backends():
        backend = preset.backend
    if precision == "auto" and backend == preset.backend:
        precision = preset.precision
    return backend, precision


def remarks_on_engine(preset: Preset, pool: EnginePool, cache_depth: int) -> tuple[str, ...]:
    """A sentence if a picture of a preset is made by another engine than it was measured with."""
    told = pool.precision_of(cache_depth).partition(" ")[0]
    if preset.backend == pool.backend and preset.precision in (told, pool.wanted_precision):
        return ()
    measured = f"the preset was measured with {preset.backend} in {preset.precision}"
    return (f"{measured}, and this is {pool.backend} in {told}: time and picture differ",)
