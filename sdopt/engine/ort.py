"""ONNX Runtime: the portable engine, on the CPU or on a device of `sdopt.engine.ort_device`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, cast

import numpy as np
import onnxruntime

from sdopt.bundle.files import Component, ModelFolder
from sdopt.bundle.specs import Array, TensorSpec, check_begin, check_inputs
from sdopt.bundle.weights import Overlay, Weights
from sdopt.engine import EngineOptions, Run, cache
from sdopt.engine.built import built_graph
from sdopt.engine.cores import thread_limit
from sdopt.engine.failures import failure, memory_is_full, shapes_of
from sdopt.engine.ort_device import PROVIDERS, Device, find_device, preload, providers, refuse_fallback
from sdopt.engine.ort_weights import OwnWeights, changes, own_weights, takes
from sdopt.engine.process import Native, library_call
from sdopt.engine.store import GRAPH
from sdopt.errors import BackendError, BundleError, UsageError

ort = cast(Any, onnxruntime)  # its bindings are not typed
ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}

INT8_WEIGHTS = "int8-weights"
FATAL = 4  # ONNX Runtime's level for what it cannot raise; below it are errors, warnings, information


def open_component(bundle: ModelFolder, name: str, options: EngineOptions) -> OrtEngine:
    """The engine of component `name`; its graph must take and give what the manifest says.

    A graph that `sdopt build --backend ort` made for this kind of device, in the wanted precision, replaces the
    bundle's own.
    """
    device = find_device(options.device)
    built = built_graph(bundle, name, options, device.provider)
    if built is None:
        return _own_graph(bundle, name, options, device)
    newest, component = built
    own = None
    if options.overlay is not None:
        own = own_weights(*changes(component, options.overlay), widen=False)
    products = newest.precision != INT8_WEIGHTS
    return OrtEngine(component, options.threads, device, carry=newest.record.carry, own=own, int8_products=products)


def _own_graph(bundle: ModelFolder, name: str, options: EngineOptions, device: Device) -> OrtEngine:
    """The engine of the bundle's own graph; on a CPU as ONNX Runtime optimised it for an earlier process.

    The cache keeps the fused nodes, and the weights as float32 in the kernels' own order. Weights are mapped from the
    file, so processes share them, and nothing is converted a second time.
    """
    if options.overlay is not None:
        return _overlaid(bundle, name, options, options.overlay, device)
    if device.kind != "cpu":
        return OrtEngine(bundle.component(name), options.threads, device)
    component = bundle.component(name, "ort")

    def opened(component: Component, optimise: bool = True, keep: Path | None = None) -> OrtEngine:
        return OrtEngine(component, options.threads, device, optimise=optimise, keep=keep)

    if not options.cache or not cache.usable(bundle):
        return opened(component)
    return cache.load(
        bundle,
        name,
        _entry(bundle, component),
        kept=lambda folder: opened(replace(component, graph=folder / GRAPH), optimise=False),
        new=lambda folder: opened(component, keep=folder and folder / GRAPH),
    )


def _entry(bundle: ModelFolder, component: Component) -> Path:
    return cache.entry(bundle, component, "ort", {"onnxruntime": ort.__version__})


def _overlaid(bundle: ModelFolder, name: str, options: EngineOptions, overlay: Overlay, device: Device) -> OrtEngine:
    """The engine of the bundle's own graph with the weights of an overlay.

    Where the graph that ONNX Runtime optimised for the bundle's own weights has all the weights that are changed, that
    graph is loaded, and nothing is optimised anew. If there is none yet, it is made first, for the next overlay too.
    """
    component = bundle.component(name, "ort" if device.kind == "cpu" else "")
    weights, changed = changes(component, overlay)
    if device.kind == "cpu" and options.cache and cache.usable(bundle):
        optimised = _optimised(bundle, component, options, device)
        there = Weights.of(optimised) if optimised else None
        same = takes(there, weights, changed) if there else None
        if optimised and there and same is not None:
            own = own_weights(there, same, widen=False)
            return OrtEngine(optimised, options.threads, device, optimise=False, own=own)
    return OrtEngine(component, options.threads, device, own=own_weights(weights, changed, widen=True))


def _optimised(bundle: ModelFolder, component: Component, options: EngineOptions, device: Device) -> Component | None:
    """The component with the graph that ONNX Runtime optimised, from the cache; None if nothing can be kept."""

    def made(folder: Path | None) -> bool:
        if folder is not None:
            OrtEngine(component, options.threads, device, keep=folder / GRAPH).close()
        return folder is not None

    entry = _entry(bundle, component)
    there = cache.load(bundle, component.name, entry, kept=lambda folder: True, new=made)
    return replace(component, graph=entry / GRAPH) if there and cache.is_sound(entry, bundle.paranoid) else None


def describe(backend: str) -> dict[str, Any]:
    """Version, precisions and devices, for `sdopt doctor`."""
    available: list[str] = ort.get_available_providers()
    devices = [device for device, entry in PROVIDERS.items() if entry.name in available]
    return {"version": ort.__version__, "precisions": ["fp32"], "devices": devices}


class OrtEngine:
    """One ONNX Runtime session behind the Engine contract, with runs whose carried tensors stay on its device.

    For `optimise`, `keep` and `lean` see `_session`. `int8_products`: the graph may multiply int8 with int8.
    """

    def __init__(
        self,
        component: Component,
        threads: int | None = None,
        device: Device | str | None = None,
        *,
        optimise: bool = True,
        keep: Path | None = None,
        lean: bool = False,
        carry: Mapping[str, str] | None = None,
        own: OwnWeights | None = None,
        int8_products: bool = True,
    ) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self.carry: Mapping[str, str] = carry or {}
        self._device = device if isinstance(device, Device) else find_device(device)
        with library_call():
            session = _session(component.graph, threads, self._device, optimise, keep, lean, own, int8_products)
        _check_signature(component, "input", self.inputs, session.get_inputs())
        _check_signature(component, "output", self.outputs, session.get_outputs())
        self._session = Native(self.name, session)
        self._output_names = [s.name for s in self.outputs]
        self._turn = Lock() if PROVIDERS[self._device.kind].one_call_at_a_time else nullcontext()

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        session = self._session.get()
        check_inputs(self.name, self.inputs, arrays)
        options = _run_options()
        try:
            with self._turn, library_call(lambda: setattr(options, "terminate", True)):
                results = session.run(self._output_names, arrays, options)
        except Exception as error:  # the library raises its own classes for every kind of fault
            raise failure(self.name, f"ONNX Runtime {ort.__version__}", shapes_of(arrays), error) from error
        return dict(zip(self._output_names, results, strict=True))

    def begin(self, arrays: Mapping[str, Array], tables: Mapping[str, Array]) -> OrtRun:
        """A run whose inputs are `arrays`, rows of `tables`, and zeros.

        Raises: UsageError for an unknown name, a wrong dtype or a wrong shape; before anything runs.
        """
        dims = check_begin(self.name, self.inputs, arrays, tables)
        values = {s.name: np.zeros(s.sized(dims), s.dtype) for s in self.inputs if s.name not in arrays}
        return OrtRun(self.name, self._session.get(), self._device, self.carry, {**values, **arrays}, tables)

    def close(self) -> None:
        """Free the session and its memory."""
        self._session.close()

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OrtRun:
    """Calls of a session in turn, its tensors bound where the session computes; see `sdopt.engine.Run`."""

    def __init__(
        self,
        component: str,
        session: Any,
        device: Device,
        carry: Mapping[str, str],
        arrays: Mapping[str, Array],
        tables: Mapping[str, Array],
    ) -> None:
        self._component, self._session = component, Native(component, session)
        self._device, self._carry, self._tables = device, carry, tables
        self._values = {name: self._placed(array) for name, array in arrays.items()}
        self._outputs: dict[str, Any] = {}
        self._feeds = list[tuple[str, OrtRun, str]]()

    def launch(self, k: int, **arrays: Array) -> None:
        for name, array in arrays.items():
            self.put(name, array)
        for name, table in self._tables.items():
            self.put(name, table[k])
        session, options = self._session.get(), _run_options()
        binding = session.io_binding()
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        names = [node.name for node in session.get_outputs()]
        for name in names:
            binding.bind_output(name, self._device.memory, self._device.index)
        try:
            with library_call(lambda: setattr(options, "terminate", True)):
                session.run_with_iobinding(binding, options)
        except Exception as error:  # the library raises its own classes for every kind of fault
            shapes = {name: value.shape() for name, value in self._values.items()}
            raise failure(self._component, f"ONNX Runtime {ort.__version__}", shapes, error) from error
        self._outputs = dict(zip(names, binding.get_outputs(), strict=True))
        self._values |= {name: self._outputs[output] for output, name in self._carry.items()}
        for output, run, name in self._feeds:
            run._values[name] = self._outputs[output]

    def fetch(self, name: str) -> Array:
        return self._outputs[name].numpy().copy()

    def put(self, name: str, array: Array) -> None:
        self._values[name] = self._placed(array)

    def feed(self, output: str, to: Run, name: str) -> None:
        if not isinstance(to, OrtRun) or to._device != self._device:
            raise UsageError(f"{output!r} cannot be given to a run on another device")
        self._feeds.append((output, to, name))

    def _placed(self, array: Array) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(np.array(array), self._device.memory, self._device.index)

    def close(self) -> None:
        self._values, self._outputs, self._feeds = {}, {}, []


def _run_options() -> Any:
    """The options of one run, in which ONNX Runtime logs no error that it raises too."""
    options = ort.RunOptions()
    options.log_severity_level = FATAL
    return options


def _session(
    graph: Path,
    threads: int | None,
    device: Device,
    optimise: bool = True,
    keep: Path | None = None,
    lean: bool = False,
    own: OwnWeights | None = None,
    int8_products: bool = True,
) -> Any:
    """The session of a graph; with `keep`, the optimised graph is also written there, its weights beside it.

    With `own`, some of its weights are others.

    Without `optimise` the graph runs as it is written, and its weights are mapped from their file. `lean` is for a few
    calls in little memory: it turns `optimise` off, does not copy weights into the kernels' own order, and gives memory
    back after each call.
    """
    options = ort.SessionOptions()
    # What fails is raised too, and its text must not reach a terminal unescaped. Why a GPU's provider does not start is
    # only logged, and has no texts of the bundle.
    options.log_severity_level = FATAL if device.kind == "cpu" else FATAL - 1
    options.intra_op_num_threads = threads or thread_limit()
    # Without this the threads of the last component keep spinning, and take the cores from the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A memory plan is made at the second run, beside the memory that the first run took, and saves no time.
    options.enable_mem_pattern = False
    # Beside weights in int8 it would round what they are multiplied with (level 4); level 1 computes in float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if lean or not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if keep is not None:
        options.optimized_model_filepath = str(keep)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{keep.name}.data")
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    # Processors without VNNI add int8 products in 16 bits, and a sum that is too large is wrong; with this it is not.
    # ONNX Runtime 1.32 then gives int8 weights that nothing in int8 multiplies a zero point of the wrong rank.
    if int8_products:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if device.kind != "cpu":
        preload()
    source: Any = graph
    if own is not None:
        source = own.content
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(own.folder))
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in own.external.values()]
        options.add_external_initializers(list(own.external), values)
    try:
        session = ort.InferenceSession(source, options, providers=providers(device))
    except Exception as error:  # the library raises its own classes for every kind of fault
        text = f"{graph}: ONNX Runtime {ort.__version__} cannot load it: {error}"
        if memory_is_full(error):
            raise BackendError(
                f'{text}\nThe memory of this process is full: try memory="low", or close others.'
            ) from error
        if "opset" in str(error) or "NOT_IMPLEMENTED" in str(error):
            raise BackendError(f"{text}\nUpgrade onnxruntime, or export the bundle with --opset 18.") from error
        raise BundleError(text) from error
    refuse_fallback(session, device)
    return session


def _check_signature(component: Component, kind: str, specs: tuple[TensorSpec, ...], nodes: list[Any]) -> None:
    wanted = {s.name: (s.dtype, len(s.shape)) for s in specs}
    actual = {n.name: (ONNX_TYPES.get(n.type, n.type), len(n.shape)) for n in nodes}
    if wanted != actual:
        raise BundleError(f"{component.graph}: its {kind}s are {actual}, the manifest says {wanted}; export it again")
