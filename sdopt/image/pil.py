"""From the decoder's [batch, 3, height, width] in -1..1 to pictures, and PNG files that tell how they were made."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from sdopt.bundle.specs import Array, Float32
from sdopt.errors import UsageError

MAX_CHUNK_BYTES = 1 << 20
MAX_PIXELS = 64_000_000


def to_unit(decoded: Array) -> Array:
    """The pictures as float32 [batch, height, width, 3] in 0..1, as diffusers' `output_type="np"`."""
    pictures: Array = np.clip(decoded * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.transpose(pictures, (0, 2, 3, 1))


def to_pil(decoded: Array) -> list[Image.Image]:
    """The pictures as PIL images, rounded as diffusers rounds."""
    pixels: Array = np.round(to_unit(decoded) * 255).astype(np.uint8)
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


def to_array(image: Any, height: int, width: int, count: int) -> Float32:
    """Pictures as float32 [count, 3, height, width] in -1..1, resized as diffusers resizes (Lanczos)."""
    unit = np.stack([_unit(one, height, width, "RGB") for one in each("image", image, count)])
    return np.ascontiguousarray(np.transpose(unit, (0, 3, 1, 2))) * 2 - 1


def to_mask(mask: Any, height: int, width: int, count: int) -> Float32:
    """Masks as float32 [count, 1, height, width]: 1 where the picture is painted anew, 0 where it stays."""
    unit = np.stack([_unit(one, height, width, "L") for one in each("mask_image", mask, count)])
    return (unit[:, None] >= 0.5).astype(np.float32)


def each(name: str, given: Any, count: int) -> Sequence[Any]:
    """One picture for each of `count` images: all the same, or as many as there are."""
    several = list(cast(Sequence[Any], given)) if isinstance(given, (list, tuple)) else [given]
    if len(several) not in (1, count):
        raise UsageError(f"{name}: {len(several)} pictures for {count} images; give one, or one per image")
    return several * (count if len(several) == 1 else 1)


def as_pil(image: Any, mode: str) -> Image.Image:
    """One picture, PIL or array, as a PIL image of that mode."""
    if isinstance(image, Image.Image):
        return image.convert(mode)
    unit = _unit(image, *size_of(image), mode)
    return Image.fromarray(np.round(unit * 255).astype(np.uint8))


def _unit(image: Any, height: int, width: int, mode: str) -> Float32:
    """One picture in 0..1, [height, width, 3] or, in mode L, [height, width]."""
    size_of(image)
    if isinstance(image, Image.Image):
        return _resized(image, height, width, mode)
    shades = np.asarray(image, np.float32) / (255 if image.dtype == np.uint8 else 1)
    if not np.isfinite(shades).all() or shades.min() < 0 or shades.max() > 1:
        raise UsageError(f"image: an array from {shades.min()} to {shades.max()}; allowed is 0..1, or uint8")
    if mode == "L" and shades.ndim == 3:
        shades = np.mean(shades, 2)
    if shades.shape != ((height, width, 3) if mode == "RGB" else (height, width)):
        return _resized(Image.fromarray(np.round(shades * 255).astype(np.uint8)), height, width, mode)
    return np.asarray(shades, np.float32)


def _resized(image: Image.Image, height: int, width: int, mode: str) -> Float32:
    picture = image.convert(mode)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, np.float32)
    pixels /= 255
    return pixels


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """A PNG, JPEG or WebP picture from a file, turned as its camera held it.

    Raises: UsageError if it is none of these, damaged, or larger than 64 megapixels (told by its header).
    """
    try:
        with cast(Any, Image).open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UsageError(f"{path}: {image.width}x{image.height} pixels; allowed are {MAX_PIXELS:,}")
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such file; give a PNG, JPEG or WebP picture") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: not a PNG, JPEG or WebP picture that can be read ({error})") from error


def save_png(image: Image.Image, path: str | os.PathLike[str], parameters: Mapping[str, Any] | None = None) -> None:
    """Write a PNG that carries `parameters` twice: as AUTOMATIC1111's text, and as JSON that replays it exactly.

    The file appears whole or not at all.
    """
    info = PngInfo()
    if parameters is not None:
        info.add_text("parameters", a1111_text(parameters))
        info.add_text("sdopt", json.dumps(parameters, ensure_ascii=True, allow_nan=False))
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters that `save_png` put into a file.

    Raises: UsageError if it is not such a PNG.
    """
    if not Path(path).exists():
        raise UsageError(f"{path}: there is no such file; give a PNG that sdopt wrote")
    try:
        with cast(Any, Image).open(path, formats=("PNG",)) as image:
            text = image.info.get("sdopt")
        if not isinstance(text, str) or len(text) > MAX_CHUNK_BYTES:
            raise ValueError("no 'sdopt' text in it")
        return dict(json.loads(text))
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"{path} does not tell how it was made ({error}); give a PNG that sdopt wrote") from error


def a1111_text(parameters: Mapping[str, Any]) -> str:
    """The `parameters` text that AUTOMATIC1111's and its readers expect: prompt, negative prompt, one line of pairs."""
    pairs = {
        "Steps": parameters["num_inference_steps"],
        "Sampler": parameters["sampled_by"],
        "Schedule type": parameters.get("schedule", "Automatic"),
        "CFG scale": parameters["guidance_scale"],
        "Seed": parameters["seed"],
        "Size": f"{parameters['width']}x{parameters['height']}",
        "Model": parameters["model"],
        "RNG": str(parameters["rng"]).upper(),
        "Version": f"sdopt {parameters['version']}",
    }
    lines = [parameters["prompt"]]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {parameters['negative_prompt']}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:\n"') else value


def numbered(path: Path, count: int) -> Sequence[Path]:
    """`path` itself for one picture, else apple-0.png, apple-1.png, ... beside it."""
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]
