"""The options of diffusers' schedulers: the defaults of each class, and which ones no table can express.

Changing a checkpoint's sampler keeps the options that its scheduler_config.json states and takes the new class's
defaults for the others, as NewScheduler.from_config(old.config) does. One exception: where the config does not state
clip_sample and the class's default is true (DDIM, DDPM), it is false here, with a note; the Stable Diffusion pipelines
of diffusers switch it off too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from sdopt.bundle.decode import DecodeError
from sdopt.bundle.settings import INFINITY, refuse_setting
from sdopt.errors import UsageError, refuse_other, shown

Options = dict[str, Any]

TRAINED: Options = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
LINSPACE: Options = {**TRAINED, "timestep_spacing": "linspace"}
LEADING: Options = {**TRAINED, "timestep_spacing": "leading"}
ZERO_SNR: Options = {"rescale_betas_zero_snr": False}
THRESHOLDING: Options = {"thresholding": False}
SIGMAS: Options = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
FLOW: Options = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False}
RANGE: Options = {"sigma_min": None, "sigma_max": None}

DDIM: Options = {**LEADING, **THRESHOLDING, **ZERO_SNR, "clip_sample": True, "set_alpha_to_one": True}
DDPM: Options = {**LEADING, **THRESHOLDING, **ZERO_SNR, "clip_sample": True, "variance_type": "fixed_small"}
PNDM: Options = {**LEADING, "skip_prk_steps": False, "set_alpha_to_one": False}
LMS: Options = {**LINSPACE, **SIGMAS}
EULER: Options = {
    **LINSPACE, **SIGMAS, **RANGE, **ZERO_SNR,
    "interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero",
}  # fmt: skip
EULER_ANCESTRAL: Options = {**LINSPACE, **ZERO_SNR}
KDPM2: Options = {**LINSPACE, **SIGMAS, "beta_start": 0.00085, "beta_end": 0.012}
HEUN: Options = {**KDPM2, "clip_sample": False}
DPM_SINGLE: Options = {
    **TRAINED, **SIGMAS, **FLOW, **THRESHOLDING,
    "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": False,
    "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None,
}  # fmt: skip
DPM: Options = {
    **DPM_SINGLE, **LINSPACE, **ZERO_SNR, "lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False,
}  # fmt: skip
UNIPC: Options = {
    **LINSPACE, **SIGMAS, **FLOW, **RANGE, **THRESHOLDING, **ZERO_SNR,
    "solver_order": 2, "predict_x0": True, "solver_type": "bh2", "lower_order_final": True, "disable_corrector": (),
    "solver_p": None, "final_sigmas_type": "zero", "shift_terminal": None, "time_shift_type": "exponential",
}  # fmt: skip
DEIS: Options = {
    **LINSPACE, **SIGMAS, **FLOW, **THRESHOLDING,
    "solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho", "lower_order_final": True,
}  # fmt: skip
IPNDM: Options = {"num_train_timesteps": 1000, "trained_betas": None}
LCM: Options = {
    **LEADING, **THRESHOLDING, **ZERO_SNR,
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "original_inference_steps": 50,
    "clip_sample": False, "set_alpha_to_one": True, "timestep_scaling": 10.0,
}  # fmt: skip
EDM: Options = {
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sigma_min": 0.002, "sigma_max": 80.0,
    "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0, "final_sigmas_type": "zero",
}  # fmt: skip
EDM_DPM: Options = {
    **EDM, **THRESHOLDING,
    "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True,
    "euler_at_final": False,
}  # fmt: skip
FLOW_EULER: Options = {
    **SIGMAS,
    "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "invert_sigmas": False,
    "shift_terminal": None, "time_shift_type": "exponential", "stochastic_sampling": False,
}  # fmt: skip
FLOW_HEUN: Options = {"num_train_timesteps": 1000, "shift": 1.0}
_OF_DIFFUSION = {*SIGMAS, "use_lu_lambdas", "timestep_spacing"}  # schedules of levels that are no flow's
FLOW_DPM: Options = {name: default for name, default in DPM.items() if name not in _OF_DIFFUSION}


def checked_config(config: Any) -> Mapping[str, Any]:
    """A scheduler_config.json, or the config of a live scheduler, whose settings are what a sampler reads.

    Raises: UsageError that names the setting, its value and what is allowed.
    """
    refuse_other("config", config, Mapping, "are the entries of a scheduler_config.json")
    entries = {key: _as_json(value) for key, value in config.items()}
    for key, value in entries.items():
        try:
            refuse_setting(key, value)
        except DecodeError as error:
            raise UsageError(str(error)) from error
    return config


def _as_json(value: Any) -> Any:
    """A setting as its file has it: a live scheduler has arrays, tuples and infinity."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, tuple):
        return list(cast("tuple[Any, ...]", value))
    return INFINITY if isinstance(value, float) and value == -math.inf else value


def refuse_no_number(**numbers: Any) -> None:
    """Raises: UsageError for a value that is neither None nor a finite number."""
    for name, value in numbers.items():
        is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if value is not None and not (is_number and -1e300 < value < 1e300):
            raise UsageError(f"{name} = {shown(value)}; allowed are finite numbers", name)


def merged(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Options, tuple[str, ...]]:
    """Every option of a class: the config's where it states one, else the default; and notes on what was decided.

    Raises: UsageError for an option that no table can express.
    """
    unstated = set(config.get("_use_default_values", ()))  # diffusers' own mark in a live config
    known = {*defaults, "sigma_min", "sigma_max"}  # these two are read by classes that do not declare them
    stated = {key: value for key, value in config.items() if key in known and key not in unstated}
    options, notes = {**defaults, **stated}, list[str]()
    if defaults.get("clip_sample") and "clip_sample" not in stated:
        options["clip_sample"] = False
        notes.append("clip_sample is not stated by the checkpoint; it is off here (the class of diffusers has it on).")
    refuse_nonlinear(options)
    return options, tuple(notes)


def refuse_nonlinear(options: Mapping[str, Any]) -> None:
    """Raises: UsageError naming the first option that makes a step depend on the sample in a way that is not linear."""
    for name, reason in _NONLINEAR.items():
        if options.get(name):
            raise UsageError(
                f"{name} {options[name]!r} cannot be used: {reason}, and sdopt's samplers are tables of coefficients. "
                f'Set "{name}" to false in scheduler_config.json.'
            )
    if options.get("variance_type") in ("learned", "learned_range"):
        raise UsageError(
            f"variance_type {options['variance_type']!r} cannot be used: the model predicts its own variance, so the "
            "noise of a step is not known before the model ran. "
            'Set "variance_type" to "fixed_small" and export an output without the variance.'
        )
    if options.get("solver_p") is not None:
        raise UsageError('solver_p cannot be used: UniPC\'s predictor is its own here. Set "solver_p" to null.')


_NONLINEAR = {
    "thresholding": "dynamic thresholding rescales by a quantile of the sample itself",
    "clip_sample": "it clamps the clean sample, which is wrong for latents anyway",
}
