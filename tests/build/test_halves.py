"""What both halves of guidance share is joined without counting, and lengths that are known are in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.build.fixed import fix_lengths
from sdopt.build.fuse_step import fuse_step
from sdopt.build.half import half
from sdopt.build.halves import join_halves
from sdopt.build.lower import lower, lower_operators
from sdopt.bundle.specs import Array
from sdopt.metrics import psnr
from tests.build.common import SIZES, inputs_of, outputs
from tests.build.test_half import COMPONENTS, UNET, inputs_of_step
from tests.conftest import EMOJI_BUNDLE

EXACT_DB = 110.0
COUNTED = {"Shape", "Gather", "Tile"}


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


def equal(one: dict[str, Array], other: dict[str, Array]) -> None:
    """Equal but for the order of sums, which the runtime chooses anew for each graph."""
    assert min(psnr(array, other[name]) for name, array in one.items()) >= EXACT_DB


@pytest.mark.parametrize("guided", [True, False])
def test_the_fused_step_repeats_nothing_by_a_computed_count(guided: bool, tmp_path: Path) -> None:
    before, after = (fuse_step(graph.load(UNET), guided=guided) for _ in range(2))
    assert join_halves(after, 2 if guided else 1) == 15
    assert "Tile" in operators(before)
    assert "Tile" not in operators(after)
    arrays = inputs_of_step(before)
    equal(outputs(before, arrays, tmp_path), outputs(after, arrays, tmp_path))


@pytest.mark.parametrize("component", COMPONENTS)
def test_with_all_lengths_fixed_no_shape_is_computed_and_nothing_changes(component: str, tmp_path: Path) -> None:
    source = EMOJI_BUNDLE / f"{component}.onnx"
    arrays, fixed = inputs_of(source), graph.load(source)
    fix_lengths(fixed, SIZES)
    shapes = [value.shape for node in fixed.graph for value in node.outputs]
    assert all(shape is not None and all(isinstance(d, int) for d in shape) for shape in shapes)
    assert "Shape" not in operators(fixed)
    assert {v.name: tuple(v.shape) for v in fixed.graph.inputs} == {name: a.shape for name, a in arrays.items()}
    equal(outputs(graph.load(source), arrays, tmp_path), outputs(fixed, arrays, tmp_path))


def test_a_step_in_half_and_lowered_can_be_fixed_too(tmp_path: Path) -> None:
    plain, fixed = (fuse_step(graph.load(UNET), rescale=True) for _ in range(2))
    arrays = inputs_of_step(plain)
    for model in (plain, fixed):
        join_halves(model, 2)
        half(model)
        lower(model)
    names = {"batch": 2, "tokens": 7, "latent_height": 8, "latent_width": 6}
    assert fix_lengths(fixed, names) > 70
    assert not operators(fixed) & COUNTED
    graph.save(fixed, tmp_path / "fixed.onnx")
    onnx.checker.check_model(tmp_path / "fixed.onnx", full_check=True)
    actual = outputs(fixed, arrays, tmp_path)
    assert min(psnr(array, actual[name]) for name, array in outputs(plain, arrays, tmp_path).items()) >= 60  # in half


def test_lengths_that_are_left_open_stay_open(tmp_path: Path) -> None:
    plain, fixed = (fuse_step(graph.load(UNET)) for _ in range(2))
    fix_lengths(fixed, {"tokens": 7, "latent_height": 8, "latent_width": 6})
    assert {str(v.shape[0]) for v in fixed.graph.inputs if v.name in ("sample", "noise")} == {"batch"}
    arrays = inputs_of_step(plain)
    equal(outputs(plain, arrays, tmp_path), outputs(fixed, arrays, tmp_path))


def test_only_what_a_parser_does_not_know_is_lowered(tmp_path: Path) -> None:
    source = graph.load(UNET)
    lowered = lower_operators(graph.load(UNET), ["GroupNormalization"])
    assert "Attention" in operators(lowered)
    assert "GroupNormalization" not in operators(lowered)
    assert lowered.graph.opset_imports == source.graph.opset_imports
    arrays = inputs_of(UNET)
    wanted, actual = outputs(source, arrays, tmp_path), outputs(lowered, arrays, tmp_path)
    np.testing.assert_allclose(actual["noise_pred"], wanted["noise_pred"], atol=2e-5)
