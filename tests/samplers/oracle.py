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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdopt.errors import UsageError
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
    if entry.family == "flow" and "flow_shift" in options:  # flow matching calls it shift
        forced["flow_shift"] = options["flow_shift"]
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

    On some processors torch takes them from a library that is one unit in the last place off for a fifth of them.
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
    """The scheduler on one-hot vectors, in float64; or, without `double`, in the float32 that it computes in."""
    from sdopt.export.observe import observe, one_hot

    calls = len(scheduler.timesteps) - begin
    size = 1 + 2 * calls

    def unit(i: int) -> Any:
        return one_hot(size, i) if double else one_hot(size, i).float()

    seen = observe(
        scheduler, begin, unit(0), lambda i: unit(1 + i), lambda j: unit(1 + calls + j), double=double, **step
    )
    return Run(seen.timesteps, seen.samples, seen.inputs, seen.clean, seen.draws)


def deviation(ours: Float64, theirs: Float64) -> float:
    """The largest difference in a row, relative to the row's largest number."""
    if not len(theirs):
        return 0.0
    scale = np.maximum(np.abs(theirs).max(axis=1), 1e-30)
    return float((np.abs(ours - theirs).max(axis=1) / scale).max())


@dataclass(frozen=True)
class Verdict:
    """How far a table is from diffusers; every number is relative but that of the timesteps.

    map: samples after every call and inputs of every call; clean: the clean samples, where the scheduler tells them;
    start: the first sample of image to image, which diffusers always mixes in float32; init: of text to image;
    undefined: how many samples of diffusers are NaN, which are not compared.
    """

    map: float
    clean: float
    timestep: float
    draws_equal: bool
    init: float
    start: float
    undefined: int


def compare(
    config: Mapping[str, Any],
    steps: int,
    *,
    sampler: str | None = None,
    strength: float = 1.0,
    eta: float | None = None,
    double: bool = True,
    **custom: Any,
) -> Verdict:
    """Our table against the scheduler, for one configuration."""
    table = sampler_table(config, steps, sampler=sampler, strength=strength, eta=eta, **custom)
    given = custom.keys() & {"timesteps", "sigmas"}
    with warnings.catch_warnings(), rounded_roots() if double else nullcontext():
        warnings.simplefilter("ignore")
        scheduler = scheduler_like(config, sampler)
        scheduler.set_timesteps(None if given else steps, **custom)
        begin = len(scheduler.timesteps) - len(table)
        init = float(getattr(scheduler, "init_noise_sigma", 1.0))
        start = _start(scheduler, begin)
        theirs = run_diffusers(scheduler, begin, double=double, eta=eta or 0.0)
    ours = run_table(table, theirs.samples.shape[1])
    told, defined = np.isfinite(theirs.clean).all(axis=1), np.isfinite(theirs.samples).all(axis=1)
    seen = defined[:-1]
    return Verdict(
        map=max(
            deviation(ours.samples[defined], theirs.samples[defined]), deviation(ours.inputs[seen], theirs.inputs[seen])
        ),
        clean=deviation(ours.clean[told], theirs.clean[told]),
        timestep=float(np.abs(ours.timesteps - theirs.timesteps).max()),
        draws_equal=bool((ours.draws == theirs.draws).all()),
        init=abs(table.init_noise_sigma / init - 1),
        start=0.0 if start is None else deviation(np.array([table.start]), start[None]),
        undefined=int((~defined).sum()),
    )


def _start(scheduler: Any, begin: int) -> Float64 | None:
    """[image, noise] coefficients of the first sample of image to image."""
    import torch

    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    image, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    first = scheduler.timesteps[begin : begin + 1]
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(image, noise, first)[0].double().numpy()
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(image, first, noise)[0].double().numpy()
    return None


# ------------------------------------------------------------------------------------------------ configurations

