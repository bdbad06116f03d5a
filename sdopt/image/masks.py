"""Tools for masks, as in diffusers' inpainting pipelines: blur, paint a region at full size, and paste it back.

mask_blur           the mask is blurred by a Gaussian of that radius, in its own pixels
padding_mask_crop   only a region around the mask is painted, and then pasted into the original picture, which keeps
                    its size. The region is wider than the mask by this many pixels on each side, and has the
                    proportions of the picture that is made.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from PIL import Image, ImageFilter

from sdopt.bundle.specs import Array, Float32
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError
from sdopt.image import pil as images

Box = tuple[int, int, int, int]  # left, top, right, bottom
NAME = "mask_image"
WHITE = 128  # of 255: what is lighter is painted
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
        base.paste(covering(painted, right - left, bottom - top), (left, top))
        kept = Image.new("RGBa", self.image.size)
        kept.paste(self.image.convert("RGBA").convert("RGBa"), mask=self.mask.point(lambda value: 255 - value))
        result = base.convert("RGB").convert("RGBA")
        result.alpha_composite(kept.convert("RGBA"))
        return result.convert("RGB")


def read(given: Any) -> Any:
    """The masks that a caller gave, one or a list of them, in shades of grey: PIL images of mode L.

    A mask whose values are 0 and 1, in any mode or dtype, gets white for 1.
    Raises: UsageError for what is no picture, and for transparency that contradicts the colours.
    """
    return images.read_pictures(NAME, given, read=_read)


def _read(name: str, given: Any) -> Image.Image:
    """One mask in shades of grey."""
    if isinstance(given, Image.Image) and given.mode.startswith("I;16"):
        given = _labels_of_16_bits(given)
    mask = images.read_picture(name, given)
    if not isinstance(mask, Image.Image):
        mask = _array_to_pil(mask)
    grey = images.converted(name, mask, "L")
    if cast(tuple[int, int], grey.getextrema())[1] == 1:
        grey = grey.point(lambda shade: 255 * shade)
    alpha = _alpha(mask)
    if alpha is not None:
        _refuse_contradiction(np.asarray(grey), np.asarray(alpha))
    return grey


def _labels_of_16_bits(mask: Image.Image) -> Image.Image:
    """A mask of 0 and 1 in 8 bits, before its shades are divided; another one as it is."""
    values = np.asarray(mask)
    return Image.fromarray(values.astype(np.uint8)) if values.size and values.max() <= 1 else mask


def _array_to_pil(mask: Array) -> Image.Image:
    """An array as a picture of bytes; those of 0 and 1 remain 0 and 1 in uint8."""
    if mask.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(mask))
    return Image.fromarray(np.round(images.unit_shades(NAME, mask) * 255).astype(np.uint8))


def _alpha(mask: Image.Image) -> Image.Image | None:
    """The opacity of a picture's pixels; None if it has none."""
    if not mask.has_transparency_data:
        return None
    return images.converted(NAME, mask, "RGBA").getchannel("A")


def _refuse_contradiction(grey: Array, alpha: Array) -> None:
    """Raises: UsageError where pixels are white and cannot be seen, or where the opacity alone varies."""
    is_hidden = (grey >= WHITE) & (alpha < WHITE)
    if is_hidden.any() or (alpha.min() < alpha.max() and grey.min() == grey.max()):
        raise UsageError(
            "mask_image: its colours and its transparency say different things; give the one that counts: "
            'mask_image.convert("RGB"), or mask_image.getchannel("A")',
            NAME,
        )


def refuse_vanished(given: Any, masks: Float32, cell: int) -> None:
    """Raises: UsageError for a mask that is not black, and of which nothing is painted.

    `masks` [count, 1, height, width] are made of those that were given. A latent takes the first pixel of its cell.
    """
    for one, mask in zip(images.each(NAME, given, len(masks)), masks, strict=True):
        lightest = cast(tuple[int, int], one.getextrema())[1]
        if not lightest or mask[:, ::cell, ::cell].any():
            continue
        if lightest < WHITE:
            raise UsageError(
                f"mask_image: its lightest shade is {lightest} of 255, and painted is what has {WHITE} or more; make "
                "it white: mask_image.point(lambda shade: 255 * (shade > 0))",
                NAME,
            )
        height, width = mask.shape[1:]
        raise UsageError(
            f"mask_image: nothing is left of its white at {width}x{height} pixels, where {cell}x{cell} pixels are "
            "painted or kept together; make the white larger, or the picture, or leave out mask_blur",
            NAME,
        )


