"""The sampler of a request: its table of rows on a bundle, and what a picture's file says about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from sdopt.bundle.disk import parse_json, read_plain
from sdopt.bundle.files import MAX_TABLE_BYTES, Bundle
from sdopt.errors import BundleError, UsageError
from sdopt.samplers import SamplerTable, sampler_table
from sdopt.samplers.flow import dynamic_mu
from sdopt.samplers.labels import Labels, labels_of
from sdopt.samplers.resolve import shifts_by_size, takes_even_sigmas


def make_table(
    bundle: Bundle,
    sampling: Mapping[str, Any],
    strength: float = 1.0,
    size: Sequence[int] | None = None,
    *,
    masked: bool = False,
) -> SamplerTable:
    """The sampler table for a bundle's scheduler and the caller's keywords; `size` is the latents' height and width.

    `masked`: the request has a mask, for which diffusers' pipelines read some schedulers otherwise.
    If sdopt does not know the scheduler by name, the bundle holds its tables, one for each number of steps.
    Raises: UsageError as `sampler_table` does, and for a number of steps that the bundle has no table for.
    """
    options = dict(sampling)
    steps = options.pop("num_inference_steps")
    scheduler, probed = bundle.manifest.scheduler, bundle.manifest.sampler_tables
    is_pndm = scheduler["_class_name"] == "PNDMScheduler" or "skip_prk_steps" in scheduler
    if masked and is_pndm and bundle.manifest.family == "sd":  # as StableDiffusionInpaintPipeline does; SDXL's does not
        scheduler = {**scheduler, "skip_prk_steps": True}
    if probed is None or options.get("sampler") is not None:
        cuts = bundle.manifest.defaults.strength_cuts
        if scheduler.get("use_dynamic_shifting") and shifts_by_size(scheduler, options):
            options.setdefault("mu", _mu(bundle, size))
        elif "mu" in options:
            text = (
                "mu: these noise levels do not depend on the size of the picture; leave it out, or name another sampler"
            )
            raise UsageError(text, "mu")
        if bundle.manifest.even_sigmas and takes_even_sigmas(scheduler, options):
            options["sigmas"] = np.linspace(1.0, 1 / steps, steps).tolist()
        return sampler_table(scheduler, steps, strength=strength, strength_cuts=cuts, **options)
    tables = _tables(bundle, probed)
    name = scheduler["_class_name"]
    if str(steps) not in tables:
        raise UsageError(
            f"num_inference_steps = {steps}; for {name} this bundle has tables for {', '.join(tables)}",
            "num_inference_steps",
        )
    given = [key for key, value in options.items() if value is not None]
    if strength < 1:
        given.append("strength")
    if given:
        raise UsageError(
            f"{', '.join(given)}: {name} takes no options here; name another sampler to use them", given[0]
        )
    try:
        return SamplerTable.from_json(tables[str(steps)])
    except UsageError as error:
        raise BundleError(f"{bundle.path / probed}: for {steps} steps: {error} Copy the bundle again") from error


def _tables(bundle: Bundle, name: str) -> Mapping[str, Any]:
    """The tables of a bundle, by the number of steps as text.

    Raises: BundleError for a file that is no JSON object.
    """
    path = bundle.file(name)
    try:
        tables = parse_json(read_plain(path, MAX_TABLE_BYTES))
        if not isinstance(tables, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} has no tables of a sampler: {error}. Copy the bundle again") from error
    return cast("dict[str, Any]", tables)


def make_labels(bundle: Bundle, sampling: Mapping[str, Any]) -> Labels:
    """What a picture's file says about the sampler of these keywords."""
    scheduler, steps = bundle.manifest.scheduler, sampling["num_inference_steps"]
    if bundle.manifest.sampler_tables is not None and sampling.get("sampler") is None:
        return Labels(scheduler["_class_name"], "", steps)
    decisive = ("sampler", "schedule", "timesteps", "sigmas")
    return labels_of(scheduler, steps, **{name: sampling.get(name) for name in decisive})


def _mu(bundle: Bundle, size: Sequence[int] | None) -> float:
    """The shift of a flow schedule that depends on the size of the picture; by default that of the bundle."""
    manifest = bundle.manifest
    latents, defaults = manifest.latents, manifest.defaults
    height, width = size or (defaults.height // latents.factor, defaults.width // latents.factor)
    return dynamic_mu(manifest.scheduler, (height // latents.patch) * (width // latents.patch))
