"""Small files: JSON and TOML read strictly, files written by one rename, and the folders of this user."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from sdopt.errors import BackendError


def parse_json(text: str | bytes) -> Any:
    """JSON without duplicate keys, NaN and infinity.

    Raises: ValueError for anything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_toml(text: str) -> Any:
    """TOML, which has a reader in Python from 3.11 on.

    Raises: ValueError for what is no TOML; BackendError where nothing reads it.
    """
    try:
        reader: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError as error:
        raise BackendError("a TOML file needs Python 3.11 or newer, or tomli: pip install tomli") from error
    return reader.loads(text)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file by one rename, also where others write it meanwhile; text as UTF-8. Its folder must exist.

    Raises: OSError, and no incomplete file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_cached(path: Path, content: bytes) -> None:
    """As `write_whole`, in a folder that is made for this user alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(path, content)


def user_folder(variable: str, below_home: str) -> Path:
    """This user's folder of state or cache, as the XDG base directories name it.

    Raises: BackendError where this user has none: no home folder, and no variable that names another.
    """
    base = os.environ.get(variable) or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return (Path(base) if base else Path.home() / below_home) / "sdopt"
    except RuntimeError as error:
        raise BackendError(
            f"this user has no home folder ({error}): set HOME, or {variable}, to a folder that can be written"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key is given twice")
    return entries


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")
