"""What every engine promises; each backend's test module runs all of it on its own engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from sdopt.bundle.specs import Array
from sdopt.engine import Engine
from sdopt.errors import UsageError

Arrays = dict[str, Array]


def unet_inputs(engine: Engine, batch: int = 2, height: int = 16, width: int = 16, tokens: int = 5) -> Arrays:
    features = engine.inputs[2].shape[2]
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((batch, 4, height, width), np.float32),
        "timestep": np.full(batch, 500, np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, tokens, features), np.float32),
    }


def takes_and_gives_arrays_by_name(engine: Engine) -> None:
    outputs = engine(**unet_inputs(engine))
    assert list(outputs) == ["noise_pred"]
    assert outputs["noise_pred"].shape == (2, 4, 16, 16)
    assert outputs["noise_pred"].dtype == np.float32


def takes_any_length_of_a_named_dimension(engine: Engine) -> None:
    for batch, height, width, tokens in ((1, 16, 16, 7), (3, 8, 24, 2)):
        shape = engine(**unet_inputs(engine, batch, height, width, tokens))["noise_pred"].shape
        assert shape == (batch, 4, height, width)


def an_output_belongs_to_the_caller(engine: Engine) -> None:
    first = engine(**unet_inputs(engine))["noise_pred"]
    kept = first.copy()
    engine(**{name: array * 0 for name, array in unet_inputs(engine).items()})
    np.testing.assert_array_equal(first, kept)
    first[...] = 7
    np.testing.assert_array_equal(engine(**unet_inputs(engine))["noise_pred"], kept)


def inputs_are_left_alone(engine: Engine) -> None:
    given = unet_inputs(engine)
    kept = {name: array.copy() for name, array in given.items()}
    engine(**given)
    for name, array in given.items():
        np.testing.assert_array_equal(array, kept[name])


def strided_inputs_are_read_right(engine: Engine) -> None:
    given = unet_inputs(engine)
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in given.items()}
    np.testing.assert_array_equal(engine(**strided)["noise_pred"], engine(**given)["noise_pred"])


def wrong_inputs_are_refused_before_anything_runs(engine: Engine) -> None:
    good = unet_inputs(engine)
    bad: list[Arrays] = [
        {k: v for k, v in good.items() if k != "timestep"},
        {**good, "extra": good["timestep"]},
        {**good, "sample": good["sample"].astype(np.float64)},
        {**good, "sample": good["sample"][:, :3]},
        {**good, "timestep": good["timestep"][:1]},
        {**good, "timestep": good["timestep"][0]},
    ]
    for arrays in bad:
        with pytest.raises(UsageError, match="unet"):
            engine(**arrays)


def each_thread_gets_its_own_answer(engine: Engine) -> None:
    """Also where several threads begin their first call at once, and where each one has other sizes."""
    calls = [unet_inputs(engine, 1 + i % 3, 8, 16, 4) for i in range(8)]
    for i, call in enumerate(calls):
        call["sample"] = call["sample"] + np.float32(i)
    expected = [engine(**call)["noise_pred"] for call in calls]
    interval, together = sys.getswitchinterval(), Barrier(4)
    sys.setswitchinterval(1e-5)

    def answered(first: int) -> list[tuple[int, Array]]:
        together.wait()
        return [(i, engine(**calls[i])["noise_pred"]) for i in (*range(first, 8), *range(first))]

    try:
        with ThreadPoolExecutor(4) as threads:
            answers = [answer for own in threads.map(answered, range(4)) for answer in own]
    finally:
        sys.setswitchinterval(interval)
    for i, answer in answers:
        np.testing.assert_array_equal(answer, expected[i])


CONTRACT: list[Callable[[Engine], None]] = [
    takes_and_gives_arrays_by_name,
    takes_any_length_of_a_named_dimension,
    an_output_belongs_to_the_caller,
    inputs_are_left_alone,
    strided_inputs_are_read_right,
    wrong_inputs_are_refused_before_anything_runs,
    each_thread_gets_its_own_answer,
]
