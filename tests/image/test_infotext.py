"""The text of AUTOMATIC1111 in a picture's file says what was run, in the words of its web UI."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.cli.samplers import DEFAULT_CONFIG
from sdopt.image.infotext import a1111_text, parsed
from sdopt.pipeline import Pipeline
from sdopt.samplers import SAMPLERS, sampler_table
from sdopt.samplers.labels import labels_of
from tests.conftest import without_address

PARAMETERS = {
    "prompt": "a cat", "negative_prompt": "", "num_inference_steps": 20, "sampled_by": "Euler", "guidance_scale": 2.0,
    "seed": 7, "rng": "cpu", "width": 64, "height": 64, "model": "a, b: c", "version": "0.1",
}  # fmt: skip
CONFIG = {**DEFAULT_CONFIG, "timestep_spacing": "linspace"}
TRAIN, STEPS = 1000, 10
ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, TRAIN) ** 2)
SIGMAS = np.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)
LOW, HIGH = SIGMAS[0], SIGMAS[-1]


def at(timesteps: np.ndarray) -> np.ndarray:
    return np.exp(np.interp(timesteps, np.arange(TRAIN), np.log(SIGMAS)))


# The noise levels of a label, by the formulas of the web UI (modules/sd_schedulers.py) and of k-diffusion.
FORMULAS = {
    "Karras": np.linspace(HIGH ** (1 / 7), LOW ** (1 / 7), STEPS) ** 7,
    "Exponential": np.exp(np.linspace(np.log(HIGH), np.log(LOW), STEPS)),
    "SGM Uniform": at(np.linspace(TRAIN - 1, 0, STEPS + 1)[:-1]),
    "Simple": np.array([SIGMAS[-(1 + int(k * TRAIN / STEPS))] for k in range(STEPS)]),
    "Normal": at(np.linspace(TRAIN - 1, 0, STEPS)),
    "DDIM": np.array([SIGMAS[k] for k in range(1, TRAIN, TRAIN // STEPS)])[::-1],
}


@pytest.mark.parametrize(
    ("sampler", "schedule", "label"),
    [
        ("euler", None, "Normal"),
        ("euler", "normal", "Normal"),
        ("euler", "linspace", "Normal"),
        ("euler", "leading", "DDIM"),
        ("euler", "trailing", "SGM Uniform"),
        ("euler", "sgm_uniform", "SGM Uniform"),
        ("euler", "simple", "Simple"),
        ("euler", "karras", "Karras"),
        ("euler", "exponential", "Exponential"),
        ("Euler Karras", None, "Karras"),
        ("Euler Simple", None, "Simple"),
        ("lms", "karras", "Karras"),
        ("ddim", "leading", "DDIM"),
        ("ddim", "simple", "Simple"),
        ("dpmpp_2m", None, "SGM Uniform"),
        ("dpmpp_2m", "simple", "Simple"),
        ("DPM++ 2M Karras", None, "Karras"),
        ("dpmpp_2m", "exponential", "Exponential"),
        ("dpmpp_2s", None, "SGM Uniform"),
        ("dpmpp_3s", "karras", "Karras"),
        ("unipc", None, "SGM Uniform"),
        ("unipc", "exponential", "Exponential"),
        ("deis", None, "SGM Uniform"),
    ],
)
def test_the_schedule_type_is_the_web_uis_name_of_these_noise_levels(
    sampler: str, schedule: str | None, label: str
) -> None:
    config = {**CONFIG, "steps_offset": 1}
    assert labels_of(config, STEPS, sampler=sampler, schedule=schedule).schedule == label
    table = sampler_table(config, STEPS, sampler=sampler, schedule=schedule)
    distance = {name: np.abs(np.log(table.sigma / levels)).max() for name, levels in FORMULAS.items()}
    assert distance[label] < 0.02, distance
    assert distance[label] < 2 * min(distance.values()) + 0.02, distance


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "Karras"),
        ({"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True}, "Exponential"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "Beta"),
        ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "Exponential"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "Lu"),
        ({"_class_name": "EDMEulerScheduler"}, "Karras"),
        ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "exponential"}, "Exponential"),
        ({"_class_name": "LCMScheduler"}, "Automatic"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "Automatic"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "Automatic"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "SGM Uniform"),
    ],
    ids=without_address,
)
def test_the_schedule_of_a_checkpoint_is_named_too(config: dict[str, Any], label: str) -> None:
    assert labels_of(config, STEPS).schedule == label


def test_every_sampler_has_a_label_on_its_own_config() -> None:
    for sampler in SAMPLERS.values():
        flow = {"use_flow_sigmas": True} if "use_flow_sigmas" in sampler.forced else {}
        labels = labels_of({"_class_name": sampler.diffusers, **flow}, STEPS, sampler=sampler.name)
        assert (labels.sampler, labels.steps) == (sampler.title, STEPS)
        assert labels.schedule


def test_a_solver_that_no_sampler_names_is_called_by_its_class() -> None:
    config = {**CONFIG, "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}
    assert labels_of(config, STEPS).sampler == "DPMSolverMultistepScheduler"
    assert labels_of({**config, "algorithm_type": "sde-dpmsolver++"}, STEPS).sampler == "DPM++ 2M SDE"


def test_the_a1111_text_is_this_to_the_letter() -> None:
    assert a1111_text(PARAMETERS) == (
        "a cat\nSteps: 20, Sampler: Euler, Schedule type: Automatic, CFG scale: 2.0, Seed: 7, Size: 64x64, "
        'Model: "a, b: c", RNG: CPU, Version: sdopt 0.1'
    )


@pytest.fixture(scope="module")
def emoji() -> Iterator[Pipeline]:
    with sdopt.load() as pipeline:
        yield pipeline


def pairs(path: Path) -> dict[str, str]:
    """The last line of a file's text, as pairs."""
    line = Image.open(path).info["parameters"].split("\n")[-1]
    return dict(pair.split(": ", 1) for pair in line.split(", "))


