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
import stat
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from sdopt.bundle.decode import DecodeError
from sdopt.bundle.disk import parse_json, read_plain
from sdopt.bundle.format import FORMAT_VERSION, OLDEST_VERSION, File, Manifest, Parity, data_file
from sdopt.bundle.manifest import decode_manifest
from sdopt.bundle.specs import TensorSpec
from sdopt.bundle.stamps import known_sha256, sha256, stamped_sha256
from sdopt.bundle.weight_files import Listing, WeightError, check_weight_files, graphs_of
from sdopt.dataclass import dataclass
from sdopt.errors import (
    BundleError,
    choices,
    refuse_no_path,
    refuse_no_switch,
    refuse_other,
    shown,
)

if TYPE_CHECKING:
    from typing_extensions import Self

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
MAX_TABLE_BYTES = 1 << 28  # of every file but graphs and their weights
PACKAGE = Path(__file__).parent.parent
EMBEDDED = (PACKAGE / "emoji", PACKAGE.parent / "engines/emoji/bundle")


Identity = tuple[int, ...]  # of a file: device, inode, size, and the times of change of its bytes and of its entry


@dataclass(frozen=True)
class Component:
    """One graph of a bundle: its file, what it takes and what it gives."""

    name: str
    graph: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: tuple[Parity, ...] = ()


@dataclass(frozen=True)
class ModelFolder:
    """An opened folder of graphs and its manifest, both checked: a bundle, or an adapter in it.

    Raises (from `open`): BundleError with what is wrong and what to do.
    """

    path: Path
    manifest: Listing
    paranoid: bool = False  # compute the hash of every file, also of its engines, whatever a stamp says
    verified: bool = False  # the hash of every file was compared with the manifest
    opened: Mapping[str, Identity] = field(default_factory=dict[str, "Identity"])  # its files when it was opened

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, paranoid: bool = False) -> Self:
        """The bundle at `path`; `verify=False` checks sizes but not hashes.

        The hash of a file that has not changed since it was last computed is taken from this user's cache (see
        `sdopt.bundle.stamps`), unless `paranoid`.
        """
        refuse_no_switch(verify=verify, paranoid=paranoid)
        refuse_no_path("path", path)
        try:
            folder = Path(path).absolute()  # the process may change its working directory
            manifest = cls.read_manifest(folder)
            opened = {name: _check_file(folder, name, entry) for name, entry in manifest.files.items()}
            _check_sizes(folder, manifest)
            _check_graphs(folder, manifest, verify)
            if verify:
                _check_hashes(folder, manifest.files, paranoid)
        except OSError as error:
            raise BundleError(
                f"{path}: {error}. A bundle is a folder of plain files that this user may read; copy it again"
            ) from error
        return cls(folder, manifest, paranoid, verify, opened)

    @staticmethod
    def read_manifest(folder: Path) -> Any:
        """The manifest of this kind of folder. Raises: BundleError."""
        raise NotImplementedError

    @property
    def factor(self) -> int:
        """Pixels per latent on a side."""
        raise NotImplementedError

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
        refuse_other("component", name, str, "are texts: " + ", ".join(table))
        if name not in table:
            raise BundleError(f"{self.path} has no component {name!r}; it has {choices(name, table)}")
        entry = table[name]
        own = entry.graphs.get(library, entry)
        self._refuse_changed(data_file(table, name))
        return Component(name, self.file(own.graph), entry.inputs, entry.outputs, own.parity)

    def file(self, name: str) -> Path:
        """The path of one file that the manifest lists."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path / MANIFEST} uses {name!r} without listing it under 'files'")
        self._refuse_changed(name)
        return self.path / name

    def refuse_changed(self, component: str) -> None:
        """Raises: BundleError if a graph or the weights of a component are other files than when it was opened."""
        entry = self.manifest.components.get(component)
        if entry is None:
            return
        graphs = [entry.graph, *(own.graph for own in entry.graphs.values())]
        for name in (*graphs, data_file(self.manifest.components, component)):
            self._refuse_changed(name)

    def _refuse_changed(self, name: str) -> None:
        then = self.opened.get(name)
        if then is None:
            return
        path = self.path / name
        try:
            now = _identity(path.lstat())
            # The same bytes once more, as of a bundle that was copied here again, are no change.
            if now == then or (self.verified and stat.S_ISREG(path.lstat().st_mode) and self._has_hash(name)):
                return
            reason = "has changed" if self.verified or now[:4] != then[:4] else ""
        except OSError as error:
            reason = f"is gone ({error.strerror})"
        if reason:
            raise BundleError(
                f"{path} {reason} since the bundle was opened: open it again, with sdopt.load or Bundle.open"
            )

    def _has_hash(self, name: str) -> bool:
        return known_sha256(self.path / name, self.paranoid) == self.manifest.files[name].sha256

    def nbytes(self, component: str) -> int:
        """Bytes on disk of a component: graph, and weights if they are its own."""
        table, files = self.manifest.components, self.manifest.files
        own = table[component].weights_of is None
        names = (table[component].graph, data_file(table, component) if own else "")
        return sum(files[name].bytes for name in names if name in files)


@dataclass(frozen=True)
class Bundle(ModelFolder):
    """An opened bundle: its folder and its manifest, both checked.

    Raises (from `open`): BundleError with what is wrong and what to do.
    """

    manifest: Manifest

    @staticmethod
    def read_manifest(folder: Path) -> Manifest:
        return read_manifest(folder)

    @property
    def factor(self) -> int:
        return self.manifest.latents.factor

    @property
    def denoiser(self) -> Component:
        """The component that predicts, as this bundle's own graph has it."""
        return self.component(self.manifest.denoiser)

    def __repr__(self) -> str:
        defaults, size = self.manifest.defaults, sum(file.bytes for file in self.manifest.files.values())
        return (
            f"<Bundle {self.path}: {self.manifest.family}, {defaults.width}x{defaults.height}, {size / 1e6:.0f} MB, "
            f"{', '.join(self.components)}>"
        )


