"""Tiny autoencoders: pictures equal those of diffusers with AutoencoderTiny, and what does not fit is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.adapter import TINY_VAE, open_adapter
from sdopt.bundle.files import Bundle
from sdopt.cli.main import main
from sdopt.errors import BundleError, CheckpointError, UsageError
from sdopt.export.onto import add_adapter
from sdopt.metrics import psnr
from sdopt.request.plan import make_plan
from tests import tiny
from tests.adapters import nets
from tests.conftest import edit_manifest

QUIET: dict[str, Any] = {"report": lambda line: None, "offline": True}
FLOOR = 100
HOW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}


def model() -> Any:
    """Its numbers of blocks and widths are not the same in each stage and on each side."""
    blocks = {"num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}
    return tiny.taesd(**blocks, encoder_block_out_channels=(6, 6), decoder_block_out_channels=(10, 10)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model, as diffusers writes it."""
    target = tmp_path_factory.mktemp("taesd") / "taesd"
    model().save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def bundles(folder: Path, tiny_bundle: Path, sdxl_bundle: Path) -> dict[str, Path]:
    """With the model as the adapter `tiny`, by family."""
    made: dict[str, Path] = {}
    for family, bundle in {"sd": tiny_bundle, "sdxl": sdxl_bundle}.items():
        made[family] = Path(shutil.copytree(bundle, folder.parent / family))
        add_adapter(folder, made[family], "tiny", **QUIET)
    return made


@pytest.fixture(scope="module")
def pipe(bundles: dict[str, Path]) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(bundles["sd"], backend="ort") as opened:
        yield opened


def photo(width: int = 32, height: int = 24) -> Any:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def noise(images: int = 2, height: int = 12, width: int = 16) -> Any:
    return np.random.default_rng(3).standard_normal((images, 4, height, width), np.float32)


CASES = {
    ("sd", "ort", "text"): "StableDiffusionPipeline",
    ("sd", "ort", "image"): "StableDiffusionImg2ImgPipeline",
    ("sd", "openvino", "text"): "StableDiffusionPipeline",
    ("sdxl", "ort", "text"): "StableDiffusionXLPipeline",
    ("sdxl", "ort", "image"): "StableDiffusionXLImg2ImgPipeline",
}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_pictures_are_those_of_diffusers(
    case: tuple[str, str, str], bundles: dict[str, Path], tiny_checkpoint: Path, sdxl_checkpoint: Path
) -> None:
    import diffusers
    import torch

    family, backend, start = case
    pytest.importorskip("openvino" if backend == "openvino" else "onnxruntime")
    checkpoint = tiny_checkpoint if family == "sd" else sdxl_checkpoint
    none = {"safety_checker": None} if family == "sd" else {"add_watermarker": False}
    theirs = getattr(diffusers, CASES[case]).from_pretrained(checkpoint, vae=model(), **none)
    theirs.set_progress_bar_config(disable=True)
    own: dict[str, Any] = {"image": photo(), "strength": 0.7} if start == "image" else {}
    size = {} if start == "image" else {"height": 24, "width": 32}
    given = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    several = {"image": [photo(), photo()]} if own else {}
    expected = theirs(["apple", "cat"], generator=given, **{**HOW, **own, **several, **size}).images
    with sdopt.load(bundles[family], backend=backend) as ours:
        made = ours(["apple", "cat"], seed=[5, 6], vae="tiny", **{**HOW, **own, **size}).images
        alone = ours("cat", seed=6, vae="tiny", **{**HOW, **own, **size}).images
        plain = ours(["apple", "cat"], seed=[5, 6], **{**HOW, **own, **size}).images
    assert psnr(expected, made) > FLOOR
    assert psnr(made[1], alone[0]) > FLOOR
    assert psnr(expected, plain) < 40


@pytest.mark.parametrize("size", [(5, 7), (12, 16), (9, 4)])
def test_latents_are_decoded_at_any_size_and_one_by_one(size: tuple[int, int], pipe: sdopt.Pipeline) -> None:
    import torch

    latents = noise(3, *size)
    with torch.inference_mode():
        expected = model().decode(torch.from_numpy(latents) / 0.9).sample.numpy()
    expected = (expected / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)
    for one_by_one in (False, True):
        assert psnr(expected, pipe.decode(latents, "np", vae="tiny", vae_slice=one_by_one)) > FLOOR
    assert psnr(expected, pipe.decode(latents, "np")) < 40