PIXELS = {"height": 64, "width": 64, "seed": 1}
PICTURE = Image.new("RGB", (64, 64), "red")
MASK = Image.new("L", (64, 64), 255)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"Steps": "20", "Sampler": "DDIM", "Schedule type": "DDIM", "RNG": "CPU", "Size": "64x64"}),
        ({"sampler": "DPM++ 2M Karras"}, {"Sampler": "DPM++ 2M", "Schedule type": "Karras"}),
        ({"sampler": "euler", "schedule": "exponential"}, {"Schedule type": "Exponential"}),
        ({"timesteps": [900, 500, 100], "sampler": "euler"}, {"Steps": "3", "Schedule type": None}),
        ({"sigmas": [10.0, 2.0, 0.0], "sampler": "euler"}, {"Steps": "2", "Schedule type": None}),
        ({"image": PICTURE, "strength": 0.5}, {"Denoising strength": "0.5", "Steps": "20", "Mask blur": None}),
        ({"image": PICTURE}, {"Denoising strength": "0.8"}),
        ({"image": PICTURE, "mask_image": MASK, "mask_blur": 4}, {"Mask blur": "4.0", "Denoising strength": "1.0"}),
        ({"image": PICTURE, "mask_image": MASK, "padding_mask_crop": 8}, {"Masked area padding": "8"}),
        ({"clip_skip": 1}, {"Clip skip": "2"}),
        ({"clip_skip": 0}, {"Clip skip": None}),
        ({"rng": "cuda:a100"}, {"RNG": "NV"}),
        ({"rng": "numpy"}, {"RNG": "NUMPY"}),
        ({"eta": 0.5}, {"Eta DDIM": "0.5"}),
        ({"sampler": "tcd", "eta": 0.5}, {"Eta DDIM": None, "Sampler": "TCD"}),
        ({"negative_prompt": "a (dog)"}, {"Emphasis": "None"}),
        ({"negative_prompt": "a (dog)", "prompt_style": "a1111"}, {"Emphasis": None}),
        ({"guidance_scale": 3}, {"CFG scale": "3.0"}),
        ({"guidance_scale": [3.0, 1.0], "num_inference_steps": 2}, {"CFG scale": None}),
    ],
    ids=without_address,
)
def test_each_key_says_what_was_run(
    emoji: Pipeline, tmp_path: Path, options: dict[str, Any], expected: dict[str, str | None]
) -> None:
    emoji("a cat", **PIXELS, **options).save(tmp_path / "a.png")
    shown = pairs(tmp_path / "a.png")
    assert {key: shown.get(key) for key in expected} == expected


def test_a_picture_of_given_noise_levels_replays(emoji: Pipeline) -> None:
    from sdopt.request.keywords import replayed

    first = emoji("a cat", **PIXELS, sampler="euler", timesteps=[900, 500, 100])
    again = emoji(**replayed(first.parameters[0]))
    np.testing.assert_array_equal(np.asarray(first.images[0]), np.asarray(again.images[0]))
    assert first.parameters[0]["num_inference_steps"] == 3


def test_a_text_is_read_as_it_is_written() -> None:
    own = {
        "prompt": "a cat, a hat: red\nsecond line", "negative_prompt": "a dog\nwet", "num_inference_steps": 4,
        "sampled_by": "Euler a", "schedule_type": "SGM Uniform", "guidance_scale": 4.0, "seed": 11, "width": 64,
        "height": 48, "model": 'a, "b": c', "rng": "cpu", "version": "1.0", "hires": 2.0, "hires_strength": 0.6,
    }  # fmt: skip
    values = parsed(a1111_text(own))
    assert values["Prompt"] == own["prompt"]
    assert values["Negative prompt"] == own["negative_prompt"]
    assert values["Model"] == own["model"]
    assert (values["Size"], values["Size-1"], values["Size-2"]) == ("64x48", "64", "48")
    assert (values["Steps"], values["Schedule type"], values["Hires upscale"]) == ("4", "SGM Uniform", "2.0")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a cat, Seed: 1", {"Prompt": "a cat, Seed: 1", "Negative prompt": ""}),
        ("a cat\nSteps: 4, Seed: 1, Size: x", {"Prompt": "a cat", "Steps": "4", "Size": "x"}),
        ('a cat\nSteps: 4, Seed: 1, Model: "half', {"Model": '"half'}),
    ],
)
def test_other_texts_are_read_too(text: str, expected: dict[str, str]) -> None:
    assert expected.items() <= parsed(text).items()
    assert bool(parsed(text)) == bool(expected)
