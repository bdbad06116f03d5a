"""Samplers are diffusers' samplers: the oracle over every sampler and option, and what every table must be."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.cli.main import main
from sdopt.errors import UsageError
from sdopt.samplers import SAMPLERS, SCHEDULES, SamplerTable, find_sampler, sampler_table
from sdopt.samplers.noise import generator
from tests.samplers.oracle import EXACT, LIMITS, SD15, compare, config_for, configurations, run_table, scheduler_like

ALL = list(SAMPLERS)
DETERMINISTIC = [name for name in ALL if not SAMPLERS[name].stochastic and name != "lcm"]


def table_of(name: str, steps: int = 8, **options: Any) -> SamplerTable:
    keywords = {key: options.pop(key) for key in ("strength", "eta", "timesteps", "sigmas", "mu") if key in options}
    return sampler_table({**config_for(name), **options}, steps, sampler=name, **keywords)


# --------------------------------------------------------------------------------------------------- the oracle


def check(name: str, config: dict[str, Any], sampler: str, runs: list[tuple[int, float]], **custom: Any) -> None:
    """Compare for (steps, strength); an impossible one is refused, and diffusers has nothing to compare either."""
    far, late, _ = LIMITS.get(name, EXACT)
    for steps, strength in runs:
        if name == "pndm" and config.get("skip_prk_steps") is False and steps < 4:
            continue
        if config.get("shift_terminal") and steps == 1:
            continue
        verdict = compare(config, steps, sampler=sampler, strength=strength, **custom)
        where = f"{name}, {steps} steps, strength {strength}: {verdict}"
        assert max(verdict.map, verdict.clean) < far, where
        assert verdict.timestep < late, where
        assert max(verdict.init, verdict.start) < 3e-7, where
        assert verdict.draws_equal, where
        assert verdict.undefined == 0 or "use_karras_sigmas" in config, where


def cases(predictions: bool) -> list[Any]:
    """(name, config, sampler) of the oracle, those of the prediction types apart from all other options."""
    found: list[Any] = []
    for name in ALL:
        for label, config, sampler in configurations(name):
            if predictions == ("=" not in label and " " not in label):
                found.append(pytest.param(name, config, sampler, id=f"{name} {label}"))
    return found


@pytest.mark.parametrize(("name", "config", "sampler"), cases(predictions=True))
def test_the_whole_linear_map_is_diffusers_for_every_number_of_steps(name: str, config: Any, sampler: str) -> None:
    runs = [(n, 1.0) for n in (1, 2, 3, 5, 8, 20, 50)] + [(20, 0.6), (20, 0.35), (8, 0.3)]
    check(name, config, sampler, runs if name != "lms" else [r for r in runs if r[0] < 50])


@pytest.mark.parametrize(("name", "config", "sampler"), cases(predictions=False))
def test_the_whole_linear_map_is_diffusers_for_every_option(name: str, config: Any, sampler: str) -> None:
    check(name, config, sampler, [(2, 1.0), (5, 1.0), (20, 1.0), (8, 0.5)] if name != "lms" else [(2, 1.0), (6, 0.7)])


@pytest.mark.parametrize("name", ["ddim", "tcd"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_is_diffusers(name: str, eta: float) -> None:
    check(name, SD15, name, [(2, 1.0), (8, 1.0), (20, 0.6)], eta=eta)


CUSTOM = {
    "timesteps": {
        **{name: [999, 850, 600, 300, 100] for name in ("ddpm", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_2s")},
        **{name: [999, 759, 499, 259] for name in ("lcm", "tcd")},
        **{name: [999.0, 700.5, 300.25, 20.0] for name in ("euler", "heun")},
    },
    "sigmas": {"euler": [14.0, 5.0, 1.0, 0.3, 0.0], "flow_euler": [1.0, 0.7, 0.5, 0.1]},
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CUSTOM.items() for name in names])
def test_custom_timesteps_and_sigmas_are_diffusers(kind: str, name: str) -> None:
    check(name, config_for(name), name, [(1, 1.0)], **{kind: CUSTOM[kind][name]})


def test_the_shift_that_depends_on_the_size_is_diffusers() -> None:
    config = {**config_for("flow_euler"), "use_dynamic_shifting": True}
    for shift_type in ("exponential", "linear"):
        check("flow_euler", {**config, "time_shift_type": shift_type}, "flow_euler", [(5, 1.0)], mu=0.8)
    for name in ("flow_dpmpp_2m", "flow_dpmpp_2m_sde"):
        check(name, config, name, [(5, 1.0)], mu=0.8)
    flow = {**SD15, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True}
    for name in ("dpmpp_2m", "dpmpp_2s", "deis", "unipc"):
        check(name, flow, name, [(5, 1.0)], mu=0.8)
    with pytest.raises(UsageError, match="mu"):
        sampler_table(config, 4)


@pytest.mark.parametrize("name", ALL)
def test_in_the_float32_that_diffusers_computes_in_the_map_is_near(name: str) -> None:
    limit = 3e-4 if SAMPLERS[name].stochastic or name == "ipndm" else 5e-5
    assert compare(config_for(name), 10, sampler=name, double=False).map < limit


def test_where_diffusers_divides_zero_by_zero_the_table_is_the_limit() -> None:
    ending = {**SD15, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    assert compare(ending, 20, sampler="dpmpp_3m").undefined == 1
    table = sampler_table(ending, 20, sampler="dpmpp_3m")
    assert table.update[-1].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]  # it ends where it is
    bh1 = {**SD15, "solver_type": "bh1"}
    assert compare(bh1, 5, sampler="unipc").undefined == 1
    assert sampler_table(bh1, 5, sampler="unipc").update[-1, 0] == 0


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_ends_at_the_same_latents(name: str) -> None:
    """A nonlinear stand-in for the UNet, float32, noise from the seed: the loop of a pipeline on both sides."""
    torch = pytest.importorskip("torch")
    shape, table = (2, 4, 8, 8), table_of(name, 7)
    scheduler = scheduler_like(config_for(name), name)
    scheduler.set_timesteps(7)
    ours, theirs = generator(5), torch.Generator("cpu").manual_seed(5)
    x = ours.randn(shape) * np.float32(table.init_noise_sigma)
    y = torch.randn(shape, generator=theirs) * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
    noisy: dict[str, Any] = {"generator": theirs} if SAMPLERS[name].stochastic else {}
    noisy |= {"eta": 0.0} if SAMPLERS[name].takes_eta else {}
    history: tuple[Any, ...] = ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, t in enumerate(scheduler.timesteps):
            output = np.tanh(table.c_in[k].astype(np.float32) * x) + np.float32(0.1)
            x, history = table.advance(k, x, output, history, ours.randn(shape) if table.draws[k] else None)
            y = scheduler.step(torch.tanh(scale(y, t)) + 0.1, t, y, **noisy).prev_sample
    assert np.abs(x - y.numpy()).max() < 1e-4 * np.abs(x).max()


# ------------------------------------------------------------------------------------------- what a table promises


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_calls_are_as_announced(name: str, steps: int) -> None:
    assert len(table_of(name, steps)) == SAMPLERS[name].calls(steps)


@pytest.mark.parametrize("name", ALL)
def test_stochastic_is_as_announced(name: str) -> None:
    assert table_of(name).stochastic == SAMPLERS[name].stochastic
    if SAMPLERS[name].takes_eta:
        assert table_of(name, eta=0.5).stochastic


@pytest.mark.parametrize("name", ALL)
def test_json_keeps_every_digit(name: str) -> None:
    table = table_of(name, 5, **({"strength": 0.6} if name != "ipndm" else {}))
    again = SamplerTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    assert SamplerTable.from_json(json.dumps(table.to_json())) == table
    assert all((getattr(again, f) == getattr(table, f)).all() for f in ("update", "timestep", "denoised", "sigma"))


def test_json_keeps_infinity_and_names_wrong_fields() -> None:
    config = {**SD15, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    table = sampler_table(config, 3, sampler="ddim")
    assert table.sigma[0] == math.inf
    assert "Infinity" not in json.dumps(table.to_json())
    assert SamplerTable.from_json(table.to_json()).sigma[0] == math.inf
    with pytest.raises(UsageError, match="fields must be"):
        SamplerTable.from_json({"name": "x"})


@pytest.mark.parametrize("name", ALL)
def test_advance_in_float32_is_the_row_and_changes_nothing_it_was_given(name: str) -> None:
    table, rng = table_of(name, 6), np.random.default_rng(0)
    shape = (2, 4, 6, 6)
    calls = len(table)
    exact = run_table(table, 1 + 2 * calls)
    parts = rng.standard_normal((1 + 2 * calls, *shape)).astype(np.float32)
    kept, x, history, drawn = parts.copy(), parts[0], (), 0
    for k in range(calls):
        noise = parts[1 + calls + drawn] if table.draws[k] else None
        drawn += int(table.draws[k])
        x, history = table.advance(k, x, parts[1 + k], history, noise)
        expected = np.tensordot(exact.samples[k + 1], parts.astype(np.float64), 1)
        assert x.dtype == np.float32
        assert len(history) <= table.order
        assert np.abs(x - expected).max() < 2e-4 * np.abs(expected).max()
    assert (parts == kept).all()


def test_advance_asks_for_noise_where_a_row_adds_it() -> None:
    table = table_of("euler_a", 3)
    with pytest.raises(UsageError, match=r"call 0; pass noise of shape \[1, 4\]"):
        table.advance(0, np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32))


def test_the_clean_sample_of_a_row_is_its_prediction() -> None:
    table, x = table_of("euler", 4), np.ones(3, np.float32)
    assert table.clean(1, x, x) == pytest.approx(np.full(3, 1 - table.sigma[1]), rel=1e-6)
    assert table.clean(1, x, x).dtype == np.float32


def test_arrays_are_read_only() -> None:
    table = table_of("euler")
    with pytest.raises(ValueError, match="read-only"):
        table.update[0, 0] = 2
    with pytest.raises(AttributeError):
        table.name = "x"  # type: ignore[misc]


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a wrong length": (lambda d: d["c_in"].pop(), r"c_in is \[3\], must be \[4\]"),
    "no rows": (lambda d: d.update(timestep=[]), "must be"),
    "NaN": (lambda d: d["update"][2].__setitem__(0, math.nan), r"update\[2\]\[0\] is nan"),
    "infinity": (lambda d: d["denoised"][1].__setitem__(1, math.inf), r"denoised\[1\]"),
    "a negative sigma": (lambda d: d["sigma"].__setitem__(3, -1.0), r"sigma\[3\]"),
    "history that is not there": (lambda d: d["update"][0].__setitem__(2, 1.0), "row 0 uses missing history"),
    "noise that is not drawn": (lambda d: d["update"][1].__setitem__(-1, 1.0), "does not draw"),
    "an infinite level": (lambda d: d["level"].__setitem__(0, [1.0, math.inf]), r"level\[0\]\[1\] is inf"),
    "a level too few": (lambda d: d["level"].pop(), r"level is \[4, 2\], must be \[5, 2\]"),
}


@pytest.mark.parametrize("wrong", list(BAD))
def test_a_table_is_proven_when_it_is_made(wrong: str) -> None:
    data = table_of("dpmpp_2m", 4).to_json()
    change, message = BAD[wrong]
    change(data)
    with pytest.raises(UsageError, match=message):
        SamplerTable.from_json(data)


# ------------------------------------------------------------------------------------------------------ mathematics


@pytest.mark.parametrize("name", [n for n in ALL if n != "ipndm"])  # that one mixes v, which is not constant
@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_a_perfect_denoiser_is_at_the_level_of_every_row(name: str, steps: int) -> None:
    """If clean and noise never change, sample k is alpha_k clean + sigma_k noise, old and fresh noise together."""
    spaced = {"set_alpha_to_one": True, "steps_offset": 0} if name in ("ddim", "pndm") else {}
    table = table_of(name, steps, **spaced)
    basis = np.eye(2 + len(table))  # clean, the first noise, then that of each call
    x, history = table.level[0] @ basis[:2], list[Any]()
    for k in range(len(table)):
        output = (basis[0] - table.denoised[k, 0] * x) / table.denoised[k, 1]  # what an exact denoiser says
        history = [table.c_skip[k] * x + table.c_out[k] * output, *history][: table.order]
        past = sum(c * m for c, m in zip(table.update[k, 1:-1], history, strict=False))
        x = table.update[k, 0] * x + past + table.update[k, -1] * basis[2 + k]
        reached = np.array([x[0], np.linalg.norm(x[1:])])
        assert reached == pytest.approx(table.level[k + 1], abs=1e-6, rel=1e-6)
    cleanest = 0.99915  # alpha_bar at timestep 0, where these two end
    end = [cleanest**0.5, (1 - cleanest) ** 0.5] if name in ("deis", "tcd") else [1.0, 0.0]
    assert table.level[-1] == pytest.approx(np.array(end), abs=1e-5)


# The order at which a warm-up of lower order lets a sampler converge, where that is not the order of its solver.
WARM_UP = {"dpmpp_3m": 2, "pndm": 1.5, "ipndm": 1.6, "lms": 3.4, "ddim": 0.9, "flow_dpmpp_2m": 1.8}


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "tcd"])
def test_the_order_of_convergence_is_the_order_announced(name: str) -> None:
    """On Gaussian data of variance 1/4 the denoiser, and the whole path, are known in closed form."""
    config = config_for(name)
    if "use_karras_sigmas" in SAMPLERS[name].defaults:
        config["use_karras_sigmas"] = True
    errors = []
    for steps in (60, 120, 240):
        table = sampler_table(config, steps, sampler=name)
        history, x = list[float](), math.hypot(0.5 * table.level[0, 0], table.level[0, 1])
        for k in range(len(table) - 1):
            alpha, sigma = table.level[k]
            clean = 0.25 * alpha * x / (0.25 * alpha**2 + sigma**2)
            output = (clean - table.denoised[k, 0] * x) / table.denoised[k, 1]
            history = [table.c_skip[k] * x + table.c_out[k] * output, *history][: table.order]
            x = table.update[k, 0] * x + sum(c * m for c, m in zip(table.update[k, 1:], history, strict=False))
        alpha, sigma = table.level[-2]
        errors.append(abs(x / math.hypot(0.5 * alpha, sigma) - 1))
    order = math.log2(errors[0] / errors[2]) / 2
    expected = WARM_UP.get(name, SAMPLERS[name].order)
    assert expected - 0.15 < order < expected + 0.6, errors


@pytest.mark.parametrize("name", [n for n in ALL if SAMPLERS[n].family == "diffusion" and n != "pndm"])
def test_epsilon_v_and_sample_predictions_of_one_model_make_one_picture(name: str) -> None:
    rng = np.random.default_rng(1)
    first, noises = rng.standard_normal(16), rng.standard_normal((40, 16))
    ends = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        table = table_of(name, 6, prediction_type=prediction)
        x, history = first * table.init_noise_sigma, list[Any]()
        for k in range(len(table)):
            clean = np.tanh(table.c_in[k] * x + 0.3)
            output = (clean - table.denoised[k, 0] * x) / table.denoised[k, 1]
            if name == "lcm":  # what it takes for denoised is not what the model predicts
                output = predicted(prediction, float(table.sigma[k]), x, clean)
            history = [table.c_skip[k] * x + table.c_out[k] * output, *history][: table.order]
            row = table.update[k]
            x = row[0] * x + sum(c * m for c, m in zip(row[1:-1], history, strict=False)) + row[-1] * noises[k]
        ends.append(x)
    assert ends[1] == pytest.approx(ends[0], rel=1e-8, abs=1e-8)
    assert ends[2] == pytest.approx(ends[0], rel=1e-8, abs=1e-8)


def predicted(prediction: str, sigma: float, x: Any, clean: Any) -> Any:
    """What a model of this prediction says, in the variance-preserving frame, when it means `clean`."""
    alpha, s = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
    noise = (x - alpha * clean) / s
    return {"epsilon": noise, "v_prediction": alpha * noise - s * clean, "sample": clean}[prediction]


# ---------------------------------------------------------------------------------------------------- names, refusals


@pytest.mark.parametrize(
    ("name", "sampler", "schedule"),
    [
        ("euler_a", "euler_a", None),
        ("Euler a", "euler_a", None),
        ("euler_ancestral", "euler_a", None),
        ("EulerAncestralDiscreteScheduler", "euler_a", None),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("dpmpp_2m", "dpmpp_2m", None),
        ("DPM++ 2M SDE Karras", "dpmpp_2m_sde", "karras"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("DPM++ 3M SDE", "dpmpp_3m_sde", None),
        ("DPM++ SDE Karras", "dpmpp_2s", "karras"),
        ("DPM++ 2M SGM Uniform", "dpmpp_2m", "sgm_uniform"),
        ("DPM2 a Karras", "dpm2_a", "karras"),
        ("dpm_2_ancestral", "dpm2_a", None),
        ("LMS Karras", "lms", "karras"),
        ("PLMS", "pndm", None),
        ("PNDMScheduler", "pndm", None),
        ("uni_pc", "unipc", None),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", None),
        ("dpmsolversinglestep", "dpmpp_2s", None),
        ("FlowMatchEulerDiscreteScheduler", "flow_euler", None),
        ("FlowMatchHeunDiscreteScheduler", "flow_heun", None),
        ("Flow DPM++ 2M", "flow_dpmpp_2m", None),
    ],
)
def test_names_are_understood(name: str, sampler: str, schedule: str | None) -> None:
    found, implied = find_sampler(name)
    assert (found.name, implied) == (sampler, schedule)


def test_an_unknown_name_lists_what_there_is_nearest_first() -> None:
    with pytest.raises(UsageError, match=r"'heunn' is unknown; use one of heun, "):
        sampler_table(SD15, 5, sampler="heunn")
    with pytest.raises(UsageError, match="use one of karras"):
        sampler_table(SD15, 5, sampler="euler", schedule="karas")


def test_a_sampler_name_overrules_the_options_it_implies_and_a_class_name_keeps_them() -> None:
    config = {**SD15, "_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}
    assert sampler_table(config, 5).name == "dpmpp_3m"
    assert sampler_table(config, 5, sampler="DPMSolverMultistepScheduler").name == "dpmpp_3m"
    assert sampler_table(config, 5, sampler="dpmpp_2m").order == 2


def test_a_schedule_overrules_the_one_of_the_config() -> None:
    karras = sampler_table({**SD15, "use_karras_sigmas": True}, 5, sampler="euler")
    assert sampler_table(SD15, 5, sampler="Euler Karras") == karras
    assert sampler_table(SD15, 5, sampler="euler", schedule="karras") == karras
    assert sampler_table({**SD15, "use_karras_sigmas": True}, 5, sampler="euler", schedule="normal") != karras
    beta = sampler_table({**SD15, "use_karras_sigmas": True}, 5, sampler="euler", schedule="beta")
    assert beta == sampler_table({**SD15, "use_beta_sigmas": True}, 5, sampler="euler")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_fits_or_says_where_it_fits(name: str, schedule: str) -> None:
    try:
        table = sampler_table(config_for(name), 6, sampler=name, schedule=schedule)
    except UsageError as error:
        assert "samplers that have" in str(error) or "does not apply" in str(error)  # noqa: PT017
    else:
        assert len(table) == SAMPLERS[name].calls(6)


def test_options_that_are_not_linear_are_refused_by_name_with_the_reason() -> None:
    with pytest.raises(UsageError, match="thresholding True cannot be used: .*quantile"):
        sampler_table({**SD15, "thresholding": True}, 5, sampler="ddim")
    with pytest.raises(UsageError, match="clip_sample True cannot be used: it clamps"):
        sampler_table({**SD15, "clip_sample": True}, 5, sampler="ddim")
    with pytest.raises(UsageError, match="variance_type 'learned_range' cannot be used"):
        sampler_table({**SD15, "variance_type": "learned_range"}, 5, sampler="ddpm")
    assert len(sampler_table({**SD15, "thresholding": True, "clip_sample": True}, 5, sampler="euler")) == 5


def test_clip_sample_that_nobody_stated_is_off_with_a_note() -> None:
    config = {key: value for key, value in SD15.items() if key != "clip_sample"}
    table = sampler_table(config, 5, sampler="ddim")
    assert "clip_sample is not stated" in table.notes[0]
    assert sampler_table(SD15, 5, sampler="ddim").notes == ()
    assert (table.update == sampler_table(SD15, 5, sampler="ddim").update).all()


def test_a_live_config_of_diffusers_hides_its_defaults() -> None:
    """scheduler.config marks what it did not state; from_config takes the new class's defaults for those."""
    config = {**SD15, "timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    assert sampler_table(config, 5, sampler="euler").timestep[0] == 999


IMPOSSIBLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"steps": 0}, "1 or more"),
    ({}, {"steps": -3}, "1 or more"),
    ({}, {"steps": 1.5}, "whole number"),
    ({}, {"steps": True}, "whole number"),
    ({}, {"steps": 1001}, "trained on 1000"),
    ({}, {"steps": 1000, "sampler": "ddim"}, "need timestep 1000"),
    ({}, {"steps": 1000, "sampler": "dpmpp_2m"}, "at most 999 steps"),
    ({}, {"steps": 51, "sampler": "lcm"}, "Use 50 or fewer"),
    ({}, {"steps": 5, "strength": 1.2}, "out of range"),
    ({}, {"steps": 5, "strength": 0.1}, "Use strength 0.2 or more"),
    ({}, {"steps": 5, "eta": 0.5}, "samplers that have: ddim, tcd"),
    ({}, {"steps": 5, "eta": 2.0, "sampler": "ddim"}, "out of range"),
    ({}, {"steps": 5, "timesteps": [1, 2]}, "samplers that do: ddpm"),
    ({}, {"steps": 5, "timesteps": [1, 2], "sampler": "euler"}, "lower than the one before"),
    ({}, {"steps": 5, "timesteps": [2000, 2], "sampler": "euler"}, "from 999 down to 0"),
    ({}, {"steps": 5, "timesteps": [9.5, 2], "sampler": "dpmpp_2m"}, "whole numbers"),
    ({}, {"steps": 5, "timesteps": [900, 2], "sampler": "Euler Karras"}, "--schedule normal"),
    ({}, {"steps": 5, "sigmas": [1.0, 5.0, 0.0], "sampler": "euler"}, "lower than the one before"),
    ({}, {"steps": 5, "sigmas": [1.0, -5.0], "sampler": "euler"}, "none below 0"),
    ({}, {"steps": 5, "sigmas": [3.0], "sampler": "euler"}, "needs at least 2"),
    ({}, {"steps": 5, "sigmas": [3.0, 1.0], "sampler": "unipc"}, "use_flow_sigmas"),
    ({}, {"steps": 5, "sigmas": [3.0, 1.0], "timesteps": [9], "sampler": "euler"}, "not both"),
    ({"beta_schedule": "cosine"}, {"steps": 5}, "beta_schedule 'cosine' is unknown"),
    ({"timestep_spacing": "even"}, {"steps": 5}, "timestep_spacing 'even' is unknown"),
    ({"prediction_type": "eps"}, {"steps": 5, "sampler": "euler"}, "use one of epsilon"),
    ({"prediction_type": "sample"}, {"steps": 5}, "epsilon or v_prediction"),
    ({"use_karras_sigmas": True, "use_beta_sigmas": True}, {"steps": 5, "sampler": "euler"}, "only one sigma schedule"),
    ({"solver_order": 4}, {"steps": 5, "sampler": "DPMSolverMultistepScheduler"}, "orders 1, 2 and 3"),
    ({"algorithm_type": "dpm"}, {"steps": 5, "sampler": "DPMSolverMultistepScheduler"}, "use one of dpmsolver"),
    ({"algorithm_type": "dpmsolver"}, {"steps": 5, "sampler": "DPMSolverMultistepScheduler"}, "cannot end at sigma 0"),
    (
        {"algorithm_type": "sde-dpmsolver++"},
        {"steps": 5, "sampler": "DPMSolverSinglestepScheduler"},
        "noise of the step",
    ),
    ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {"steps": 5, "sampler": "ddim"}, "pure noise"),
    ({"use_flow_sigmas": True, "use_karras_sigmas": True}, {"steps": 5, "sampler": "dpmpp_2m"}, "not below 1"),
    ({"beta_end": 0.5}, {"steps": 20, "sampler": "ddim"}, "leave .* of the signal's variance"),
    ({"num_train_timesteps": 100000}, {"steps": 20, "sampler": "dpmpp_2m"}, "leave .* of the signal's variance"),
    ({"_class_name": None}, {"steps": 5}, "scheduler._class_name is None"),
    ({"_class_name": ""}, {"steps": 5}, "allowed is a name"),
    ({"_class_name": "MyScheduler"}, {"steps": 5}, "'MyScheduler' is unknown"),
    ({"_class_name": "EDMEulerScheduler"}, {"steps": 5, "sampler": "euler"}, "use one of edm_euler, edm_dpmpp_2m"),
]


