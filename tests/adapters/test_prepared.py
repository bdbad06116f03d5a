"""Photos that are prepared for ControlNets: from Python, on the command line, and when a picture is made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sdopt
from sdopt.cli.main import main
from sdopt.errors import UsageError
from sdopt.export.onto import add_adapter
from sdopt.image.pil import read_parameters
from sdopt.metrics import psnr
from tests.adapters import relatives
from tests.adapters.nets import controlnet, edges
from tests.image.test_control import make_inpaint_condition, photo

FLOOR_DB = 60.0
CALL: dict[str, Any] = {"num_inference_steps": 3, "height": 24, "width": 32, "output_type": "np"}


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the ControlNets `canny` and `other`, and the T2I-Adapter `sketch`, which sees shades of grey."""
    folder = tmp_path_factory.mktemp("prepared")
    own = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    for name, seed in (("canny", 3), ("other", 4)):
        controlnet(tiny_checkpoint, seed).save_pretrained(folder / name)
        add_adapter(folder / name, own, name, report=lambda line: None)
    relatives.t2i_adapter(in_channels=1, channels=[12, 28]).save_pretrained(folder / "sketch")
    add_adapter(folder / "sketch", own, "sketch", report=lambda line: None)
    return own


def mask() -> Image.Image:
    shades = np.zeros((24, 32), np.uint8)
    shades[6:18, 8:24] = 255
    return Image.fromarray(shades)


