"""ControlNets inside the engine of a step give what they give beside the UNet on the host."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt import graph
from sdopt.build.jobs import build
from sdopt.build.join_control import join_control
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array
from sdopt.errors import UsageError
from sdopt.export import export
from sdopt.export.onto import add_adapter
from sdopt.metrics import psnr
from tests import tiny
from tests.adapters.nets import controlnet, edges
from tests.conftest import once

FLOOR_DB = 100.0
CALL: dict[str, Any] = {
    "prompt": "apple",
    "num_inference_steps": 5,
    "output_type": "latent",
    "height": 24,
    "width": 32,
    "seed": 1,
}
NETS = {"canny": 3, "pose": 4}  # name -> the seed of its weights
STEPS = ("unet_step", "unet_step.canny", "unet_step.pose.canny")


def silent(line: str) -> None: ...


def added(bundle: Path, net: Any, folder: Path, name: str) -> None:
    """Add a ControlNet to a bundle."""
    net.save_pretrained(folder / name)
    add_adapter(folder / name, bundle, name, verify=False, report=silent)


def with_nets(checkpoint: Path, bundle: Path, folder: Path, names: Iterable[str] = NETS, **changes: Any) -> Path:
    """A copy of a bundle with ControlNets."""
    own = Path(shutil.copytree(bundle, folder / "bundle"))
    for name in names:
        added(own, controlnet(checkpoint, NETS[name], **changes), folder, name)
    return own


@pytest.fixture(scope="session")
def controlled(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with two ControlNets, without engines."""
    made = once(tmp_path_factory, "tiny/controlled", lambda folder: with_nets(tiny_checkpoint, tiny_bundle, folder))
    return made / "bundle"


def built(bundle: Path, folder: Path, *steps: str) -> Path:
    """A copy of a bundle with graphs of these steps for ONNX Runtime."""
    copy = Path(shutil.copytree(bundle, folder / "built"))
    build(Bundle.open(copy), "ort", components=steps, report=silent)
    return copy


