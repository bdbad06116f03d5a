"""A checkpoint's scheduler as its pipeline reads it: a configuration for the runtime or, if need be, its tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers

from sdopt.bundle.format import Defaults
from sdopt.errors import CheckpointError, UsageError
from sdopt.export import families
from sdopt.export.checkpoint import Checkpoint, read_json
from sdopt.export.probe import probe
from sdopt.samplers import SAMPLERS, sampler_table

PROBED_STEPS = range(1, 51)
TABLES = "sampler_tables.json"


def manifest_entries(
    checkpoint: Checkpoint, folder: Path, defaults: Defaults, report: Callable[[str], None]
) -> dict[str, Any]:
    """`scheduler`, `prediction_type` and, for a scheduler that sdopt does not know by name, `sampler_tables`.

    Such a scheduler is run on one-hot vectors for each number of steps in PROBED_STEPS, and the tables are written
    into `folder`.
    Raises: CheckpointError for a scheduler that diffusers does not have, or that no table can express.
    """
    config = checkpoint.config("scheduler")
    name = str(config.get("_class_name"))
    scheduler_class: Any = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    where = checkpoint.folder / "scheduler"
    if scheduler_class is None:
        raise CheckpointError(f"{where}: {name} is no scheduler of diffusers {diffusers.__version__}")
    raw = read_json(where / "scheduler_config.json")
    complete: Mapping[str, Any] = scheduler_class.from_config(raw).config
    corrections = _corrections(checkpoint, complete)
    for key, value in corrections.items():
        report(f"{name}: {key} {complete[key]} is read as {value}, as {checkpoint.pipeline} does")
    scheduler = {**config, **corrections}
    entries = {"scheduler": scheduler, "prediction_type": complete.get("prediction_type", "epsilon")}
    if any(name in (sampler.diffusers, *sampler.aliases) for sampler in SAMPLERS.values()):
        try:
            sampler_table(scheduler, defaults.num_inference_steps)
        except UsageError as error:
            raise CheckpointError(f"{where}: {error}") from error
        return entries
    tables = {n: probe(scheduler_class.from_config({**raw, **corrections}), n).to_json() for n in PROBED_STEPS}
    (folder / TABLES).write_text(json.dumps(tables, allow_nan=False))
    report(
        f"{name} is not a sampler that sdopt knows by name: its tables were found by running it, for "
        f"{PROBED_STEPS.start} to {PROBED_STEPS.stop - 1} steps, and are stored in the bundle"
    )
    return {**entries, "sampler_tables": TABLES}


def _corrections(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint's pipeline class changes in a complete configuration of its scheduler."""
    pipeline = families.of(checkpoint).pipelines[checkpoint.pipeline]
    return {
        key: value for key, value in pipeline.scheduler_corrections.items() if key in config and config[key] != value
    }
