"""The defaults of a bundle: size, steps, guidance and strengths.

What the caller gives comes first, then the checkpoint's generation_config.json, then what its family says: of the model
by its name, of its pipeline class, of a guidance embedding, of its scheduler, and of all its models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from sdopt.bundle.decode import DecodeError, decode
from sdopt.bundle.format import Defaults
from sdopt.errors import CheckpointError, UsageError
from sdopt.export.checkpoint import Checkpoint, read_json
from sdopt.export.families.contract import Family, SomeDefaults

KEYS = tuple(f.name for f in fields(Defaults))


def defaults(
    checkpoint: Checkpoint, family: Family, factor: int, steps: int | None = None, guidance: float | None = None
) -> Defaults:
    """The `defaults` entry of the manifest; `factor` is the VAE's, pixels per latent.

    Raises: UsageError for steps or guidance that no picture can be made with; CheckpointError for such a
        generation_config.json.
    """
    if steps is not None and steps < 1:
        raise UsageError(f"steps = {steps}; allowed are whole numbers from 1")
    if guidance is not None and not math.isfinite(guidance):
        raise UsageError(f"guidance = {guidance}; allowed are finite numbers")
    scheduler = str(checkpoint.config("scheduler").get("_class_name"))
    has_embedding = family.conditioning(checkpoint).guidance_embedding > 0
    layers: tuple[SomeDefaults, ...] = (
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
    height, width = cast("list[int]", size if isinstance(size, list) else [size, size])
    return {"height": height * factor, "width": width * factor}


def _by_name(checkpoint: Checkpoint, family: Family) -> SomeDefaults:
    """What the family says of the model under one of the names that it goes by."""
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
    """Those entries of the checkpoint's generation_config.json that are a default here."""
    path = checkpoint.folder / "generation_config.json"
    content = read_json(path) if path.is_file() else {}
    values = {key: value for key, value in content.items() if key in KEYS}
    for key, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key != "strength_cuts" and not is_number:
            raise CheckpointError(f"{path}: {key} is {value!r}, not a number")
    return values
