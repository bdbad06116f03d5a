"""LoRA files for SD3 and Flux: every spelling changes the same weights, and the picture is that of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.transformer_names import originals
from sdopt.errors import CheckpointError, UsageError
from sdopt.export.onto import add_adapter
from tests.adapters.lora_files import shapes
from tests.test_families import theirs
from tests.test_pipeline import FLOOR_DB, picture_psnr
from tests.test_sdxl import generators

RANK, OPTIONS = 3, {"height": 24, "width": 32, "num_inference_steps": 3, "max_sequence_length": 11, "output_type": "np"}
Tensors = dict[str, Any]


@pytest.fixture(scope="module", params=["StableDiffusion3Pipeline", "FluxPipeline"])
def model(request: pytest.FixtureRequest) -> tuple[str, Path, sdopt.Pipeline]:
    name = "sd3" if "3" in request.param else "flux"
    checkpoint, bundle = (request.getfixturevalue(f"{name}_{what}") for what in ("checkpoint", "bundle"))
    return request.param, checkpoint, sdopt.load(bundle)


def factors(pipe: sdopt.Pipeline) -> dict[str, tuple[Any, Any]]:
    """(down, up) of every linear of the blocks; those that the original code has as one share their down half."""
    rng = np.random.default_rng(0)
    found = shapes(pipe.bundle, "transformer")
    made: dict[str, tuple[Any, Any]] = {}
    for original in originals(found):
        paths = [path for path in original.modules if path in found and len(found[path]) == 2]
        if not paths or original.swapped or "blocks" not in original.path:
            continue
        down = rng.normal(size=(RANK, found[paths[0]][1])).astype(np.float32)
        for path in paths:
            made[path] = (down, 0.3 * rng.normal(size=(found[path][0], RANK)).astype(np.float32))
    return made


def by_path(prefix: str, pipe: sdopt.Pipeline, ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")) -> Tensors:
    """As trainers write it that have diffusers' modules."""
    dots = prefix.endswith(".")
    keys = {path: prefix + (path if dots else path.replace(".", "_")) for path in factors(pipe)}
    pairs = factors(pipe).items()
    return {keys[path] + end: half for path, halves in pairs for end, half in zip(ends, halves, strict=True)}


def by_original(prefix: str, pipe: sdopt.Pipeline) -> Tensors:
    """As trainers write it that have the original code's modules: queries, keys and values in one."""
    halves, made = factors(pipe), {}
    for original in originals(shapes(pipe.bundle, "transformer")):
        own = [halves[path] for path in original.modules if path in halves]
        if own:
            dots = prefix.endswith(".")
            key = prefix + (original.path if dots else original.path.replace(".", "_"))
            made[f"{key}.lora_down.weight"] = own[0][0]
            made[f"{key}.lora_up.weight"] = np.concatenate([up for _, up in own])
            made[f"{key}.alpha"] = np.float32(RANK)
    return made


SPELLINGS: dict[str, Callable[[sdopt.Pipeline], Tensors]] = {
    "peft": lambda pipe: by_path("base_model.model.", pipe),
    "diffusers": lambda pipe: by_path("transformer.", pipe),
    "onetrainer": lambda pipe: by_path("lora_transformer_", pipe, (".lora_down.weight", ".lora_up.weight")),
    "kohya": lambda pipe: by_original("lora_unet_", pipe),
    "comfy": lambda pipe: by_original("diffusion_model.", pipe),
}


def saved(tensors: Tensors, path: Path) -> Path:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
    return path


def test_the_picture_is_that_of_diffusers_with_the_same_file(model: Any, tmp_path: Path) -> None:
    kind, checkpoint, pipe = model
    path = saved(by_path("transformer.", pipe), tmp_path / "style.safetensors")
    reference = theirs(checkpoint, kind)
    plain = reference("a cat", generator=generators(5), **OPTIONS).images
    reference.load_lora_weights(path)
    try:
        expected = reference("a cat", generator=generators(5), **OPTIONS).images
    finally:
        reference.unload_lora_weights()
    pipe.load_lora_weights(path)
    try:
        found = pipe("a cat", seed=5, **OPTIONS).images
    finally:
        pipe.unload_lora_weights()
    assert picture_psnr(expected, found) >= FLOOR_DB
    assert picture_psnr(plain, found) < 40


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_changes_the_same_weights(spelling: str, model: Any, tmp_path: Path) -> None:
    pipe, pictures = model[2], []
    for name in ("diffusers", spelling):
        pipe.load_lora_weights(saved(SPELLINGS[name](pipe), tmp_path / f"{name}.safetensors"))
        pictures.append(pipe("a cat", seed=5, **OPTIONS).images)
        pipe.unload_lora_weights()
    assert picture_psnr(*pictures) >= 100


def test_a_weight_is_named_by_its_component(model: Any, tmp_path: Path) -> None:
    pipe = model[2]
    name = pipe.load_lora_weights(saved(by_path("transformer.", pipe), tmp_path / "style.safetensors"))
    plain = pipe("a cat", seed=5, lora_scale=0.0, **OPTIONS).images
    pipe.set_adapters(name, {"transformer": 0.0})
    np.testing.assert_array_equal(pipe("a cat", seed=5, **OPTIONS).images, plain)
    with pytest.raises(UsageError, match="names 'unet'; this model has text_encoder"):
        pipe.set_adapters(name, {"unet": 1.0})
    pipe.unload_lora_weights()


def test_what_cannot_be_split_is_named(model: Any, tmp_path: Path) -> None:
    pipe = model[2]
    fused = next(original for original in originals(shapes(pipe.bundle, "transformer")) if len(original.modules) > 2)
    key = f"lora_unet_{fused.path.replace('.', '_')}"
    half = np.ones((2, 2), np.float32)
    path = saved({f"{key}.lokr_w1": half, f"{key}.lokr_w2": half}, tmp_path / "lokr.safetensors")
    with pytest.raises(UsageError, match="several modules here: LoKr cannot be split along the outputs"):
        pipe.load_lora_weights(path)
    halves = {f"{key}.lora_down.weight": half, f"{key}.lora_up.weight": half}
    with pytest.raises(UsageError, match=r"up is \[2, 2\]; its modules have \d+ outputs"):
        pipe.load_lora_weights(saved(halves, tmp_path / "short.safetensors"))


def test_an_adapter_of_a_unet_is_refused_by_name(model: Any, tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    config: Any = {"block_out_channels": (12, 28), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D")
    net = ControlNetModel(
        **config, cross_attention_dim=20, attention_head_dim=2, down_block_types=blocks,
        conditioning_embedding_out_channels=(4, 8),
    )  # fmt: skip
    net.save_pretrained(tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"is a controlnet: it steers a UNet, .*; allowed is a tiny autoencoder"):
        add_adapter(tmp_path / "net", model[2].bundle, "canny")
    bundle = model[2].bundle
    with pytest.raises(UsageError, match="control_image"):
        model[2].plan("a cat", control_image=np.zeros((24, 32, 3), np.float32))
    assert not (bundle.path / "adapters").exists()