def test_tiles_are_those_of_the_tiny_decoder(pipe: sdopt.Pipeline) -> None:
    latents = noise(1, 20, 28)
    whole = pipe.decode(latents, "np", vae="tiny")
    assert psnr(whole, pipe.decode(latents, "np", vae="tiny", vae_tile=28)) > FLOOR
    assert FLOOR > psnr(whole, pipe.decode(latents, "np", vae="tiny", vae_tile=12)) > 25
    options = {**HOW, "image": photo(48, 40), "strength": 0.5, "seed": 1, "vae": "tiny"}
    assert psnr(pipe("apple", **options).images, pipe("apple", vae_tile=12, **options).images) > 25


def test_hires_and_a_mask_take_it_too(pipe: sdopt.Pipeline) -> None:
    mask = np.zeros((24, 32), np.float32)
    mask[8:16, 8:24] = 1
    for options in ({"hires": 2.0, "height": 16, "width": 16}, {"image": photo(), "mask_image": mask}):
        tiny_one = pipe("apple", seed=1, vae="tiny", **HOW, **options).images
        latents = pipe("apple", seed=1, vae="tiny", **{**HOW, "output_type": "latent"}, **options).images
        np.testing.assert_array_equal(tiny_one, pipe.decode(latents, "np", vae="tiny"))


def test_a_picture_carries_it_and_a_replay_wants_the_same(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(bundles["sd"], tmp_path / "bundle"))
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    how = ["-m", str(bundle)]
    assert main(["generate", "apple", "--steps", "2", "--seed", "1", "--vae", "tiny", *how, "-o", str(first)]) == 0
    assert main(["generate", "--replay", str(first), *how, "-o", str(again)]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    with sdopt.load(bundle) as opened:
        parameters = opened("apple", num_inference_steps=2, seed=1, vae="tiny").parameters[0]
    assert (parameters["vae"], parameters["vae_digest"]) == ("tiny", open_adapter(Bundle.open(bundle), "tiny").digest)
    assert main(["generate", "--replay", str(first), *how, "--vae", "tiny", "-o", str(again)]) == 2
    assert "--replay takes everything from the PNG; leave out --vae" in capsys.readouterr().err
    shutil.rmtree(bundle / "adapters/tiny")
    assert main(["generate", "--replay", str(first), *how, "-o", str(again)]) == 2
    assert "--vae 'tiny'; allowed are the names of tiny autoencoders" in capsys.readouterr().err
    other = tmp_path / "other"
    tiny.taesd(scaling_factor=0.8).save_pretrained(other)
    add_adapter(other, bundle, "tiny", **QUIET)
    assert main(["generate", "--replay", str(first), *how, "-o", str(again)]) == 2
    assert "was made with another tiny autoencoder tiny: " in capsys.readouterr().err


def test_an_adapter_that_is_deleted_while_a_pipeline_is_open_is_told(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles["sd"], tmp_path / "bundle"))
    with sdopt.load(bundle, memory="low") as opened:
        before = opened("apple", seed=1, vae="tiny", **HOW).images
        np.testing.assert_array_equal(before, opened("apple", seed=1, vae="tiny", **HOW).images)
        shutil.rmtree(bundle / "adapters/tiny")
        with pytest.raises(UsageError, match=r"vae = 'tiny'; .* has none\. To add one: sdopt export TAESD --onto"):
            opened("apple", seed=1, vae="tiny", **HOW)
        assert opened("apple", seed=1, **HOW).images.shape == before.shape


def test_a_name_that_is_none_is_refused_before_any_work(
    bundles: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(bundles["sd"], tmp_path / "bundle"))
    nets.controlnet(tiny_checkpoint).save_pretrained(tmp_path / "canny")
    add_adapter(tmp_path / "canny", bundle, "canny", **QUIET, verify=False)
    names: dict[Any, str] = {
        "tny": "tny.*; allowed are the names of tiny autoencoders of the bundle, and there are tiny",
        "canny": "canny.*: canny is a controlnet; allowed are .* there are tiny",
        "../tiny": "../tiny.*; allowed are the names",
        "": "'; allowed are texts without spaces",
        3: "; allowed are texts without spaces",
    }
    with sdopt.load(bundle) as opened:
        calls: tuple[Callable[[Any], Any], ...] = (
            lambda name: opened.plan("apple", vae=name),
            lambda name: opened.decode(noise(), vae=name),
        )
        for name, message in names.items():
            for call in calls:
                with pytest.raises(UsageError, match=f"^vae = .*{message}") as caught:
                    call(name)
                assert caught.value.param == "vae"
        with pytest.raises(UsageError, match="tiny is no ControlNet, but a tiny_vae"):
            opened.plan("apple", control_image={"tiny": photo()})


