"""Pictures to and from arrays [batch, 3, height, width] in -1..1, and PNG files that hold their parameters."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from sdopt.bundle.disk import parse_json, write_named
from sdopt.bundle.specs import Array, Float32
from sdopt.errors import UsageError
from sdopt.image import chunks
from sdopt.image.infotext import a1111_text

MAX_CHUNK_BYTES = 1 << 20
MAX_PIXELS = 64_000_000
MAX_SIDE = 1 << 14
MAX_CHANNELS = 16  # of latents; an array with a larger second axis is a batch of pictures
EXACT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV")


def to_unit(decoded: Array) -> Array:
    """The pictures as float32 [batch, height, width, 3] in 0..1, as diffusers' `output_type="np"`."""
    pictures: Array = np.clip(decoded * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.transpose(pictures, (0, 2, 3, 1))


def to_pil(decoded: Array) -> list[Image.Image]:
    """The pictures as PIL images, rounded as diffusers rounds."""
    return unit_to_pil(to_unit(decoded))


def unit_to_pil(pictures: Array) -> list[Image.Image]:
    """Pictures [batch, height, width, 3] in 0..1 as PIL images, rounded as diffusers rounds."""
    pixels: Array = np.round(pictures * 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def is_latents(image: Any) -> bool:
    """Whether `image` is latents [images, channels, h, w], not a picture."""
    return hasattr(image, "shape") and len(image.shape) == 4


def size_of(image: Any, name: str = "image", factor: int = 0) -> tuple[int, int]:
    """(height, width) in pixels of a picture, of the first of several, or of latents of `factor` pixels."""
    if is_latents(image) and factor:
        return int(image.shape[2]) * factor, int(image.shape[3]) * factor
    first: Any = cast(Sequence[Any], image)[0] if isinstance(image, (list, tuple)) else image
    if isinstance(first, Image.Image):
        return first.height, first.width
    if hasattr(first, "shape") and first.ndim in (2, 3):
        return int(first.shape[0]), int(first.shape[1])
    raise UsageError(f"{name}: got {type(first)}; allowed are PIL images and arrays [height, width, 3] in 0..1")


def read_pictures(name: str, given: Any, latents: bool = False, read: Callable[[str, Any], Any] | None = None) -> Any:
    """The pictures that a caller gave: one, a list of them, or latents; a batch of arrays becomes a list.

    `read` is what reads one of them; without it, `read_picture`.
    Raises: UsageError for anything else.
    """
    read = read or read_picture
    if isinstance(given, (list, tuple)):
        several = list(cast(Sequence[Any], given))
        if not several:
            raise UsageError(f"{name} = []; allowed are PIL images and arrays [height, width, 3] in 0..1, one or more")
        return [read(name, one) for one in several]
    if not isinstance(given, np.ndarray) or given.ndim != 4:
        return read(name, given)
    array: Array = np.asarray(cast(Array, given))
    may_be_latents = array.dtype.kind == "f" and array.shape[1] <= MAX_CHANNELS
    if array.shape[-1] in (1, 3, 4) and len(array) and not may_be_latents:  # of output_type="np"
        return [read(name, one) for one in array]
    is_valid = array.dtype == np.float32 and array.size > 0 and bool(np.isfinite(array).all())
    if not latents or not is_valid:
        or_latents = "finite float32 latents [images, channels, height, width], and pictures " if latents else ""
        raise UsageError(
            f"{name}: got {'latents ' if latents else ''}{array.dtype} {array.shape}; allowed are {or_latents}"
            "[height, width, 3] in 0..1"
        )
    return array


def read_picture(name: str, given: Any) -> Any:
    """One picture, checked; an array of one channel becomes [height, width]."""
    if isinstance(given, Image.Image):
        if not given.width or not given.height:
            raise UsageError(f"{name}: a picture of {given.width}x{given.height} pixels; allowed are 1 or more a side")
        return converted(name, given, given.mode)
    if not isinstance(given, np.ndarray) or isinstance(given, np.ma.MaskedArray):
        other: Any = cast(Any, given)
        shape = f" {tuple(other.shape)}" if hasattr(other, "shape") else ""
        raise UsageError(
            f"{name}: got {type(other)}{shape}; allowed are PIL images and NumPy arrays [height, width, 3] in 0..1: "
            f"for a tensor [3, height, width] {name}={name}.permute(1, 2, 0).numpy()"
        )
    array: Array = np.asarray(cast(Array, given))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not fits or not array.size or array.dtype.kind not in "fuib":
        raise UsageError(f"{name}: got {array.dtype} {array.shape}; allowed are [height, width, 3] in 0..1, or uint8")
    low, high = array.min(), array.max()
    if array.dtype != np.uint8 and not (low >= 0 and high <= 1):  # false for NaN too
        raise UsageError(f"{name}: an array from {low} to {high}; allowed is 0..1, or uint8{_instead(name, low, high)}")
    return array


def _instead(name: str, low: Any, high: Any) -> str:
    """What to type for an array of these values, as it ends a sentence."""
    if 0 <= low <= high <= 255:
        return f": if 255 is white, {name}.astype(np.uint8)"
    return f": if -1 is black and 1 is white, ({name} + 1) / 2" if -1 <= low <= high <= 1 else ""


def to_array(image: Any, height: int, width: int, count: int) -> Float32:
    """Pictures as float32 [count, 3, height, width] in -1..1, resized as diffusers resizes (Lanczos)."""
    return to_planes(image, height, width, count) * 2 - 1


def to_planes(image: Any, height: int, width: int, count: int, name: str = "image", channels: int = 3) -> Float32:
    """The same in 0..1, as ControlNets see pictures; with one channel, in shades of grey."""
    pictures = each(name, image, count)
    if channels == 1:
        greys = [as_pil(one) if not isinstance(one, Image.Image) else one for one in pictures]
        return np.stack([resized(converted(name, one, "L"), height, width)[None] for one in greys])
    unit = np.stack([_unit(one, height, width) for one in pictures])
    return np.ascontiguousarray(np.transpose(unit, (0, 3, 1, 2)))


def to_mask(mask: Any, height: int, width: int, count: int) -> Float32:
    """Masks, PIL images, as float32 [count, 1, height, width]: 1 where the picture is repainted, 0 where it is kept."""
    greys = [converted("mask_image", one, "L") for one in each("mask_image", mask, count)]
    unit = np.stack([resized(grey, height, width) for grey in greys])
    return (unit[:, None] >= 0.5).astype(np.float32)


def each(name: str, given: Any, count: int) -> Sequence[Any]:
    """A list of `count` pictures, from one picture for all images or one for each."""
    several = list(cast(Sequence[Any], given)) if isinstance(given, (list, tuple)) else [given]
    if len(several) not in (1, count):
        text = f"{name}: {len(several)} pictures for {count} images; give one, or one per image"
        raise UsageError(text, name)
    return several * count if len(several) == 1 else several


def as_pil(image: Any) -> Image.Image:
    """One picture, PIL or array, as a PIL image in RGB."""
    if isinstance(image, Image.Image):
        return converted("image", image, "RGB")
    return Image.fromarray(np.round(_unit(image, *size_of(image)) * 255).astype(np.uint8))


def converted(name: str, image: Image.Image, mode: str) -> Image.Image:
    """A picture in another mode. 16 bits a pixel are scaled to 8; Pillow would clip them.

    Raises: UsageError for a mode whose range is not known, and for a file that turns out to be damaged.
    """
    try:
        if image.mode.startswith("I;16"):
            shades = np.asarray(image).astype(np.float32) / 257
            image = Image.fromarray(np.round(shades).astype(np.uint8))
            return image if mode.startswith("I;16") else image.convert(mode)
        if image.mode not in EXACT_MODES:
            raise ValueError(f"its mode is {image.mode}")
        if image.mode in ("RGBa", "La") and mode != image.mode:
            image = image.convert(image.mode.upper())  # the colours as they are without the transparency
        return image.convert(mode)
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(
            f'{name}: a picture that cannot be read ({error}); allowed are 8 bits a channel, e.g. {name}.convert("RGB")'
        ) from error


def unit_shades(name: str, array: Array) -> Float32:
    """The values of an array in 0..1: bytes are divided by 255."""
    shades: Float32 = np.asarray(array, np.float32)
    if array.dtype == np.uint8:
        shades = np.divide(shades, np.float32(255))
    if not np.isfinite(shades).all() or shades.min() < 0 or shades.max() > 1:
        raise UsageError(f"{name}: an array from {shades.min()} to {shades.max()}; allowed is 0..1, or uint8")
    return shades


def _unit(image: Any, height: int, width: int) -> Float32:
    """One picture in 0..1, [height, width, 3]."""
    size_of(image)
    if isinstance(image, Image.Image):
        return resized(converted("image", image, "RGB"), height, width)
    shades = unit_shades("image", image)
    if shades.shape != (height, width, 3):
        bytes_ = Image.fromarray(np.round(shades * 255).astype(np.uint8))
        return resized(bytes_.convert("RGB"), height, width)
    return shades


def resized(picture: Image.Image, height: int, width: int) -> Float32:
    """A picture in 0..1 at another size, [height, width] or [height, width, channels]; by Lanczos, as in diffusers."""
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, np.float32)
    pixels /= 255
    return pixels


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """A PNG, JPEG or WebP picture from a file, rotated as its EXIF orientation says.

    Raises: UsageError if it is none of these, if it is damaged, or if its header says that it is larger than 64
    megapixels or 16,384 pixels a side.
    """
    try:
        return chunks.read_picture(path, ("PNG", "JPEG", "WEBP"), partial(_upright, path))
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such file; give a PNG, JPEG or WebP picture") from error
    except Exception as error:  # Pillow's readers raise almost anything for a damaged file
        raise UsageError(f"{path}: not a PNG, JPEG or WebP picture that can be read ({error})") from error


def open_picture(name: str, file: io.BytesIO, most: int = MAX_PIXELS) -> Image.Image:
    """A PNG, JPEG or WebP picture from memory, as `open_image` opens it; `most`: pixels.

    Raises: UsageError that names the field `name`.
    """
    try:
        with cast(Any, Image).open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            return _upright(name, image, most)
    except UsageError:
        raise
    except UnidentifiedImageError as error:
        raise UsageError(f"{name} is no PNG, JPEG or WebP picture", name) from error
    except Exception as error:  # Pillow's readers raise almost anything for damaged bytes
        raise UsageError(f"{name}: not a PNG, JPEG or WebP picture that can be read ({error})", name) from error


def _upright(path: str | os.PathLike[str], image: Image.Image, most: int = MAX_PIXELS) -> Image.Image:
    """The pixels of an opened file, rotated as its EXIF orientation says."""
    from PIL import ImageOps  # late, as Pillow itself imports what reads and writes files

    if image.width * image.height > most or max(image.size) > MAX_SIDE:
        raise UsageError(f"{path}: {image.width}x{image.height} pixels; allowed are {most:,}, and {MAX_SIDE:,} a side")
    return ImageOps.exif_transpose(image)


def save_png(image: Image.Image, path: str | os.PathLike[str], parameters: Mapping[str, Any] | None = None) -> None:
    """Write `png` of these, completely or not at all."""
    write_named(Path(path), png(image, parameters))


def png(image: Image.Image, parameters: Mapping[str, Any] | None = None) -> bytes:
    """A PNG that carries `parameters` twice: as AUTOMATIC1111's text, and as JSON that replays it exactly."""
    from PIL.PngImagePlugin import PngInfo  # late, as Pillow itself imports what reads and writes files

    info = PngInfo()
    if parameters is not None:
        info.add_text("parameters", a1111_text(parameters))
        info.add_text("sdopt", json.dumps(parameters, ensure_ascii=True, allow_nan=False))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=info)
    return content.getvalue()


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters that `save_png` put into a file.

    Raises: UsageError if the file is not a PNG that `save_png` wrote.
    """
    if not Path(path).exists():
        raise UsageError(f"{path}: there is no such file; give a PNG that sdopt wrote")
    try:
        text = chunks.read_picture(path, ("PNG",), lambda image: image.info.get("sdopt"), text="sdopt")
        if not isinstance(text, str) or len(text) > MAX_CHUNK_BYTES:
            raise ValueError("no 'sdopt' text in it")
        parameters = parse_json(text)
        if not isinstance(parameters, dict):
            raise ValueError("its 'sdopt' text is no object")
        return cast(dict[str, Any], parameters)
    except Exception as error:  # Pillow's readers raise almost anything for a damaged file
        raise UsageError(f"{path} does not tell how it was made ({error}); give a PNG that sdopt wrote") from error


def numbered(path: Path, count: int) -> Sequence[Path]:
    """`path` itself for one picture, else apple-0.png, apple-1.png, ... beside it."""
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]
