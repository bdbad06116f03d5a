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
from types import TracebackType
from typing import Protocol

from sdopt.bundle import Bundle
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


# name -> (module with `open_component(bundle, name, threads, device)`, the library it needs, how to get it), best first
BACKENDS = {
    "ort": ("sdopt.engine.ort", "onnxruntime", 'pip install "sdopt[cpu]" (or "sdopt[cuda]" with an NVIDIA GPU)'),
}


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


def open_engine(bundle: Bundle, component: str, backend: str = "auto", *, threads: int | None = None) -> Engine:
    """The engine of one component; `threads=None` takes what the machine gives to this process."""
    if threads is not None and threads < 1:
        raise UsageError(f"threads = {threads}; allowed is 1 or more, or None for all that this process may use")
    name, _, device = choose_backend(backend).partition(":")
    module = importlib.import_module(BACKENDS[name][0])
    engine: Engine = module.open_component(bundle, component, threads, device or None)
    return engine
