"""What both halves of guidance share is computed once, and the result is that of computing it twice."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.bundle.files import Bundle, Component
from sdopt.bundle.specs import Array, TensorSpec
from sdopt.engine.ort import OrtEngine
from tests.conftest import EMOJI_BUNDLE

LATENT = ("latent_height", "latent_width")


def of_batch(specs: tuple[TensorSpec, ...], name: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(s.name, s.dtype, (name, *s.shape[1:])) for s in specs)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Component:
    """The embedded UNet."""
    return Bundle.open(EMOJI_BUNDLE).component("unet")


def arrays(images: int, repeats: int, height: int, width: int) -> dict[str, Array]:
    rng = np.random.default_rng(images)
    return {
        "sample": rng.standard_normal((images, 4, height, width), np.float32),
        "timestep": rng.uniform(0, 999, images).astype(np.float32),
        "encoder_hidden_states": rng.standard_normal((images * repeats, 5, 128), np.float32),
    }


@pytest.mark.parametrize("sizes", [(1, 2, 16, 16), (2, 2, 9, 13), (1, 1, 16, 16), (3, 1, 8, 24), (2, 3, 8, 8)])
def test_a_shared_sample_gives_what_a_repeated_one_gives(unet: Component, sizes: tuple[int, int, int, int]) -> None:
    images, repeats = sizes[:2]
    inputs = arrays(*sizes)
    repeated = {
        **inputs,
        "sample": np.tile(inputs["sample"], (repeats, 1, 1, 1)),
        "timestep": np.tile(inputs["timestep"], repeats),
    }
    assert len(repeated["sample"]) == len(inputs["encoder_hidden_states"]) == images * repeats
    with OrtEngine(unet, threads=1) as engine:
        shared = engine(**inputs)["noise_pred"]
        np.testing.assert_allclose(shared, engine(**repeated)["noise_pred"], atol=2e-5)


def test_the_nodes_before_the_prompt_keep_the_batch_of_the_images(unet: Component) -> None:
    model = ir.load(unet.graph)
    tiles = [node for node in model.graph if node.op_type == "Tile"]
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    once = [node for node in convolutions if str(node.outputs[0].shape[0]) == "images"]
    assert len(once) >= 7  # conv_in, two residual blocks, a downsampler, proj_in
    assert 0 < len(tiles) < 25
    assert all(str(tile.inputs[0].shape[0]) == "images" for tile in tiles if tile.inputs[0].shape is not None)
