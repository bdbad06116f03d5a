"""A Bundle: one Stable Diffusion pipeline as a folder that a product can run without PyTorch.

    manifest.json           what is here, with the size and SHA-256 of every file; written last
    <component>.onnx        the graph, float32-typed standard ONNX
    <component>.onnx.data   its weights in the checkpoint's own precision
    <component>.ort.onnx    the same, on the same weights, in the operators that one engine library is fast at
    tokenizer/tokenizer.json

A bundle is data from somewhere else: nothing in it is opened before the manifest has been read strictly, and every
file it names is a plain file inside the folder with the size and hash that the manifest gives.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, cast

from sdopt.bundle.specs import TensorSpec
from sdopt.bundle.stamps import known_sha256, sha256
from sdopt.errors import BundleError, choices

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
REQUIRED = (
    "format_version",
    "family",
    "components",
    "files",
    "tokenizers",
    "conditioning",
    "scheduler",
    "latents",
    "defaults",
)
STALE_SECONDS = 24 * 3600
PACKAGE = Path(__file__).parent.parent
EMBEDDED = (PACKAGE / "emoji", PACKAGE.parent / "engines/emoji/bundle")


@dataclass(frozen=True)
class Component:
    """One graph of a bundle: its file, what it takes and what it gives."""

    name: str
    graph: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest, both checked.

    Raises (from `open`): BundleError with what is wrong and what to do.
    """

    path: Path
    manifest: Mapping[str, Any]
    paranoid: bool = False  # compute the hash of every file, also of its engines, whatever a stamp says

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, paranoid: bool = False) -> Bundle:
        """The bundle at `path`; `verify=False` checks sizes but not hashes.

        The hash of a file that has not changed since it was last computed is taken from this user's cache (see
        `sdopt.bundle.stamps`), unless `paranoid`.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        files: Mapping[str, Any] = manifest["files"]
        for name, entry in files.items():
            _check_file(folder, name, entry)
        if verify:
            _check_hashes(folder, files, paranoid)
        bundle = cls(folder, manifest, paranoid)
        for name in bundle.components:
            bundle.component(name)
        for entry in manifest["tokenizers"].values():
            bundle.file(entry["file"])
        return bundle

    @property
    def digest(self) -> str:
        """Ten hex digits that name the contents: the same files have the same digest."""
        hashes = sorted((name, entry["sha256"]) for name, entry in self.manifest["files"].items())
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:10]

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.manifest["components"])

    def component(self, name: str, library: str = "") -> Component:
        """The entry of `name`, e.g. "unet", with the graph that is meant for `library` (e.g. "ort") if there is one."""
        table: Mapping[str, Any] = self.manifest["components"]
        if name not in table:
            raise BundleError(f"{self.path} has no component {name!r}; it has {choices(name, table)}")
        entry = table[name]
        try:
            inputs, outputs = (tuple(map(TensorSpec.from_json, entry[k])) for k in ("inputs", "outputs"))
            own: Mapping[str, Any] = entry.get("graphs", {}).get(library, entry)
            return Component(name, self.file(own["graph"]), inputs, outputs, tuple(own.get("parity", ())))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{self.path / MANIFEST}: component {name!r} is malformed ({error!r})") from error

    def file(self, name: str) -> Path:
        """The path of one file that the manifest lists."""
        if name not in self.manifest["files"]:
            raise BundleError(f"{self.path / MANIFEST} uses {name!r} without listing it under 'files'")
        return self.path / name

    def nbytes(self, component: str) -> int:
        """Bytes on disk of a component: graph and weights."""
        graph = self.manifest["components"][component]["graph"]
        sizes = {name: entry["bytes"] for name, entry in self.manifest["files"].items()}
        return sizes[graph] + sizes.get(f"{graph}.data", 0)


def embedded() -> Path:
    """The folder of the text-to-emoji bundle that comes with sdopt: in the package, or in a checkout."""
    return next((path for path in EMBEDDED if path.is_dir()), EMBEDDED[0])


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The manifest of the bundle in `folder`, read strictly: no duplicate keys, no NaN, known version, all keys."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a bundle: there is no such folder. `sdopt export CHECKPOINT -o {folder}`")
    if (folder / "model_index.json").is_file() and not path.exists():
        raise BundleError(f"{folder} is a diffusers checkpoint, not a bundle. `sdopt export {folder} -o BUNDLE` first.")
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle, or an incomplete one: it has no {MANIFEST}. Export it again.")
    if path.is_symlink() or path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is a link or larger than {MAX_MANIFEST_BYTES} bytes; refusing to read it")
    try:
        manifest: Any = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from error
    manifest = cast(dict[str, Any], manifest if isinstance(manifest, dict) else {})
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {version!r}; this sdopt reads {FORMAT_VERSION}. "
            "Upgrade sdopt for a newer bundle, or export it again with this one."
        )
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        raise BundleError(f"{path} lacks {', '.join(missing)}; export it again")
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key is given twice")
    return entries


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Refuse a file that is absent, truncated, outside the folder, or anything but a plain file."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(c in name for c in "\\:\0"):
        raise BundleError(f"{folder}: the manifest names {name!r}, which leaves the bundle; refusing to open it")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(
                f"{path} is a symbolic link; a bundle holds plain files. "
                f"Copy it with `cp -rL {folder} NEW`, or download it with `hf download ID --local-dir NEW`."
            )
    if not path.is_file():
        raise BundleError(f"{path} is missing, or is not a plain file; copy the bundle again")
    if path.stat().st_size != entry.get("bytes"):
        raise BundleError(
            f"{path} is truncated or changed: {path.stat().st_size} bytes, the manifest says {entry.get('bytes')}; "
            "copy the bundle again"
        )


def _check_hashes(folder: Path, files: Mapping[str, Any], paranoid: bool) -> None:
    with ThreadPoolExecutor(max_workers=4) as pool:
        paths = [folder / name for name in files]
        digests = pool.map(partial(known_sha256, paranoid=paranoid), paths)
        for name, digest in zip(files, digests, strict=True):
            if digest != files[name].get("sha256"):
                raise BundleError(
                    f"{folder / name} does not match its SHA-256 in the manifest: it was changed or damaged. "
                    "Copy or export the bundle again."
                )


def refuse_existing(target: Path, force: bool) -> None:
    """Raises BundleError if there is something under the name of `target` and it is not to be replaced."""
    if force and target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).exists():
        raise BundleError(f"{target} is a folder, but not a bundle; it is not replaced. Choose another name.")
    if target.exists() and not (force and target.is_dir()):
        raise BundleError(f"{target} exists already; choose another name, or replace a bundle with --force")


@contextmanager
def new_folder(target: Path, *, force: bool = False, needed_bytes: int = 0) -> Generator[Path]:
    """A temporary folder beside `target` that takes its name, by one rename, when the block ends well.

    A block that raises, or a process that is killed, leaves nothing under the name of `target`.
    Raises: BundleError if `target` exists and not `force`, or the disk has less than 1.2 times `needed_bytes`.
    """
    target = target.absolute()
    refuse_existing(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < 1.2 * needed_bytes:
        raise BundleError(f"{target.parent} has {free / 1e9:.1f} GB free, about {1.2 * needed_bytes / 1e9:.1f} needed")
    _remove_stale(target)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*(p for p in temporary.rglob("*") if p.is_file()), temporary):
            _fsync(path)
        old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a finished folder, adding the size and SHA-256 of every file in it."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths}
    text = json.dumps({"format_version": FORMAT_VERSION, **manifest, "files": files}, indent=1, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _remove_stale(target: Path) -> None:
    """Delete what an export of this name left behind when it was killed, once it is a day old."""
    for path in target.parent.glob(f".{target.name}.tmp-*"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
