"""Engines on disk: what `sdopt build` made for a bundle, and whether it may be loaded here.

    BUNDLE/engines/unet_step-3f2a9c01d4e5/
        record.json     what the engine takes and gives, all that it was made from, sizes and hashes; signed
        engine.plan

An engine is code. So a record is signed (HMAC-SHA256) with a key in this user's state folder, and the engine's hash is
checked before a library reads the file. An engine that came with somebody else's bundle is loaded only if the caller
trusts it. An engine is stale if its sources or its environment changed since it was built; the error says what changed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Any, cast

from sdopt.bundle.decode import Json, decode, encode
from sdopt.bundle.disk import is_private, parse_json, read_plain, user_folder, write_new
from sdopt.bundle.files import ModelFolder
from sdopt.bundle.format import File
from sdopt.bundle.joined import adapter_hashes
from sdopt.bundle.specs import Profile, TensorSpec
from sdopt.bundle.stamps import known_sha256, sha256
from sdopt.bundle.weights import Overlay
from sdopt.dataclass import dataclass
from sdopt.errors import BackendError, BundleError

RECORD = "record.json"
PLAN = "engine.plan"  # TensorRT's
GRAPH = "graph.onnx"  # ONNX Runtime's: what `sdopt build` makes, and what an earlier process kept
FOLDER = "engines"
COMMAND = "sdopt build BUNDLE"  # how a record's command begins; `Record.at` fills in where the bundle is now
MAX_RECORD_BYTES = 1 << 20
KEY_BYTES = 32

Environment = Callable[["Record"], Mapping[str, str]]  # the environment that a record would have if built here, now


class NoEnginesError(BackendError):
    """Nothing is built for a backend yet; the message ends with the command that builds all that a bundle needs."""


@dataclass(frozen=True)
class Record:
    """One engine: its component and backend, its tensors, and all that it was made from."""

    component: str
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    carry: Mapping[str, str]  # output -> the input that it becomes in the next call, on the device
    profiles: tuple[Profile, ...]
    environment: Mapping[str, str]  # library, GPU, driver: what must be the same where it runs
    sources: Mapping[str, str]  # file of the bundle -> its SHA-256
    options: Mapping[str, Json]  # every option of the build, by name
    command: str  # the command that builds it again, without its component and profiles; see `COMMAND`
    asked: tuple[str, ...] = ()  # its profiles as they are typed, in pictures and pixels
    notes: Mapping[str, Json] = field(default_factory=dict[str, Any])  # what was found in the finished engine
    files: Mapping[str, File] = field(default_factory=dict[str, File])

    @property
    def key(self) -> str:
        """The folder's name: the component, and a digest of all that changes the engine."""
        parts = [self.backend, str(dict(self.carry)), [str(p) for p in self.profiles]]
        made_from = [parts, sorted(self.environment.items()), sorted(self.sources.items()), self.options]
        text = json.dumps(made_from, sort_keys=True)
        return f"{self.component.replace('/', '.')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def rebuild_command(self) -> str:
        """The command that builds it again. A graph takes every size, and its build no profiles."""
        return self.building(() if GRAPH in self.files else self.asked)

    def building(self, profiles: Sequence[object]) -> str:
        """The command that builds this component for these profiles, in the user's units."""
        words = [self.command, f"--component {self.component}", *(f'--profile "{text}"' for text in profiles)]
        return " ".join(words)

    def having(self, option: str) -> Record:
        """The record, with an option of `sdopt build` in its command."""
        there = not option or f" {option} " in f"{self.command} "
        return self if there else replace(self, command=f"{self.command} {option}")

    def at(self, bundle: Path) -> Record:
        """The record, with the bundle's present folder in its command."""
        if not f"{self.command} ".startswith(f"{COMMAND} "):
            return self
        return replace(self, command=f"sdopt build {shlex.quote(str(bundle))}{self.command[len(COMMAND) :]}")


