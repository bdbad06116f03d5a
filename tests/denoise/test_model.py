"""Wrappers around the UNet: guidance in one call or two, and one model for requests that differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdopt.bundle.specs import Array
from sdopt.denoise.conditions import Call, Conditions
from sdopt.denoise.model import Predict


class Echo:
    """A UNet whose prediction is the mean of its prompt."""

    inputs = outputs = ()

    def __init__(self) -> None:
        self.calls = list[dict[str, Array]]()

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        self.calls.append(arrays)
        means = arrays["encoder_hidden_states"].mean((1, 2))[:, None, None, None]
        return {"noise_pred": arrays["sample"][:, :4] * 0 + means}

    def close(self) -> None: ...


def prompts(*values: float) -> dict[str, Array]:
    return {"encoder_hidden_states": np.stack([np.full((3, 4), value, np.float32) for value in values])}


def call(scales: tuple[float, ...], conditions: Conditions) -> Call:
    return Call(np.full(len(scales), 10.5, np.float32), scales, conditions)


SAMPLE = np.zeros((2, 4, 8, 8), np.float32)


@pytest.mark.parametrize(("together", "calls"), [(True, 1), (False, 2)])
def test_guidance_is_uncond_plus_scale_times_the_difference(together: bool, calls: int) -> None:
    engine: Any = Echo()
    conditions = Conditions(prompts(5, 5), prompts(1, 1))
    found = Predict(True, together).model({"unet": engine})(SAMPLE, call((7.5, 7.5), conditions))
    assert len(engine.calls) == calls
    np.testing.assert_array_equal(found, np.full(SAMPLE.shape, 1 + 7.5 * 4, np.float32))
    assert all((given["timestep"] == 10.5).all() for given in engine.calls)


def test_without_guidance_the_prompt_alone_is_asked() -> None:
    engine: Any = Echo()
    found = Predict(False).model({"unet": engine})(SAMPLE, call((1.0, 1.0), Conditions(prompts(5, 5), prompts(1, 1))))
    assert [len(given["sample"]) for given in engine.calls] == [2]
    np.testing.assert_array_equal(found, np.full(SAMPLE.shape, 5, np.float32))


@pytest.mark.parametrize("together", [True, False])
def test_every_image_has_a_guidance_scale_of_its_own(together: bool) -> None:
    engine: Any = Echo()
    conditions = Conditions(prompts(5, 3), prompts(1, 2))
    found = Predict(True, together).model({"unet": engine})(SAMPLE, call((7.5, 2.0), conditions))
    assert found[:, 0, 0, 0].tolist() == [1 + 7.5 * 4, 2 + 2.0 * 1]


def test_further_channels_stand_beside_the_sample_in_both_halves() -> None:
    engine: Any = Echo()
    extra = np.arange(2 * 5 * 8 * 8, dtype=np.float32).reshape(2, 5, 8, 8)
    conditions = Conditions(prompts(5, 5), prompts(1, 1), extra)
    Predict(True, joins=True).model({"unet": engine})(SAMPLE, call((2.0, 2.0), conditions))
    given = engine.calls[0]["sample"]
    assert given.shape == (4, 9, 8, 8)
    np.testing.assert_array_equal(given[:, 4:], np.concatenate([extra, extra]))


def test_conditions_of_several_requests_are_rows_of_one() -> None:
    extra = np.ones((1, 5, 8, 8), np.float32)
    one, other = (
        Conditions(prompts(1), prompts(2), extra),
        Conditions(prompts(3, 4), prompts(5, 6), np.zeros((2, 5, 8, 8), np.float32)),
    )
    stacked = Conditions.stacked([one, other])
    assert stacked.both["encoder_hidden_states"][:, 0, 0].tolist() == [2, 5, 6, 1, 3, 4]
    assert stacked.extra is not None
    assert stacked.extra[:, 0, 0, 0].tolist() == [1, 0, 0]
