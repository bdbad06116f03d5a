"""With padding_mask_crop a ControlNet and a T2I-Adapter see the region that is painted, as in diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.errors import UsageError
from sdopt.export.onto import add_adapter
from sdopt.metrics import psnr
from tests.adapters import relatives as nets


def photo(seed: int = 0, size: tuple[int, int] = (61, 47)) -> Any:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def mask() -> Any:
    pixels = np.zeros((47, 61), np.uint8)
    pixels[12:30, 20:41] = 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def net(tiny_checkpoint: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return nets.controlnet(UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet"))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, net: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cropped")
    target = Path(shutil.copytree(tiny_bundle, folder / "bundle", ignore=shutil.ignore_patterns("adapters")))
    net.save_pretrained(folder / "net")
    add_adapter(folder / "net", target, "canny", offline=True, report=lambda line: None)
    return target


HOW: dict[str, Any] = {"num_inference_steps": 4, "height": 24, "width": 24, "padding_mask_crop": 3}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_the_picture_is_that_of_diffusers(
    backend: str, guidance: float, bundle: Path, net: Any, tiny_checkpoint: Path
) -> None:
    pytest.importorskip("openvino" if backend == "openvino" else "onnxruntime")
    import torch
    from diffusers import StableDiffusionControlNetInpaintPipeline

    reference = StableDiffusionControlNetInpaintPipeline.from_pretrained(
        tiny_checkpoint, controlnet=net, safety_checker=None
    )
    reference.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {
        "guidance_scale": guidance,
        "strength": 1.0,
        "image": photo(),
        "mask_image": mask(),
        **HOW,
    }
    expected = reference(
        "apple",
        control_image=photo(1),
        controlnet_conditioning_scale=0.7,
        generator=torch.Generator().manual_seed(3),
        **options,
    ).images[0]
    with sdopt.load(bundle, backend=backend) as pipe:
        ours = pipe("apple", control_image=photo(1), controlnet_conditioning_scale=0.7, seed=3, **options).images[0]
        other = pipe("apple", control_image=photo(2), controlnet_conditioning_scale=0.7, seed=3, **options).images[0]
    theirs, mine, unlike = (np.asarray(one, np.float32) for one in (expected, ours, other))
    assert psnr(theirs, mine) > 90  # of 8-bit pictures
    assert psnr(theirs, unlike) < 70


def test_a_picture_of_another_size_is_refused(bundle: Path) -> None:
    with (
        sdopt.load(bundle, backend="ort") as pipe,
        pytest.raises(UsageError, match="control_image is 60x47 pixels, image 61x47; with padding_mask_crop both are"),
    ):
        pipe("apple", image=photo(), mask_image=mask(), control_image=photo(1, (60, 47)), **HOW)
