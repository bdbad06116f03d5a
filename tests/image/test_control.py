"""What a photo becomes for a ControlNet is what the examples of diffusers make of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sdopt
from sdopt.errors import BackendError, UsageError
from sdopt.image import control, masked, pil
from tests.conftest import ROOT


def photo(height: int = 37, width: int = 53) -> Image.Image:
    """Smooth shapes with a little noise."""
    y, x = np.mgrid[:height, :width]
    shapes = 127 + 90 * np.sign(np.sin(x / 6) * np.cos(y / 5))[..., None] * np.array([1, 0.6, -0.7])
    return Image.fromarray(
        np.clip(shapes + np.random.default_rng(5).normal(0, 4, shapes.shape), 0, 255).astype(np.uint8)
    )


def mask(height: int = 37, width: int = 53) -> Image.Image:
    shades = np.zeros((height, width), np.uint8)
    shades[9:25, 11:40] = 255
    shades[25:28, 11:40] = 127
    shades[28:31, 11:40] = 128
    return Image.fromarray(shades)


@pytest.mark.parametrize("thresholds", [(), (50, 120), (0, 0), (100.5, 1530)])
def test_edges_are_those_of_diffusers_examples(thresholds: tuple[float, ...]) -> None:
    cv2 = pytest.importorskip("cv2")
    picture = photo()
    edges = cv2.Canny(np.array(picture), *(thresholds or (100, 200)))
    expected = np.concatenate([edges[:, :, None]] * 3, axis=2)
    made = sdopt.control.canny(picture, *thresholds)
    assert np.array_equal(np.asarray(made), expected)
    assert made.picture.mode == "RGB"
    assert len(np.unique(expected)) == (2 if thresholds != (100.5, 1530) else 1)


def test_edges_are_of_the_colours_that_are_seen() -> None:
    pytest.importorskip("cv2")
    picture = photo()
    seen = np.asarray(control.canny(picture))
    again = (np.asarray(picture), np.asarray(picture, np.float32) / 255, picture.convert("RGBA"))
    for other in again:
        made = control.canny(other)
        assert np.array_equal(np.asarray(made), seen)
        assert made.record == control.canny(picture).record


def test_a_picture_without_edges_is_remarked(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("cv2")
    assert not np.asarray(control.canny(Image.new("RGB", (9, 7), "red"))).any()
    assert not np.asarray(control.canny(Image.new("RGB", (1, 1)))).any()


def resize_for_condition_image(image: Any, resolution: int) -> Any:
    """Of diffusers' documentation of ControlNet tile, as a reference."""
    image = image.convert("RGB")
    width, height = image.size
    k = float(resolution) / min(height, width)
    height, width = (round(side * k / 64.0) * 64 for side in (height, width))
    return image.resize((width, height), resample=Image.LANCZOS)


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (1, 1), (100, 300)])
@pytest.mark.parametrize("resolution", [64, 100, 1024])
def test_tiles_are_those_of_diffusers_examples(size: tuple[int, int], resolution: int) -> None:
    picture = photo(*size)
    expected = resize_for_condition_image(picture, resolution)
    made = sdopt.control.tile(picture, resolution)
    assert np.array_equal(np.asarray(made), np.asarray(expected))


def make_inpaint_condition(image: Any, image_mask: Any) -> Any:
    """Of diffusers' documentation of ControlNet for inpainting, as a reference."""
    pixels = np.array(image.convert("RGB")).astype(np.float32) / 255.0
    shades = np.array(image_mask.convert("L")).astype(np.float32) / 255.0
    pixels[shades > 0.5] = -1.0
    return torch.from_numpy(np.expand_dims(pixels, 0).transpose(0, 3, 1, 2))


def test_masked_pixels_are_those_of_diffusers_examples() -> None:
    expected = make_inpaint_condition(photo(), mask())[0].numpy()
    made = sdopt.control.inpaint(photo(), mask())
    assert expected.min() == -1
    assert np.asarray(made).dtype == np.float32
    assert np.array_equal(np.asarray(made), expected.transpose(1, 2, 0))
    assert np.array_equal(made.planes(37, 53), expected)


def test_the_photo_and_the_mask_are_resized_before_they_are_joined() -> None:
    made = sdopt.control.inpaint(photo(), mask()).planes(24, 32)
    resized = photo().resize((32, 24), Image.LANCZOS), mask().resize((32, 24), Image.LANCZOS)
    assert np.array_equal(made, make_inpaint_condition(*resized)[0].numpy())


