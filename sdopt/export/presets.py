"""The defaults of a bundle: size, steps, guidance and strengths.

The caller's values win over the checkpoint's generation_config.json, and that wins over what its family says. The
family has defaults, the strongest first, for the model's name, its pipeline class, a guidance embedding, its scheduler,
and all its models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from numbers import Real
from typing import Any, cast

from sdopt.bundle.decode import DecodeError, decode
from sdopt.bundle.format import MAX_STEPS, Defaults
from sdopt.errors import CheckpointError, UsageError, refuse_other, shown
from sdopt.export.checkpoint import Checkpoint, read_json
from sdopt.export.families.contract import Family, SomeDefaults

KEYS = tuple(f.name for f in fields(Defaults))


def check(steps: object, guidance: object) -> None:
    """Raises: UsageError for `steps` or `guidance` that cannot be a bundle's defaults; None is left to the model."""
    counts = f"are whole numbers from 1 to {MAX_STEPS}"
    if steps is not None:
        refuse_other("steps", steps, int, counts)
        if not 1 <= cast(int, steps) <= MAX_STEPS:
            raise UsageError(f"steps = {shown(steps)}; allowed {counts}", "steps")
    if guidance is not None:
        refuse_other("guidance", guidance, Real, "are finite numbers")
        if not math.isfinite(cast(float, guidance)):
            raise UsageError(f"guidance = {guidance}; allowed are finite numbers", "guidance")


def defaults(
    checkpoint: Checkpoint, family: Family, factor: int, steps: int | None = None, guidance: float | None = None
) -> Defaults:
    """The `defaults` entry of the manifest. `factor`: pixels per latent of the VAE.

    Raises: UsageError for `steps` or `guidance` that are not allowed; CheckpointError if the checkpoint lacks a default
        or has one that is not allowed.
    """
    check(steps, guidance)
    scheduler = str(checkpoint.config("scheduler").get("_class_name"))
    has_embedding = family.conditioning(checkpoint).guidance_embedding > 0
    layers: tuple[SomeDefaults, ...] = (  # a later layer wins
        family.defaults,
        _size(checkpoint, family, factor),
        family.schedulers.get(scheduler, {}),
        family.guidance_embedding if has_embedding else {},
        family.pipelines[checkpoint.pipeline].defaults,
        _by_name(checkpoint, family),
        _generation_config(checkpoint),
        {"num_inference_steps": steps, "guidance_scale": guidance},
    )
    values: dict[str, Any] = {}
    for layer in layers:
        values |= {key: value for key, value in layer.items() if value is not None}
    missing = [key for key in KEYS if key not in values]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: it does not tell {', '.join(missing)} of its pictures; add them to its "
            "generation_config.json"
        )
    try:
        return decode(Defaults, {key: values[key] for key in KEYS}, "defaults")
    except DecodeError as error:
        raise CheckpointError(f"{checkpoint.folder}: what it says of its pictures cannot be: {error}") from error


def _size(checkpoint: Checkpoint, family: Family, factor: int) -> SomeDefaults:
    """The size of picture that the denoiser was trained for, if its configuration has it."""
    size: Any = checkpoint.config(family.denoiser).get("sample_size")
    if size is None:
        return {}
    version = re.match(r"0\.(\d+)", str(checkpoint.config(family.denoiser).get("_diffusers_version")))
    is_old = version is not None and int(version[1]) < 9
    if is_old and isinstance(size, int) and size < 64 and family.pipelines[checkpoint.pipeline].corrects_size:
        size = 64
    sizes = cast("list[Any]", size if isinstance(size, list) else [size, size])
    if len(sizes) != 2 or not all(isinstance(edge, int) and edge > 0 for edge in sizes):
        raise CheckpointError(
            f"{checkpoint.folder / family.denoiser}: sample_size is {size!r}; it must be a whole number of "
            "latents from 1, or a list of height and width"
        )
    height, width = sizes
    return {"height": height * factor, "width": width * factor}


def _by_name(checkpoint: Checkpoint, family: Family) -> SomeDefaults:
    """The family's defaults for the model, if it knows one of the model's names."""
    by_lower_case = {name.lower(): known for name, known in family.named_models.items()}
    names = (
        checkpoint.provenance.get("hub_id"),
        checkpoint.index().get("_name_or_path"),
        checkpoint.config(family.denoiser).get("_name_or_path"),
    )
    for name in names:
        known = by_lower_case.get(str(name).lower())
        if known is not None:
            return known
    return {}


def _generation_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The entries of the checkpoint's generation_config.json that are defaults of a bundle."""
    path = checkpoint.folder / "generation_config.json"
    content = read_json(path) if path.is_file() else {}
    values = {key: value for key, value in content.items() if key in KEYS}
    for key, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key != "strength_cuts" and not is_number:
            raise CheckpointError(f"{path}: {key} is {value!r}, not a number")
    return values