@pytest.mark.parametrize(("options", "asked", "message"), IMPOSSIBLE, ids=[m for _, _, m in IMPOSSIBLE])
def test_impossible_wishes_get_a_clear_error(options: Any, asked: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler_table({**SD15, **options}, **asked)


WILD = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "exp", "laplace", "sigmoid"],
    "num_train_timesteps": [1000, 100, 10],
    "steps_offset": [0, 1, 5],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "prediction_type": ["epsilon", "v_prediction", "sample", "flow_prediction"],
    "solver_order": [1, 2, 3],
    "solver_type": ["midpoint", "heun", "bh1", "bh2"],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"],
    "final_sigmas_type": ["zero", "sigma_min"],
    "lambda_min_clipped": [-5.1, 5.0],
    "interpolation_type": ["linear", "log_linear"],
    "timestep_type": ["discrete", "continuous"],
    "flow_shift": [0.5, 3.0],
    "shift": [0.3, 3.0],
    "shift_terminal": [None, 0.1],
    "sigma_schedule": ["karras", "exponential"],
    "original_inference_steps": [10, 50],
    **{flag: [True, False] for flag in (
        "rescale_betas_zero_snr", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
        "use_flow_sigmas", "skip_prk_steps", "set_alpha_to_one", "lower_order_final", "euler_at_final", "predict_x0",
        "invert_sigmas", "stochastic_sampling", "use_dynamic_shifting",
    )},
}  # fmt: skip


