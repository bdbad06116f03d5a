"""Masks are blurred, regions are cut out and put back exactly as diffusers does it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sdopt
from sdopt.errors import UsageError
from sdopt.image import masks
from tests.conftest import EMOJI_CHECKPOINT
from tests.conftest import sdopt as command
from tests.denoise.test_start import generators, picture, theirs
from tests.test_pipeline import picture_psnr

FLOOR_DB = 55.0


@pytest.fixture(scope="module")
def emoji() -> Iterator[sdopt.Pipeline]:
    with sdopt.load() as pipe:
        yield pipe


@pytest.fixture(scope="module")
def inpaint() -> Any:
    return theirs("Inpaint", EMOJI_CHECKPOINT)


def photo(width: int, height: int, seed: int = 3) -> Image.Image:
    return picture(max(width, height), seed).resize((width, height))


def spot(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize(
    ("size", "box", "padding", "blur", "made"),
    [
        ((300, 200), (120, 60, 190, 140), 16, 0, (128, 128)),
        ((300, 200), (120, 60, 190, 140), 16, 6, (128, 128)),
        ((300, 200), (250, 10, 290, 180), 32, 0, (128, 128)),  # at the edge, taller than there is room for
        ((90, 300), (10, 20, 80, 280), 8, 3, (128, 128)),  # the region cannot have the picture's shape: bars
        ((300, 90), (20, 10, 280, 80), 8, 0, (128, 128)),
        ((260, 200), (100, 60, 190, 140), 0, 0, (96, 160)),  # another shape than the bundle's own
    ],
    ids=str,
)
def test_a_region_is_painted_large_and_laid_back_as_in_diffusers(
    size: tuple, box: tuple, padding: int, blur: int, made: tuple, inpaint: Any, emoji: sdopt.Pipeline
) -> None:
    image, mask = photo(*size), spot(*size, box)
    options = {"num_inference_steps": 3, "strength": 0.9, "padding_mask_crop": padding}
    options |= {"height": made[0], "width": made[1], "guidance_scale": 2.0, "image": image}
    blurred = inpaint.mask_processor.blur(mask, blur) if blur else mask
    expected = inpaint("a cat", mask_image=blurred, generator=generators(5), **options).images[0]
    found = emoji("a cat", mask_image=mask, mask_blur=blur, seed=5, **options).images[0]
    assert found.size == image.size
    shades = [np.asarray(one, np.float32) / 255 for one in (expected, found, image)]
    assert picture_psnr(shades[0], shades[1]) >= FLOOR_DB
    assert picture_psnr(shades[2], shades[1]) < 30  # something was painted
    untouched = np.asarray(mask.filter(masks.ImageFilter.GaussianBlur(blur)) if blur else mask) == 0
    np.testing.assert_array_equal(np.asarray(found)[untouched], np.asarray(image)[untouched])


def test_a_blurred_mask_is_that_of_diffusers(inpaint: Any, emoji: sdopt.Pipeline) -> None:
    image, mask = photo(128, 128), spot(128, 128, (30, 50, 60, 128))
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np", "image": image}
    options |= {"height": 128, "width": 128}
    blurred = inpaint.mask_processor.blur(mask, 9)
    expected = inpaint("a cat", mask_image=blurred, generator=generators(5), strength=1.0, **options).images
    found = emoji("a cat", mask_image=mask, mask_blur=9, seed=5, **options).images
    assert picture_psnr(expected, found) >= FLOOR_DB
    given_as_array = emoji("a cat", mask_image=np.asarray(mask), mask_blur=9, seed=5, **options).images
    np.testing.assert_array_equal(given_as_array, found)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_region_is_the_one_that_diffusers_finds(data: st.DataObject) -> None:
    from diffusers.image_processor import VaeImageProcessor

    width, height = data.draw(st.tuples(*[st.integers(4, 60)] * 2))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height)))
    padding, (w, h) = data.draw(st.integers(0, 20)), data.draw(st.tuples(*[st.integers(8, 64)] * 2))
    mask = spot(width, height, box)
    expected = VaeImageProcessor.get_crop_region(mask, w, h, pad=padding)
    assert masks.crop_region(mask, w, h, padding) == expected
    processor = VaeImageProcessor()
    part = photo(width, height).crop(expected)
    thin = min(w * part.height // part.width, h * part.width // part.height) < 1  # a side would have no pixel
    for ours, mode in ((masks.filled, "fill"), (masks.covering, "crop")):
        found = ours(part, w, h)
        assert found.size == (w, h)
        if not (thin and mode == "fill"):
            wanted = processor.resize(part, height=h, width=w, resize_mode=mode)
            np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_a_region_of_one_line_is_filled_with_it() -> None:
    line = photo(4, 33)
    assert np.asarray(masks.filled(line, 8, 8)).shape == (8, 8, 3)


def test_each_picture_of_a_batch_has_its_own_region(emoji: sdopt.Pipeline) -> None:
    pictures, spots = [photo(200, 150, 1), photo(180, 220, 2)], [
        spot(200, 150, (20, 20, 70, 70)),
        spot(180, 220, (90, 100, 170, 200)),
    ]  # fmt: skip
    options = {"num_inference_steps": 2, "padding_mask_crop": 10}
    found = emoji(["a cat", "a dog"], image=pictures, mask_image=spots, seed=[5, 9], **options).images
    assert [one.size for one in found] == [(200, 150), (180, 220)]
    alone = emoji("a dog", image=pictures[1], mask_image=spots[1], seed=9, **options).images[0]
    assert np.abs(np.asarray(alone, np.int16) - np.asarray(found[1], np.int16)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_image": spot(40, 30, (0, 0, 9, 9))}, "mask_image is 40x30 pixels, its image 64x48; give a mask of"),
        ({"mask_image": np.zeros((48, 60), np.float32)}, r"mask_image is 60x48 pixels, .* mask.resize\(\(64, 48\)\)"),
        ({"mask_image": "mask.png"}, "mask_image: got <class 'str'>"),
        ({"mask_blur": 3}, "mask_blur needs a mask"),
        ({"padding_mask_crop": 3}, "padding_mask_crop needs a mask"),
        ({"mask_image": spot(64, 48, (0, 0, 9, 9)), "mask_blur": -1}, "mask_blur = -1; allowed are 0 to 1000"),
        ({"mask_image": spot(64, 48, (0, 0, 9, 9)), "padding_mask_crop": -1}, "padding_mask_crop = -1; allowed"),
        ({"mask_image": Image.new("L", (64, 48)), "padding_mask_crop": 3}, "the mask is black everywhere"),
        ({"mask_image": spot(64, 48, (0, 0, 9, 9)), "padding_mask_crop": 3, "output_type": "np"}, "'pil'"),
        ({"strength": 0.0}, "strength 0.0 of 20 steps leaves nothing to do: .* Use strength 0.05 or more"),
        (
            {"strength": 0.1, "num_inference_steps": 8},
            "strength 0.1 of 8 steps leaves nothing to do: .* Use strength 0.125 or",
        ),
        ({"strength": 1.5}, "strength = 1.5; allowed are numbers from 0 to 1"),
        ({"height": 100}, "height = 100; this model makes multiples of 8 pixels: 96 or 104"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_does_not_fit_together_is_refused(options: dict, message: str, emoji: sdopt.Pipeline) -> None:
    with pytest.raises(UsageError, match=message):
        emoji("a cat", image=photo(64, 48), **options)


def test_the_command_paints_a_region(tmp_path: Path) -> None:
    photo(150, 100).save(tmp_path / "in.png")
    spot(150, 100, (40, 20, 90, 70)).save(tmp_path / "mask.png")
    done = command(
        "generate", "a cat", "--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png", "--mask-blur", 4,
        "--padding-mask-crop", 16, "--steps", 2, "-o", tmp_path / "out.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == (150, 100)
    done = command(
        "generate", "a", "--image", tmp_path / "in.png", "--mask", tmp_path / "out.png", "--strength", 0, "-o", "a.png"
    )
    assert done.returncode == 2
    assert "leaves nothing to do" in done.stderr