@dataclass(frozen=True)
class Stored:
    """A record with the folder where it is, and whether this user signed it."""

    folder: Path
    record: Record
    ours: bool
    paranoid: bool = False  # hash its files anew, whatever a stamp says

    @property
    def precision(self) -> str:
        """What it was built in: "fp32", "fp16" or "bf16"."""
        return str(self.record.options.get("precision", ""))

    @property
    def weights(self) -> str:
        """The key of the overlay that it was built with; empty for the bundle's own weights."""
        return str(self.record.options.get("weights", ""))

    def checked(self, name: str) -> Path:
        """The path of one file of the engine, after its size and hash were compared with the record."""
        path, entry = self.folder / name, self.record.files.get(name)
        rebuild = f"build it again: {self.record.rebuild_command}"
        if entry is None:
            raise BackendError(f"{path} is not listed in its record; {rebuild}")
        if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.bytes:
            raise BackendError(f"{path} is missing, truncated or a link; {rebuild}")
        if known_sha256(path, self.paranoid) != entry.sha256:
            raise BackendError(f"{path} is damaged: its SHA-256 is another one; {rebuild}")
        return path


@dataclass(frozen=True)
class Unsigned:
    """An engine that was just built here: its files need no check, and its record is not written yet."""

    folder: Path
    record: Record

    def checked(self, name: str) -> Path:
        return self.folder / name


def engines_folder(bundle: ModelFolder) -> Path:
    """Where a bundle's engines are: inside it or, if it cannot be written, in this user's cache."""
    inside = bundle.path / FOLDER
    if os.path.islink(inside):
        raise BundleError(f"{inside} is a symbolic link; a bundle's engines are a plain folder. Remove the link.")
    if os.path.isdir(inside) or os.access(bundle.path, os.W_OK):
        return inside
    return user_folder("XDG_CACHE_HOME", ".cache") / FOLDER / bundle.digest


def stored(bundle: ModelFolder, backend: str) -> list[Stored]:
    """The engines of `backend` in a bundle, newest first; folders without a readable record are left out."""
    dated: list[tuple[int, Stored]] = []
    for path in _record_files(bundle):
        with suppress(OSError):  # a build in another process removes what is stale
            entry = _read(path)
            if entry is None or entry[0].backend != backend:
                continue
            record, signed = entry
            engine = Stored(path.parent, record.at(bundle.path), signed, bundle.paranoid)
            dated.append((path.stat().st_mtime_ns, engine))
    dated.sort(key=lambda pair: pair[0], reverse=True)
    return [engine for _, engine in dated]


def _record_files(bundle: ModelFolder) -> list[Path]:
    """Where a bundle's engines have their records; none where this user may not look, or has no home."""
    try:
        return list(engines_folder(bundle).glob(f"*/{RECORD}"))
    except (OSError, BackendError):
        return []


def usable(
    bundle: ModelFolder,
    component: str,
    backend: str,
    environment: Environment,
    trust: bool = False,
    provider: str = "",
    precision: str = "",
    option: str = "",
    weights: str = "",
) -> list[Stored]:
    """The engines of `component` that fit this bundle, library and machine, newest first; at least one.

    `provider`: see `built_components`. `precision`: engines in it are preferred. Others are taken if there are none,
    since `sdopt build` chooses another precision for a component that overflows. `option`: of `sdopt build`, which the
    caller will need; the commands in errors have it. `weights`: the key of the overlay that is in use. An engine that
    was built with it is taken before the others; one that was built with another is not taken.

    Raises: BackendError if there is no such engine, if somebody else built it, or if it is stale; the text has the
    command that builds it. NoEnginesError if nothing at all is built for this backend.
    """
    build = f"sdopt build {shlex.quote(str(bundle.path))} --backend {backend}{f' {option}' if option else ''}"
    every = _for_provider(stored(bundle, backend), provider)
    if not every:
        raise NoEnginesError(f"{bundle.path} has no {backend} engines. Build them: {build}")
    build = f"{build} --component {component}"
    candidates = [s for s in every if s.record.component == component]
    if not candidates:
        raise BackendError(f"{bundle.path} has no {backend} engine of {component}. Build it: {build}")
    candidates = [s for s in candidates if s.weights in ("", weights)]
    if not candidates:
        raise BackendError(
            f"{bundle.path} has {backend} engines of {component} only with other LoRAs built into them. "
            f"Build one without: {build}; or use the LoRA and the weight that it was built with"
        )
    candidates = [s for s in candidates if s.precision == precision] or candidates
    candidates = [s for s in candidates if s.weights == weights] or candidates
    allowed = [s for s in candidates if trust or s.ours]
    if not allowed:
        raise BackendError(
            f"{candidates[0].folder} was not built by you on this machine, and an engine is code. "
            f"Build your own: {build}; or, if you know who built it, say so with --trust-engines (trust_engines=True)"
        )
    changes = [(s, changed(s.record, bundle, environment(s.record))) for s in allowed]
    fresh = [s for s, change in changes if not change]
    if not fresh:
        newest, change = changes[0]
        rebuild = newest.record.having(option).rebuild_command
        raise BackendError(f"the {backend} engine of {component} is stale: {change}. Build it: {rebuild}")
    return fresh


