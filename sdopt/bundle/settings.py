"""The settings of a scheduler_config.json: those that a sampler reads, and what each may be."""

# no `from __future__ import annotations`: `decode` reads annotations, and as text each would be compiled first

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from sdopt.bundle.decode import DecodeError, Rule, decode, integer, one_of, within
from sdopt.bundle.format import Count
from sdopt.bundle.specs import Name

INFINITY = "-inf"  # how diffusers writes it into a scheduler_config.json

# those settings of a scheduler_config.json that a sampler reads; others are kept, and may be any JSON
_Word = Annotated[str, Rule("a word of at most 100 characters", lambda value: len(value) <= 100)]
_Timesteps = Annotated[int, integer(1, 1 << 20)]
_Beta = Annotated[float, Rule("a number above 0 and below 1", lambda value: 0 < value < 1)]
_Above0 = Annotated[float, Rule("a finite number above 0", lambda value: value > 0)]
_Sigma = Annotated[float | None, Rule("null or a finite number above 0", lambda value: value is None or value > 0)]
_Betas = Annotated[tuple[_Beta, ...] | None, Rule("null or a list of numbers", lambda value: value is None or value)]
_BOOLEANS = (
    "clip_sample", "euler_at_final", "invert_sigmas", "lower_order_final", "predict_x0", "rescale_betas_zero_snr",
    "set_alpha_to_one", "skip_prk_steps", "stochastic_sampling", "thresholding", "use_beta_sigmas",
    "use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas", "use_lu_lambdas",
)  # fmt: skip
_WORDS = (
    "algorithm_type", "beta_schedule", "final_sigmas_type", "interpolation_type", "prediction_type",
    "sigma_schedule", "solver_type", "time_shift_type", "timestep_spacing", "timestep_type",
)  # fmt: skip
SETTINGS: Mapping[str, Any] = {
    **dict.fromkeys(_BOOLEANS, bool),
    "_class_name": Name,
    **dict.fromkeys(_WORDS, _Word),
    **dict.fromkeys(("num_train_timesteps", "original_inference_steps"), _Timesteps),
    **dict.fromkeys(("beta_start", "beta_end"), _Beta),
    **dict.fromkeys(("rho", "sigma_data", "timestep_scaling", "flow_shift", "shift"), _Above0),
    **dict.fromkeys(("sigma_min", "sigma_max"), _Sigma),
    "trained_betas": _Betas,
    "steps_offset": Annotated[int, integer(0, 1000)],
    "solver_order": Annotated[int, integer(1, 4)],
    "lambda_min_clipped": float | Annotated[str, one_of(INFINITY)],
    "variance_type": Annotated[str | None, Rule("null or a name", lambda value: True)],
    "shift_terminal": float | None,
    "disable_corrector": tuple[Count, ...],
    "_use_default_values": tuple[str, ...],
}


def check_scheduler(scheduler: Mapping[str, Any]) -> None:
    """Raises: DecodeError that names the first setting of a manifest's `scheduler` that is wrong."""
    for error in of_the_scheduler(scheduler):
        raise error


def refuse_setting(key: str, value: Any) -> None:
    """Raises: DecodeError for a setting of a scheduler_config.json that no sampler reads so."""
    if key in SETTINGS:
        decode(SETTINGS[key], value, within("scheduler", key))


def of_the_scheduler(scheduler: Mapping[str, Any]) -> Iterator[DecodeError]:
    """What is wrong with a manifest's `scheduler`."""
    if "_class_name" not in scheduler:
        yield DecodeError("scheduler._class_name is missing; allowed is the name of a scheduler of diffusers")
    for key, value in scheduler.items():
        try:
            refuse_setting(key, value)
        except DecodeError as error:
            yield error