@st.composite
def wild(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(ALL))
    known = sorted(WILD.keys() & SAMPLERS[name].defaults.keys())
    stated = draw(st.sets(st.sampled_from(known), max_size=5)) if known else set[str]()
    return name, {key: draw(st.sampled_from(WILD[key])) for key in sorted(stated)}


@given(wild(), st.integers(1, 120), st.sampled_from([1.0, 0.6, 0.1]))
@settings(max_examples=400, deadline=None)
def test_any_configuration_is_a_proven_table_or_a_clear_error(asked: Any, steps: int, strength: float) -> None:
    name, config = asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            table = sampler_table({"_class_name": SAMPLERS[name].diffusers, **config}, steps, strength=strength, mu=0.5)
        except UsageError as error:
            assert len(str(error)) > 20  # noqa: PT017
        else:
            assert np.isfinite(table.update).all()
            assert SamplerTable.from_json(table.to_json()) == table


# ------------------------------------------------------------------------------------------------------- the command


def command(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["samplers", *args]) == 0
    return capsys.readouterr().out


def test_the_command_lists_every_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    lines = command(capsys, "--steps", "8").splitlines()
    assert [line.split()[0] for line in lines[1:]] == ALL
    assert "15" in next(line for line in lines if line.startswith("heun"))
    entries = json.loads(command(capsys, "--json"))
    assert {entry["name"]: entry["calls"] for entry in entries}["pndm"] == 21


@pytest.mark.parametrize("name", ALL)
def test_the_command_prints_a_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = command(capsys, "--print", name, "--steps", "4")
    assert len(text.splitlines()) >= 4 + SAMPLERS[name].calls(4)
    printed = json.loads(command(capsys, "--print", name, "--steps", "4", "--json"))
    assert SamplerTable.from_json(printed).name == name


def test_the_command_reads_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({**SD15, "prediction_type": "v_prediction"}))
    printed = json.loads(command(capsys, "--print", "ddim", "--steps", "4", "--config", str(path), "--json"))
    assert SamplerTable.from_json(printed) == table_of("ddim", 4, prediction_type="v_prediction")
    path.write_text("[1]")
    assert main(["samplers", "--print", "ddim", "--config", str(path)]) == 2
    assert "not a scheduler_config.json" in capsys.readouterr().err
