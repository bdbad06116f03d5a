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
import operator
import shlex
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from sdopt.bundle.files import ModelFolder
from sdopt.bundle.joined import depth_of, engine_of
from sdopt.bundle.precision import precision_word
from sdopt.bundle.specs import Array, TensorSpec
from sdopt.bundle.weights import Overlay
from sdopt.dataclass import dataclass
from sdopt.engine import store
from sdopt.engine.names import BackendName, PrecisionName
from sdopt.errors import BackendError, BundleError, UsageError, choices, install, refuse_no_switch, refuse_other, shown


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
        """Queue call `k`, with row k of every table and these inputs; other inputs keep their values."""
        ...

    def fetch(self, name: str) -> Array:
        """An output of the latest call; this waits for it."""
        ...

    def put(self, name: str, array: Array) -> None:
        """Change an input of the next call, also a carried one."""
        ...

    def feed(self, output: str, to: Run, name: str) -> None:
        """Let every later launch copy `output` to the input `name` of another engine's run, on the device.

        Raises: UsageError if shapes or dtypes differ, or the two runs are not on one device.
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
        """A run whose inputs begin as `arrays`, or as zeros if not given; call k takes row k of each table."""
        ...


@dataclass(frozen=True)
class Backend:
    """One row of the table; `module` has `open_component(bundle, name, options)` and `describe(backend)`.

    A backend with empty `precisions` runs only engines that `sdopt build` made, in the precision they were built in.
    """

    module: str
    library: str
    install: str
    precisions: tuple[str, ...]


@dataclass(frozen=True)
class EngineOptions:
    """How a component is opened: the backend's name, device, precision and threads.

    `trust`: also load engines that somebody else built. `cache`: keep what the library makes of the graph for the next
    process (see `sdopt.engine.cache`). `built`: which precision an engine of `sdopt build` must have; "" takes the
    newest engine of any precision. `overlay`: other numbers for some of its weights.
    """

    backend: str
    device: str | None = None
    precision: str = "fp32"
    threads: int | None = None
    trust: bool = False
    cache: bool = True
    built: str = ""
    overlay: Overlay | None = None


TRT = "sdopt.engine.trt"
BACKENDS = {  # best first
    "ort": Backend(
        "sdopt.engine.ort",
        "onnxruntime",
        f"{install('cpu')}, or the extra cuda with an NVIDIA GPU",
        ("fp32",),
    ),
    "openvino": Backend("sdopt.engine.openvino", "openvino", install("openvino"), ("fp32", "bf16")),
    "tensorrt": Backend(TRT, "tensorrt", f"{install('tensorrt')}, then `sdopt build BUNDLE --backend tensorrt`", ()),
    "tensorrt-rtx": Backend(
        TRT, "tensorrt_rtx", f"{install('tensorrt-rtx')}, then `sdopt build BUNDLE --backend tensorrt-rtx`", ()
    ),
}
ON_ITS_OWN = {word for entry in BACKENDS.values() for word in entry.precisions}  # without `sdopt build`
MAX_THREADS = 1024  # of one engine
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8", "fp8", "int8-weights")
ON_CPUS = ("int8", "int8-weights")  # what OpenVINO runs after a build
# the components that run as the denoiser; the first one built is used
UNETS = ("unet_step", "unet_step_alone", "unet", "unet_controlled", "unet_ip_adapter", "transformer")
IN_FP32 = ("text_encoder", "text_encoder_2")  # they run once a prompt: nothing to gain, and every step sees the loss


def installed_backends() -> tuple[str, ...]:
    """The backends whose library is installed, best first."""
    return tuple(name for name, entry in BACKENDS.items() if importlib.util.find_spec(entry.library))


def choose_backend(
    backend: str = "auto", precision: str = "auto", bundle: ModelFolder | None = None
) -> tuple[str, str]:
    """The backend and the precision that these words mean on this machine; "ort:cuda" also names the device.

    If both are "auto", pictures are exact: fp32, on the first backend that is installed. bf16 is used only if the
    caller names it; "auto" is then a backend that computes in it. A named backend also accepts a precision that it has
    engines of `bundle` in.
    Raises: UsageError for an unknown name; BackendError if the library is not installed.
    """
    refuse_other("backend", backend, str, f"are auto, {', '.join(BACKENDS)}")
    refuse_other("precision", precision, str, f"are {', '.join(PRECISIONS)}")
    word = precision_word(precision)
    exact = "fp32" if word == "auto" else word
    if exact not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is not known; there are {choices(precision, PRECISIONS)}")
    if backend == "auto":
        ours = [name for name in installed_backends() if exact not in ON_ITS_OWN and _is_built(bundle, name, exact)]
        return ours[0] if ours else _first_backend(exact), exact
    name, colon, device = backend.partition(":")
    if name not in BACKENDS or (colon and not device):
        raise UsageError(f"backend {backend!r} is not known; there are auto, {choices(name, BACKENDS)}")
    entry = BACKENDS[name]
    if name not in installed_backends() and (word == "auto" or exact in entry.precisions):
        raise BackendError(f"backend {backend!r} needs {entry.library}: {entry.install}")
    if word == "auto" and not entry.precisions:
        return backend, "auto"
    if exact not in entry.precisions and not _is_built(bundle, backend, exact):
        raise UsageError(_not_in(backend, exact, bundle))
    return backend, exact


def _is_built(bundle: ModelFolder | None, backend: str, precision: str) -> bool:
    """Whether a bundle has engines of a backend in a precision."""
    name = backend.partition(":")[0]
    if bundle is None or name not in installed_backends():
        return False
    return bool(store.built_components(bundle, name, _provider(backend), precision))


def _not_in(backend: str, precision: str, bundle: ModelFolder | None) -> str:
    """The error text for a precision that a backend neither computes in nor has engines of: what to do instead."""
    name = backend.partition(":")[0]
    entry = BACKENDS[name]
    path = "BUNDLE" if bundle is None else shlex.quote(str(bundle.path))
    build = f"sdopt build {path} --backend {backend} --precision {precision}"
    if not entry.precisions:
        built = () if bundle is None else sorted({*store.built_components(bundle, name).values()})
        existing = f"there is {', '.join(built)}" if built else "there is none"
        return (
            f"precision {precision!r}: {backend} runs what was built, and in {precision} nothing is; {existing}. "
            f"Leave --precision out, or build it: {build}"
        )
    ways = [other for other, e in BACKENDS.items() if precision in e.precisions]
    if name == "ort" or (name == "openvino" and precision in ON_CPUS):
        ways.append(f"what is built: {build}")
    elif not ways:
        ways.append(f"what is built: sdopt build {path} --backend tensorrt --precision {precision}")
    return (
        f"backend {backend!r} computes in {', '.join(entry.precisions)}; for {precision} there is {', or '.join(ways)}"
    )


def _first_backend(precision: str) -> str:
    """The best installed backend that computes in `precision`.

    Raises: BackendError if there is none.
    """
    able = {name: entry for name, entry in BACKENDS.items() if precision in entry.precisions}
    installed = [name for name in installed_backends() if name in able]
    if not installed:
        ways = "; ".join(f"{name}: {entry.install}" for name, entry in able.items())
        builder = "openvino" if precision in ON_CPUS else "tensorrt"
        ways = ways or f"Build it: sdopt build BUNDLE --backend {builder} --precision {precision}, then name --backend"
        raise BackendError(f"no engine library that computes in {precision} is installed. {ways}")
    return installed[0]


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
    description: dict[str, Any] = _module(name).describe(name)
    return description


def open_engine(
    bundle: ModelFolder,
    component: str,
    backend: BackendName | str = "auto",
    *,
    threads: int | None = None,
    precision: PrecisionName | str = "auto",
    trust: bool = False,
    cache: bool = True,
    overlay: Overlay | None = None,
) -> Engine:
    """The engine of one component; `threads=None` takes what the machine gives to this process.

    In bf16, text encoders stay in fp32. `trust` also loads engines that somebody else built; for `cache` see
    `EngineOptions`. `overlay`: other numbers for some of its weights.
    Raises: UsageError for an argument that is not allowed; BackendError, BundleError.
    """
    refuse_no_bundle(bundle)
    refuse_other("component", component, str, "are texts: " + ", ".join(bundle.components))
    refuse_no_switch(trust=trust, cache=cache)
    threads = checked_threads(threads)
    if overlay is not None and not overlay.key(component):
        overlay = None
    chosen, exact = choose_backend(backend, precision, bundle)
    name, _, device = chosen.partition(":")
    module = _module(name)
    own = "fp32" if component in IN_FP32 else exact
    wanted = _wanted(chosen, exact if backend == "auto" else precision)
    options = EngineOptions(name, device or None, own, threads, trust, cache, wanted, overlay)
    engine: Engine = module.open_component(bundle, component, options)
    try:
        bundle.refuse_changed(component)  # it may have been replaced while it was read
    except BundleError:
        engine.close()
        raise
    return engine


def refuse_no_bundle(bundle: object) -> None:
    """Raises: UsageError unless it is an opened bundle."""
    refuse_other("bundle", bundle, ModelFolder, "are opened bundles: sdopt.Bundle.open(path)")


def checked_threads(threads: Any) -> int | None:
    """The number of threads as a plain int; NumPy's integers are welcome.

    Raises: UsageError for anything else.
    """
    if threads is None:
        return None
    try:
        number = 0 if isinstance(threads, bool) else operator.index(threads)
    except Exception:  # any object may be given, and may raise anything when it is looked at
        number = 0
    if not 1 <= number <= MAX_THREADS:
        text = f"threads = {shown(threads)}; allowed are 1 to {MAX_THREADS}, or None for all that this process may use"
        raise UsageError(text, "threads")
    return number


def built_components(
    bundle: ModelFolder, backend: str, precision: str = "auto", trust: bool = False, overlay: Overlay | None = None
) -> dict[str, str]:
    """The components that this backend runs from engines of `sdopt build`, each with the engine's precision.

    Only engines in the chosen precision count; for "auto" that is fp32 on a CPU, and any elsewhere. A backend that runs
    nothing but built engines takes one in another precision for a component that has none in the chosen one.
    Somebody else's engines count if `trust`. Without it, a backend that can run the bundle's own graphs passes them
    over; another one names them in its error. `overlay`: counts engines that were built with it too.
    """
    name = backend.partition(":")[0]
    provider, wanted = _provider(backend), _wanted(backend, precision)
    if BACKENDS[name].precisions:
        built = store.built_components(bundle, name, provider, wanted, not trust, overlay)
        return dict.fromkeys(built, precision_word(precision)) if name == "openvino" and precision != "auto" else built
    matching = store.built_components(bundle, name, provider, wanted, overlay=overlay)
    return {**store.built_components(bundle, name, provider, overlay=overlay), **matching}


def told_precision(bundle: ModelFolder, built: Mapping[str, str], own: str, cache_depth: int = 0) -> str:
    """The precision of a picture as text: that of the UNet, then in brackets the components with another one.

    `built`: component -> precision of its built engine. `own`: the precision of the other components, or "auto" where
    the backend does not run them. `cache_depth`: of the feature cache that the picture is made with, or 0.
    """
    if not built:
        return own
    unets = [*(name for name in UNETS if name in built), *(name for name in built if engine_of(name) in UNETS)]
    fitting = [name for name in unets if depth_of(name)[1] == cache_depth]
    unet = next(iter(fitting or (unets if own == "auto" else ())), "unet")
    main = built.get(unet, own)
    precisions = {name: built.get(name, own) for name in bundle.components if name not in UNETS}
    if own == "bf16" != main:  # beside int8
        precisions |= {name: "fp32" for name in IN_FP32 if name in precisions and name not in built}
    others = [f"{name} {word}" for name, word in precisions.items() if word not in ("auto", main)]
    return f"{main} ({', '.join(others)})" if others else main


def unbuilt_precision(backend: str, precision: str) -> str:
    """The precision in which a backend computes a component of which nothing is built, where `precision` is wanted."""
    name = backend.partition(":")[0]
    able = BACKENDS[name].precisions
    if not able or precision in able:
        return precision
    return "bf16" if precision in ON_CPUS and "bf16" in describe(name)["precisions"] else "fp32"


def _wanted(backend: str, precision: str) -> str:
    """The precision that an engine of `sdopt build` must have to be taken; "" where any will do."""
    if precision != "auto":
        word = precision_word(precision)
        return "fp32" if word == "bf16" and backend.partition(":")[0] == "openvino" else word  # its graphs serve both
    return "fp32" if _provider(backend) == "CPU" else ""


def _provider(backend: str) -> str:
    """What runs the graphs of ONNX Runtime and OpenVINO here, "CPU" or "CUDA"; "" for other backends."""
    name, _, device = backend.partition(":")
    if name == "openvino":
        return "CPU"
    return _module(name).find_device(device or None).provider if name == "ort" else ""
