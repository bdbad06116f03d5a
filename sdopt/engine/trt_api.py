"""A thin layer over TensorRT's Python bindings: 8.6, 10, 11 and TensorRT-RTX.

Features are found with `hasattr`; versions are never compared. Enum members are found by name, because their values
differ between versions. `tests/engine/test_trt_api.py` checks every call of the bindings, here and in `sdopt.build`,
against what each version offers.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sdopt.bundle.specs import Array
from sdopt.dataclass import dataclass
from sdopt.engine.cuda import Gpu
from sdopt.engine.cuda_errors import OutOfMemoryError
from sdopt.errors import BackendError

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> the module of its bindings
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
WEIGHTS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}  # what weights may be -> DataType
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")

Typed = tuple[str, Array]  # a key of WEIGHTS, and the numbers; those of bfloat16 as their bits


class TensorRT:
    """One imported library and its logger. The logger must outlive every object that was made with it."""

    def __init__(self, backend: str) -> None:
        self.backend, self.trt = backend, imported(backend)
        self.log = make_log(self.trt)
        self.version = str(self.trt.__version__)

    def runtime(self) -> Any:
        """A runtime on the calling thread's GPU. Without a driver its constructor ends the process."""
        runtime = self.trt.Runtime(self.log)
        runtime.engine_host_code_allowed = True  # version-compatible plans contain a runtime; plans are signed
        return runtime

    def load(self, runtime: Any, plan: Any, what: str) -> LoadedPlan:
        """The engine in the bytes of `plan`.

        Raises: OutOfMemoryError where the GPU is full; BackendError with what TensorRT logged.
        """
        self.log.clear()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            kind = OutOfMemoryError if "OutOfMemory" in self.log.errors() else BackendError
            raise kind(f"{what}: {self.backend} {self.version} cannot load the engine: {self.log.errors()}")
        return LoadedPlan(self.trt, engine, self.log, what)

    def stream_weights(self, loaded: LoadedPlan) -> None:
        """Keep the weights that fit on the GPU, and stream the others. To be called before any context is made.

        Ref: NVIDIA, ICudaEngine::setWeightStreamingBudget of 10.0: -1 is automatic, 0 disables streaming.
        """
        engine = loaded.engine
        if hasattr(engine, "get_weight_streaming_automatic_budget"):
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        else:
            engine.weight_streaming_budget = -1


def imported(backend: str) -> Any:
    """The module of a backend's library; importing it needs no driver.

    Raises: BackendError for a stub package, or a library that does not load.
    """
    try:
        return importlib.import_module(LIBRARIES[backend])
    except (ImportError, OSError) as error:
        raise BackendError(f"backend {backend!r}: {LIBRARIES[backend]} cannot be imported: {error}") from error


def make_log(trt: Any) -> Any:
    """A logger that keeps the last 20 errors instead of printing them."""
    names = {int(getattr(trt.ILogger, name)): name for name in SEVERITIES}

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: deque[str] = deque(maxlen=20)  # errors only: a build logs thousands of lines

        def log(self, severity: Any, msg: str) -> None:
            if names[int(severity)].endswith("ERROR"):
                self._lines.append(msg)

        def clear(self) -> None:
            self._lines.clear()

        def errors(self) -> str:
            """The errors since `clear`, as one text."""
            return " | ".join(self._lines) or "no reason given"

    return Log()


