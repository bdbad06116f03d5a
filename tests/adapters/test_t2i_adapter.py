"""T2I-Adapters: pictures equal those of diffusers' pipelines, and what does not fit is refused in words."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.adapter import CONTROLLED, open_adapter
from sdopt.bundle.files import Bundle
from sdopt.engine import open_engine
from sdopt.errors import CheckpointError, UsageError
from sdopt.export.onto import add_adapter
from sdopt.metrics import psnr
from tests import tiny
from tests.adapters import relatives as nets

QUIET: dict[str, Any] = {"report": lambda line: None}
FLOOR = 100
BACKENDS = ["ort", "openvino"]


def photo(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (37, 29)) -> Any:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def adapters() -> dict[str, Any]:
    """Of the tiny UNet, by name."""
    return {
        "sketch": nets.t2i_adapter(in_channels=1),
        "color": nets.t2i_adapter(adapter_type="light_adapter", channels=[12, 28]),
        "pose": nets.t2i_adapter(seed=5),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, of which the last has neither attention nor what makes it smaller, as in Stable Diffusion 1.5."""
    blocks = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    up = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    unet = tiny.unet(block_out_channels=(12, 28, 28), down_block_types=blocks, up_block_types=up)
    return tiny.sd(tmp_path_factory.mktemp("t2i") / "checkpoint", unet=unet)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tiny_bundle: Path, adapters: dict[str, Any]) -> Path:
    folder = checkpoint.parent
    target = tiny.export_like(checkpoint, folder / "bundle", tiny_bundle)
    for name, model in adapters.items():
        model.save_pretrained(folder / name)
        add_adapter(folder / name, target, name, offline=True, **QUIET)
    return target


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Any]:
    with sdopt.load(bundle, backend="ort") as opened:
        yield opened


def latents(images: int = 1) -> Any:
    return np.random.default_rng(3).standard_normal((images, 4, 12, 12), np.float32)


