"""No documented option needs an engine that `sdopt build` does not make: pictures from built engines alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions
from sdopt.bundle.files import Bundle
from sdopt.denoise.program import fused_component
from sdopt.engine.store import usable
from sdopt.errors import BackendError
from tests import tiny
from tests.conftest import EMOJI_BUNDLE, edit_manifest

OPTIONS: dict[str, Any] = {"seed": 3, "num_inference_steps": 4, "output_type": "latent"}
SIZE = {"height": 64, "width": 64}
GUIDED = [
    {"guidance_scale": 5.0, "guidance_rescale": 0.7},
    {"guidance_scale": 5.0, "guidance_rescale": 0.7, "guidance_interval": (0.2, 0.7)},
    {"guidance_scale": 5.0, "guidance_batch": 1},
    {"guidance_scale": 1.0},
    {"guidance_scale": 0.0, "guidance_rescale": 0.5},
    {"guidance_scale": 5.0, "guidance_interval": (0.3, 0.8), "negative_prompt": "a pear"},
]


def built(source: Path, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """A bundle, and the same with the engines that `sdopt build` makes of its UNet, for ONNX Runtime."""
    plain, with_engines = folder / "plain", folder / "built"
    shutil.copytree(source, plain)
    if changes:
        edit_manifest(plain, **changes)
    shutil.copytree(plain, with_engines)
    build(
        Bundle.open(with_engines, verify=False), "ort", options=BuildOptions(precision="fp32"), report=lambda line: None
    )
    return plain, with_engines


@pytest.fixture(scope="module", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("own")))
        yield


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return built(EMOJI_BUNDLE, tmp_path_factory.mktemp("guided"))


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> tuple[Path, Path]:
    from diffusers import LCMScheduler

    folder = tmp_path_factory.mktemp("lcm")
    unet = tiny.unet(time_cond_proj_dim=6)
    kind = "LatentConsistencyModelPipeline"
    checkpoint = tiny.sd(folder / "checkpoint", kind, unet=unet, scheduler=LCMScheduler(**tiny.BETAS))
    return built(tiny.export_like(checkpoint, folder / "bundle", tiny_bundle), folder)


def pictures(bundle: Path, step: str = "", **options: Any) -> Any:
    """Latents; with `step` they were made by this engine, and by no other UNet."""
    with sdopt.load(bundle, backend="ort:cpu", threads=1, verify=False, cache=False) as pipe:
        images = pipe("a red apple", **{**OPTIONS, **options}).images
        if step:
            assert [name for name in pipe.pool.opened if name.startswith("unet")] == [step]
    return images


@pytest.mark.parametrize("options", GUIDED, ids=str)
def test_a_guided_bundles_step_takes_every_form_of_guidance(options: dict[str, Any], guided: tuple[Path, Path]) -> None:
    expected, found = pictures(guided[0], **SIZE, **options), pictures(guided[1], "unet_step", **SIZE, **options)
    np.testing.assert_allclose(found, expected, atol=5e-4)


@pytest.mark.parametrize("scale", [None, 1.5, 7.3])
def test_the_step_of_a_distilled_unet_is_told_the_scale(scale: float | None, lcm: tuple[Path, Path]) -> None:
    options = {"num_images_per_prompt": 2} | ({} if scale is None else {"guidance_scale": scale})
    expected, found = pictures(lcm[0], **options), pictures(lcm[1], "unet_step_alone", **options)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    if scale is not None:
        assert np.abs(pictures(lcm[0], **{**options, "guidance_scale": scale + 2}) - found).max() > 1e-3


def test_a_feature_cache_of_a_distilled_unet_beside_its_plain_step(lcm: tuple[Path, Path], tmp_path: Path) -> None:
    host, steps = (Path(shutil.copytree(lcm[1], tmp_path / name)) for name in ("host", "steps"))
    silent: dict[str, Any] = {"report": lambda line: None}
    build(Bundle.open(host, verify=False), "ort", cache_depth=1, **silent)
    names = ["unet_step_alone_deep_1", "unet_step_alone_shallow_1"]
    build(Bundle.open(steps, verify=False), "ort", components=names, **silent)
    options = {"cache_interval": 2, "num_images_per_prompt": 2, "guidance_scale": 7.3}
    expected, found = pictures(host, **options), pictures(steps, **options)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(pictures(steps, "unet_step_alone", **{**options, "cache_interval": 1}) - found).max() > 1e-3


def test_a_turbo_bundle_has_the_half_step_and_is_told_how_to_get_the_other(tmp_path: Path) -> None:
    defaults = replace(Bundle.open(EMOJI_BUNDLE).manifest.defaults, guidance_scale=0.0)
    plain, engines = built(EMOJI_BUNDLE, tmp_path, defaults=defaults)
    np.testing.assert_allclose(pictures(engines, "unet_step_alone", **SIZE), pictures(plain, **SIZE), atol=5e-4)
    assert fused_component(True, ["unet_step_alone"], needs_built=True) == "unet_step"
    with pytest.raises(
        BackendError, match=r"has no tensorrt engines. Build them: sdopt build .*built --backend tensorrt$"
    ):
        usable(Bundle.open(engines, verify=False), "unet_step", "tensorrt", lambda record: {})


@pytest.mark.parametrize(
    ("guided", "built", "needs_built", "component"),
    [
        (True, ["unet_step"], True, "unet_step"),
        (False, ["unet_step"], True, "unet_step"),
        (False, ["unet_step", "unet_step_alone"], True, "unet_step_alone"),
        (False, ["unet_step_alone"], False, "unet_step_alone"),
        (True, ["unet_step_alone"], False, None),  # the bundle's own UNet
        (True, ["unet"], True, None),  # one that was built
        (True, [], True, "unet_step"),  # the error of opening it says how to build it
        (False, ["vae_decoder"], True, "unet_step_alone"),
    ],
)
def test_the_engine_is_the_one_that_is_there(
    guided: bool, built: list[str], needs_built: bool, component: str | None
) -> None:
    assert fused_component(guided, built, needs_built) == component
