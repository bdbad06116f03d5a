"""Rows that should be equal are compared; an engine whose rows differ is told apart from one that rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdopt.build.agree import FLOOR_DB, check_rows, measure
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions
from sdopt.bundle.files import Bundle, Component
from sdopt.bundle.specs import Array, Profile, TensorSpec
from sdopt.engine.ort import OrtEngine
from sdopt.engine.store import stored
from sdopt.errors import BackendError
from tests.conftest import EMOJI_BUNDLE

X = TensorSpec("x", "float32", ("batch", 64))
PROFILE = Profile({"batch": (1, 1, 4)})


class Plain:
    """An engine of one Python function."""

    def __init__(self, run: Callable[..., Array], *further: TensorSpec) -> None:
        self.inputs, self.outputs, self._run = (X, *further), (TensorSpec("y", "float32", ("batch", 64)),), run

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        return {"y": self._run(**arrays)}

    def close(self) -> None: ...

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None: ...


def rounding(x: Array) -> Array:
    """Another batch, another order of sums: the last bit of float16 moves."""
    return (x * (1 + len(x) * 2.0**-12)).astype(np.float32)


def second_row_is_off(x: Array) -> Array:
    y = x.copy()
    y[1:] += 0.3
    return y


def batch_is_off(x: Array) -> Array:
    return x + np.float32(0.3 * (len(x) > 1))


def test_an_engine_that_only_rounds_is_kept() -> None:
    found = check_rows("plain", Plain(rounding), [PROFILE], "fp16")
    assert found.rows == 200
    assert 40 < (found.alone or 0) < 80
    assert found.halves is None
    assert set(found.to_json()) == {"rows", "alone"}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (second_row_is_off, r"plain: identical rows of one batch give different results: they are alike to \d+.\d dB"),
        (batch_is_off, "plain: a row gives another result in a batch than alone"),
    ],
)
@pytest.mark.parametrize("precision", FLOOR_DB)
def test_an_engine_whose_rows_differ_is_refused(run: Callable[..., Array], message: str, precision: str) -> None:
    with pytest.raises(BackendError, match=message):
        check_rows("plain", Plain(run), [PROFILE], precision)


def test_nan_is_no_agreement() -> None:
    with pytest.raises(BackendError, match="alike to -inf dB"):
        check_rows("plain", Plain(lambda x: x * np.float32(np.nan)), [PROFILE], "fp16")


def test_the_worst_of_the_profiles_counts() -> None:
    profiles = [Profile({"batch": (1, 1, 1)}), Profile({"batch": (2, 2, 4)})]
    assert measure(Plain(second_row_is_off), profiles[0]).rows is None
    with pytest.raises(BackendError, match="identical rows"):
        check_rows("plain", Plain(second_row_is_off), profiles, "fp32")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Component]:
    """The emoji model's fused step and plain UNet as engines for ONNX Runtime."""
    import shutil

    path = Path(shutil.copytree(EMOJI_BUNDLE, tmp_path_factory.mktemp("agree") / "bundle"))
    bundle = Bundle.open(path, verify=False)
    build(bundle, "ort", components=["unet_step"], options=BuildOptions(precision="fp32"), report=lambda line: None)
    (found,) = stored(bundle, "ort")
    step = Component("unet_step", found.folder / "graph.onnx", found.record.inputs, found.record.outputs)
    return {"unet_step": step, "unet": bundle.component("unet"), "text_encoder": bundle.component("text_encoder")}


SIZES = {"tokens": (7, 7, 7), "latent_height": (8, 8, 8), "latent_width": (8, 8, 8), "extra_tokens": (1, 1, 1)}


@pytest.mark.parametrize(
    ("component", "batches", "kinds"),
    [
        ("unet_step", {"batch": (1, 1, 3)}, {"rows", "alone", "halves"}),
        ("unet_step", {"batch": (1, 1, 1)}, {"halves"}),
        ("unet", {"batch": (1, 2, 2), "images": (1, 1, 1)}, {"rows", "alone"}),
        ("text_encoder", {"batch": (2, 2, 8)}, {"rows"}),
    ],
)
def test_every_component_of_a_real_model_agrees(
    component: str, batches: dict[str, tuple[int, int, int]], kinds: set[str], steps: dict[str, Component]
) -> None:
    with OrtEngine(steps[component], threads=1) as engine:
        found = check_rows(component, engine, [Profile({**batches, **SIZES})], "fp32")
    assert set(found.to_json()) == kinds
    assert min(found.to_json().values()) > 80


class Uneven:
    """A step whose unconditional half comes out otherwise than its conditional one."""

    def __init__(self, step: OrtEngine) -> None:
        self.inputs, self.outputs, self._step = step.inputs, step.outputs, step

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        name = "negative_encoder_hidden_states"
        return self._step(**{**arrays, name: arrays[name] * np.float32(1.5)})

    __enter__ = __exit__ = close = None  # type: ignore[assignment]


def test_halves_of_guidance_that_differ_are_found(steps: dict[str, Component]) -> None:
    with OrtEngine(steps["unet_step"], threads=1) as engine:
        uneven: Any = Uneven(engine)
        with pytest.raises(BackendError, match="unet_step: equal halves of guidance give different results"):
            check_rows("unet_step", uneven, [Profile({"batch": (1, 1, 1), **SIZES})], "fp32")
