"""A PNG without its texts: Pillow refuses a picture whose texts or colour profile are long.

Web UIs write whole workflows into PNGs. Pillow reads a compressed text up to 1 MiB, and 64 MiB in all; those limits
belong to the process. Here a copy of the file is made that has none of these chunks.
Ref: PNG, third edition, https://www.w3.org/TR/png-3/, sections 5.3 (chunk layout) and 11.3.3 (textual information).
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from typing import Any, TypeVar, cast

from PIL import Image, UnidentifiedImageError

from sdopt.bundle.disk import open_given

Answer = TypeVar("Answer")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
PROFILE = b"iCCP"  # compressed too, and colours are taken as they are
HEAD = struct.Struct(">I4s")  # length and type of a chunk
CHECKSUM = 4  # bytes after its data


def read_picture(
    path: str | os.PathLike[str], formats: tuple[str, ...], read: Callable[[Any], Answer], text: str = ""
) -> Answer:
    """What `read` makes of the picture in a file, opened by Pillow.

    The picture has all of its texts or, where they are too long for Pillow, the one named `text` alone.
    Raises: what Pillow and `read` raise.
    """
    try:
        with open_given(path) as stream, cast(Any, Image).open(stream, formats=formats) as image:
            return read(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no {' or '.join(formats)} file") from error
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
    with cast(Any, Image).open(_with_one_text(path, text), formats=formats) as image:
        return read(image)


def _with_one_text(path: str | os.PathLike[str], text: str) -> io.BytesIO:
    """The PNG at `path` without a profile, and without its texts but the uncompressed one named `text`."""
    wanted = text.encode("latin-1") + b"\0"
    copy = io.BytesIO()
    with open_given(path) as file:
        copy.write(file.read(len(SIGNATURE)))
        while len(head := file.read(HEAD.size)) == HEAD.size:
            length, kind = HEAD.unpack(head)
            name = file.read(min(length, len(wanted))) if kind == TEXTS[0] else b""
            rest = length - len(name) + CHECKSUM
            if kind == PROFILE or (kind in TEXTS and name != wanted):
                file.seek(rest, os.SEEK_CUR)
            else:
                copy.write(head + name + file.read(rest))
    copy.seek(0)
    return copy
