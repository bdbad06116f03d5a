"""ONNX Runtime: the portable engine, on the CPU or, with onnxruntime-gpu, on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import onnxruntime

from sdopt.bundle.disk import user_folder
from sdopt.bundle.files import Bundle, Component
from sdopt.bundle.specs import Array, TensorSpec, check_begin, check_inputs
from sdopt.engine import EngineOptions, Run, cache
from sdopt.engine.cores import thread_limit
from sdopt.engine.cuda import sees_gpu
from sdopt.engine.store import GRAPH, built_components, usable
from sdopt.errors import BackendError, BundleError, UsageError

ort = cast(Any, onnxruntime)  # its bindings are not typed
ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}

# device -> its provider and options; best first. cuDNN chooses convolutions by its rules; trying each shape is slow.
# TF32 is off, so that float32 graphs give the pictures of a CPU; graphs in a half type do not use it.
Providers = list[tuple[str, dict[str, str]]]
PROVIDERS = {
    "cuda": (
        "CUDAExecutionProvider",
        {"cudnn_conv_algo_search": "HEURISTIC", "cudnn_conv_use_max_workspace": "1", "use_tf32": "0"},
    ),
    "cpu": ("CPUExecutionProvider", dict[str, str]()),
    "tensorrt": ("TensorrtExecutionProvider", {"trt_engine_cache_enable": "1"}),  # only if named
}


@dataclass(frozen=True)
class Device:
    """Where ONNX Runtime computes: "cpu", "cuda" or "tensorrt", and which GPU."""

    kind: str
    index: int = 0

    @property
    def memory(self) -> str:
        """What ONNX Runtime calls the device's memory."""
        return "cpu" if self.kind == "cpu" else "cuda"

    @property
    def provider(self) -> str:
        """Whose engines of `sdopt build` it takes: "CPU" or "CUDA"."""
        return self.memory.upper()


def find_device(device: str | None) -> Device:
    """The device that "cpu", "cuda", "cuda:1" or "tensorrt" names; None is a GPU if this onnxruntime can use one.

    Raises: UsageError for another word; BackendError if this onnxruntime cannot compute there.
    """
    available: list[str] = ort.get_available_providers()
    if device is None:
        has_gpu = PROVIDERS["cuda"][0] in available and sees_gpu()
        return Device("cuda" if has_gpu else "cpu")
    kind, colon, number = device.partition(":")
    numbered = not colon or (kind != "cpu" and number.isdecimal())
    if kind not in PROVIDERS or not numbered:
        known = ", ".join(f"ort:{name}" for name in PROVIDERS)
        raise UsageError(f"backend 'ort:{device}' is not known; there are {known}, and ort:cuda:1 for the second GPU")
    if PROVIDERS[kind][0] not in available:
        raise BackendError(
            f"backend 'ort:{device}': this onnxruntime has {', '.join(available)}. "
            'For NVIDIA GPUs: pip uninstall onnxruntime && pip install "sdopt[cuda]"'
        )
    return Device(kind, int(number or 0))


def open_component(bundle: Bundle, name: str, options: EngineOptions) -> OrtEngine:
    """The engine of component `name`; its graph must take and give what the manifest says.

    A graph that `sdopt build --backend ort` made for this kind of device, in the wanted precision, replaces the
    bundle's own.
    """
    device = find_device(options.device)
    if name not in built_components(bundle, options.backend, device.provider, options.built):
        return _own_graph(bundle, name, options, device)
    here = {"provider": device.provider}
    engines = usable(bundle, name, options.backend, lambda record: here, options.trust, device.provider, options.built)
    newest = engines[0]
    for file in newest.record.files:
        newest.checked(file)
    component = Component(name, newest.folder / GRAPH, newest.record.inputs, newest.record.outputs)
    return OrtEngine(component, options.threads, device, carry=newest.record.carry)


def _own_graph(bundle: Bundle, name: str, options: EngineOptions, device: Device) -> OrtEngine:
    """The engine of the bundle's own graph; on a CPU as ONNX Runtime optimised it for an earlier process.

    The cache keeps the fused nodes, and the weights as float32 in the kernels' own order. Weights are mapped from the
    file, so processes share them, and nothing is converted a second time.
    """
    if device.kind != "cpu":
        return OrtEngine(bundle.component(name), options.threads, device)
    component = bundle.component(name, "ort")

    def opened(component: Component, optimise: bool = True, keep: Path | None = None) -> OrtEngine:
        return OrtEngine(component, options.threads, device, optimise=optimise, keep=keep)

    if not options.cache or not cache.available():
        return opened(component)
    return cache.load(
        cache.entry(bundle, component, "ort", {"onnxruntime": ort.__version__}),
        2 * bundle.nbytes(name),
        kept=lambda folder: opened(replace(component, graph=folder / GRAPH), optimise=False),
        new=lambda folder: opened(component, keep=folder and folder / GRAPH),
    )


def describe(backend: str) -> dict[str, Any]:
    """Version, precisions and devices, for `sdopt doctor`."""
    available: list[str] = ort.get_available_providers()
    devices = [device for device, (provider, _) in PROVIDERS.items() if provider in available]
    return {"version": ort.__version__, "precisions": ["fp32"], "devices": devices}


