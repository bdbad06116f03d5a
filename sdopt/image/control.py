"""A photo becomes what a ControlNet sees: edges, tiles, or a picture with masked pixels. As `sdopt.control` in Python.

    canny     the edges of the picture, white on black                          ControlNets called canny
    tile      the picture at another size                                       tile
    inpaint   the picture, with masked pixels where it is painted               inpaint

Ref: diffusers, documentation of ControlNet; github.com/lllyasviel/ControlNet-v1-1-nightly, gradio_canny.py,
gradio_tile.py and gradio_inpaint.py
"""

from __future__ import annotations

import hashlib
import importlib
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from PIL import Image

from sdopt.bundle.specs import Array, Float32
from sdopt.dataclass import dataclass
from sdopt.errors import BackendError, UsageError, install, shown
from sdopt.image import masked, masks, pil
from sdopt.logs import logger

log = logger(__name__)

LOW, HIGH = 100, 200  # of diffusers' documentation
STEEPEST = 1530  # the largest sum of both gradients of bytes
RESOLUTION, MULTIPLE = 1024, 64


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a ControlNet sees, and how it was made: a value for `control_image`.

    `picture`: in RGB. `mask`: of the same size, in shades of grey; masked pixels are where it is white.
    `record`: what a PNG carries: "by", the function; its numbers; "given", the digest of the picture that it was given.
    """

    picture: Image.Image
    record: Mapping[str, Any]
    mask: Image.Image | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """The pixels: bytes [height, width, 3]; with a mask float32 [height, width, 3] in 0..1, and -1 where masked."""
        pixels: Array = np.asarray(self.picture)
        if self.mask is not None:
            pixels = np.ascontiguousarray(np.transpose(self.planes(self.picture.height, self.picture.width), (1, 2, 0)))
        return pixels if dtype is None else pixels.astype(dtype)

    def planes(self, height: int, width: int, overlay: masks.Overlay | None = None) -> Float32:
        """What a ControlNet sees at another size: [3, height, width] in 0..1, and -1 where masked.

        With an overlay, that of padding_mask_crop, it is the region of that.
        Raises: UsageError if no white of the mask is left, or the overlay is of a picture of another size.
        """
        name, picture, mask = "control_image", self.picture, self.mask
        if overlay is not None:
            picture = masks.same_region(name, picture, overlay, height, width)
            mask = None if mask is None else masks.same_region(name, mask, overlay, height, width).convert("L")
        (colours,) = pil.to_planes(picture, height, width, 1, name)
        if mask is None:
            return colours
        white = pil.to_mask(mask, height, width, 1)
        masks.refuse_vanished(mask, white, 1)
        return np.where(white[0] > 0, np.float32(masked.MASKED), colours)


def canny(picture: Any, low: float = LOW, high: float = HIGH) -> Prepared:
    """The edges of a picture by Canny's method, white on black, at the picture's own size.

    `picture`: a PIL image, or an array [height, width, 3] in 0..1 or of bytes. `low`, `high`: a line of edges has a
    gradient of `high` at one pixel at least, and of `low` at all of them.
    Raises: UsageError for numbers that are not 0 <= low <= high <= 1530; BackendError without OpenCV.
    Ref: Canny 1986, doi:10.1109/TPAMI.1986.4767851; OpenCV, `Canny`
    """
    first, last = (_number(*one, float, 0, STEEPEST, LOW) for one in (("low", low), ("high", high)))
    if first > last:
        raise UsageError(f"low = {low:g} and high = {high:g}; the low threshold is not above the high one", "low")
    rgb = _rgb(picture)
    try:
        cv2: Any = importlib.import_module("cv2")  # late: an extra, which nothing else needs
    except ImportError as error:
        raise BackendError(f"edges by Canny need OpenCV: {install('control')} ({error})") from error
    edges: Array = cv2.Canny(np.ascontiguousarray(np.asarray(rgb)), first, last)
    if not edges.any():
        log.warning("canny finds no edges in a picture of %dx%d pixels; lower thresholds find more", *rgb.size)
    record = {"by": "canny", "low": first, "high": last, "given": digest(rgb)}
    return Prepared(Image.fromarray(np.repeat(edges[:, :, None], 3, 2)), record)


def tile(picture: Any, resolution: int = RESOLUTION) -> Prepared:
    """The picture in RGB, its shorter side about `resolution` pixels, and both sides multiples of 64.

    `picture`: as `canny` takes it. Give `image` and the size of the request the same size, as diffusers' examples do.
    Raises: UsageError for a resolution that is no whole number from 64 to 16384, and for a picture that gets too large.
    """
    resolution = _number("resolution", resolution, int, MULTIPLE, pil.MAX_SIDE, RESOLUTION)
    rgb = _rgb(picture)
    width, height = tiled_size(rgb.width, rgb.height, resolution)
    if width * height > pil.MAX_PIXELS or max(width, height) > pil.MAX_SIDE:
        raise UsageError(
            f"resolution = {resolution}: a picture of {rgb.width}x{rgb.height} pixels becomes {width}x{height}; "
            f"allowed are {pil.MAX_PIXELS:,} pixels, and {pil.MAX_SIDE:,} a side",
            "resolution",
        )
    record = {"by": "tile", "resolution": resolution, "given": digest(rgb)}
    return Prepared(rgb.resize((width, height), Image.Resampling.LANCZOS), record)


def tiled_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Width and height of what `tile` makes.

    Ref: diffusers, documentation of ControlNet tile, `resize_for_condition_image`
    """
    scale = float(resolution) / min(height, width)
    w, h = (round(side * scale / MULTIPLE) * MULTIPLE for side in (width, height))
    return w, h


