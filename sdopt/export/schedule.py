"""A checkpoint's scheduler as its pipeline reads it: a configuration and, for an unknown scheduler, its tables."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers

from sdopt.bundle.decode import DecodeError
from sdopt.bundle.format import Defaults
from sdopt.bundle.settings import check_scheduler
from sdopt.errors import CheckpointError, UsageError
from sdopt.export import families
from sdopt.export.checkpoint import Checkpoint, read_json
from sdopt.export.probe import probe
from sdopt.samplers import SAMPLERS, sampler_table

PROBED_STEPS = range(1, 51)
TABLES = "sampler_tables.json"
FIXED_PREDICTIONS = {"IPNDMScheduler": "v_prediction"}  # of classes without an option for it


def manifest_entries(
    checkpoint: Checkpoint, folder: Path, defaults: Defaults, report: Callable[[str], None]
) -> dict[str, Any]:
    """The manifest's `scheduler` and `prediction_type`. A scheduler that sdopt does not know adds `sampler_tables`.

    Such a scheduler is run for each number of steps in PROBED_STEPS, and the tables are written into `folder`.
    Raises: CheckpointError for a scheduler that diffusers does not have, or that no table can express.
    """
    config = checkpoint.config("scheduler")
    name = str(config.get("_class_name"))
    scheduler_class: Any = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    where = checkpoint.folder / "scheduler"
    if scheduler_class is None:
        raise CheckpointError(f"{where}: {name} is no scheduler of diffusers {diffusers.__version__}")
    try:
        check_scheduler(config)
    except DecodeError as error:
        raise CheckpointError(f"{where}: {error}") from error
    raw = read_json(where / "scheduler_config.json")
    complete = _made(where, scheduler_class, raw).config
    corrections = _corrections(checkpoint, complete)
    for key, value in corrections.items():
        report(f"{name}: {key} {complete[key]} is read as {value}, as {checkpoint.pipeline} does")
    scheduler = {**config, **corrections}
    entries = {"scheduler": scheduler, "prediction_type": prediction_type(scheduler_class, complete)}
    is_known = any(name in (sampler.diffusers, *sampler.aliases) for sampler in SAMPLERS.values())
    if is_known:
        stated = {key: value for key, value in complete.items() if key != "_use_default_values"}
        try:  # with the defaults of absent keys, which decide too whether a table can express the scheduler
            mu = 0.0 if complete.get("use_dynamic_shifting") else None  # any: it depends on the size of the picture
            sampler_table({**stated, **scheduler}, defaults.num_inference_steps, mu=mu)
        except UsageError as error:
            raise CheckpointError(f"{where}: {error}") from error
        return entries
    corrected = _made(where, scheduler_class, {**raw, **corrections})
    tables = {n: probe(corrected, n).to_json() for n in PROBED_STEPS}
    (folder / TABLES).write_text(json.dumps(tables, allow_nan=False))
    report(
        f"{name} is not a sampler that sdopt knows by name: its tables were found by running it, for "
        f"{PROBED_STEPS.start} to {PROBED_STEPS.stop - 1} steps, and are stored in the bundle"
    )
    return {**entries, "sampler_tables": TABLES}


def prediction_type(scheduler_class: Any, config: Mapping[str, Any]) -> str:
    """What the denoiser predicts: what the complete configuration says, or what the class has no option for."""
    if "prediction_type" in inspect.signature(scheduler_class.__init__).parameters:
        return str(config["prediction_type"])
    is_flow = hasattr(scheduler_class, "scale_noise") and not hasattr(scheduler_class, "add_noise")
    return "flow_prediction" if is_flow else FIXED_PREDICTIONS.get(scheduler_class.__name__, "epsilon")


def _made(where: Path, scheduler_class: Any, config: Mapping[str, Any]) -> Any:
    """The scheduler of a configuration.

    Raises: CheckpointError if its class does not take it.
    """
    try:
        return scheduler_class.from_config(config)
    except Exception as error:  # a configuration can make a class raise anything
        name = scheduler_class.__name__
        raise CheckpointError(f"{where}: {name} does not take its configuration: {error}") from error


def _corrections(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the checkpoint's pipeline class changes in the complete configuration of its scheduler."""
    wanted = families.of(checkpoint).pipelines[checkpoint.pipeline].scheduler_corrections
    return {key: value for key, value in wanted.items() if key in config and config[key] != value}
