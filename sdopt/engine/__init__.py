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
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Backend:
    """One row of the table; `module` has `open_component(bundle, name, threads, device, precision)`, `describe()`."""

    module: str
    library: str
    install: str
    precisions: tuple[str, ...]


BACKENDS = {  # best first
    "ort": Backend(
        "sdopt.engine.ort",
        "onnxruntime",
        'pip install "sdopt[cpu]" (or "sdopt[cuda]" with an NVIDIA GPU)',
        ("float32",),
    ),
    "openvino": Backend("sdopt.engine.openvino", "openvino", 'pip install "sdopt[openvino]"', ("float32", "bf16")),
}
PRECISIONS = ("auto", "float32", "bf16")
IN_FLOAT32 = ("text_encoder", "text_encoder_2")  # they run once a prompt: nothing to gain, and every step sees the loss


def installed_backends() -> tuple[str, ...]:
    """The backends whose library is installed, best first."""
    return tuple(name for name, entry in BACKENDS.items() if importlib.util.find_spec(entry.library))


def choose_backend(backend: str = "auto", precision: str = "auto") -> tuple[str, str]:
    """The backend and the precision that these words mean on this machine; "ort:cuda" also names the device.

    Where both are "auto", pictures are exact: float32, on the first backend that is installed. bf16 has to be asked
    for, and finds a backend that computes in it.
    Raises: UsageError for an unknown name; BackendError if the library is not installed.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is not known; there are {choices(precision, PRECISIONS)}")
    exact = "float32" if precision == "auto" else precision
    if backend == "auto":
        return _first_backend(exact), exact
    name = backend.partition(":")[0]
    if name not in BACKENDS:
        raise UsageError(f"backend {backend!r} is not known; there are auto, {choices(name, BACKENDS)}")
    entry = BACKENDS[name]
    if exact not in entry.precisions:
        able = ", ".join(other for other, e in BACKENDS.items() if exact in e.precisions)
        raise UsageError(f"backend {backend!r} computes in {', '.join(entry.precisions)}; for {exact} there is {able}")
    if name not in installed_backends():
        raise BackendError(f"backend {backend!r} needs {entry.library}: {entry.install}")
    return backend, exact


def _first_backend(precision: str) -> str:
    able = {name: entry for name, entry in BACKENDS.items() if precision in entry.precisions}
    found = [name for name in installed_backends() if name in able]
    if not found:
        ways = "; ".join(f"{name}: {entry.install}" for name, entry in able.items())
        raise BackendError(f"no engine library that computes in {precision} is installed. {ways}")
    return found[0]


def describe(name: str) -> dict[str, Any]:
    """What an installed backend can do here: its version, the precisions that it computes in natively, its devices."""
    entry: dict[str, Any] = importlib.import_module(BACKENDS[name].module).describe()
    return entry


def open_engine(
    bundle: Bundle, component: str, backend: str = "auto", *, threads: int | None = None, precision: str = "auto"
) -> Engine:
    """The engine of one component; `threads=None` takes what the machine gives to this process.

    In bf16, text encoders stay in float32.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads = {threads}; allowed is 1 or more, or None for all that this process may use")
    chosen, exact = choose_backend(backend, precision)
    name, _, device = chosen.partition(":")
    module = importlib.import_module(BACKENDS[name].module)
    engine: Engine = module.open_component(
        bundle, component, threads, device or None, "float32" if component in IN_FLOAT32 else exact
    )
    return engine
