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
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from sdopt.bundle.files import Bundle
from sdopt.bundle.precision import precision_word
from sdopt.bundle.specs import Array, TensorSpec
from sdopt.engine import store
from sdopt.errors import BackendError, UsageError, choices


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

    def feed(self, output: str, to: Run, name: str) -> None:
        """From now on each launch gives `output` to input `name` of another engine's run, on the device.

        Raises: UsageError where they do not have the same shape and dtype, or are not on one device.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class Carrying(Protocol):
    """An engine that carries outputs over to its next call: `carry` maps each to the input that it becomes."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def carry(self) -> Mapping[str, str]: ...
    def begin(self, arrays: Mapping[str, Array], tables: Mapping[str, Array]) -> Run:
        """A run that begins with `arrays`, and with zeros where none is given; call k takes row k of each table."""
        ...


@dataclass(frozen=True)
class Backend:
    """One row of the table; `module` has `open_component(bundle, name, options)` and `describe(backend)`.

    Without `precisions` a backend runs engines that `sdopt build` made, in the precision that they were built in.
    """

    module: str
    library: str
    install: str
    precisions: tuple[str, ...]


@dataclass(frozen=True)
class EngineOptions:
    """How a component is opened: the backend's name, device and precision, threads, and whose engines to trust.

    `cache`: keep what the library makes of the graph for the next process (see `sdopt.engine.cache`). `built`: the
    precision of the engines of `sdopt build` that are taken; "": the newest, whatever it is.
    """

    backend: str
    device: str | None = None
    precision: str = "fp32"
    threads: int | None = None
    trust: bool = False
    cache: bool = True
    built: str = ""


TRT = "sdopt.engine.trt"
BACKENDS = {  # best first
    "ort": Backend(
        "sdopt.engine.ort",
        "onnxruntime",
        'pip install "sdopt[cpu]" (or "sdopt[cuda]" with an NVIDIA GPU)',
        ("fp32",),
    ),
    "openvino": Backend("sdopt.engine.openvino", "openvino", 'pip install "sdopt[openvino]"', ("fp32", "bf16")),
    "tensorrt": Backend(
        TRT, "tensorrt", 'pip install "sdopt[tensorrt]", then `sdopt build BUNDLE --backend tensorrt`', ()
    ),
    "tensorrt-rtx": Backend(
        TRT, "tensorrt_rtx", 'pip install "sdopt[tensorrt-rtx]", then `sdopt build BUNDLE --backend tensorrt-rtx`', ()
    ),
}
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
UNETS = ("unet_step", "unet_step_alone", "unet")  # what is taken as the UNet, if it is built
IN_FP32 = ("text_encoder", "text_encoder_2")  # they run once a prompt: nothing to gain, and every step sees the loss


def installed_backends() -> tuple[str, ...]:
    """The backends whose library is installed, best first."""
    return tuple(name for name, entry in BACKENDS.items() if importlib.util.find_spec(entry.library))


def choose_backend(backend: str = "auto", precision: str = "auto", bundle: Bundle | None = None) -> tuple[str, str]:
    """The backend and the precision that these words mean on this machine; "ort:cuda" also names the device.

    Where both are "auto", pictures are exact: fp32, on the first backend that is installed. bf16 has to be asked
    for, and finds a backend that computes in it; so has what was built for `bundle` in another precision.
    Raises: UsageError for an unknown name; BackendError if the library is not installed.
    """
    word = precision_word(precision)
    exact = "fp32" if word == "auto" else word
    if exact not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is not known; there are {choices(precision, PRECISIONS)}")
    if backend == "auto":
        return _first_backend(exact), exact
    name = backend.partition(":")[0]
    if name not in BACKENDS:
        raise UsageError(f"backend {backend!r} is not known; there are auto, {choices(name, BACKENDS)}")
    entry = BACKENDS[name]
    if name not in installed_backends() and (word == "auto" or exact in entry.precisions):
        raise BackendError(f"backend {backend!r} needs {entry.library}: {entry.install}")
    if word == "auto" and not entry.precisions:
        return backend, "auto"
    if exact not in entry.precisions and not _is_built(bundle, backend, exact):
        raise UsageError(_not_in(backend, exact, bundle))
    return backend, exact


def _is_built(bundle: Bundle | None, backend: str, precision: str) -> bool:
    """Whether a bundle has engines of a backend in a precision."""
    name = backend.partition(":")[0]
    if bundle is None or name not in installed_backends():
        return False
    return bool(store.built_components(bundle, name, _provider(backend), precision))


