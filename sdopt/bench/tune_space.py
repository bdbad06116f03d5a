"""What a tune tries on a bundle: every combination of its levers that the bundle and this machine can make.

A lever is a list of settings, each some keywords of a request; the product of all levers and engines is the space.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sdopt.bench.tune_search import Candidate
from sdopt.bundle.adapter import TINY_VAE, adapter_names
from sdopt.bundle.files import Bundle
from sdopt.bundle.joined import shallow_depth
from sdopt.dataclass import dataclass
from sdopt.engine import BACKENDS, PRECISIONS, choose_backend, installed_backends
from sdopt.errors import BackendError, UsageError
from sdopt.pipeline import Pipeline

Setting = Mapping[str, Any]
PROMPTS = (  # of pictures, where the caller names none
    "a red apple", "a cat", "a blue car on a street at night", "a house by a lake", "a smiling face", "a yellow flower",
    "a boat at sunset", "a slice of pizza",
)  # fmt: skip
SAMPLERS = ("", "ddim", "dpmpp_2m", "dpmpp_2m/karras", "unipc", "deis", "euler")  # "": the bundle's own
STEPS = (1.0, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)  # of the bundle's own number
INTERVALS = ((), (0.0, 0.8), (0.0, 0.6))  # in which guidance is on; (): all
CACHES = (2, 3)  # calls from one full call to the next


@dataclass(frozen=True)
class Wanted:
    """What the caller limits the space to; an empty tuple is all. `steps`: numbers of steps."""

    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()


def engines_here(bundle: Bundle, wanted: Wanted) -> list[tuple[str, str]]:
    """(backend, precision) of all engines that run a bundle here.

    Raises: BackendError or UsageError if there is none, or none of a backend or a precision that was named.
    """
    found: dict[tuple[str, str], tuple[str, str]] = {}  # as they are named -> as they are opened
    errors: dict[tuple[str, str], Exception] = {}
    for named in itertools.product(wanted.backends or installed_backends(), wanted.precisions or PRECISIONS[1:]):
        try:
            found[named] = choose_backend(*named, bundle)
        except (BackendError, UsageError) as error:
            errors[named] = error
    for place, words in enumerate((wanted.backends, wanted.precisions)):
        for word in words:
            if word not in {named[place] for named in found}:
                raise next(error for named, error in errors.items() if named[place] == word)
    if not found:
        raise BackendError(f"no backend runs here; there are {', '.join(BACKENDS)}")
    return list(dict.fromkeys(found.values()))


def refuse_unfit(pipe: Pipeline, wanted: Wanted) -> None:
    """Raises: UsageError for a sampler or a number of steps that was named and that the bundle refuses, or that draws
    noise in its steps."""
    for steps in wanted.steps:
        pipe.plan("a cat", seed=0, num_inference_steps=steps)
    for word in wanted.samplers:
        settings: dict[str, Any] = dict(_sampler(word))
        if pipe.plan("a cat", seed=0, **settings).table.stochastic:
            text = "draws noise in its steps, so that it comes to another picture; name one that draws none, e.g. ddim"
            raise UsageError(f"--sampler {word} {text}", "sampler")


def default_candidate(engine: tuple[str, str]) -> Candidate:
    """The settings of a call without keywords."""
    return Candidate(*engine, {})


def space(pipe: Pipeline, engine: tuple[str, str], wanted: Wanted) -> list[Candidate]:
    """The candidates on an engine. Left out are those that the bundle refuses, and those that draw noise in each step.

    Two names of one sampler, such as the bundle's own and that of no name, are one candidate.
    """
    kept: dict[Any, Candidate] = {}
    for settings in itertools.product(*levers(pipe, wanted)):
        keywords = {name: value for setting in settings for name, value in setting.items()}
        try:
            plan = pipe.plan("a cat", seed=0, **keywords)
        except UsageError:
            continue
        if not plan.table.stochastic and not plan.remarks:
            same = (plan.labels.sampler, plan.labels.schedule, plan.labels.steps, str(settings[2:]))
            kept.setdefault(same, Candidate(*engine, keywords))
    return list(kept.values())


def levers(pipe: Pipeline, wanted: Wanted) -> list[Sequence[Setting]]:
    """The settings of each lever on a bundle."""
    own = pipe.bundle.manifest.defaults.num_inference_steps
    steps = wanted.steps or tuple(dict.fromkeys(max(1, round(part * own)) for part in STEPS))
    samplers = [_sampler(word) for word in wanted.samplers or SAMPLERS]
    depths = sorted({shallow_depth(name) for name in pipe.pool.built} - {0})
    caches: list[Setting] = [{}, *({"cache_interval": k, "cache_depth": d} for k in CACHES for d in depths)]
    intervals: list[Setting] = [{"guidance_interval": list(one)} if one else {} for one in INTERVALS]
    names = [name for name in adapter_names(pipe.bundle) if pipe.pool.adapter(name).manifest.kind == TINY_VAE]
    decoders: list[Setting] = [{}, *({"vae": name} for name in names)]
    return [samplers, [{"num_inference_steps": n} for n in steps], intervals, caches, decoders]


def _sampler(word: str) -> Setting:
    """The keywords of "dpmpp_2m/karras"."""
    name, _, schedule = word.partition("/")
    return {**({"sampler": name} if name else {}), **({"schedule": schedule} if schedule else {})}
