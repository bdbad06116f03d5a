"""A Bundle: one Stable Diffusion pipeline as a folder that a product can run without PyTorch.

    manifest.json           what is here (see format.py), with the size and SHA-256 of every file; written last
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
import reprlib
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from sdopt.bundle.decode import DecodeError
from sdopt.bundle.disk import parse_json
from sdopt.bundle.format import FORMAT_VERSION, File, Manifest, Parity, decode_manifest, to_json
from sdopt.bundle.specs import TensorSpec
from sdopt.bundle.stamps import known_sha256, sha256, stamped_sha256
from sdopt.errors import BundleError, choices

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
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
    parity: tuple[Parity, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest, both checked.

    Raises (from `open`): BundleError with what is wrong and what to do.
    """

    path: Path
    manifest: Manifest
    paranoid: bool = False  # compute the hash of every file, also of its engines, whatever a stamp says

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, paranoid: bool = False) -> Bundle:
        """The bundle at `path`; `verify=False` checks sizes but not hashes.

        The hash of a file that has not changed since it was last computed is taken from this user's cache (see
        `sdopt.bundle.stamps`), unless `paranoid`.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry)
        if verify:
            _check_hashes(folder, manifest.files, paranoid)
        return cls(folder, manifest, paranoid)

    @property
    def digest(self) -> str:
        """Ten hex digits that name the contents: the same files have the same digest."""
        hashes = sorted((name, entry.sha256) for name, entry in self.manifest.files.items())
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:10]

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.manifest.components)

    def component(self, name: str, library: str = "") -> Component:
        """The entry of `name`, e.g. "unet", with the graph that is meant for `library` (e.g. "ort") if there is one."""
        table = self.manifest.components
        if name not in table:
            raise BundleError(f"{self.path} has no component {name!r}; it has {choices(name, table)}")
        entry = table[name]
        own = entry.graphs.get(library, entry)
        return Component(name, self.file(own.graph), entry.inputs, entry.outputs, own.parity)

    def file(self, name: str) -> Path:
        """The path of one file that the manifest lists."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path / MANIFEST} uses {name!r} without listing it under 'files'")
        return self.path / name

    def nbytes(self, component: str) -> int:
        """Bytes on disk of a component: graph and weights."""
        graph, files = self.manifest.components[component].graph, self.manifest.files
        return sum(files[name].bytes for name in (graph, f"{graph}.data") if name in files)


def embedded() -> Path:
    """The folder of the text-to-emoji bundle that comes with sdopt: in the package, or in a checkout."""
    return next((path for path in EMBEDDED if path.is_dir()), EMBEDDED[0])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`, read strictly: known version, no duplicate keys, every field checked.

    Raises: BundleError that names the field and what is allowed.
    """
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
        entry: Any = parse_json(path.read_bytes())
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from error
    if isinstance(entry, dict):
        _check_version(folder, cast("dict[str, Any]", entry).get("format_version"))
    try:
        return decode_manifest(entry)
    except DecodeError as error:
        raise BundleError(f"{path}: {error}. Copy the bundle again, or {_export_again(folder)}") from error


def _check_version(folder: Path, version: Any) -> None:
    if type(version) is int and version == FORMAT_VERSION:
        return
    problem = f"{folder / MANIFEST}: format_version is {reprlib.repr(version)}; this sdopt reads {FORMAT_VERSION}"
    if type(version) is int and version > FORMAT_VERSION:
        raise BundleError(f"{problem}. Upgrade sdopt, which a newer one has written")
    raise BundleError(f"{problem}. An earlier sdopt has written it: {_export_again(folder)}")


def _export_again(folder: Path) -> str:
    return f"export it again: `sdopt export CHECKPOINT -o {folder} --force`"


def _check_file(folder: Path, name: str, entry: File) -> None:
    """Refuse a file that is absent, truncated, behind a link, or anything but a plain file."""
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(
                f"{path} is a symbolic link; a bundle holds plain files. "
                f"Copy it with `cp -rL {folder} NEW`, or download it with `hf download ID --local-dir NEW`."
            )
    if not path.is_file():
        raise BundleError(f"{path} is missing, or is not a plain file; copy the bundle again")
    if path.stat().st_size != entry.bytes:
        raise BundleError(
            f"{path} is truncated or changed: {path.stat().st_size} bytes, the manifest says {entry.bytes}; "
            "copy the bundle again"
        )


def _check_hashes(folder: Path, files: Mapping[str, File], paranoid: bool) -> None:
    digests = {} if paranoid else {name: stamped_sha256(folder / name) for name in files}
    unknown = [name for name in files if not digests.get(name)]
    if unknown:
        from concurrent.futures import ThreadPoolExecutor  # late: a bundle that has not changed needs none

        def hashed(name: str) -> str:
            return known_sha256(folder / name, paranoid)

        with ThreadPoolExecutor(max_workers=4) as pool:
            digests |= zip(unknown, pool.map(hashed, unknown), strict=True)
    for name, entry in files.items():
        if digests[name] != entry.sha256:
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
    temporary = target.with_name(f".{target.name}.tmp-{os.urandom(4).hex()}")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*(p for p in temporary.rglob("*") if p.is_file()), temporary):
            _fsync(path)
        old = target.with_name(f".{target.name}.old-{os.urandom(4).hex()}")
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a finished folder, with the size and SHA-256 of every file in it; the manifest as written.

    Raises: BundleError for a manifest that could not be read again.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {p.relative_to(folder).as_posix(): File(p.stat().st_size, sha256(p)) for p in paths}
    manifest = replace(manifest, files=files)
    try:
        text = json.dumps(to_json(manifest), indent=1, allow_nan=False)
    except ValueError as error:  # a DecodeError too
        raise BundleError(f"{folder / MANIFEST} cannot be written: {error}") from error
    if len(text) >= MAX_MANIFEST_BYTES:
        raise BundleError(f"{folder / MANIFEST} cannot be written: {len(text)} bytes, more than {MAX_MANIFEST_BYTES}")
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


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