def diffusers_picture(checkpoint: Path, kind: str, adapter: Any, pictures: Any, **options: Any) -> Any:
    import diffusers
    import torch

    pipeline = getattr(diffusers, kind).from_pretrained(checkpoint, adapter=adapter, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "latents": torch.from_numpy(latents()), "height": 24, "width": 24, **options}
    return pipeline("apple", image=pictures, output_type="np", **options).images


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "guided": ({"pose": photo()}, {"adapter_conditioning_scale": 0.7}),
    "unguided": ({"pose": photo()}, {"guidance_scale": 1.0}),
    "grey": ({"sketch": photo(1, "L")}, {}),
    "light": ({"color": photo(2)}, {"adapter_conditioning_scale": 1.5}),
    "two": ({"pose": photo(), "sketch": photo(1, "L")}, {"adapter_conditioning_scale": [0.6, 0.9]}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_diffusers(
    case: str, backend: str, bundle: Path, checkpoint: Path, adapters: dict[str, Any]
) -> None:
    pytest.importorskip("openvino" if backend == "openvino" else "onnxruntime")
    from diffusers import MultiAdapter

    pictures, options = CASES[case]
    models = [adapters[name] for name in pictures]
    model = models[0] if len(models) == 1 else MultiAdapter(models)
    seen = list(pictures.values()) if len(models) > 1 else next(iter(pictures.values()))
    expected = diffusers_picture(checkpoint, "StableDiffusionAdapterPipeline", model, seen, **options)
    how: dict[str, Any] = {"height": 24, "width": 24, "latents": latents(), "output_type": "np", **options}
    with sdopt.load(bundle, backend=backend) as opened:
        plain = opened("apple", num_inference_steps=4, **{k: v for k, v in how.items() if "adapter" not in k}).images
        ours = opened("apple", num_inference_steps=4, control_image=pictures, **how).images
        in_two = opened("apple", num_inference_steps=4, control_image=pictures, guidance_batch=1, **how).images
    assert psnr(expected, ours) > FLOOR
    assert psnr(expected, in_two) > FLOOR
    assert psnr(expected, plain) < 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_features_and_residuals_the_graph_is_the_plain_one(backend: str, bundle: Path) -> None:
    from sdopt.denoise.control import nothing

    opened = Bundle.open(bundle)
    rng = np.random.default_rng(0)
    with open_engine(opened, "unet", backend) as unet, open_engine(opened, CONTROLLED, backend) as controlled:
        arrays = {
            "sample": rng.standard_normal((2, 4, 9, 8), np.float32),
            "timestep": np.array([3, 700], np.float32),
            "encoder_hidden_states": rng.standard_normal((4, 7, 20), np.float32),
        }
        further = [spec for spec in controlled.inputs if spec.name not in arrays]
        zeros = {name: z if "feature" in name else np.concatenate([z, z]) for name, z in nothing(further, 2).items()}
        given, plain = controlled(**arrays, **zeros)["noise_pred"], unet(**arrays)["noise_pred"]
        assert psnr(plain, given) > 120  # ONNX Runtime fuses other nodes, which round otherwise


def test_the_factor_ends_the_features_and_images_of_a_batch_are_those_alone(pipe: Any) -> None:
    how: dict[str, Any] = {"num_inference_steps": 4, "height": 24, "width": 24, "output_type": "np"}
    pictures = {"pose": [photo(), photo(7)]}
    both = pipe(["apple", "apple"], seed=[1, 2], control_image=pictures, adapter_conditioning_factor=0.5, **how).images
    for i, picture in enumerate(pictures["pose"]):
        alone = pipe("apple", seed=1 + i, control_image={"pose": picture}, adapter_conditioning_factor=0.5, **how)
        assert psnr(both[i], alone.images[0]) > FLOOR
    plain = pipe("apple", seed=1, **how).images
    never = pipe("apple", seed=1, control_image={"pose": photo()}, adapter_conditioning_factor=0.0, **how).images
    always = pipe("apple", seed=1, control_image={"pose": photo()}, **how).images
    assert psnr(plain[0], never[0]) > FLOOR
    assert psnr(always[0], both[0]) < 60


def test_a_picture_tells_which_adapter_saw_what(pipe: Any, bundle: Path) -> None:
    result = pipe("apple", seed=1, num_inference_steps=1, height=24, width=24, control_image={"pose": photo()})
    (seen,) = result.parameters[0]["controls"]
    assert (seen["name"], seen["digest"]) == ("pose", open_adapter(Bundle.open(bundle), "pose").digest)
    assert len(seen["picture"]) == 64


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"control_image": {"pose": photo()}, "controlnet_conditioning_scale": 0.5}, "needs a ControlNet, and"),
        ({"control_image": {"pose": photo()}, "guess_mode": True}, "guess_mode needs a ControlNet"),
        ({"adapter_conditioning_scale": 0.5}, "adapter_conditioning_scale needs control_image"),
        ({"adapter_conditioning_factor": 0.5}, "adapter_conditioning_factor needs control_image"),
        ({"control_image": {"pose": photo()}, "adapter_conditioning_factor": 2.0}, "allowed are numbers from 0 to 1"),
        (
            {"control_image": {"pose": photo()}, "adapter_conditioning_scale": [1.0, 2.0]},
            "2 numbers for 1 T2I",
        ),
        ({"control_image": {"poses": photo()}}, "has no adapter 'poses'; there are"),
        ({"control_image": photo()}, "this bundle has color, pose, sketch; say which"),
    ],
)
def test_what_does_not_fit_is_refused(pipe: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        pipe("apple", **{"height": 24, "width": 24, **options})


def test_an_adapter_of_another_model_is_refused(bundle: Path, tmp_path: Path) -> None:
    cases = {
        "features have .*16, 16.*, and the UNet of .* takes .*12, 16": {"channels": [16, 28, 28]},
        "features have .*12, 8.*, and the UNet of .* takes .*12, 16": {"downscale_factor": 4},
        "that do not exist": {"downscale_factor": 64},
        "in_channels is 4": {"in_channels": 4},
    }
    for says, changes in cases.items():
        nets.t2i_adapter(**changes).save_pretrained(tmp_path / "other")
        with pytest.raises(CheckpointError, match=says):
            add_adapter(tmp_path / "other", bundle, "other", offline=True, **QUIET)
        shutil.rmtree(tmp_path / "other")


def test_sdxl_and_its_factor(sdxl_checkpoint: Path, sdxl_bundle: Path, tmp_path: Path) -> None:
    model = nets.t2i_adapter(adapter_type="full_adapter_xl", channels=[12, 28], downscale_factor=4)
    model.save_pretrained(tmp_path / "adapter")
    bundle = Path(shutil.copytree(sdxl_bundle, tmp_path / "bundle"))
    add_adapter(tmp_path / "adapter", bundle, "lineart", offline=True, **QUIET)
    options = {"adapter_conditioning_factor": 0.5, "adapter_conditioning_scale": 0.8}
    kind = "StableDiffusionXLAdapterPipeline"
    expected = diffusers_picture(sdxl_checkpoint, kind, model, photo(), **options)
    how: dict[str, Any] = {"height": 24, "width": 24, "latents": latents(), "output_type": "np", **options}
    for backend in BACKENDS:
        with sdopt.load(bundle, backend=backend) as opened:
            ours = opened("apple", num_inference_steps=4, control_image=photo(), **how).images
            assert psnr(expected, ours) > FLOOR
            with pytest.raises(UsageError, match="height = 26: lineart takes multiples of 4 pixels; give 24 or 28"):
                opened("apple", **{**how, "latents": None, "height": 26}, control_image=photo())
