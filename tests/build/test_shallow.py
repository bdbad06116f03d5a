"""A UNet in two: the shallow one, with the deep features of a full call, computes what the full one computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.build.examples import example
from sdopt.build.shallow import joins, keep_deep, take_deep
from sdopt.build.simulate import outputs_of
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array
from sdopt.errors import UsageError
from sdopt.graph.ort_ops import ort_ops
from tests.build.common import SIZES, opened
from tests.conftest import EMOJI_BUNDLE

UNETS = {"tiny": 4, "sd2": 4, "sdxl": 4, "emoji": 6}  # how many depths each has


@pytest.fixture(params=UNETS)
def unet(request: pytest.FixtureRequest) -> tuple[Path, int]:
    name = request.param
    folder = EMOJI_BUNDLE if name == "emoji" else request.getfixturevalue(f"{name}_bundle")
    return Bundle.open(folder, verify=False).component("unet").graph, UNETS[name]


def outputs(model: ir.Model, arrays: dict[str, Array], folder: Path, replaced: bool) -> dict[str, Array]:
    if replaced:
        ort_ops(model)
    session = opened(model, folder)
    return outputs_of(session, {one.name: arrays[one.name] for one in session.get_inputs()})


@pytest.mark.parametrize(
    "sizes",
    [{}, {"latent_height": 12, "latent_width": 16, "images": 1}, {"latent_height": 7, "latent_width": 9, "batch": 4}],
    ids=str,
)
def test_a_shallow_unet_with_fresh_features_equals_the_full_one_bit_for_bit(
    sizes: dict[str, int], unet: tuple[Path, int], tmp_path: Path
) -> None:
    source, count = unet
    assert len(joins(graph.load(source))) == count
    arrays: dict[str, Any] = example(graph.specs(graph.load(source))[0], {**SIZES, **sizes})
    for replaced in (False, True):
        plain = outputs(graph.load(source), arrays, tmp_path, replaced)["noise_pred"]
        for depth in range(1, count + 1):
            full, shallow = graph.load(source), graph.load(source)
            keep_deep(full, depth)
            take_deep(shallow, depth)
            kept = outputs(full, arrays, tmp_path, replaced)
            np.testing.assert_array_equal(kept["noise_pred"], plain)
            again = outputs(shallow, {**arrays, "deep": kept["deep"]}, tmp_path, replaced)["noise_pred"]
            np.testing.assert_array_equal(again, plain, err_msg=f"depth {depth}")


def test_a_depth_that_a_unet_has_not_is_refused(tmp_path: Path) -> None:
    for depth in (0, 7):
        with pytest.raises(UsageError, match=f"--cache-depth {depth}; allowed are 1 to 6: the up path"):
            keep_deep(graph.load(EMOJI_BUNDLE / "unet.onnx"), depth)


def test_a_shallow_unet_keeps_the_weights_of_its_own_layers_alone(tmp_path: Path) -> None:
    model = graph.load(EMOJI_BUNDLE / "unet.onnx")
    take_deep(model, 1)
    modules = {graph.name_of(weight).split(".")[0] for weight in graph.weights(model)} - {""}
    assert {"conv_in", "conv_out", "time_embedding", "up_blocks"} <= modules
    assert not modules & {"down_blocks", "mid_block"}