@dataclass(frozen=True)
class LoadedPlan:
    """A deserialized engine: its tensors, its profiles and its contexts. `what` is its name in messages."""

    trt: Any
    engine: Any
    log: Any
    what: str

    def names(self, inputs: bool) -> Iterator[str]:
        """The names of its inputs, or of its outputs."""
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            if (self.engine.get_tensor_mode(name).name == "INPUT") is inputs:
                yield name

    def dtype(self, name: str) -> str:
        """NumPy's name of a tensor's dtype."""
        return DTYPES[self.engine.get_tensor_dtype(name).name]

    @property
    def profiles(self) -> int:
        """How many profiles the engine has."""
        return int(self.engine.num_optimization_profiles)

    def runtime_config(self) -> Any:
        """How contexts are made; None if the library cannot be told.

        TensorRT-RTX compiles kernels for the shapes of a context, and runs fallback kernels until they are compiled.
        EAGER compiles all of them before the first run, so a graph never captures a fallback kernel.
        """
        if not hasattr(self.engine, "create_runtime_config"):
            return None
        runtime_config = self.engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(
            self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        strategies = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None:
            runtime_config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return runtime_config

    def context(self, config: Any = None) -> Context:
        """A context without memory of its own, made as `runtime_config` says.

        Raises: OutOfMemoryError if TensorRT makes none: then memory is short.
        """
        self.log.clear()
        if config is not None:
            context = self.engine.create_execution_context(config)
        elif hasattr(self.trt, "ExecutionContextAllocationStrategy"):
            context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = self.engine.create_execution_context_without_device_memory()
        if context is None:
            raise OutOfMemoryError(
                f"{self.what}: TensorRT makes no execution context for this engine. Most often the GPU's memory is "
                f"full. TensorRT says: {self.log.errors()}"
            )
        return Context(self.engine, context, self.log, self.what)

    def refit(self, changed: Iterable[tuple[str, Typed]], as_built: Callable[[str], Typed | None]) -> None:
        """Give weights other numbers, before the first context is made.

        `changed`: by the names of the ONNX graph. TensorRT may have joined one of them with others, and then needs
        these too: `as_built` has their numbers.
        Raises: OutOfMemoryError where the GPU is full; BackendError with what TensorRT logged.
        """
        self.log.clear()
        refitter = self.trt.Refitter(self.engine, self.log)
        arrays: dict[str, Array] = {}  # TensorRT copies none of them: they live until it is done

        def give(name: str, typed: Typed | None) -> None:
            if typed is None or name in arrays:
                raise self._not_refitted(f"needs {name or 'a weight without a name'!r} to change its weights")
            kind, arrays[name] = typed
            if not refitter.set_named_weights(name, self._weights(kind, arrays[name])):
                raise self._not_refitted(f"does not take {kind} numbers for {name!r}")

        for name, typed in changed:
            give(name, typed)
        while missing := refitter.get_missing_weights():
            for name in missing:
                give(name, as_built(name))
        if not refitter.refit_cuda_engine():
            raise self._not_refitted("does not change its weights")

    def _weights(self, kind: str, array: Array) -> Any:
        """TensorRT's view of an array; NumPy has no bfloat16."""
        if kind != "bfloat16":
            return self.trt.Weights(array)
        return self.trt.Weights(getattr(self.trt.DataType, WEIGHTS[kind]), array.ctypes.data, array.size)

    def _not_refitted(self, what: str) -> BackendError:
        kind = OutOfMemoryError if "OutOfMemory" in self.log.errors() else BackendError
        return kind(f"{self.what}: TensorRT {what}: {self.log.errors()}")

    def layers(self) -> str:
        """The engine's layers as JSON; empty if the library has no inspector.

        Raises: BackendError with what TensorRT logged if its inspector fails.
        """
        if not hasattr(self.engine, "create_engine_inspector"):
            return ""
        self.log.clear()
        inspector = self.engine.create_engine_inspector()
        layers = inspector and inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        if not layers:
            raise BackendError(f"{self.what}: TensorRT's inspector tells nothing of this engine: {self.log.errors()}")
        return str(layers)


@dataclass(frozen=True)
class Context:
    """TensorRT's execution context: choose a profile, shapes and addresses, then `enqueue`."""

    engine: Any
    context: Any
    log: Any
    what: str

    def prepare(self, profile: int, shapes: Mapping[str, tuple[int, ...]], stream: int) -> int:
        """Choose the profile, then the shapes of all inputs. Returns the bytes of scratch memory that they need."""
        self.log.clear()
        done = self.context.set_optimization_profile_async(profile, stream)
        for name, shape in shapes.items():
            done = done and self.context.set_input_shape(name, shape)
        if not done:
            raise self._refused(f"takes its profile {profile} not for {dict(shapes)}")
        most = int(self._largest_scratch())
        if not hasattr(self.context, "update_device_memory_size_for_shapes"):
            return most
        needed = int(self.context.update_device_memory_size_for_shapes())
        if not needed and most:  # TensorRT returns 0 for a failure, or if no shape needs any
            raise self._refused(f"does not tell how much memory it needs for {dict(shapes)}")
        return needed

    def _largest_scratch(self) -> int:
        """Bytes of scratch memory that are enough for all shapes."""
        if hasattr(self.engine, "device_memory_size_v2"):
            return self.engine.device_memory_size_v2
        return self.engine.device_memory_size

    def _refused(self, what: str) -> BackendError:
        return BackendError(f"{self.what}: TensorRT {what}; build the engine again. It says: {self.log.errors()}")

    def scratch(self, address: int, nbytes: int) -> None:
        """Use the scratch memory at this address."""
        if hasattr(self.context, "set_device_memory"):
            self.context.set_device_memory(address, nbytes)
        else:
            self.context.device_memory = address

    def bind(self, name: str, address: int) -> None:
        """Let the engine read or write tensor `name` at this address."""
        if not self.context.set_tensor_address(name, address):
            raise self._refused(f"refuses the address {address} for {name!r}")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; all inputs must have theirs."""
        return tuple(self.context.get_tensor_shape(name))

    def capturable(self, stream: int) -> bool:
        """Whether a run can become a graph. If the library cannot tell, the capture itself will."""
        is_capturable = getattr(self.context, "is_stream_capturable", None)
        return is_capturable is None or bool(is_capturable(stream))

    def enqueue(self, stream: int) -> None:
        """Queue one run."""
        if not self.context.execute_async_v3(stream):
            raise self._refused("did not queue the run")


def environment(lib: TensorRT, gpu: Gpu | None, options: Mapping[str, Any]) -> dict[str, str]:
    """What an engine depends on besides its sources, as a build with these options records it.

    An engine needs the TensorRT version, the GPU and the driver that it was built with. With `version_compatible` it
    runs on every release of the same major version, with `hardware_compatible` on every GPU from Ampere on.
    TensorRT-RTX compiles for the GPU when an engine is loaded, so its engines run on every GPU that it knows.
    """
    version = lib.version.split(".")[0] + ".x" if options.get("version_compatible") else lib.version
    recorded = {lib.trt.__name__: version}
    capabilities = getattr(lib.trt, "ComputeCapability", None)
    if capabilities is not None:
        known = [member[2:] for member in capabilities.__members__ if member.startswith("SM")]
        if gpu is None or gpu.compute_capability.replace(".", "") in known:
            return {**recorded, "compute capability": " ".join(known)}
        return {**recorded, "compute capability": gpu.compute_capability}
    if gpu is None:
        raise BackendError(f"{lib.trt.__name__} builds engines on the GPU that will run them, and there is none here")
    recorded["driver"] = f"CUDA {gpu.driver // 1000}"
    if options.get("hardware_compatible") and float(gpu.compute_capability) >= 8:
        return {**recorded, "GPU": "Ampere or newer"}
    return {**recorded, "GPU": gpu.name, "compute capability": gpu.compute_capability}