class OrtEngine:
    """One ONNX Runtime session behind the Engine contract, with runs whose carried tensors stay on its device.

    For `optimise`, `keep` and `lean` see `_session`.
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
    ) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self.carry: Mapping[str, str] = carry or {}
        self._device = device if isinstance(device, Device) else find_device(device)
        self._session: Any = _session(component.graph, threads, self._device, optimise, keep, lean)
        _check_signature(component, "input", self.inputs, self._session.get_inputs())
        _check_signature(component, "output", self.outputs, self._session.get_outputs())
        self._output_names = [s.name for s in self.outputs]

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        session = self._open()
        check_inputs(self.name, self.inputs, arrays)
        return dict(zip(self._output_names, session.run(self._output_names, arrays), strict=True))

    def begin(self, arrays: Mapping[str, Array], tables: Mapping[str, Array]) -> OrtRun:
        """A run whose inputs are `arrays`, rows of `tables`, and zeros.

        Raises: UsageError for an unknown name, a wrong dtype or a wrong shape; before anything runs.
        """
        dims = check_begin(self.name, self.inputs, arrays, tables)
        values = {s.name: np.zeros(s.sized(dims), s.dtype) for s in self.inputs if s.name not in arrays}
        return OrtRun(self._open(), self._device, self.carry, {**values, **arrays}, tables)

    def _open(self) -> Any:
        if self._session is None:
            raise UsageError(f"{self.name}: this engine is closed; open it again with open_engine")
        return self._session

    def close(self) -> None:
        """Free the session and its memory."""
        self._session = None

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
        session: Any,
        device: Device,
        carry: Mapping[str, str],
        arrays: Mapping[str, Array],
        tables: Mapping[str, Array],
    ) -> None:
        self._session, self._device, self._carry, self._tables = session, device, carry, tables
        self._values = {name: self._placed(array) for name, array in arrays.items()}
        self._outputs: dict[str, Any] = {}
        self._feeds = list[tuple[str, OrtRun, str]]()

    def launch(self, k: int, **arrays: Array) -> None:
        for name, array in arrays.items():
            self.put(name, array)
        for name, table in self._tables.items():
            self.put(name, table[k])
        binding = self._session.io_binding()
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        names = [node.name for node in self._session.get_outputs()]
        for name in names:
            binding.bind_output(name, self._device.memory, self._device.index)
        self._session.run_with_iobinding(binding)
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


def providers(device: Device) -> Providers:
    """The execution providers of a session on `device`; ONNX Runtime adds the CPU's for nodes that they cannot run."""
    name, options = PROVIDERS[device.kind]
    if device.kind == "cpu":
        return [(name, options)]
    options = {**options, "device_id": str(device.index)}
    if device.kind == "cuda":
        return [(name, options)]
    plans = user_folder("XDG_CACHE_HOME", ".cache") / "ort-tensorrt"  # not the folder where a process happens to run
    return [(name, {**options, "trt_engine_cache_path": str(plans)}), *providers(Device("cuda", device.index))]


def _preload() -> None:
    """Load the libraries of CUDA and cuDNN from their pip packages, if the system has none.

    Without them ONNX Runtime only warns, and computes on the CPU.
    """
    if hasattr(ort, "preload_dlls"):  # 1.21 and newer
        ort.preload_dlls()


def _refuse_fallback(session: Any, device: Device) -> None:
    """Raises: BackendError if a session does not compute where it was asked to."""
    wanted, active = PROVIDERS[device.kind][0], session.get_providers()
    if wanted not in active:
        raise BackendError(
            f"backend 'ort:{device.kind}': ONNX Runtime {ort.__version__} could not start its {wanted} and would "
            f"compute on {', '.join(active)} instead. Its libraries of CUDA and cuDNN are missing or too old, or the "
            'driver is: pip install "onnxruntime-gpu[cuda,cudnn]", see the warning above; or use --backend ort:cpu'
        )


def _session(
    graph: Path,
    threads: int | None,
    device: Device,
    optimise: bool = True,
    keep: Path | None = None,
    lean: bool = False,
) -> Any:
    """The session of a graph; with `keep`, the optimised graph is also written there, its weights beside it.

    Without `optimise` the graph runs as it is written, and its weights are mapped from their file. `lean` is for a few
    calls in little memory: it turns `optimise` off, does not copy weights into the kernels' own order, and gives memory
    back after each call.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or thread_limit()
    # Without this the threads of the last component keep spinning, and take the cores from the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A memory plan is made at the second run, beside the memory that the first run took, and saves no time.
    options.enable_mem_pattern = False
    if lean or not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if keep is not None:
        options.optimized_model_filepath = str(keep)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{keep.name}.data")
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    if device.kind != "cpu":
        _preload()
    try:
        session = ort.InferenceSession(graph, options, providers=providers(device))
    except Exception as error:  # the library raises its own classes for every kind of fault
        text = f"{graph}: ONNX Runtime {ort.__version__} cannot load it: {error}"
        if "opset" in str(error) or "NOT_IMPLEMENTED" in str(error):
            raise BackendError(f"{text}\nUpgrade onnxruntime, or export the bundle with --opset 18.") from error
        raise BundleError(text) from error
    _refuse_fallback(session, device)
    return session


def _check_signature(component: Component, kind: str, specs: tuple[TensorSpec, ...], nodes: list[Any]) -> None:
    wanted = {s.name: (s.dtype, len(s.shape)) for s in specs}
    actual = {n.name: (ONNX_TYPES.get(n.type, n.type), len(n.shape)) for n in nodes}
    if wanted != actual:
        raise BundleError(f"{component.graph}: its {kind}s are {actual}, the manifest says {wanted}; export it again")