def test_one_file_is_the_same_as_its_folder(folder: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles["sd"], tmp_path / "bundle"))
    file = tmp_path / "taesd.safetensors"
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", file)
    add_adapter(file, bundle, "file", **QUIET)
    adapter = open_adapter(Bundle.open(bundle), "file")
    assert (adapter.manifest.kind, adapter.manifest.source) == (TINY_VAE, {"file": "taesd.safetensors"})
    assert adapter.manifest.latents is not None
    assert adapter.manifest.latents.scaling_factor == 1.0  # no file tells it, and all published ones have it
    with sdopt.load(bundle, backend="ort") as opened:
        expected = opened.decode(noise(), "np", vae="tiny")
        assert psnr(expected, opened.decode(noise() / np.float32(0.9), "np", vae="file")) > FLOOR


WRONG: dict[str, tuple[Any, str]] = {
    "channels": (lambda: tiny.taesd(latent_channels=16), "latents have 16 channels, and those of .* have 4; .*/taesd"),
    "factor": (
        lambda: tiny.taesd(
            **{f"{side}_block_out_channels": (6,) * 3 for side in ("encoder", "decoder")},
            **{f"num_{side}_blocks": (1,) * 3 for side in ("encoder", "decoder")},
        ),
        "latents have 4 pixels for each, and those of .* have 2; it is made for another model",
    ),
    "pictures": (lambda: tiny.taesd(out_channels=4), "out_channels is 4; pictures have 3 channels"),
    "full size": (tiny.vae, "its class is AutoencoderKL; what can be added to a bundle is .*AutoencoderTiny"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_does_not_fit_adds_nothing(case: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    make, message = WRONG[case]
    make().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        add_adapter(tmp_path / "model", bundles["sd"], "wrong", **QUIET)
    assert not (bundles["sd"] / "adapters/wrong").exists()


def test_files_that_are_no_tiny_autoencoder_are_named(bundles: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    own = load_file(folder / "diffusion_pytorch_model.safetensors")
    files: dict[str, tuple[dict[str, Any], str]] = {
        "full": (dict(tiny.vae().state_dict()), "is an autoencoder of full size; what is added to a bundle is a tiny"),
        "half": ({"1.weight": torch.zeros(4, 4), "3.conv.0.bias": torch.zeros(4)}, "numbers as names of its layers"),
        "decoder": ({k: v for k, v in own.items() if "decoder" in k}, "has no encoder of a tiny autoencoder"),
        "more": ({**own, "other.weight": torch.zeros(3)}, "other.weight"),
        "less": ({k: v for k, v in own.items() if k != "decoder.layers.2.conv.2.bias"}, "decoder.layers.2.conv.2.bias"),
        "empty": ({}, "has no ControlNet"),
    }
    for name, (tensors, message) in files.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        with pytest.raises(CheckpointError, match=message):
            add_adapter(path, bundles["sd"], "wrong", **QUIET)
    (tmp_path / "taesd_decoder.pth").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is a pickle file, and only safetensors are read; give its folder"):
        add_adapter(tmp_path / "taesd_decoder.pth", bundles["sd"], "wrong", **QUIET)
    assert not (bundles["sd"] / "adapters/wrong").exists()


@pytest.mark.parametrize("field", ["channels", "factor"])
def test_one_that_was_copied_from_another_bundle_is_refused(
    field: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(bundles["sd"], tmp_path / "bundle"))
    latents = {"channels": 4, "factor": 2, "scaling_factor": 1.0, "shift_factor": 0.0, field: 16}
    edit_manifest(bundle / "adapters/tiny", latents=latents)
    with pytest.raises(BundleError, match=r"is made for latents of .* Delete it, or make it again: .* --name tiny"):
        make_plan(Bundle.open(bundle), "apple", {"vae": "tiny"})
    edit_manifest(bundle / "adapters/tiny", latents=None)
    with pytest.raises(BundleError, match="latents is null; a tiny_vae has them"):
        make_plan(Bundle.open(bundle), "apple", {"vae": "tiny"})
