"""The UNet with inputs for residuals: zeros change nothing, others are added where diffusers adds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.bundle.adapter import CONTROLLED
from sdopt.bundle.files import Bundle
from sdopt.engine import open_engine
from sdopt.errors import CheckpointError
from sdopt.graph import control, load
from sdopt.metrics import psnr
from tests.conftest import EMOJI_BUNDLE


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_zeros_of_one_pixel_leave_the_prediction_as_it_was(backend: str) -> None:
    bundle, rng = Bundle.open(EMOJI_BUNDLE), np.random.default_rng(0)
    given = {
        "sample": rng.standard_normal((1, 4, 11, 16), np.float32),
        "timestep": np.array([500], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 32, 128), np.float32),
    }
    with open_engine(bundle, "unet", backend) as plain, open_engine(bundle, CONTROLLED, backend) as controlled:
        zeros = {
            spec.name: np.zeros(({"images": 1, "batch": 2}[spec.shape[0]], spec.shape[1], 1, 1), np.float32)
            for spec in controlled.inputs
            if spec.name not in given
        }
        before, after = plain(**given)["noise_pred"], controlled(**given, **zeros)["noise_pred"]
    assert psnr(before, after) > 120  # ONNX Runtime fuses other nodes
    assert backend == "ort" or np.array_equal(before, after)


def test_its_weights_are_in_the_file_of_the_unet() -> None:
    bundle = Bundle.open(EMOJI_BUNDLE)
    assert bundle.manifest.components[CONTROLLED].weights_of == "unet"
    assert f"{CONTROLLED}.onnx.data" not in bundle.manifest.files
    assert bundle.nbytes(CONTROLLED) < 600_000 < 10_000_000 < bundle.nbytes("unet")


def test_a_graph_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="in 0 places, and has 0 residual blocks"):
        control.write_controlled_graph(EMOJI_BUNDLE / "vae_decoder.onnx", tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_inputs_have_the_names_and_channels_of_the_skips() -> None:
    model = load(EMOJI_BUNDLE / "unet.onnx")
    before = len(model.graph.inputs)
    control.add_residual_inputs(model)
    added = model.graph.inputs[before:]
    assert [value.name for value in added] == list(control.residual_names(len(added) - 1))
    assert [value.shape[1] for value in added if isinstance(value.shape, ir.Shape)] == [32, 32, 32, 96, 96, 160, 160]
