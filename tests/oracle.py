"""The oracle: the whole linear map of a real diffusers scheduler, read off by running it once on one-hot vectors.

    e0        the first sample
    e(1 + i)  the i-th model output
    then      the j-th noise that the scheduler draws

A sampler table run on the same vectors must arrive at the same numbers after every call.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdopt.samplers import SAMPLERS, SamplerTable, resolve, sampler_table

Float64 = NDArray[np.float64]

SD15 = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def scheduler_like(config: Mapping[str, Any], sampler: str | None) -> Any:
    """The diffusers scheduler that the same request means: NewScheduler.from_config(config)."""
    import diffusers

    entry, options, _ = resolve(config, sampler)
    forced = {key: options[key] for key in entry.forced}
    stated = {**config, **forced, "clip_sample": False, "_class_name": entry.diffusers}
    key = json.dumps(stated, sort_keys=True)
    if key not in _MADE:
        diffusers.utils.logging.set_verbosity_error()
        _MADE[key] = getattr(diffusers, entry.diffusers).from_config(stated)
    return copy.deepcopy(_MADE[key])


_MADE: dict[str, Any] = {}  # some constructors take a quarter of a second


@contextmanager
def rounded_roots() -> Iterator[None]:
    """Inside, torch's square roots are correctly rounded, as IEEE 754 says and NumPy's are.

    On some processors torch takes them from a library that is one unit in the last place off, for a fifth of all numbers.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    powers = (torch.pow, torch.Tensor.pow, torch.Tensor.__pow__)

    class Rounded(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            root = func in (torch.sqrt, torch.Tensor.sqrt) or (func in powers and args[1:] == (0.5,))
            return torch.from_numpy(np.asarray(np.sqrt(args[0].numpy()))) if root else func(*args, **(kwargs or {}))

    with Rounded():
        yield


@dataclass(frozen=True)
class Run:
    """Samples after every call, inputs of every call, as coefficients of one-hot vectors."""

    timesteps: Float64
    samples: Float64
    inputs: Float64
    clean: Float64
    draws: NDArray[np.int64]


def run_table(table: SamplerTable, size: int) -> Run:
    """The table on one-hot vectors, in float64."""
    calls = len(table)
    unit = np.eye(size)
    x, history, drawn = unit[0], list[Float64](), 0
    samples, inputs, clean = [x], list[Float64](), list[Float64]()
    for k in range(calls):
        output = unit[1 + k]
        inputs.append(table.c_in[k] * x)
        clean.append(table.denoised[k] @ np.stack([x, output]))
        history = [table.c_skip[k] * x + table.c_out[k] * output, *history][: table.order]
        padded = [*history, *[np.zeros(size)] * (table.order - len(history))]
        noise = unit[1 + calls + drawn] if table.draws[k] else np.zeros(size)
        drawn += int(table.draws[k])
        x = table.update[k] @ np.stack([x, *padded, noise])
        samples.append(x)
    return Run(table.timestep, np.stack(samples), np.stack(inputs), np.stack(clean), table.draws.astype(np.int64))


def run_diffusers(scheduler: Any, begin: int, *, double: bool = True, **step: Any) -> Run:
    """The scheduler on one-hot vectors, in float64 (or as it is: `double=False`)."""
    from sdopt.export.probe import observe, one_hot

    calls = len(scheduler.timesteps) - begin
    size = 1 + 2 * calls
    seen = observe(
        scheduler,
        begin,
        one_hot(size, 0),
        lambda i: one_hot(size, 1 + i),
        lambda j: one_hot(size, 1 + calls + j),
        double=double,
        **step,
    )
    return Run(seen.timesteps, seen.samples, seen.inputs, seen.clean, seen.draws)


def deviation(ours: Float64, theirs: Float64) -> float:
    """The largest difference of a row, relative to the row's largest number; NaN rows of theirs are not compared."""
    told = np.isfinite(theirs).all(axis=1)
    scale = np.abs(theirs[told]).max(axis=1, initial=1e-30)
    return float((np.abs(ours[told] - theirs[told]).max(axis=1, initial=0) / scale).max(initial=0))


@dataclass(frozen=True)
class Verdict:
    """How far a table is from diffusers: `map` over all samples and inputs, `clean` over the clean samples."""

    map: float
    clean: float
    timestep: float
    draws_equal: bool
    init: float
    start: float


def compare(
    config: Mapping[str, Any],
    steps: int | None,
    *,
    sampler: str | None = None,
    strength: float = 1.0,
    eta: float | None = None,
    double: bool = True,
    **custom: Any,
) -> Verdict:
    """Our table against the scheduler, for one configuration."""
    import torch

    table = sampler_table(config, steps or 1, sampler=sampler, strength=strength, eta=eta, **custom)
    with warnings.catch_warnings(), rounded_roots():
        warnings.simplefilter("ignore")
        scheduler = scheduler_like(config, sampler)
        scheduler.set_timesteps(None if custom else steps, **custom)
        begin = len(scheduler.timesteps) - len(table)
        init = float(getattr(scheduler, "init_noise_sigma", 1.0))
        start = _start(scheduler, begin, torch)
        theirs = run_diffusers(scheduler, begin, double=double, eta=eta or 0.0)
    ours = run_table(table, theirs.samples.shape[1])
    return Verdict(
        map=max(deviation(ours.samples, theirs.samples), deviation(ours.inputs, theirs.inputs)),
        clean=deviation(ours.clean, theirs.clean),
        timestep=float(np.abs(ours.timesteps - theirs.timesteps).max()),
        draws_equal=bool((ours.draws == theirs.draws).all()),
        init=abs(table.init_noise_sigma / init - 1),
        start=0.0 if start is None else float(np.abs(np.array(table.start) - start).max() / np.abs(start).max()),
    )


def _start(scheduler: Any, begin: int, torch: Any) -> Float64 | None:
    mix = getattr(scheduler, "add_noise", None) or getattr(scheduler, "scale_noise", None)
    if mix is None:
        return None
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    image, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    first = scheduler.timesteps[begin : begin + 1]
    mixed = mix(image, noise, first) if hasattr(scheduler, "add_noise") else mix(image, first, noise)
    return mixed[0].numpy().astype(np.float64)


def samplers() -> list[str]:
    """The names to test: all there are."""
    return list(SAMPLERS)
