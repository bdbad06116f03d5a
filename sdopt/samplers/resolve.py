"""From a scheduler_config.json, and what the user prefers, to a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from sdopt.errors import UsageError, choices, refuse_other, shown
from sdopt.samplers.grids import SCHEDULE_FLAGS
from sdopt.samplers.names import SamplerName, ScheduleName
from sdopt.samplers.options import Options, checked_config, merged, refuse_no_number
from sdopt.samplers.registry import SAMPLERS, SCHEDULES, Sampler, find_sampler, names_class
from sdopt.samplers.rows import Request
from sdopt.samplers.table import SamplerTable


def sampler_table(
    config: Mapping[str, Any],
    steps: int,
    *,
    sampler: SamplerName | str | None = None,
    schedule: ScheduleName | str | None = None,
    strength: float = 1.0,
    strength_cuts: str = "steps",
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float | None = None,
    mu: float | None = None,
) -> SamplerTable:
    """The table of a checkpoint's sampler, from its scheduler_config.json, for a number of steps.

    `sampler` and `schedule` replace the checkpoint's (see `find_sampler` and SCHEDULES). A `strength` below 1 is for
    image to image: it leaves out the first steps. With `strength_cuts="steps_up"` a part of a step is done too. For a
    distilled model and `strength_cuts="schedule"` it keeps their number, and takes them from a smaller part of the
    schedule. `denoising_start` and `denoising_end` are fractions of the way; the steps between them are kept.
    `timesteps` or `sigmas` replace the spacing, and decide the number of steps. `eta` is the noise of DDIM and TCD; as
    in diffusers' pipelines it is 0 unless given. `mu` is the logarithm of the flow shift, which depends on the size of
    the image.

    Raises: UsageError for unknown names, options that no table can express, and numbers that make no schedule.
    """
    refuse_no_number(strength=strength, denoising_start=denoising_start, denoising_end=denoising_end, eta=eta, mu=mu)
    for name, given in (("timesteps", timesteps), ("sigmas", sigmas)):
        _refuse_no_levels(name, given)
    entry, options, notes = resolve(config, sampler, schedule)
    steps = steps_of(entry, options, steps, timesteps, sigmas)
    _check_eta(entry, eta)
    distilled = "original_inference_steps" in options and timesteps is None
    skipped = 0
    request = Request(entry.name, options, steps, 0, timesteps, sigmas, eta, mu, notes)
    if denoising_start is not None:
        skipped = _before(entry, entry.function(request), request.train, denoising_start)
    elif strength_cuts == "schedule" and distilled:
        request = replace(request, fraction=_checked(strength))
    else:
        skipped = _skipped(steps, strength, strength_cuts == "steps_up") * entry.rows_per_step
    table = entry.function(replace(request, begin=skipped))
    if timesteps is not None or sigmas is not None:
        _refuse_unread_schedule(config, request, sampler, schedule)
    return table if denoising_end is None else _until(table, request.train, denoising_end)


def resolve(
    config: Mapping[str, Any], sampler: str | None = None, schedule: str | None = None
) -> tuple[Sampler, Options, tuple[str, ...]]:
    """The sampler, all of its options, and notes, from a scheduler_config.json and what the user prefers.

    Raises: UsageError as `sampler_table` does.
    """
    config = checked_config(config)
    for argument, given in (("sampler", sampler), ("schedule", schedule)):
        if given is not None:
            refuse_other(argument, given, str, "are names, and None")
    name = sampler if sampler is not None else config.get("_class_name")
    if not name:
        raise UsageError('the scheduler config has no "_class_name"; name a sampler: ' + ", ".join(SAMPLERS) + ".")
    entry, implied = find_sampler(str(name))
    _check_family(entry, config)
    options, notes = merged(entry.defaults, config)
    if entry.family == "flow" and "flow_shift" in options and "flow_shift" not in config:
        options["flow_shift"] = config.get("shift", options["flow_shift"])  # what flow matching calls it
    by_class = names_class(str(name), entry)
    if not by_class:
        options |= entry.forced
    if implied is not None and schedule is not None and schedule != implied:
        raise UsageError(
            f"{name} has the schedule {implied}, and schedule is {schedule!r}; name one of them", "schedule"
        )
    wanted = schedule if schedule is not None else implied
    if wanted is not None:
        options |= _schedule_options(entry, wanted)
        if "original_inference_steps" in entry.defaults and wanted != "normal":
            reason = f"{entry.name} takes its steps from those that the model was distilled with"
            notes = (*notes, f"schedule {wanted!r} has no effect: {reason}; leave it out")
    if by_class:
        entry = _named_by_options(entry, options)
    return entry, options, notes


def _check_family(entry: Sampler, config: Mapping[str, Any]) -> None:
    """Raises: UsageError when a sampler of one kind of model is asked to sample another kind."""
    own = str(config.get("_class_name", ""))
    families = {sampler.family for sampler in SAMPLERS.values() if sampler.diffusers == own}
    if not config.get("use_flow_sigmas") and len(families) > 1:
        families -= {"flow"}  # a solver of both, as this checkpoint's config has it
    if families and entry.family not in families:
        fitting = [sampler.name for sampler in SAMPLERS.values() if sampler.family in families]
        raise UsageError(
            f"{entry.name} cannot sample this checkpoint: its scheduler is {own}; use one of {', '.join(fitting)}.",
            "sampler",
        )


def _refuse_unread_schedule(
    config: Mapping[str, Any], request: Request, sampler: str | None, schedule: str | None
) -> None:
    """Raises: UsageError for a schedule that changes nothing beside the caller's own timesteps or sigmas."""
    implied = None if sampler is None else find_sampler(sampler)[1]
    schedule = implied if schedule is None else schedule
    if schedule in (None, "normal"):
        return
    entry, options, _ = resolve(config, request.name if implied else sampler, "normal")
    if entry.function(request) == entry.function(replace(request, options=options)):
        kind = "timesteps" if request.timesteps is not None else "sigmas"
        text = f"schedule {schedule!r} has no effect: the {kind} say where every step is; leave out one of the two"
        raise UsageError(text, "schedule")


