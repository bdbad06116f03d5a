"""Pictures into files: PNG, JPEG and WebP, with the parameters that make them again.

A PNG holds them twice, see `sdopt.image.pil.save_png`. JPEG and WebP hold AUTOMATIC1111's text in the UserComment of
their EXIF data, as its web UI writes it and reads it.
Ref: Exif 2.32, 4.6.5 UserComment: eight bytes name the encoding; "UNICODE\\0" is UTF-16, here the high byte first.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.bundle.disk import real_path, write_named
from sdopt.bundle.permission import refusal
from sdopt.errors import SdoptError, UsageError
from sdopt.image.infotext import a1111_text
from sdopt.image.pil import MAX_PIXELS, open_picture, png

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = 95  # above it files grow, and nothing is seen
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_SIDE = {"WEBP": 16383}  # of its header's 14 bits
EXIF, USER_COMMENT = 0x8769, 0x9286
UNICODE = b"UNICODE\0"


def format_of(path: Path, width: int = 0, height: int = 0) -> str:
    """The format that a file's name stands for, in Pillow's word.

    Raises: UsageError for another name, and for a picture that is too large for the format.
    """
    name = FORMATS.get(path.suffix.lower())
    if name is None:
        allowed = ", ".join(FORMATS)
        raise UsageError(f"{path}: pictures are written as {allowed}; name it {_named(path)}", "path")
    if max(width, height) > MAX_SIDE.get(name, max(width, height)):
        raise UsageError(f"{path}: {width}x{height} pixels; {name} holds {MAX_SIDE[name]} a side: name it .png")
    return name


def _named(path: Path) -> Path:
    """A name that a picture could have in place of `path`."""
    if path.name.lower() in FORMATS:  # a suffix and nothing before it
        return path.with_name(f"apple{path.name}")
    if path.name in ("", "-", ".."):
        return path.parent / "apple.png" if path.name == "-" else path / "apple.png"
    return path.with_suffix(".png")


def save(image: Image, path: str | os.PathLike[str], parameters: Mapping[str, Any] | None = None) -> None:
    """Write a picture in the format of the file's name, completely or not at all.

    Raises: UsageError for a name of no format; OSError.
    """
    file = Path(path)
    write_named(file, encoded(image, format_of(file, *image.size), parameters))


def encoded(image: Image, name: str, parameters: Mapping[str, Any] | None = None, quality: int | None = None) -> bytes:
    """A picture as the bytes of a file in Pillow's format `name`; `quality` of JPEG and WebP is 0 to 100."""
    if name == "PNG":
        return png(image, parameters)
    content = io.BytesIO()
    settings: dict[str, Any] = {"quality": QUALITY if quality is None else quality}
    if parameters is not None:
        exif = image.getexif()
        exif.get_ifd(EXIF)[USER_COMMENT] = UNICODE + a1111_text(parameters).encode("utf-16-be")
        settings["exif"] = exif.tobytes()
    image.save(content, format=name, **settings)
    return content.getvalue()


def texts_of(name: str, file: io.BytesIO, most: int = MAX_PIXELS) -> dict[str, str]:
    """The texts in a picture: those of a PNG by their names, the UserComment of a JPEG or WebP as "parameters".

    Raises: UsageError that names the field `name`, for what is no picture of at most `most` pixels.
    """
    image = open_picture(name, file, most)
    texts = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    comment: Any = image.getexif().get_ifd(EXIF).get(USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(UNICODE):
        texts["parameters"] = comment[len(UNICODE) :].decode("utf-16-be", "replace")
    return texts


def save_each(pictures: Iterable[tuple[Image, Path, Mapping[str, Any] | None]]) -> list[str]:
    """Write every picture that can be written, as `save` does. Returns a sentence for each that cannot."""
    lost: list[str] = []
    for image, path, parameters in pictures:
        try:
            save(image, path, parameters)
        except OSError as error:
            is_refused = isinstance(error, PermissionError)
            why = refusal(real_path(path).parent) if is_refused else ""
            lost.append(f"{path} is not written: {why or error.strerror or error}")
    return lost


def refuse_lost(lost: Sequence[str], count: int) -> None:
    """Raises: SdoptError that names those of `count` pictures that could not be written."""
    if lost:
        others = f"; the other {count - len(lost)} are written" if count > len(lost) else ""
        raise SdoptError(f"{'; '.join(lost)}{others}")