def prepare(
    image: Any, mask: Any, height: int, width: int, count: int, blur: float, padding: int | None
) -> tuple[Float32, Float32, tuple[Overlay, ...]]:
    """Pictures [count, 3, height, width] in -1..1, masks [count, 1, height, width], and where the results belong.

    Raises: UsageError for a mask that is not of its picture's size, or has no white in it to crop to.
    """
    pictures, masks = images.each("image", image, count), images.each(NAME, mask, count)
    for picture, mask_of_picture in zip(pictures, masks, strict=True):
        _check_same_size(picture, mask_of_picture)
    if blur:
        masks = [each.filter(ImageFilter.GaussianBlur(blur)) for each in masks]
    overlays: tuple[Overlay, ...] = ()
    if padding is not None:
        overlays = tuple(
            _overlay(images.as_pil(p), m, height, width, padding) for p, m in zip(pictures, masks, strict=True)
        )
        pictures = [filled(overlay.image.crop(overlay.box), width, height) for overlay in overlays]
        masks = [filled(overlay.mask.crop(overlay.box), width, height) for overlay in overlays]
    return images.to_array(pictures, height, width, count), images.to_mask(masks, height, width, count), overlays


def same_region(name: str, picture: Any, overlay: Overlay, height: int, width: int) -> Image.Image:
    """What another picture of the same size has in the region of an overlay, at height x width; as diffusers crops it.

    Raises: UsageError for a picture of another size. `name`: its keyword.
    """
    h, w = images.size_of(picture, name)
    if (w, h) != overlay.image.size:
        raise UsageError(
            f"{name} is {w}x{h} pixels, image {overlay.image.width}x{overlay.image.height}; with padding_mask_crop "
            "both are cropped: give pictures of one size",
            name,
        )
    return filled(images.as_pil(picture).crop(overlay.box), width, height)


def _check_same_size(image: Any, mask: Image.Image) -> None:
    h, w = images.size_of(image)
    if (w, h) != mask.size:
        raise UsageError(
            f"mask_image is {mask.width}x{mask.height} pixels, its image {w}x{h}; give a mask of the image's size: "
            f"mask.resize(({w}, {h}))",
            NAME,
        )


def _overlay(image: Image.Image, mask: Image.Image, height: int, width: int, padding: int) -> Overlay:
    if mask.getbbox() is None:
        raise UsageError("padding_mask_crop: the mask is black everywhere, so there is no region to paint", NAME)
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


def filled(image: Image.Image, width: int, height: int) -> Image.Image:
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


def covering(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the picture, resized to cover width x height."""
    wide = width / height > image.width / image.height
    w = width if wide else image.width * height // image.height
    h = image.height * width // image.width if wide else height
    covering = Image.new("RGB", (width, height))
    covering.paste(image.resize((w, h), LANCZOS), (width // 2 - w // 2, height // 2 - h // 2))
    return covering


# radius of a blur in pixels -> how often it is laid over the others, the widest first
BLURS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


def filled_from_around(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with the colours around the mask under it: blurred copies of what is kept, the narrowest on top.

    Ref: AUTOMATIC1111/stable-diffusion-webui, modules/masking.py, fill: "masked content: fill", its radii and counts.
    """
    kept = Image.new("RGBa", image.size)
    kept.paste(image.convert("RGB").convert("RGBA").convert("RGBa"), mask=mask.point(lambda shade: 255 - shade))
    result = Image.new("RGBA", image.size)
    for radius, times in BLURS:
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(blurred)
    return result.convert("RGB")
