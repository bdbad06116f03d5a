"""The words of AUTOMATIC1111's web UI for samplers and schedules: of a table that was made, and of one to make.

Ref: AUTOMATIC1111/stable-diffusion-webui, modules/sd_schedulers.py, the labels of its schedulers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices
from sdopt.samplers.grids import schedule_of
from sdopt.samplers.registry import Sampler, find_sampler
from sdopt.samplers.resolve import resolve, steps_of

AUTOMATIC = "Automatic"  # the sampler's own schedule, which has no name there
# schedule -> label. The web UI has no word for "lu".
SCHEDULE_LABELS = {"karras": "Karras", "exponential": "Exponential", "beta": "Beta", "lu": "Lu"}
# timestep_spacing of diffusers -> label. Solvers divide "linspace" into one part more, and leave out the cleanest.
SPACING_LABELS = {"leading": "DDIM", "linspace": "Normal", "trailing": "SGM Uniform"}
SOLVER_LABELS = {**SPACING_LABELS, "linspace": "SGM Uniform"}
SOLVERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
NAMED_LABELS = {"sgm_uniform": "SGM Uniform", "simple": "Simple"}  # two names of "trailing"
ALIASES = {"Normal": ("Uniform",), "SGM Uniform": ("SGMUniform",)}  # label -> other labels of the same noise levels
SCHEDULES_BY_LABEL = {  # the same tables the other way round
    label: schedule for table in (SPACING_LABELS, NAMED_LABELS, SCHEDULE_LABELS) for schedule, label in table.items()
}


@dataclass(frozen=True)
class Labels:
    """What a picture's file says about the sampler.

    `schedule` is empty where the caller gave the noise levels. `steps` is their number then.
    """

    sampler: str
    schedule: str
    steps: int


def labels_of(
    config: Mapping[str, Any],
    steps: int,
    *,
    sampler: str | None = None,
    schedule: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Labels:
    """The labels of the table that `sampler_table` makes from the same values.

    Raises: UsageError as `sampler_table` does.
    """
    entry, options, _ = resolve(config, sampler, schedule)
    steps = steps_of(entry, options, steps, timesteps, sigmas)
    is_this_sampler = entry.forced.items() <= options.items()  # a config of its class may ask for another solver
    title = entry.title if is_this_sampler else entry.diffusers
    if timesteps is not None or sigmas is not None:
        return Labels(title, "", steps)
    named = find_sampler(sampler)[1] if schedule is None and sampler is not None else schedule
    return Labels(title, _schedule(entry, options, named), steps)


def _schedule(entry: Sampler, options: Mapping[str, Any], named: str | None) -> str:
    """The label of the schedule that the options stand for. `named` tells two names of one schedule apart."""
    sigmas = schedule_of(options) or options.get("sigma_schedule", "")
    if not sigmas and options.get("interpolation_type") == "log_linear":
        sigmas = "exponential"
    if sigmas:
        return SCHEDULE_LABELS[sigmas]
    if named in NAMED_LABELS:
        return NAMED_LABELS[named]
    if "original_inference_steps" in options or options.get("use_flow_sigmas"):
        return AUTOMATIC
    if entry.diffusers in SOLVERS:  # the single-step one has no option for its spacing, which is linspace
        return SOLVER_LABELS.get(options.get("timestep_spacing", "linspace"), AUTOMATIC)
    return SPACING_LABELS.get(options.get("timestep_spacing", ""), AUTOMATIC)


def name_of(label: str) -> str:
    """The name beside a label in the web UI's list of schedulers: "sgm_uniform" of "SGM Uniform"."""
    return label.lower().replace(" ", "_")


def from_labels(sampler: str, scheduler: str | None = None) -> tuple[str, str | None]:
    """(sampler, schedule) as keywords, for the web UI's words: "Euler a", and "Karras" or "karras".

    A sampler may end in its scheduler, as in "DPM++ 2M Karras". No scheduler, and "Automatic", is the sampler's own.
    Raises: UsageError for words that are unknown, that contradict each other, or that no table is made for.
    """
    stem, own = _split(sampler)
    entry, implied = find_sampler(stem)
    implied = implied if own is None else SCHEDULES_BY_LABEL[own]
    wanted = _schedule_of(scheduler)
    if implied is not None and wanted is not None and implied != wanted:
        text = f"{sampler} has a scheduler, and scheduler is {scheduler!r}; name one of them"
        raise UsageError(text, "schedule")
    schedule = implied if wanted is None else wanted
    if schedule == SCHEDULES_BY_LABEL["Normal"] and entry.diffusers in SOLVERS:
        text = f"{entry.title} has no scheduler Normal: its levels are those of SGM Uniform; name that"
        raise UsageError(text, "schedule")
    return entry.name, schedule


def _labels() -> dict[str, str]:
    """Label by each of its spellings, in small letters and without what is between words."""
    spelled = {_plain(label): label for label in SCHEDULES_BY_LABEL}
    return spelled | {_plain(other): label for label, others in ALIASES.items() for other in others}


def _plain(word: str) -> str:
    return word.lower().replace(" ", "").replace("_", "")


def _split(sampler: str) -> tuple[str, str | None]:
    """A sampler's name without the label of a scheduler at its end, and that label."""
    others = [other for several in ALIASES.values() for other in several]
    for label in sorted((*SCHEDULES_BY_LABEL, *others), key=len, reverse=True):  # "SGM Uniform" before "Uniform"
        stem = sampler[: -len(label) - 1]
        if stem and sampler.lower().endswith(f" {label.lower()}"):
            return stem, _labels()[_plain(label)]
    return sampler, None


def _schedule_of(scheduler: str | None) -> str | None:
    if scheduler is None or _plain(scheduler) in ("", _plain(AUTOMATIC)):
        return None
    label = _labels().get(_plain(scheduler))
    if label is None:
        there = choices(scheduler, (AUTOMATIC, *SCHEDULES_BY_LABEL))
        raise UsageError(f"scheduler {scheduler!r} is unknown; there are {there}", "schedule")
    return SCHEDULES_BY_LABEL[label]