def reference(checkpoint: Path, bundle: Path, kind: str = "", **options: Any) -> Any:
    """What diffusers' pipeline of a kind makes with the ControlNet `canny`."""
    import diffusers
    import torch

    net = diffusers.ControlNetModel.from_pretrained(bundle.parent / "canny")
    pipe = getattr(diffusers, f"StableDiffusionControlNet{kind}Pipeline").from_pretrained(checkpoint, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe("apple", generator=torch.Generator().manual_seed(1), **{**CALL, **options}).images


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_a_picture_with_masked_pixels_is_that_of_diffusers(tiny_checkpoint: Path, bundle: Path, backend: str) -> None:
    condition = make_inpaint_condition(photo(24, 32), mask())
    expected = reference(tiny_checkpoint, bundle, image=condition)
    array = condition[0].permute(1, 2, 0).numpy()
    with sdopt.load(bundle, backend) as pipe:
        for given in (array, array[None], [array], sdopt.control.inpaint(photo(24, 32), mask())):
            images = pipe("apple", seed=1, control_image={"canny": given}, **CALL).images
            assert psnr(expected, images) >= 100
        plain = pipe("apple", seed=1, control_image={"canny": photo(24, 32)}, **CALL).images
        assert psnr(expected, plain) < 80


def test_inpainting_with_masked_pixels_is_that_of_diffusers(tiny_checkpoint: Path, bundle: Path) -> None:
    condition = make_inpaint_condition(photo(24, 32), mask())
    how = {"image": photo(24, 32), "mask_image": mask(), "strength": 1.0, "controlnet_conditioning_scale": 1.0}
    expected = reference(tiny_checkpoint, bundle, "Inpaint", control_image=condition, **how)
    with sdopt.load(bundle) as pipe:
        made = {"canny": sdopt.control.inpaint(photo(24, 32), mask())}
        assert psnr(expected, pipe("apple", seed=1, control_image=made, **how, **CALL).images) >= FLOOR_DB


def test_masked_pixels_are_cropped_with_the_picture(bundle: Path) -> None:
    how: dict[str, Any] = {"image": photo(24, 32), "mask_image": mask(), "padding_mask_crop": 2, "seed": 1}
    made = sdopt.control.inpaint(photo(24, 32), mask())
    with sdopt.load(bundle) as pipe:
        plan = pipe.plan("apple", **how, height=24, width=32, control_image={"canny": made})
        (seen,) = plan.controls[0].picture
        assert np.array_equal(seen == -1, np.broadcast_to(plan.mask[0] > 0, seen.shape))
        kept = seen != -1
        assert np.allclose(seen[kept], (plan.image[0][kept] + 1) / 2, atol=1e-6)
        with pytest.raises(UsageError, match="an array with masked pixels is not cropped"):
            pipe.plan("apple", **how, control_image={"canny": np.asarray(made)})


def test_each_image_has_its_own_record_and_grey_adapters_have_no_masked_pixels(bundle: Path) -> None:
    made = sdopt.control.tile(photo(24, 32), 64)
    with sdopt.load(bundle) as pipe:
        plan = pipe.plan(["apple", "a"], control_image={"canny": [made, edges()], "sketch": made}, height=24, width=32)
        first, second = ([entry.get("prepared") for entry in plan.parameters(i)["controls"]] for i in (0, 1))
        assert (first, second) == ([[made.record], [made.record]], [None, [made.record]])
        assert np.array_equal(plan.features[0].picture, _grey(pipe, made.picture))
        with pytest.raises(UsageError, match="masked pixels for an adapter that sees shades of grey"):
            pipe.plan("apple", control_image={"sketch": sdopt.control.inpaint(photo(24, 32), mask())})
        with pytest.raises(UsageError, match="ip_adapter_image: got <class 'sdopt.image.control.Prepared'>"):
            pipe.plan("apple", ip_adapter_image=made)


def _grey(pipe: Any, picture: Any) -> Any:
    plan = pipe.plan(["apple", "a"], control_image={"sketch": picture}, height=24, width=32)
    return plan.features[0].picture


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photo(24, 32).save(tmp_path / "photo.png")
    photo(40, 40).save(tmp_path / "square.png")
    edges().save(tmp_path / "edges.png")
    mask().save(tmp_path / "mask.png")
    return tmp_path


def generate(bundle: Path, folder: Path, *words: str, out: str = "out.png") -> int:
    """The exit code of `sdopt generate` with the files of a folder."""
    files = [(word, *word.rpartition("=")) for word in words]
    own = [f"{name}{sign}{folder}/{file}" if ".png" in word else word for word, name, sign, file in files]
    how = [] if "--replay" in words else ["apple", "--steps", "3", "--seed", "1"]
    try:
        return main(["generate", "-m", str(bundle), "-o", str(folder / out), *own, *how])
    except SystemExit as ended:  # a mistake that the parser finds
        return int(str(ended.code))


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


SIZE = ("--size", "32x24")
WAYS: dict[str, tuple[Sequence[str], Any]] = {
    "edges": (
        ("--control", "canny=photo.png", "--canny", *SIZE),
        lambda: {"control_image": {"canny": sdopt.control.canny(photo(24, 32))}},
    ),
    "edges with thresholds": (
        ("--control", "canny=photo.png:0.5", "--canny-thresholds", "20", "60", *SIZE),
        lambda: {
            "control_image": {"canny": sdopt.control.canny(photo(24, 32), 20, 60)},
            "controlnet_conditioning_scale": 0.5,
        },
    ),
    "a tile": (
        ("--control", "canny=photo.png", "--tile", "--tile-resolution", "64"),
        lambda: {"control_image": {"canny": sdopt.control.tile(photo(24, 32), 64)}, "width": 64, "height": 64},
    ),
    "a tile of a size": (
        ("--control", "canny=photo.png", "--tile", "--size", "64x72"),
        lambda: {"control_image": {"canny": sdopt.control.tile(photo(24, 32), 64)}, "width": 64, "height": 72},
    ),
    "masked pixels": (
        ("--control", "canny=photo.png", "--inpaint", "--mask", "mask.png", *SIZE),
        lambda: {"control_image": {"canny": sdopt.control.inpaint(photo(24, 32), mask())}},
    ),
    "several": (
        (
            "--control", "other=edges.png:0.7", "--control", "canny=photo.png", "--canny", "--control",
            "sketch=square.png:0.4", "--tile", *SIZE,
        ),
        lambda: {
            "control_image": {
                "other": edges(), "canny": sdopt.control.canny(photo(24, 32)),
                "sketch": sdopt.control.tile(photo(40, 40), 64),
            },
            "controlnet_conditioning_scale": [0.7, 1.0],
            "adapter_conditioning_scale": 0.4,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WAYS)
def test_the_command_makes_the_picture_that_python_makes_and_again_from_its_file(
    case: str, bundle: Path, folder: Path
) -> None:
    pytest.importorskip("cv2")
    words, keywords = WAYS[case]
    assert generate(bundle, folder, *words) == 0
    with sdopt.load(bundle) as pipe:
        options = {"height": 24, "width": 32, **keywords()}
        (expected,) = pipe("apple", seed=1, num_inference_steps=3, **options).images
    assert np.array_equal(pixels(folder / "out.png"), np.asarray(expected))
    # the pictures alone, in another order, are enough to make it again
    controls = [word.partition(":")[0] for word in words if "=" in word][::-1]
    seen = [word for control in controls for word in ("--control", control)]
    given = [*seen, *(("--mask", "mask.png") if "--mask" in words else ())]
    assert generate(bundle, folder, "--replay", "out.png", *given, out="again.png") == 0
    assert np.array_equal(pixels(folder / "again.png"), np.asarray(expected))
    assert read_parameters(folder / "again.png") == read_parameters(folder / "out.png")


def test_a_mask_inpaints_and_is_seen(bundle: Path, folder: Path) -> None:
    words = ("--control", "canny=photo.png", "--inpaint", "--mask", "mask.png", "--image", "photo.png")
    assert generate(bundle, folder, *words) == 0
    with sdopt.load(bundle) as pipe:
        made = {"canny": sdopt.control.inpaint(photo(24, 32), mask())}
        how = {"image": photo(24, 32), "mask_image": mask(), "control_image": made}
        (expected,) = pipe("apple", seed=1, num_inference_steps=3, **how).images
    assert np.array_equal(pixels(folder / "out.png"), np.asarray(expected))


CANNY = ("--control", "canny=photo.png", "--canny")
WRONG: list[tuple[Sequence[str], str]] = [
    (("--canny", "--control", "canny=photo.png"), "argument --canny: it is about the --control bef"),
    ((*CANNY, "--tile"), "argument --tile: --control canny="),
    (("--control", "canny=photo.png", "--canny-thresholds", "9", "5"), "--canny-thresholds: low = 9 and high = 5; the"),
    (("--control", "canny=photo.png", "--canny-thresholds", "0", "2000"), "allowed are numbers from 0 to 1530"),
    (("--control", "canny=photo.png", "--canny-thresholds", "0", "nan"), "allowed are numbers from 0 to 1530"),
    (
        ("--control", "canny=photo.png", "--tile-resolution", "7"),
        "--tile-resolution: resolution = 7; allowed are whole",
    ),
    (("--control", "canny=photo.png", "--inpaint"), "--inpaint needs --mask MASK"),
    (("--control", "canny=square.png", "--inpaint", "--mask", "mask.png"), "mask is 32x24 pixels, its picture 40x40"),
    (("--control", "canny=photo.png", "--inpaint", "--mask", "mask.png", "--mask-blur", "2"), "alone; leave it out"),
    (("--control", "canny=photo.png:1", "--control-scale", "2"), "NAME=FILE:SCALE and --control-scale: give one"),
    (("--control", "sketch=photo.png:1", "--adapter-scale", "2"), "NAME=FILE:SCALE and --adapter-scale: give one"),
    (
        ("--control", "sketch=photo.png:101"),
        "--control sketch=...: the scale is 101; allowed are numbers from -100 to 100",
    ),
    (("--ip-adapter", "face=photo.png:101"), "--ip-adapter face=...: the scale is 101; allowed are numbers"),
    (("--control", "skech=photo.png:1"), "has no adapter 'skech'; there are sketch"),
    (("--control", "sketch=photo.png", "--control-scale", "1"), "--control-scale needs a ControlNet, and"),
    (("--control", "canny=photo.png", "--adapter-scale", "1"), "--adapter-scale needs a T2I-Adapter"),
]


@pytest.mark.parametrize(("words", "says"), WRONG, ids=lambda value: value[-28:] if isinstance(value, str) else "")
def test_what_is_wrong_on_the_command_line_is_said(
    words: Sequence[str], says: str, bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cv2")
    assert generate(bundle, folder, *words, *SIZE) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "out.png").exists()


def test_a_scale_of_a_kind_beside_the_flag_of_the_other_kind(bundle: Path, folder: Path) -> None:
    seen = ("--control", "sketch=edges.png:0.4", "--control", "canny=edges.png", *SIZE)
    assert generate(bundle, folder, *seen, "--control-scale", "0.6") == 0
    record = read_parameters(folder / "out.png")
    assert (record["adapter_conditioning_scale"], record["controlnet_conditioning_scale"]) == ([0.4], 0.6)


REPLAYED_WRONG: list[tuple[Sequence[str], str]] = [
    ((), "was made with ControlNets, whose pictures it does not carry; give the same: --control canny"),
    ((*CANNY,), "--replay takes everything from the PNG; leave out --canny"),
    (("--control", "canny=square.png"), "was made with another picture; the SHA-256 of its pixels begins with"),
    (("--control", "other=photo.png"), "give the same: --control canny=FILE"),
    (("--control", "canny=photo.png:0.5"), "--replay takes the scale from the PNG"),
    (("--control", "canny=photo.png", "--mask", "mask.png"), "leave out --mask"),
    (("--control", "canny=photo.png", "--control-scale", "1"), "leave out --control-scale"),
    (("--control", "canny=photo.png", "--ip-adapter", "photo.png"), "leave out --ip-adapter"),
]


@pytest.mark.parametrize(("words", "says"), REPLAYED_WRONG)
def test_a_picture_is_not_made_again_from_other_pictures(
    words: Sequence[str], says: str, bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cv2")
    assert generate(bundle, folder, *CANNY, *SIZE) == 0
    capsys.readouterr()
    assert generate(bundle, folder, "--replay", "out.png", *words, out="again.png") == 2
    assert says in capsys.readouterr().err
    assert not (folder / "again.png").exists()


def test_a_ready_picture_is_needed_again_too_and_another_net_is_noticed(
    bundle: Path, folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(bundle, folder, "--control", "canny=edges.png", *SIZE) == 0
    assert generate(bundle, folder, "--replay", "out.png", "--control", "canny=edges.png", out="again.png") == 0
    assert np.array_equal(pixels(folder / "again.png"), pixels(folder / "out.png"))
    assert generate(bundle, folder, "--replay", "out.png", "--control", "canny=photo.png", out="x.png") == 2
    assert "was made with another picture; give the same" in capsys.readouterr().err
    other = Path(shutil.copytree(bundle, folder / "bundle"))
    controlnet(tiny_checkpoint, 9).save_pretrained(folder / "net")
    add_adapter(folder / "net", other, "canny", force=True, report=lambda line: None)
    assert generate(other, folder, "--replay", "out.png", "--control", "canny=edges.png", out="x.png") == 2
    assert "was made with another adapter canny" in capsys.readouterr().err


@pytest.mark.parametrize(
    "controls",
    [
        {"name": "canny"},
        [{"name": "canny", "digest": "x", "picture": 3}],
        [{"name": "canny", "digest": "x", "picture": "y", "prepared": [{"by": "canny", "low": "1"}]}],
        [{"name": "canny", "digest": "x", "picture": "y", "prepared": [{"by": "eval"}]}],
        ["canny"],
    ],
)
def test_a_record_that_sdopt_did_not_write_is_refused(
    controls: Any, bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = PngInfo()
    info.add_text("sdopt", json.dumps({"prompt": "apple", "seed": 1, "controls": controls}))
    Image.new("RGB", (8, 8)).save(folder / "out.png", pnginfo=info)
    assert generate(bundle, folder, "--replay", "out.png", "--control", "canny=photo.png", out="again.png") == 2
    assert "are not those that sdopt wrote: controls is" in capsys.readouterr().err
