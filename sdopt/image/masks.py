"""Tools for masks, as in diffusers' inpainting pipelines: blur, paint a region at full size, and paste it back.

mask_blur           the mask is blurred by a Gaussian of that radius, in its own pixels
padding_mask_crop   only a region around the mask is painted, and then pasted into the original picture, which keeps
                    its size. The region is wider than the mask by this many pixels on each side, and has the
                    proportions of the picture that is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from sdopt.bundle.specs import Float32
from sdopt.errors import UsageError
from sdopt.image import pil as images

Box = tuple[int, int, int, int]  # left, top, right, bottom
LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Overlay:
    """Where a painted picture belongs: in the region `box` of `image`, where `mask` is white."""

    image: Image.Image
    mask: Image.Image
    box: Box

    def over(self, painted: Image.Image) -> Image.Image:
        """The original picture with the painted one where the mask is white."""
        left, top, right, bottom = self.box
        base = Image.new("RGBA", self.image.size)
        base.paste(_cropped(painted, right - left, bottom - top), (left, top))
        kept = Image.new("RGBa", self.image.size)
        kept.paste(self.image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(self.mask))
        result = base.convert("RGB").convert("RGBA")
        result.alpha_composite(kept.convert("RGBA"))
        return result.convert("RGB")


def prepare(
    image: Any, mask: Any, height: int, width: int, count: int, blur: float, padding: int | None
) -> tuple[Float32, Float32, tuple[Overlay, ...]]:
    """Pictures [count, 3, height, width] in -1..1, masks [count, 1, height, width], and where the results belong.

    Raises: UsageError for a mask that is not of its picture's size, or has no white in it to crop to.
    """
    pictures, masks = images.each("image", image, count), images.each("mask_image", mask, count)
    for picture, mask_of_picture in zip(pictures, masks, strict=True):
        _check_same_size(picture, mask_of_picture)
    if blur:
        masks = [images.as_pil(each, "L").filter(ImageFilter.GaussianBlur(blur)) for each in masks]
    overlays: tuple[Overlay, ...] = ()
    if padding is not None:
        overlays = tuple(
            _overlay(images.as_pil(p, "RGB"), images.as_pil(m, "L"), height, width, padding)
            for p, m in zip(pictures, masks, strict=True)
        )
        pictures = [_filled(overlay.image.crop(overlay.box), width, height) for overlay in overlays]
        masks = [_filled(overlay.mask.crop(overlay.box), width, height) for overlay in overlays]
    return images.to_array(pictures, height, width, count), images.to_mask(masks, height, width, count), overlays


def _check_same_size(image: Any, mask: Any) -> None:
    h, w = images.size_of(image)
    mask_h, mask_w = images.size_of(mask, "mask_image")
    if (h, w) != (mask_h, mask_w):
        raise UsageError(
            f"mask_image is {mask_w}x{mask_h} pixels, its image {w}x{h}; give a mask of the image's size: "
            f"mask.resize(({w}, {h}))"
        )


def _overlay(image: Image.Image, mask: Image.Image, height: int, width: int, padding: int) -> Overlay:
    if mask.getbbox() is None:
        raise UsageError("padding_mask_crop: the mask is black everywhere, so there is no region to paint")
    return Overlay(image, mask, crop_region(mask, width, height, padding))


def crop_region(mask: Image.Image, width: int, height: int, padding: int) -> Box:
    """The box around everything that is not black, `padding` pixels larger on each side.

    It is then widened to the proportions of width and height, as far as the picture has room.
    """
    pixels = np.asarray(mask)
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    left = max(int(columns[0]) - padding, 0)
    right = min(int(columns[-1]) + 1 + padding, mask.width)
    top = max(int(rows[0]) - padding, 0)
    bottom = min(int(rows[-1]) + 1 + padding, mask.height)
    if (right - left) / (bottom - top) > width / height:
        top, bottom = _widened(top, bottom, (right - left) / (width / height), mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * (width / height), mask.width)
    return left, top, right, bottom


def _widened(low: int, high: int, wanted: float, limit: int) -> tuple[int, int]:
    """The span, lengthened on both sides to `wanted`, moved back inside 0..limit, and cut if it is still too long."""
    more = int(wanted - (high - low))
    low, high = low - more // 2, high + more - more // 2
    if high >= limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


def _filled(image: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture in the middle of width x height; the bars beside it repeat its edge.

    A picture that is too thin keeps one pixel; diffusers refuses it.
    """
    wide = width / height < image.width / image.height  # bars above and below
    w = width if wide else max(1, image.width * height // image.height)
    h = max(1, image.height * width // image.width) if wide else height
    resized = image.resize((w, h), LANCZOS)
    filled = Image.new(image.mode, (width, height))
    x, y = width // 2 - w // 2, height // 2 - h // 2
    filled.paste(resized, (x, y))
    if wide and y > 0:
        filled.paste(resized.resize((width, y), box=(0, 0, width, 0)), (0, 0))
        filled.paste(resized.resize((width, y), box=(0, h, width, h)), (0, y + h))
    elif not wide and x > 0:
        filled.paste(resized.resize((x, height), box=(0, 0, 0, height)), (0, 0))
        filled.paste(resized.resize((x, height), box=(w, 0, w, height)), (x + w, 0))
    return filled


def _cropped(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the picture, resized to cover width x height."""
    wide = width / height > image.width / image.height
    w = width if wide else image.width * height // image.height
    h = image.height * width // image.width if wide else height
    covering = Image.new("RGB", (width, height))
    covering.paste(image.resize((w, h), LANCZOS), (width // 2 - w // 2, height // 2 - h // 2))
    return covering