def changed(record: Record, bundle: ModelFolder, environment: Mapping[str, str]) -> str:
    """What changed since the engine was built, as text; empty if nothing did."""
    files = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    files |= adapter_hashes(bundle, [name for name in record.sources if name not in files])
    changes = [
        f"{name} is {'another file' if name in files else 'not there'}"
        for name, digest in record.sources.items()
        if files.get(name) != digest
    ]
    for name in {**record.environment, **environment}:
        was, now = record.environment.get(name), environment.get(name)
        if was != now:
            changes.append(f"{name} was {was}, is {now}")
    return "; ".join(changes)


def built_components(
    bundle: ModelFolder,
    backend: str,
    provider: str = "",
    precision: str = "",
    only_ours: bool = False,
    overlay: Overlay | None = None,
) -> dict[str, str]:
    """The components that have engines, usable or not, each with the precision of its newest one.

    `provider`: "CUDA" or "CPU" counts only engines made for it; "" counts all. `precision`: the same. `only_ours`
    leaves out what somebody else built. `overlay`: counts engines that were built with it too; those that were built
    with another are left out always.
    """
    newest: dict[str, str] = {}
    for engine in reversed(_for_provider(stored(bundle, backend), provider)):
        component = engine.record.component
        fits = engine.weights in ("", overlay.key(component) if overlay is not None else "")
        if fits and precision in ("", engine.precision) and (engine.ours or not only_ours):
            newest[component] = engine.precision
    return newest


def _for_provider(engines: list[Stored], provider: str) -> list[Stored]:
    if not provider:
        return engines
    return [engine for engine in engines if engine.record.environment.get("provider") == provider]


def write_record(folder: Path, record: Record, names: Sequence[str]) -> Record:
    """Sign `record` and write it beside its finished files; the record with their sizes and hashes."""
    files = {n: File((folder / n).stat().st_size, sha256(folder / n)) for n in names}
    record = replace(record, files=files)
    entry: dict[str, Any] = json.loads(json.dumps(encode(record)))
    text = json.dumps({**entry, "signature": _signature(entry, _key())}, indent=1, allow_nan=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
    return record


def check_key() -> None:
    """To be called before a build: without a key its engines could not be signed.

    Raises: BackendError if this user's key cannot be made or read.
    """
    _key()


def _read(path: Path) -> tuple[Record, bool] | None:
    """(record, whether this user signed it), or None if the file is not a record."""
    if path.parent.is_symlink():
        return None
    try:
        entry = parse_json(read_plain(path, MAX_RECORD_BYTES))
        fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        signature = fields.pop("signature", None)
        record: Record = decode(Record, fields)
    except (OSError, ValueError):
        return None
    return record, _is_signed(fields, signature)


def _is_signed(fields: Mapping[str, Any], signature: Any) -> bool:
    """Whether a signature is that of this user's key; without a key, or with one that others know, nothing is."""
    if not (isinstance(signature, str) and signature.isascii()):
        return False
    try:
        key = _read_key(_key_path())
    except (OSError, BackendError):
        return False
    return hmac.compare_digest(signature, _signature(fields, key))


def _signature(entry: Mapping[str, Any], key: bytes) -> str:
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key_path() -> Path:
    return user_folder("XDG_STATE_HOME", ".local/state") / "engine-key"


def _read_key(path: Path) -> bytes:
    """The key in a file.

    Raises: OSError if there is none; BackendError if it is no key, or one that other users may have read or written.
    """
    key = read_plain(path, KEY_BYTES)
    closed = is_private(path) and (os.name == "nt" or not path.stat().st_mode & 0o077)
    if len(key) != KEY_BYTES or not closed:
        raise BackendError(
            f"{path} is not a signing key that this user alone can read; remove it and build the engines again"
        )
    return key


def _key() -> bytes:
    """This user's signing key, made when it is first needed.

    Raises: BackendError if it cannot be made or read.
    """
    path = _key_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_new(path, lambda: os.urandom(KEY_BYTES))
        return _read_key(path)
    except OSError as error:
        raise BackendError(
            f"{path}: the key that signs engines cannot be kept: {error}. Set XDG_STATE_HOME to a folder of your own"
        ) from error