def _check_eta(entry: Sampler, eta: float | None) -> None:
    """Raises: UsageError when eta is outside 0..1, or given to a sampler that has none."""
    if eta is not None and not 0 <= eta <= 1:
        raise UsageError(f"eta {eta!r} is out of range; 0 adds no noise, 1 adds the most.", "eta")
    if eta and not entry.takes_eta:
        able = [sampler.name for sampler in SAMPLERS.values() if sampler.takes_eta]
        raise UsageError(f"{entry.name} has no eta; samplers that have: {', '.join(able)}.", "eta")


def _named_by_options(entry: Sampler, options: Options) -> Sampler:
    """Among samplers of one class, the one whose name implies these options; else the class's first."""
    fitting = [
        other
        for other in SAMPLERS.values()
        if other.diffusers == entry.diffusers and other.forced.items() <= options.items()
    ]
    return max(fitting, key=lambda other: len(other.forced), default=entry)  # the first of those that imply most


def shifts_by_size(scheduler: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether the noise levels of these keywords' sampler may depend on the size of the picture, by `mu`."""
    return "use_dynamic_shifting" in resolve(scheduler, options.get("sampler"))[0].defaults


def takes_even_sigmas(scheduler: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether the sampler of these keywords takes noise levels, and the caller leaves them to the model's pipeline."""
    entry = resolve(scheduler, options.get("sampler"))[0]
    free = options.get("timesteps") is None and options.get("sigmas") is None
    return free and entry.family == "flow" and "sigmas" in entry.custom


def find_schedule(name: str) -> str:
    """`name`, if there is such a schedule.

    Raises: UsageError listing all names, the nearest first.
    """
    if name not in SCHEDULES:
        raise UsageError(f"schedule {name!r} is unknown; use one of {choices(name, SCHEDULES)}.", "schedule")
    return name


def _schedule_options(entry: Sampler, schedule: str) -> Options:
    """The options that a schedule name stands for.

    Raises: UsageError when there is no such schedule, or not for this sampler.
    """
    find_schedule(schedule)
    plain: Options = {flag: False for flag in SCHEDULE_FLAGS.values() if flag in entry.defaults}
    if "sigma_schedule" in entry.defaults and schedule in ("karras", "exponential"):
        return {"sigma_schedule": schedule}
    if schedule in SCHEDULE_FLAGS:
        flag = SCHEDULE_FLAGS[schedule]
        if flag not in entry.defaults:
            able = [s.name for s in SAMPLERS.values() if flag in s.defaults]
            text = f"{entry.name} has no schedule {schedule!r}; samplers that have: {', '.join(able)}."
            raise UsageError(text, "schedule")
        return {**plain, flag: True}
    if schedule == "normal":
        return plain
    if "timestep_spacing" not in entry.defaults:
        text = f"{entry.name} has one spacing of its own; schedule {schedule!r} does not apply to it."
        raise UsageError(text, "schedule")
    return {**plain, "timestep_spacing": "trailing" if schedule in ("sgm_uniform", "simple") else schedule}


def steps_of(
    entry: Sampler, options: Options, steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> int:
    """The number of steps: that of `timesteps` or `sigmas` if they are given, else `steps`; checked."""
    if timesteps is not None and sigmas is not None:
        raise UsageError("give timesteps or sigmas, not both.", "sigmas")
    for kind, given in (("timesteps", timesteps), ("sigmas", sigmas)):
        if given is None:
            continue
        if kind not in entry.custom:
            able = [s.name for s in SAMPLERS.values() if kind in s.custom]
            raise UsageError(f"{entry.name} does not take {kind}; samplers that do: {', '.join(able)}.", kind)
        flags = [flag for flag in SCHEDULE_FLAGS.values() if options.get(flag)]
        if flags and kind == "timesteps":
            raise UsageError(f"timesteps cannot be combined with {flags[0]}; use --schedule normal.", kind)
        ends_with_sigma = kind == "sigmas" and entry.name == "euler"  # its last sigma is where it ends
        count = len(given) - 1 if ends_with_sigma else len(given)
        if count < 1:
            least = 2 if len(given) else 1
            example = "timesteps=[999, 499]" if kind == "timesteps" else "sigmas=[14.6, 3.2, 0.6, 0.0]"
            text = f"{kind}={list(given)}: {entry.name} needs at least {least}, e.g. {example}"
            raise UsageError(text, kind)
        return count
    is_whole = isinstance(steps, (int, np.integer)) and not isinstance(steps, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not is_whole or steps < 1:
        raise UsageError(
            f"steps {shown(steps)}: the number of steps is a whole number, 1 or more.", "num_inference_steps"
        )
    if steps > options["num_train_timesteps"]:
        raise UsageError(
            f"steps {steps}: the model was trained on {options['num_train_timesteps']} timesteps; use fewer.",
            "num_inference_steps",
        )
    return steps


def _refuse_no_levels(name: str, given: Any) -> None:
    """Raises: UsageError for timesteps or sigmas that are no list of numbers."""
    if given is None:
        return
    levels: Any = given.tolist() if isinstance(given, np.ndarray) else given
    if not isinstance(levels, (list, tuple, range)):
        raise UsageError(f"{name} = {shown(given)}; allowed is a list of numbers", name)
    for level in cast("Sequence[Any]", levels):
        if level is None:
            raise UsageError(f"{name} = {shown(given)}; allowed is a list of numbers", name)
        refuse_no_number(**{name: level})


def _cut(train: int, fraction: float) -> int:
    """The timestep at which `fraction` of the way is done, as diffusers rounds it."""
    return round(train - fraction * train)


def _before(entry: Sampler, table: SamplerTable, train: int, start: float) -> int:
    """How many rows lie before `start` of the way; a step of two rows is not taken apart."""
    left = int((table.timestep < _cut(train, start)).sum())
    if entry.rows_per_step == 2 and left % 2 == 0:
        left += 1
    if not left:
        raise UsageError(
            f"denoising_start {start} of {len(table)} calls leaves nothing to do; use less, or more steps.",
            "denoising_start",
        )
    return len(table) - left


def _until(table: SamplerTable, train: int, end: float) -> SamplerTable:
    """The rows up to `end` of the way."""
    done = int((table.timestep >= _cut(train, end)).sum())
    if not done:
        text = f"denoising_end {end} of {len(table)} calls leaves nothing to do; use more, or more steps."
        raise UsageError(text, "denoising_end")
    return table.first(done)


def _checked(strength: float) -> float:
    """The strength.

    Raises: UsageError when it is outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise UsageError(f"strength {strength!r} is out of range; 0 keeps the image, 1 replaces it.", "strength")
    return strength


def _skipped(steps: int, strength: float, rounds_up: bool = False) -> int:
    """How many steps image to image skips: strength 0.6 of 50 does the last 30.

    `rounds_up`: a part of a step is done, as in the pipelines of SD3 and Flux.
    Raises: UsageError when strength is outside 0..1 or leaves nothing to do.
    """
    done = min(int(steps * _checked(strength)), steps)
    if rounds_up:
        done = steps - int(max(steps - min(steps * strength, steps), 0))  # as diffusers computes it
    if done < 1:
        more = f", or {math.ceil(1 / strength)} steps or more" if strength > 1e-6 else ""
        raise UsageError(
            f"strength {strength} of {steps} steps leaves nothing to do: steps x strength must reach 1. "
            f"Use strength {1 / steps:g} or more{more}.",
            "strength",
        )
    return steps - done
