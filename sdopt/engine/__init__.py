"""Engines: a component of a bundle, loaded on a device and called with NumPy arrays by name.

    unet = open_engine(bundle, "unet")
    noise = unet(sample=x, timestep=t, encoder_hidden_states=e)["noise_pred"]

The contract, on every backend (`tests/engine/contract.py`): unknown or missing names, wrong dtypes and wrong shapes
raise UsageError before anything runs; an output belongs to the caller; a closed engine refuses to be called.
A new backend is one file here and one row in `BACKENDS`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, runtime_checkable

from sdopt.bundle import Bundle
from sdopt.engine import plans
from sdopt.errors import BackendError, UsageError, choices
from sdopt.specs import Array, TensorSpec


class Engine(Protocol):
    """A loaded component: NumPy in, NumPy out, by name."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...
    def __call__(self, **arrays: Array) -> dict[str, Array]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Engine: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Run(Protocol):
    """Calls of one engine, one after the other, whose carried tensors stay on its device."""

    def launch(self, k: int, **arrays: Array) -> None:
        """Queue call `k`: row k of every table, these inputs anew, the others as they are."""
        ...

    def fetch(self, name: str) -> Array:
        """An output of the latest call; this waits for it."""
        ...

    def put(self, name: str, array: Array) -> None:
        """Change an input of the next call, also a carried one."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Carrying(Protocol):
    """An engine that carries outputs over to its next call: `carry` maps each to the input that it becomes."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def carry(self) -> Mapping[str, str]: ...
    def begin(self, arrays: Mapping[str, Array], tables: Mapping[str, Array]) -> Run:
        """A run that begins with `arrays`, and with zeros where none is given; call k takes row k of each table."""
        ...


TRT = "sdopt.engine.trt"
# name -> (module with `open_component`, the library it needs, how to get it); "auto" is the first that is installed
BACKENDS = {
    "ort": ("sdopt.engine.ort", "onnxruntime", 'pip install "sdopt[cpu]" (or "sdopt[cuda]" with an NVIDIA GPU)'),
    "tensorrt": (TRT, "tensorrt", 'pip install "sdopt[tensorrt]", then `sdopt build BUNDLE --backend tensorrt`'),
    "tensorrt-rtx": (
        TRT, "tensorrt_rtx", 'pip install "sdopt[tensorrt-rtx]", then `sdopt build BUNDLE --backend tensorrt-rtx`',
    ),
}  # fmt: skip


def installed_backends() -> tuple[str, ...]:
    """The backends whose library is installed, best first."""
    return tuple(name for name, (_, library, _) in BACKENDS.items() if importlib.util.find_spec(library))


def choose_backend(backend: str = "auto") -> str:
    """The name of the backend that `backend` means on this machine; "ort:cpu" and "ort:cuda" also name the device.

    Raises: UsageError for an unknown name; BackendError if its library is not installed.
    """
    if backend == "auto":
        found = installed_backends()
        if not found:
            ways = "; ".join(f"{name}: {how}" for name, (_, _, how) in BACKENDS.items())
            raise BackendError(f"no engine library is installed. {ways}")
        return found[0]
    name = backend.partition(":")[0]
    if name not in BACKENDS:
        raise UsageError(f"backend {backend!r} is not known; there are auto, {choices(name, BACKENDS)}")
    if name not in installed_backends():
        raise BackendError(f"backend {backend!r} needs {BACKENDS[name][1]}: {BACKENDS[name][2]}")
    return backend


def open_engine(
    bundle: Bundle, component: str, backend: str = "auto", *, threads: int | None = None, trust: bool = False
) -> Engine:
    """The engine of one component; `threads=None` takes what the machine gives to this process.

    `trust` also loads engines that somebody else built.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads = {threads}; allowed is 1 or more, or None for all that this process may use")
    name, _, device = choose_backend(backend).partition(":")
    module = importlib.import_module(BACKENDS[name][0])
    engine: Engine = module.open_component(bundle, component, threads, device or None, trust, name)
    return engine


def built_components(bundle: Bundle, backend: str) -> tuple[str, ...]:
    """The components that `sdopt build` made engines of, for this backend."""
    return plans.built_components(bundle, backend.partition(":")[0])
