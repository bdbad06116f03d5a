"""From the decoder's [batch, 3, height, width] in -1..1 to pictures, and PNG files that tell how they were made."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdopt.errors import UsageError
from sdopt.specs import Array

MAX_CHUNK_BYTES = 1 << 20


def to_unit(decoded: Array) -> Array:
    """The pictures as float32 [batch, height, width, 3] in 0..1, as diffusers' `output_type="np"`."""
    pictures: Array = np.clip(decoded * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.transpose(pictures, (0, 2, 3, 1))


def to_pil(decoded: Array) -> list[Image.Image]:
    """The pictures as PIL images, rounded as diffusers rounds."""
    pixels: Array = np.round(to_unit(decoded) * 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


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