def embedded() -> Path:
    """The folder of the text-to-emoji bundle that comes with sdopt: in the package, or in a checkout."""
    return next((path for path in EMBEDDED if path.is_dir()), EMBEDDED[0])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`, read strictly: known version, no duplicate keys, every field checked.

    Raises: BundleError that names the field and what is allowed.
    """
    path = folder / MANIFEST
    if folder.is_file():
        text = f"{folder} is not a bundle: a bundle is a folder, and this is a file"
        export = (
            f". If it is a checkpoint: `sdopt export {folder} -o BUNDLE`" if folder.suffix == ".safetensors" else ""
        )
        raise BundleError(f"{text}{export}")
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a bundle: there is no such folder. `sdopt export CHECKPOINT -o {folder}`")
    if (folder / "model_index.json").is_file() and not path.exists():
        raise BundleError(f"{folder} is a diffusers checkpoint, not a bundle. `sdopt export {folder} -o BUNDLE` first.")
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle, or an incomplete one: it has no {MANIFEST}. Export it again.")
    if path.is_symlink():
        raise BundleError(_link(path, folder))
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; refusing to read it")
    try:
        entry: Any = parse_json(read_plain(path, MAX_MANIFEST_BYTES))
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from error
    if isinstance(entry, dict):
        _check_version(folder, cast("dict[str, Any]", entry).get("format_version"))
    try:
        return decode_manifest(entry)
    except DecodeError as error:
        raise BundleError(f"{path}: {error}. Copy the bundle again, or {_export_again(folder)}") from error


def _check_version(folder: Path, version: Any) -> None:
    if type(version) is int and OLDEST_VERSION <= version <= FORMAT_VERSION:
        return
    readable = f"{OLDEST_VERSION} to {FORMAT_VERSION}"
    problem = f"{folder / MANIFEST}: format_version is {shown(version)}; this sdopt reads {readable}"
    if type(version) is int and version > FORMAT_VERSION:
        raise BundleError(f"{problem}. Upgrade sdopt, which a newer one has written")
    raise BundleError(f"{problem}. An earlier sdopt has written it: {_export_again(folder)}")


def _export_again(folder: Path) -> str:
    return f"export it again: `sdopt export CHECKPOINT -o {folder} --force`"


def _link(path: Path, folder: Path) -> str:
    return (
        f"{path} is a symbolic link; a bundle holds plain files. "
        f"Copy it with `cp -rL {folder} NEW`, or download it with `hf download ID --local-dir NEW`."
    )


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _check_file(folder: Path, name: str, entry: File) -> Identity:
    """The identity of a file. Raises: BundleError if it is absent, truncated, behind a link, or no plain file."""
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(_link(path, folder))
    if not path.is_file():
        raise BundleError(f"{path} is missing, or is not a plain file; copy the bundle again")
    status = path.lstat()
    if status.st_size != entry.bytes:
        raise BundleError(
            f"{path} is truncated or changed: {status.st_size} bytes, the manifest says {entry.bytes}; "
            "copy the bundle again"
        )
    return _identity(status)


def _check_sizes(folder: Path, manifest: Listing) -> None:
    """Raises: BundleError for a file, other than a graph or its weights, that is far too large."""
    large = {name for graph, data, _ in graphs_of(manifest) for name in (graph, data)}
    for name, entry in manifest.files.items():
        if name not in large and entry.bytes > MAX_TABLE_BYTES:
            raise BundleError(f"{folder / name} has {entry.bytes} bytes; allowed are {MAX_TABLE_BYTES}")


def _check_graphs(folder: Path, manifest: Listing, verify: bool) -> None:
    """Every graph's weights are in `<graph>.data`, as listed, and nothing else is; see `sdopt.bundle.weight_files`.

    Raises: BundleError that names the tensor, or the file that is too large.
    """
    try:
        check_weight_files(folder, manifest, is_certain=verify)
    except WeightError as error:
        if verify and error.graph:  # a damaged graph is to be called so
            _check_hashes(folder, {error.graph: manifest.files[error.graph]}, paranoid=False)
        raise BundleError(f"{error}. Copy the bundle again, or {_export_again(folder)}") from error


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
        if digests[name] != entry.sha256 and sha256(folder / name) != entry.sha256:  # a stamp may be damaged
            raise BundleError(
                f"{folder / name} does not match its SHA-256 in the manifest: it was changed or damaged. "
                "Copy or export the bundle again."
            )
