"""Pictures and masks of every mode, dtype, range and layout are scaled rightly, or refused in words."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.errors import UsageError
from sdopt.image import masks, pil
from sdopt.request.plan import Plan, make_plan
from tests.denoise.test_start import picture

EDGE = 64
PHOTO = picture(EDGE)
PIXELS = np.asarray(PHOTO)
LABELS = np.zeros((EDGE, EDGE), np.uint8)
LABELS[16:40, 8:48] = 1
PAINTED = LABELS.astype(np.float32)
HALF_SEEN = np.full((EDGE, EDGE, 4), 255, np.uint8)
HALF_SEEN[: EDGE // 2, :, 3] = 0


@pytest.fixture(scope="module")
def bundle() -> sdopt.Bundle:
    with sdopt.load() as pipe:
        return pipe.bundle


def plan_of(bundle: sdopt.Bundle, **options: Any) -> Plan:
    return make_plan(bundle, "a cat", options)  # pyright: ignore


def refused(bundle: sdopt.Bundle, message: str, param: str, **options: Any) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        plan_of(bundle, **options)
    assert caught.value.param == param


def premultiplied(mode: str) -> Image.Image:
    return PHOTO.convert(mode.upper()).convert(mode)


@pytest.mark.parametrize(
    "image",
    [
        PIXELS / 255,
        (PIXELS / 255).astype(">f4"),
        np.ascontiguousarray((PIXELS / 255)[::-1])[::-1],
        np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape),
        (PIXELS / 255)[None],
        np.dstack([PIXELS, np.zeros((EDGE, EDGE, 1), np.uint8)]),
        PHOTO.convert("RGBX"),
        premultiplied("RGBa"),
    ],
    ids=["float64", "big-endian", "negative strides", "read-only", "batch of one", "RGBA array", "RGBX", "RGBa"],
)
def test_a_picture_is_the_same_in_every_layout(image: Any, bundle: sdopt.Bundle) -> None:
    expected = plan_of(bundle, image=PHOTO).image
    assert expected is not None
    np.testing.assert_allclose(plan_of(bundle, image=image).image, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "CMYK", "YCbCr", "HSV", "I;16", "I;16B", "I;16L"])
def test_every_mode_of_a_known_range_keeps_its_shades(mode: str, bundle: sdopt.Bundle) -> None:
    ramp = np.tile(np.arange(EDGE, dtype=np.uint8) * 4, (EDGE, 1))
    grey = Image.fromarray(ramp)
    if mode.startswith("I;16"):
        values = ramp.astype(">u2" if mode == "I;16B" else "<u2") * 257
        image = Image.frombytes(mode, (EDGE, EDGE), values.tobytes())
    elif mode == "La":
        image = grey.convert("LA").convert("La")
    else:
        image = grey.convert(mode) if mode in ("1", "P", "LA") else grey.convert("RGB").convert(mode)
    found = plan_of(bundle, image=image).image
    assert found is not None
    spread = 1.0 if mode == "1" else 0.02  # black and white are dithered
    assert abs(found.mean() - (ramp / 127.5 - 1).mean()) < 0.02
    assert np.abs(found[0, 1] - (ramp / 127.5 - 1)).max() < 2 * spread


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.float32), r"from \d.0 to 255.0; .* if 255 is white, image.astype\(np.uint8\)"),
        (PIXELS.astype(int), r"from \d to 255; .* if 255 is white, image.astype\(np.uint8\)"),
        (PIXELS.astype(np.uint16) * 257, "allowed is 0..1, or uint8$"),
        (PIXELS / 127.5 - 1, r"if -1 is black and 1 is white, \(image \+ 1\) / 2"),
        (np.moveaxis(PIXELS, 2, 0), r"got uint8 \(3, 64, 64\); allowed are \[height, width, 3\]"),
        (np.moveaxis(PIXELS, 2, 0)[None], r"uint8 \(1, 3, 64, 64\); allowed are"),
        (PIXELS[:, :, :2], r"uint8 \(64, 64, 2\)"),
        (PIXELS[:0], r"uint8 \(0, 64, 3\)"),
        (PIXELS[:4], "image is 64x4 pixels; allowed are 8 to 16384 a side: give height= and width="),
        (np.zeros((8, 20_000, 3), np.uint8), "image is 20000x8 pixels; allowed are 8 to 16384 a side"),
        (PIXELS.astype(object), "got object"),
    ],
    ids=lambda v: v[:20] if isinstance(v, str) else "",
)
def test_an_array_of_another_range_or_layout_is_refused(image: Any, message: str, bundle: sdopt.Bundle) -> None:
    refused(bundle, message, "image", image=image)


def test_a_small_preview_in_bytes_is_a_picture_and_not_latents(bundle: sdopt.Bundle) -> None:
    small = np.asarray(picture(16))
    expected = plan_of(bundle, image=Image.fromarray(small), height=64, width=64).image
    assert expected is not None
    np.testing.assert_array_equal(plan_of(bundle, image=small[None], height=64, width=64).image, expected)


@pytest.mark.parametrize(
    "mask",
    [
        LABELS, LABELS * 255, LABELS.astype(bool), LABELS.astype(np.int64), LABELS.astype(np.uint16), PAINTED,
        PAINTED[:, :, None], np.dstack([LABELS] * 3), np.dstack([LABELS * 255] * 3 + [LABELS * 0 + 255]),
        LABELS[:, ::-1][:, ::-1], LABELS[None, :, :, None], Image.fromarray(LABELS), Image.fromarray(LABELS * 255),
        Image.fromarray(LABELS.astype(np.uint16)), Image.fromarray(LABELS.astype(np.uint16) * 65535),
        Image.fromarray(np.dstack([LABELS] * 3)), Image.fromarray(LABELS.astype(bool)),
        Image.fromarray(LABELS * 255).convert("RGBA"), Image.fromarray(LABELS * 255).convert("P"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("more", [{}, {"mask_blur": 0.5}, {"height": 128, "width": 128}], ids=str)
def test_a_mask_of_zeros_and_ones_or_of_black_and_white_is_the_same_mask(
    more: Any, mask: Any, bundle: sdopt.Bundle
) -> None:
    expected = plan_of(bundle, image=PHOTO, mask_image=Image.fromarray(LABELS * 255), **more).mask
    found = plan_of(bundle, image=PHOTO, mask_image=mask, **more).mask
    assert expected is not None
    assert 0.1 < expected.mean() < 0.5
    np.testing.assert_array_equal(found, expected)


def test_a_mask_in_colours_is_the_same_as_an_array_and_as_a_picture() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    expected = np.asarray(Image.fromarray(colours).convert("L")) >= 128
    for mask in (colours, colours / 255, Image.fromarray(colours)):
        np.testing.assert_array_equal(pil.to_mask(masks.read(mask), EDGE, EDGE, 1)[0, 0], expected)


@pytest.mark.parametrize(
    "mask",
    [HALF_SEEN, Image.fromarray(HALF_SEEN), Image.fromarray(HALF_SEEN * np.array([0, 0, 0, 1], np.uint8))],
    ids=["white that cannot be seen, array", "white that cannot be seen", "black, and only the opacity varies"],
)
def test_a_mask_whose_transparency_contradicts_its_colours_is_refused(mask: Any, bundle: sdopt.Bundle) -> None:
    refused(bundle, r'mask_image.getchannel\("A"\)', "mask_image", image=PHOTO, mask_image=mask)


def test_a_mask_on_a_transparent_ground_is_read_by_its_colours() -> None:
    ground = np.zeros((EDGE, EDGE, 4), np.uint8)
    ground[LABELS == 1] = 255
    np.testing.assert_array_equal(pil.to_mask(masks.read(Image.fromarray(ground)), EDGE, EDGE, 1)[0, 0], PAINTED)


def test_a_mask_of_which_nothing_would_be_painted_is_refused(bundle: sdopt.Bundle) -> None:
    dark = Image.fromarray(LABELS * 38)  # the red of a palette
    refused(bundle, "lightest shade is 38 of 255, and painted is", "mask_image", image=PHOTO, mask_image=dark)
    dot = LABELS * 0
    dot[3, 3] = 255
    given = {"image": PHOTO, "height": EDGE, "width": EDGE}
    refused(bundle, "nothing is left of its white at 64x64", "mask_image", mask_image=dot, **given)
    line = LABELS * 0
    line[:, 16] = 255
    given["mask_image"] = line
    assert plan_of(bundle, **given).mask is not None
    refused(bundle, "nothing is left of its white", "mask_image", **given, mask_blur=9)
    black = plan_of(bundle, image=PHOTO, mask_image=LABELS * 0).mask
    assert black is not None
    assert not black.any()


def test_a_picture_has_so_many_pixels_at_most(bundle: sdopt.Bundle) -> None:
    refused(bundle, "height = 16384 and width = 8192: 134,217,728 pixels; allowed are 64,000,000", "height",
            height=16384, width=8192)  # fmt: skip
    refused(bundle, "width = 100000; allowed are whole numbers from 1 to 16384", "width", height=8, width=100_000)
    assert plan_of(bundle, height=8, width=16384).width == 16384


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


LONG = zlib.compress(b"a" * (2 << 20))


@pytest.mark.parametrize("place", [b"IDAT", b"IEND"], ids=["before the pixels", "behind the pixels"])
@pytest.mark.parametrize(
    "texts",
    [
        chunk(b"zTXt", b"workflow\0\0" + LONG),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
        chunk(b"iCCP", b"profile\0\0" + LONG),
        chunk(b"tEXt", b"workflow\0" + b"a" * (1 << 20)) * 65,
    ],
    ids=["zTXt", "iTXt", "iCCP", "64 MiB of tEXt"],
)
def test_long_texts_in_a_png_are_no_error(texts: bytes, place: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    pil.save_png(PHOTO, file, {"prompt": "a cat", **A1111})
    content = file.read_bytes()
    at = content.index(place) - 4
    file.write_bytes(content[:at] + texts + content[at:])
    np.testing.assert_array_equal(np.asarray(pil.open_image(file)), PIXELS)
    assert pil.read_parameters(file)["prompt"] == "a cat"


A1111 = {
    "num_inference_steps": 1, "sampled_by": "Euler", "guidance_scale": 1.0, "seed": 1, "width": 64, "height": 64,
    "model": "m", "rng": "cpu", "version": "1",
}  # fmt: skip
