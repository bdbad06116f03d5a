"""A tensor's spec says what it takes, and an error says what to give instead."""

from __future__ import annotations

import numpy as np
import pytest

from sdopt.bundle.decode import decode, encode
from sdopt.bundle.specs import TensorSpec, check_inputs
from sdopt.errors import UsageError

SAMPLE = TensorSpec("sample", "float32", ("batch", 4, "latent_height", "latent_width"))
TIMESTEP = TensorSpec("timestep", "float32", ("batch",))


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def test_named_dimensions_are_read_off_the_arrays() -> None:
    dims = check_inputs("unet", (SAMPLE, TIMESTEP), {"sample": zeros(2, 4, 8, 6), "timestep": zeros(2)})
    assert dims == {"batch": 2, "latent_height": 8, "latent_width": 6}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sample": zeros(2, 4, 8, 6)}, "unet: missing input timestep; it takes sample, timestep"),
        ({"sample": zeros(2, 4, 8, 6), "timestep": zeros(2), "t": zeros(2)}, "unet: unknown input t"),
        (
            {"sample": zeros(2, 4, 8, 6, dtype="float64"), "timestep": zeros(2)},
            r"got float64 .*sample.astype\(np.float32\)",
        ),
        ({"sample": zeros(2, 3, 8, 6), "timestep": zeros(2)}, r"got float32 \[2, 3, 8, 6\]; it takes .* with 4"),
        ({"sample": zeros(2, 4, 8), "timestep": zeros(2)}, "it takes 4 dimensions"),
        ({"sample": zeros(2, 4, 8, 6), "timestep": zeros(1)}, r"'timestep': got float32 \[1\]; .* batch = 2"),
        ({"sample": zeros(0, 4, 8, 6), "timestep": zeros(0)}, "sample"),
    ],
)
def test_a_wrong_input_is_named_with_what_is_allowed(arrays: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_inputs("unet", (SAMPLE, TIMESTEP), arrays)


def test_a_spec_survives_its_json() -> None:
    assert decode(TensorSpec, encode(SAMPLE)) == SAMPLE


@pytest.mark.parametrize(("dtype", "shape"), [("float33", ("batch",)), ("float32", (0,)), ("float32", (-1, "batch"))])
def test_a_malformed_spec_is_refused_at_birth(dtype: str, shape: tuple) -> None:
    with pytest.raises(UsageError, match="sample"):
        TensorSpec("sample", dtype, shape)