@pytest.fixture(scope="module")
def pipes(controlled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """The host way, and joined engines."""
    copy = built(controlled, tmp_path_factory.mktemp("joined"), *STEPS)
    with sdopt.load(controlled, "ort") as host, sdopt.load(copy, "ort") as joined:
        yield host, joined


def latents(pipe: Any, **options: Any) -> Array:
    return pipe(**{**CALL, **options}).images


def steps_of(pipe: Any) -> set[str]:
    return {name for name in pipe.pool.opened if name.startswith("unet")}


def disc() -> Image.Image:
    mask = np.zeros((24, 32), np.uint8)
    mask[6:18, 8:24] = 255
    return Image.fromarray(mask)


ONE, TWO = {"canny": edges()}, {"pose": edges(seed=5), "canny": edges()}
CASES: dict[str, dict[str, Any]] = {
    "one": {"control_image": ONE, "controlnet_conditioning_scale": 0.8},
    "guess": {"control_image": ONE, "guess_mode": True, "guidance_scale": 4.0},
    "no guidance": {"control_image": ONE, "guess_mode": True, "guidance_scale": 1.0},
    "start and end": {"control_image": ONE, "control_guidance_start": 0.3, "control_guidance_end": 0.7},
    "two": {"control_image": TWO, "controlnet_conditioning_scale": [0.7, 1.3], "control_guidance_end": [1.0, 0.5]},
    "a picture for each": {
        "control_image": {"canny": [edges(), edges(seed=9)]},
        "prompt": ["apple", "a"],
        "seed": [3, 4],
    },
    "img2img": {"control_image": ONE, "image": edges(seed=7), "strength": 0.7},
    "inpaint": {"control_image": ONE, "image": edges(seed=7), "mask_image": disc(), "strength": 0.9},
    "noise in each call": {"control_image": TWO, "sampler": "dpmpp_2m_sde", "guidance_interval": (0.25, 0.7)},
}


@pytest.mark.parametrize("case", CASES)
def test_joined_engines_are_the_host_way(case: str, pipes: tuple[Any, Any]) -> None:
    host, joined = pipes
    joined.close()
    expected, found = latents(host, **CASES[case]), latents(joined, **CASES[case])
    assert psnr(expected, found) >= FLOOR_DB
    plain = {name: option for name, option in CASES[case].items() if "control" not in name and name != "guess_mode"}
    assert psnr(expected, latents(host, **plain)) < 50  # the net matters
    name = "unet_step." + ".".join(sorted(CASES[case]["control_image"]))
    assert steps_of(joined) == ({name, "unet_step"} if case == "start and end" else {name})
    assert not any("adapters" in name for name in joined.pool.opened)


def test_guidance_that_is_off_takes_the_engine_without_it(controlled: Path, tmp_path: Path) -> None:
    copy = built(controlled, tmp_path, "unet_step.canny", "unet_step_alone.canny")
    options: dict[str, Any] = {"control_image": ONE, "guidance_interval": (0.25, 0.7), "sampler": "dpmpp_2m"}
    with sdopt.load(controlled, "ort") as host, sdopt.load(copy, "ort") as joined:
        assert psnr(latents(host, **options), latents(joined, **options)) >= FLOOR_DB
        assert steps_of(joined) == {"unet_step.canny", "unet_step_alone.canny"}
        joined.close()
        ends = {"control_guidance_end": 0.5, "control_image": ONE}  # no plain engine: the same with scales of 0
        assert psnr(latents(host, **ends), latents(joined, **ends)) >= FLOOR_DB
        assert steps_of(joined) == {"unet_step.canny"}
        latents(joined, control_image={"pose": edges()})  # not built: the host way
        assert {"unet_controlled", "adapters/pose/controlnet"} <= set(joined.pool.opened)


def test_a_net_of_means_and_one_of_pictures_are_added_up(
    controlled: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The residuals of the ControlNet of `shuffle` have one pixel, and it runs in guess mode."""
    bundle = Path(shutil.copytree(controlled, tmp_path / "bundle"))
    added(bundle, controlnet(tiny_checkpoint, global_pool_conditions=True), tmp_path, "shuffle")
    copy = built(bundle, tmp_path, "unet_step.canny.shuffle", "unet_step.shuffle")
    with sdopt.load(bundle, "ort") as host, sdopt.load(copy, "ort") as joined:
        for names in (("shuffle",), ("canny", "shuffle"), ("shuffle", "canny")):
            options = {"control_image": dict.fromkeys(names, edges())}
            assert psnr(latents(host, **options), latents(joined, **options)) >= FLOOR_DB
        assert steps_of(joined) == {"unet_step.canny.shuffle", "unet_step.shuffle"}


def test_a_net_sees_no_mask_and_takes_no_guidance_scale(tmp_path: Path) -> None:
    """A UNet with further channels for inpainting, which was distilled with guidance."""
    checkpoint = tiny.sd(tmp_path / "checkpoint", unet=tiny.unet(in_channels=9, time_cond_proj_dim=6))
    plain = export(checkpoint, tmp_path / "plain", verify=False, report=silent)
    bundle = with_nets(checkpoint, plain, tmp_path, ["canny"], in_channels=4)
    copy = built(bundle, tmp_path, "unet_step_alone.canny")
    options = {**CASES["inpaint"], "guidance_scale": 6.0}
    with sdopt.load(bundle, "ort") as host, sdopt.load(copy, "ort") as joined:
        assert psnr(latents(host, **options), latents(joined, **options)) >= FLOOR_DB
        assert steps_of(joined) == {"unet_step_alone.canny"}


def test_nets_of_sdxl_read_its_sizes_and_pooled_text(sdxl_checkpoint: Path, sdxl_bundle: Path, tmp_path: Path) -> None:
    bundle = with_nets(sdxl_checkpoint, sdxl_bundle, tmp_path)
    copy = built(bundle, tmp_path, "unet_step.canny.pose", "unet_step.canny")
    with sdopt.load(bundle, "ort") as host, sdopt.load(copy, "ort") as joined:
        for case in ("guess", "two"):
            assert psnr(latents(host, **CASES[case]), latents(joined, **CASES[case])) >= FLOOR_DB
        assert steps_of(joined) == {"unet_step.canny.pose", "unet_step.canny"}


def test_a_net_of_another_model_or_opset_is_refused(controlled: Path, sdxl_bundle: Path) -> None:
    net = graph.load(controlled / "adapters/canny/controlnet.onnx")
    other = graph.load(sdxl_bundle / "unet_controlled.onnx")
    with pytest.raises(UsageError, match=r"canny: it is made for another model.*--name canny --force"):
        join_control(other, {"canny": net})
    with pytest.raises(UsageError, match="canny: it is made for another model"):
        join_control(graph.load(controlled / "unet.onnx"), {"canny": net})
    net.graph.opset_imports[""] = 18
    with pytest.raises(UsageError, match=r"canny: it is in opset 18, the UNet in 2\d"):
        join_control(graph.load(controlled / "unet_controlled.onnx"), {"canny": net})


def test_weights_of_nets_have_names_of_their_own_and_stay_in_their_files(controlled: Path) -> None:
    unet = graph.load(controlled / "unet_controlled.onnx")
    before = set(graph.names.parameters(unet))
    paths = {name: controlled / f"adapters/{name}/controlnet.onnx" for name in NETS}
    model = join_control(unet, {name: graph.load(path) for name, path in paths.items()})
    assert set(graph.names.parameters(model)) == before
    for name, path in paths.items():
        for weight, value in graph.load(path).graph.initializers.items():
            joined = model.graph.initializers[f"adapters/{name}/{weight}"].const_value
            assert value.const_value is not None
            assert joined is not None
            assert type(joined) is type(value.const_value)  # an external tensor, where the graph has one
            np.testing.assert_array_equal(joined.numpy(), value.const_value.numpy())
