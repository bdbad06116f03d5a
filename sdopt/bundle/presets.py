"""Presets: named settings of a bundle that were measured, in files beside its manifest.

    BUNDLE/presets/fast.json      or, where the bundle cannot be written, in this user's cache

A preset says which engine it was measured with, which keywords it sets, and what came out. It is data: the manifest
does not list it, and whoever has the bundle may add one, change it, or delete it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from sdopt.bundle.decode import DecodeError, Json, Rule, between, decode, encode
from sdopt.bundle.disk import parse_json, read_plain, user_folder, write_whole
from sdopt.bundle.files import Bundle
from sdopt.dataclass import dataclass
from sdopt.errors import BackendError, BundleError, UsageError, choices, shown

FOLDER = "presets"
NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_BYTES = 1 << 16
MAKE = "`sdopt tune BUNDLE` measures this machine and writes the presets exact, balanced and fast"
_Word = Annotated[str, Rule("a word of 1 to 100 characters", lambda value: 0 < len(value) <= 100)]


@dataclass(frozen=True)
class Preset:
    """`keywords`: what a request gets of it, e.g. {"num_inference_steps": 12}. `backend`, `precision`: the engine.

    `seconds`: of one picture. `psnr_db`, `ssim`: how near it is to `reference`. `machine`: where it was measured.
    """

    backend: _Word
    precision: _Word
    keywords: Mapping[str, Json]
    seconds: Annotated[float, between(0, 1e6)]
    psnr_db: Annotated[float, between(-1000, 200)]
    ssim: Annotated[float, between(-1, 1)]
    reference: str
    machine: str

    def __str__(self) -> str:
        return f"{self.seconds:.3g} s, {self.psnr_db:.1f} dB, SSIM {self.ssim:.3f}, {self.backend} in {self.precision}"


def preset_names(bundle: Bundle) -> tuple[str, ...]:
    """The names of the presets of a bundle, in alphabetical order.

    Raises: BundleError where their folder is a link.
    """
    found: set[str] = set()
    for folder in _folders(bundle):
        try:
            with os.scandir(folder) as entries:
                names = [entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json")]
        except OSError:
            continue
        found |= {name for name in names if NAMES.fullmatch(name)}
    return tuple(sorted(found))


def read_preset(bundle: Bundle, name: str) -> Preset:
    """Raises: UsageError for a name that there is not; BundleError for a file that is no preset."""
    refuse_unknown(name, preset_names(bundle), str(bundle.path))
    path = next(path for folder in _folders(bundle) if os.path.lexists(path := folder / f"{name}.json"))
    try:
        return decode(Preset, parse_json(read_plain(path, MAX_BYTES)))
    except (OSError, ValueError) as error:  # a DecodeError is a ValueError
        raise BundleError(f"{path} is no preset: {error}. Delete the file; {MAKE}") from error


def refuse_unknown(name: str, there: tuple[str, ...], bundle: str) -> None:
    """Raises: UsageError unless a preset is `there`."""
    if name not in there:
        known = f"there are {choices(name, there)}" if there else "it has none"
        raise UsageError(f"{bundle} has no preset {shown(name)}; {known}. {MAKE}", "preset")


def write_preset(bundle: Bundle, name: str, preset: Preset) -> Path:
    """Write a preset; one of this name is replaced. Returns its file.

    Raises: UsageError for a name or a value that no preset has; OSError where it cannot be written.
    """
    if not NAMES.fullmatch(name):
        text = f"name = {shown(name)}; allowed are up to 64 letters, digits, '-' and '_', e.g. name='fast'"
        raise UsageError(text, "name")
    entry = encode(preset)
    try:
        decode(Preset, entry)
    except DecodeError as error:
        raise UsageError(f"preset {name}: {error}", "preset") from error
    folder = _folders(bundle)[0]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_whole(path, json.dumps(entry, indent=2, ensure_ascii=False) + "\n")
    return path


def _folders(bundle: Bundle) -> list[Path]:
    """Where presets are. The first folder is the one that new ones are written into."""
    inside = bundle.path / FOLDER
    if inside.is_symlink():
        raise BundleError(f"{inside} is a symbolic link; a bundle's presets are a plain folder. Remove the link.")
    if os.access(inside if inside.is_dir() else bundle.path, os.W_OK):
        return [inside]
    try:
        return [user_folder("XDG_CACHE_HOME", ".cache") / FOLDER / bundle.digest, inside]
    except BackendError:  # this user has no home
        return [inside]
