"""The probe finds a scheduler's table by running it: ours for every sampler; and it refuses what is not linear."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from sdopt.errors import CheckpointError
from sdopt.samplers import SAMPLERS, SamplerTable, sampler_table
from tests.samplers.oracle import SD15, config_for, deviation, run_diffusers, run_table, scheduler_like

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from sdopt.export.probe import probe  # noqa: E402


def scheduler(name: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, name).from_config({**SD15, **options})


def deviation_from(table: SamplerTable, run: Any, steps: int, begin: int = 0) -> float:
    run.set_timesteps(steps)
    theirs = run_diffusers(run, begin, eta=0.0)
    ours = run_table(table, theirs.samples.shape[1])
    return max(deviation(ours.samples, theirs.samples), deviation(ours.inputs, theirs.inputs))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_it_finds_the_table_of_every_sampler(name: str) -> None:
    config = config_for(name)
    found, ours = probe(scheduler_like(config, name), 6), sampler_table(config, 6, sampler=name)
    assert deviation_from(found, scheduler_like(config, name), 6) < 1e-9
    assert found.timestep == pytest.approx(ours.timestep, abs=1e-3)
    assert (found.draws == ours.draws).all()
    assert found.stochastic == ours.stochastic
    assert found.init_noise_sigma == pytest.approx(ours.init_noise_sigma, rel=1e-6)
    if name != "ipndm":  # it does not say how it mixes an image with noise
        assert found.start == pytest.approx(ours.start, rel=1e-6)
    if name not in ("ipndm", "edm_dpmpp_2m"):  # nor do these say what they take for clean
        assert found.denoised == pytest.approx(ours.denoised, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ipndm", "edm_dpmpp_2m")])
def test_it_finds_a_history_as_short_as_ours(name: str) -> None:
    config = config_for(name)
    assert probe(scheduler_like(config, name), 9).order <= sampler_table(config, 9, sampler=name).order


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "ddim"])
def test_it_begins_where_image_to_image_begins(name: str) -> None:
    begin = 4 * SAMPLERS[name].rows_per_step
    found = probe(scheduler_like(SD15, name), 10, begin=begin)
    ours = sampler_table(SD15, 10, sampler=name, strength=0.6)
    assert found.timestep == pytest.approx(ours.timestep, abs=1e-3)
    assert found.start == pytest.approx(ours.start, rel=1e-6)
    assert deviation_from(found, scheduler_like(SD15, name), 10, begin) < 1e-9


UNKNOWN = [
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
    "CogVideoXDDIMScheduler",
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_it_brings_schedulers_that_sdopt_does_not_know(name: str) -> None:
    found = probe(scheduler(name, _class_name=name), 6)
    assert deviation_from(found, scheduler(name, _class_name=name), 6) < 1e-9
    assert found.name == name
    assert "found by running" in found.notes[0]
    assert SamplerTable.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"thresholding": True}),
        ("DDPMScheduler", {"clip_sample": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("CMStochasticIterativeScheduler", {}),
    ],
)
def test_it_refuses_what_is_not_linear(name: str, options: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is not linear"):
        probe(scheduler(name, **options), 5)


def test_it_refuses_what_history_cannot_tell() -> None:
    with pytest.raises(CheckpointError, match="needs a sample or a noise of an earlier step"):
        probe(scheduler("SASolverScheduler"), 6)


def test_it_says_what_went_wrong_when_a_scheduler_cannot_run_alone() -> None:
    class Broken(diffusers.DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("needs a moon")

    with pytest.raises(CheckpointError, match="Broken could not be run .* needs a moon"):
        probe(Broken(clip_sample=False), 4)


def test_it_leaves_the_scheduler_and_torch_as_they_were() -> None:
    import torch

    euler = scheduler_like(SD15, "euler")
    euler.set_timesteps(11)
    before = euler.sigmas.clone()
    probe(euler, 5)
    assert (euler.sigmas == before).all()
    assert euler.sigmas.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert np.isfinite(torch.randn(3).numpy()).all()