def _not_in(backend: str, precision: str, bundle: Bundle | None) -> str:
    """What to do about a precision that a backend neither computes in nor has engines of, as a sentence."""
    name = backend.partition(":")[0]
    entry = BACKENDS[name]
    path = "BUNDLE" if bundle is None else shlex.quote(str(bundle.path))
    build = f"sdopt build {path} --backend {backend} --precision {precision}"
    if not entry.precisions:
        there = () if bundle is None else sorted({*store.built_components(bundle, name).values()})
        told = f"there is {', '.join(there)}" if there else "there is none"
        return (
            f"precision {precision!r}: {backend} runs what was built, and in {precision} nothing is; {told}. "
            f"Leave --precision out, or build it: {build}"
        )
    able = [other for other, e in BACKENDS.items() if precision in e.precisions]
    ways = [*able, *([f"what is built: {build}"] if name == "ort" else [])] or [
        f"what is built: sdopt build {path} --backend tensorrt --precision {precision}"
    ]
    return (
        f"backend {backend!r} computes in {', '.join(entry.precisions)}; for {precision} there is {', or '.join(ways)}"
    )


def _first_backend(precision: str) -> str:
    able = {name: entry for name, entry in BACKENDS.items() if precision in entry.precisions}
    found = [name for name in installed_backends() if name in able]
    if not found:
        ways = "; ".join(f"{name}: {entry.install}" for name, entry in able.items())
        ways = ways or f"Build it: sdopt build BUNDLE --backend tensorrt --precision {precision}, then name --backend"
        raise BackendError(f"no engine library that computes in {precision} is installed. {ways}")
    return found[0]


def _module(name: str) -> Any:
    """The module of a backend.

    Raises: BackendError if its library is there and cannot be loaded.
    """
    entry = BACKENDS[name]
    try:
        return importlib.import_module(entry.module)
    except (ImportError, OSError) as error:
        raise BackendError(f"backend {name!r}: {entry.library} cannot be loaded: {error}. {entry.install}") from error


def describe(name: str) -> dict[str, Any]:
    """What an installed backend can do here: its version, the precisions that it computes in natively, its devices."""
    entry: dict[str, Any] = _module(name).describe(name)
    return entry


def open_engine(
    bundle: Bundle,
    component: str,
    backend: str = "auto",
    *,
    threads: int | None = None,
    precision: str = "auto",
    trust: bool = False,
    cache: bool = True,
) -> Engine:
    """The engine of one component; `threads=None` takes what the machine gives to this process.

    In bf16, text encoders stay in fp32. `trust` also loads engines that somebody else built; for `cache` see
    `EngineOptions`.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads = {threads}; allowed is 1 or more, or None for all that this process may use")
    chosen, exact = choose_backend(backend, precision, bundle)
    name, _, device = chosen.partition(":")
    module = _module(name)
    own = "fp32" if component in IN_FP32 else exact
    options = EngineOptions(name, device or None, own, threads, trust, cache, _wanted(chosen, precision))
    engine: Engine = module.open_component(bundle, component, options)
    return engine


def built_components(bundle: Bundle, backend: str, precision: str = "auto") -> dict[str, str]:
    """The components that are run as `sdopt build` made them, for this backend, each with its precision.

    A backend that computes by itself takes those in the precision that is asked for, on a CPU in fp32 unless
    another is; one that runs nothing else takes what there is for a component that has none in it.
    """
    name = backend.partition(":")[0]
    provider, wanted = _provider(backend), _wanted(backend, precision)
    found = store.built_components(bundle, name, provider, wanted)
    return found if BACKENDS[name].precisions else {**store.built_components(bundle, name, provider), **found}


def told_precision(bundle: Bundle, built: Mapping[str, str], own: str) -> str:
    """The precision of a picture in a word, that of its UNet; behind it components that have another.

    `built`: component -> precision of the engine that is taken; `own`: of what is not built, "auto" if that does not
    run.
    """
    if not built:
        return own
    unet = next((name for name in UNETS if name in built), "unet")
    found = {name: built.get(name, own) for name in (unet, *(n for n in bundle.components if n not in UNETS))}
    main = found.pop(unet)
    others = [f"{name} {word}" for name, word in found.items() if word not in ("auto", main)]
    return f"{main} ({', '.join(others)})" if others else main


def _wanted(backend: str, precision: str) -> str:
    """The precision that an engine of `sdopt build` must have to be taken; "" where any will do."""
    if precision != "auto":
        return precision_word(precision)
    return "fp32" if _provider(backend) == "CPU" else ""


def _provider(backend: str) -> str:
    """The part of ONNX Runtime that runs its engines here, "CPU" or "CUDA"; "" for other backends."""
    name, _, device = backend.partition(":")
    return _module(name).find_device(device or None).provider if name == "ort" else ""