# What diffusers itself can do; sdopt's formulas know every prediction for every sampler but these and pndm.
PREDICTIONS = {
    **dict.fromkeys(("pndm", "euler_a", "dpm2", "dpm2_a", "edm_euler", "edm_dpmpp_2m"), ("epsilon", "v_prediction")),
    **dict.fromkeys(("flow_euler", "flow_heun", "ipndm"), ("",)),
    **dict.fromkeys(("flow_dpmpp_2m", "flow_dpmpp_2m_sde"), ("",)),
}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
OPTIONS: dict[str, list[Any]] = {  # option: the values to try, where the sampler's class has it
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "beta_schedule": ["linear", "squaredcos_cap_v2"],
    "steps_offset": [0],
    "set_alpha_to_one": [True],
    "final_sigmas_type": ["sigma_min"],
    "variance_type": ["fixed_small_log", "fixed_large"],
    "interpolation_type": ["log_linear"],
    "original_inference_steps": [100],
    "timestep_scaling": [5.0],
    "sigma_schedule": ["exponential"],
    "rho": [5.0],
    "sigma_data": [1.0],
    "shift": [3.0],
    "invert_sigmas": [True],
    "stochastic_sampling": [True],
    "disable_corrector": [[0, 1, 3]],
    "lower_order_final": [True],
    "use_lu_lambdas": [True],
}
SETS: list[dict[str, Any]] = [  # options that only make sense, or only show, together
    {"use_karras_sigmas": True},
    {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
    {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True, "final_sigmas_type": "sigma_min"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "linspace", "prediction_type": "v_prediction"},
    {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    {"skip_prk_steps": False},
    {"skip_prk_steps": False, "timestep_spacing": "linspace", "prediction_type": "v_prediction"},
    {"solver_type": "heun", "euler_at_final": False},
    {"solver_type": "bh1", "solver_order": 3, "predict_x0": True, "final_sigmas_type": "sigma_min"},
    {"solver_type": "bh2", "solver_order": 3, "predict_x0": True},
    {"solver_type": "bh1", "solver_order": 1, "predict_x0": True, "final_sigmas_type": "sigma_min"},
    {"solver_type": "logrho", "solver_order": 3, "algorithm_type": "deis"},
    {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"euler_at_final": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
    {**FLOW, "flow_shift": 3.0},
    {**FLOW, "use_karras_sigmas": True, "predict_x0": True},
    {**FLOW, "flow_shift": 2.0, "shift_terminal": 0.1, "predict_x0": True},
    {"shift": 3.0, "shift_terminal": 0.1},
    {"shift": 3.0, "use_karras_sigmas": True},
    {"shift": 3.0, "use_beta_sigmas": True},
    {"flow_shift": 3.0, "num_train_timesteps": 1000},
]
SOLVERS = [  # by class name, which keeps these options; a sampler's own name would overrule them
    {"algorithm_type": algorithm, "solver_type": solver, "solver_order": order, "final_sigmas_type": "sigma_min"}
    for algorithm in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
    for solver in ("midpoint", "heun")
    for order in (1, 2, 3)
    if (algorithm, order) != ("sde-dpmsolver", 3)
]


def config_for(name: str) -> dict[str, Any]:
    """A checkpoint's config that the sampler fits: Stable Diffusion 1.5's, or an empty one of its own kind."""
    entry = SAMPLERS[name]
    if entry.family == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    return dict(SD15) if entry.family == "diffusion" else {"_class_name": entry.diffusers}


def configurations(name: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(label, config, sampler) of everything to compare for one sampler."""
    known, base = SAMPLERS[name].defaults, config_for(name)
    for prediction in PREDICTIONS.get(name, ("epsilon", "v_prediction", "sample")):
        yield prediction or "default", {**base, "prediction_type": prediction} if prediction else base, name
    options = [{key: value} for key, values in OPTIONS.items() for value in values]
    for extra in [*options, *SETS]:
        needed = extra.keys() - {"prediction_type", "sigma_min", "sigma_max"}
        cosine = extra.get("beta_schedule") == "squaredcos_cap_v2"
        if needed <= known.keys() and not (cosine and name == "dpm2_a"):  # sigmas of 20,000: nothing but cancellation
            yield " ".join(f"{key}={value}" for key, value in extra.items()), {**base, **extra}, name
    for extra in SOLVERS:
        single = name == "dpmpp_2s" and not extra["algorithm_type"].startswith("sde")
        if name == "dpmpp_2m" or single:
            label = " ".join(str(value) for value in extra.values())
            yield label, {**base, **extra}, SAMPLERS[name].diffusers


# How far the map and the timesteps may be from diffusers', where that is not 1e-9, and why.
LIMITS = {
    "dpm2": (5e-6, 1e-4, "diffusers computes the middle levels in float32"),
    "dpm2_a": (3e-4, 2e-2, "diffusers computes the middle and lower levels in float32, where they nearly cancel"),
    "ipndm": (5e-6, 1e-6, "diffusers computes its schedule in float32, with sin and atan2"),
    "edm_euler": (1e-6, 1e-6, "diffusers computes exponential sigmas in float32"),
    "edm_dpmpp_2m": (5e-6, 1e-6, "diffusers computes its sigmas in float32, as seventh powers"),
    "euler": (1e-6, 1e-6, "diffusers computes log_linear sigmas and continuous timesteps in float32"),
}
EXACT = (1e-9, 1e-9, "rounding of float64")


def main() -> None:
    """Print the table of samplers and their largest deviation, as Markdown."""
    print("| sampler | configurations | float64 map | as diffusers runs, float32 | limit of the float64 map |")
    print("|---|---|---|---|---|")
    for name in SAMPLERS:
        exact, plain, count = 0.0, 0.0, 0
        for _, config, sampler in configurations(name):
            for steps in (5, 8, 20):
                try:
                    verdict = compare(config, steps, sampler=sampler)
                    rough = compare(config, steps, sampler=sampler, double=False)
                except UsageError:
                    continue
                count += 1
                exact, plain = max(exact, verdict.map, verdict.clean), max(plain, rough.map)
        reason = LIMITS.get(name, EXACT)[2]
        print(f"| {name} | {count} | {exact:.1e} | {plain:.1e} | {reason} |", flush=True)


if __name__ == "__main__":
    main()