def inpaint(picture: Any, mask: Any) -> Prepared:
    """The picture with masked pixels, which are -1 in all channels, where the mask is white.

    `picture`: as `canny` takes it. `mask`: as `mask_image` is given. Both are resized before they are joined.
    Raises: UsageError for a mask of another size.
    """
    rgb, grey = _rgb(picture), masks.read(mask)
    if isinstance(grey, list):
        raise UsageError("mask: a list; give the mask of one picture", "mask")
    if grey.size != rgb.size:
        raise UsageError(
            f"mask is {grey.width}x{grey.height} pixels, its picture {rgb.width}x{rgb.height}; give a mask of the "
            f"picture's size: mask.resize(({rgb.width}, {rgb.height}))",
            "mask",
        )
    return Prepared(rgb, {"by": "inpaint", "given": digest(rgb), "mask": digest(grey)}, grey)


def read(name: str, given: Any) -> Any:
    """One value of `control_image`: what was prepared, a picture, or an array with masked pixels.

    Raises: UsageError for what is none of these.
    """
    return given if isinstance(given, Prepared) else masked.read(name, given)


WAYS: Mapping[str, Callable[..., Prepared]] = {"canny": canny, "tile": tile, "inpaint": inpaint}
NUMBERS = {"canny": ("low", "high"), "tile": ("resolution",), "inpaint": ()}  # their arguments beside pictures
DIGESTS = {"canny": ("given",), "tile": ("given",), "inpaint": ("given", "mask")}


def is_record(record: Any) -> bool:
    """Whether it can be the record of a `Prepared`."""
    if not isinstance(record, dict):
        return False
    entry = cast("dict[str, Any]", record)
    by: str = str(entry.get("by"))
    if by not in WAYS or set(entry) != {"by", *NUMBERS[by], *DIGESTS[by]}:
        return False
    numbers = all(type(entry[name]) in (int, float) for name in NUMBERS[by])
    return numbers and all(isinstance(entry[name], str) for name in DIGESTS[by])


def numbers_of(record: Mapping[str, Any]) -> dict[str, float | int]:
    """The arguments in a record, beside the pictures."""
    return {name: record[name] for name in NUMBERS[record["by"]]}


def digest(picture: Image.Image) -> str:
    """The SHA-256 of a picture's pixels, whatever file they came from."""
    return hashlib.sha256(f"{picture.mode} {picture.width}x{picture.height} ".encode() + picture.tobytes()).hexdigest()


def _rgb(picture: Any) -> Image.Image:
    """One picture in RGB. Raises: UsageError for what is none."""
    return pil.as_pil(pil.read_picture("picture", picture))


def _number(name: str, value: Any, kind: type[Any], first: int, last: int, example: int) -> Any:
    """A number as `kind`, which is int or float. Raises: UsageError for what is none, or out of its range."""
    try:
        number = operator.index(value) if kind is int else float(value)
        if isinstance(value, (bool, str, bytes)) or not first <= number <= last:  # NaN is in no range
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        noun = "whole numbers" if kind is int else "numbers"
        text = f"{name} = {shown(value)}; allowed are {noun} from {first} to {last}, e.g. {name}={example}"
        raise UsageError(text, name) from None
    return number