@pytest.mark.parametrize("size", [(37, 53), (24, 32), (80, 111), (1, 2)])
def test_an_array_with_masked_pixels_is_resized_as_diffusers_resizes_a_tensor(size: tuple[int, int]) -> None:
    from diffusers.image_processor import VaeImageProcessor

    tensor = make_inpaint_condition(photo(), mask())
    processor = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=True, do_normalize=False)
    expected = processor.preprocess(tensor, height=size[0], width=size[1])[0].numpy()
    array = masked.read("control_image", tensor[0].permute(1, 2, 0).numpy())
    assert masked.is_masked(array)
    assert np.array_equal(masked.fitted(array, *size), expected)


UNIT = np.linspace(0, 1, 27, dtype=np.float32).reshape(3, 3, 3)


def changed(value: float, where: Any = (0, 0)) -> Any:
    array = UNIT.copy()
    array[where] = value
    return array


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (UNIT * 2 - 1, "an array from -1.0 to 1.0; allowed is 0..1"),
        (changed(-1, (0, 0, 0)), "an array from -1.0 to 1.0"),
        (changed(-0.5), "an array from -0.5 to 1.0"),
        (changed(np.nan), "an array from nan to nan"),
        (np.where(changed(-1) < 0, -1, 1).astype(np.float32), "an array of -1 and 1 alone"),
        (np.where(changed(-1) < 0, np.nan, changed(-1)).astype(np.float32), "an array from nan"),
    ],
)
def test_an_array_that_has_no_masked_pixels_is_refused_as_before(array: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        masked.read("control_image", array)


def test_arrays_without_masked_pixels_are_read_as_before() -> None:
    for array in (UNIT, UNIT[:, :, 0], (UNIT * 255).astype(np.uint8), np.ones_like(UNIT)):
        assert np.array_equal(masked.read("control_image", array), pil.read_picture("control_image", array))
        assert not masked.is_masked(array)
    assert masked.is_masked(masked.read("control_image", np.full((2, 2, 3), -1.0)))


WRONG: dict[str, Any] = {
    "low = 300 and high = 200; the low threshold is not above": lambda: control.canny(photo(), 300),
    "low = -1; allowed are numbers from 0 to 1530, e.g. low=100": lambda: control.canny(photo(), -1),
    "high = 1531; allowed are numbers": lambda: control.canny(photo(), 1, 1531),
    "high = nan; allowed": lambda: control.canny(photo(), 1, float("nan")),
    "low = '1'; allowed": lambda: control.canny(photo(), "1"),
    "low = True; allowed": lambda: control.canny(photo(), True),
    "low = None; allowed": lambda: control.canny(photo(), None),
    "low = int of about 400 digits; allowed": lambda: control.canny(photo(), 10**400),
    "picture: got <class 'str'>; allowed are PIL images": lambda: control.canny("photo.png"),
    "resolution = 63; allowed are whole numbers from 64 to 16384, e.g. resolution=1024": lambda: control.tile(
        photo(), 63
    ),
    "resolution = 64.0; allowed": lambda: control.tile(photo(), 64.0),
    "resolution = True; allowed": lambda: control.tile(photo(), True),
    "a picture of 900x1 pixels becomes 57600x64; allowed are 64,000,000 pixels": lambda: control.tile(
        Image.new("RGB", (900, 1)), 64
    ),
    "mask is 3x2 pixels, its picture 53x37; give a mask of the picture's size: mask.resize((53, 37))": lambda: (
        control.inpaint(photo(), mask(2, 3))
    ),
    "mask: a list": lambda: control.inpaint(photo(), [mask()]),
    "mask_image: got <class 'int'>": lambda: control.inpaint(photo(), 3),
    "nothing is left of its white at 4x4 pixels": lambda: control.inpaint(photo(), dot()).planes(4, 4),
}


def dot() -> Image.Image:
    dotted = Image.new("L", (53, 37))
    dotted.putpixel((20, 20), 255)
    return dotted


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said(message: str) -> None:
    with pytest.raises(UsageError) as caught:
        WRONG[message]()
    assert message in str(caught.value)


def test_without_opencv_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BackendError, match=r'edges by Canny need OpenCV: pip install "sdopt\[control\]"'):
        control.canny(photo())


def test_opencv_is_imported_only_for_edges() -> None:
    code = (
        "import sys, numpy, sdopt; from PIL import Image; p = Image.new('RGB', (64, 64));"
        "sdopt.control.tile(p, 64); sdopt.control.inpaint(p, p); assert 'cv2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_record_is_known_by_its_names() -> None:
    made = [control.tile(photo(), 64), control.inpaint(photo(), mask())]
    for one in made:
        assert control.is_record(dict(one.record))
        assert not control.is_record({**one.record, "more": 1})
        assert not control.is_record({name: one.record[name] for name in list(one.record)[:-1]})
    for record in (None, [], {}, {"by": "x"}, {"by": []}, {"by": "tile", "resolution": "64", "given": ""}):
        assert not control.is_record(record)
    assert len({one.record["given"] for one in made}) == 1
