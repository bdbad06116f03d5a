"""The one thin layer over TensorRT's Python bindings: 8.6, 10, 11 and TensorRT-RTX, told apart by what they have.

Libraries are imported by name, features found with `hasattr`, enum members by name: their values differ between
versions, and versions are never compared. `tests/engine/test_trt_api.py` holds every call made here and in
`sdopt.build.trt_build` against what each version's bindings offer.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdopt.engine.cuda import Gpu, OutOfMemoryError
from sdopt.errors import BackendError

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> the module of its bindings
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


class TensorRT:
    """One imported library with its logger, which must outlive all that it made."""

    def __init__(self, backend: str) -> None:
        self.backend, self.trt = backend, imported(backend)
        self.log = make_log(self.trt)
        self.version = str(self.trt.__version__)

    def runtime(self) -> Any:
        """A runtime on the calling thread's GPU: without a driver its constructor would end the process."""
        runtime = self.trt.Runtime(self.log)
        runtime.engine_host_code_allowed = True  # version-compatible plans carry a runtime; plans are signed
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
        """Keep as many weights on the GPU as there is room for, and stream the others; before any context is made.

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
    """A logger that keeps the last errors instead of printing them."""
    names = {int(getattr(trt.ILogger, name)): name for name in SEVERITIES}

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: deque[str] = deque(maxlen=20)  # errors, and nothing else: a build logs thousands of lines

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
    """A deserialized engine: its tensors, its profiles and contexts to run it in. `what`: its name, for messages."""

    trt: Any
    engine: Any
    log: Any
    what: str

    def names(self, inputs: bool) -> Iterator[str]:
        """The tensors that go in, or that come out."""
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            if (self.engine.get_tensor_mode(name).name == "INPUT") is inputs:
                yield name

    def dtype(self, name: str) -> str:
        """NumPy's name of a tensor's type."""
        return DTYPES[self.engine.get_tensor_dtype(name).name]

    @property
    def profiles(self) -> int:
        """How many profiles the engine has."""
        return int(self.engine.num_optimization_profiles)

    def runtime_config(self) -> Any:
        """How contexts are made, where the library can be told; else None.

        TensorRT-RTX compiles kernels for the shapes of a context: EAGER has them all before the first run, so that a
        graph never captures the fallback kernels that run while others are compiled.
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

        Raises: OutOfMemoryError if there is none, which means that memory is short.
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

    def layers(self) -> str:
        """What the engine's layers are, as JSON; empty where the library cannot tell.

        Raises: BackendError with what TensorRT logged where its inspector fails.
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
    """One execution context: a profile, shapes and addresses, and then `enqueue`. What is refused says why."""

    engine: Any
    context: Any
    log: Any
    what: str

    def prepare(self, profile: int, shapes: Mapping[str, tuple[int, ...]], stream: int) -> int:
        """Choose the profile, then the shapes of all inputs; bytes of scratch memory that they need."""
        self.log.clear()
        done = self.context.set_optimization_profile_async(profile, stream)
        for name, shape in shapes.items():
            done = done and self.context.set_input_shape(name, shape)
        if not done:
            raise self._refused(f"takes its profile {profile} not for {dict(shapes)}")
        most = getattr(self.engine, "device_memory_size_v2", None)
        most = int(self.engine.device_memory_size if most is None else most)
        if not hasattr(self.context, "update_device_memory_size_for_shapes"):
            return most
        needed = int(self.context.update_device_memory_size_for_shapes())
        if not needed and most:  # 0 is TensorRT's word for a failure, unless no shape needs any
            raise self._refused(f"does not tell how much memory it needs for {dict(shapes)}")
        return needed

    def _refused(self, what: str) -> BackendError:
        return BackendError(f"{self.what}: TensorRT {what}; build the engine again. It says: {self.log.errors()}")

    def scratch(self, address: int, nbytes: int) -> None:
        """Use this scratch memory."""
        if hasattr(self.context, "set_device_memory"):
            self.context.set_device_memory(address, nbytes)
        else:
            self.context.device_memory = address

    def bind(self, name: str, address: int) -> None:
        """Read or write a tensor there."""
        if not self.context.set_tensor_address(name, address):
            raise self._refused(f"refuses the address {address} for {name!r}")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, once all inputs have theirs."""
        return tuple(self.context.get_tensor_shape(name))

    def capturable(self, stream: int) -> bool:
        """Whether a run can become a graph, where the library can tell; elsewhere the capture itself tells."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream))

    def enqueue(self, stream: int) -> None:
        """Queue one run."""
        if not self.context.execute_async_v3(stream):
            raise self._refused("did not queue the run")


def environment(lib: TensorRT, gpu: Gpu | None, options: Mapping[str, Any]) -> dict[str, str]:
    """What an engine depends on beside its sources, as a build with these options records it.

    An engine runs where its build's TensorRT, GPU and driver are. With `version_compatible` any build of the same major
    version will do, with `hardware_compatible` any GPU from Ampere on. TensorRT-RTX compiles for the GPU when it loads.
    """
    version = lib.version.split(".")[0] + ".x" if options.get("version_compatible") else lib.version
    told = {lib.trt.__name__: version}
    capabilities = getattr(lib.trt, "ComputeCapability", None)
    if capabilities is not None:
        known = [n[2:] for n in capabilities.__members__ if n.startswith("SM")]
        takes = gpu is None or gpu.compute_capability.replace(".", "") in known
        return {**told, "compute capability": " ".join(known) if takes or gpu is None else gpu.compute_capability}
    if gpu is None:
        raise BackendError(f"{lib.trt.__name__} builds engines on the GPU that will run them, and there is none here")
    told["driver"] = f"CUDA {gpu.driver // 1000}"
    if options.get("hardware_compatible") and float(gpu.compute_capability) >= 8:
        return {**told, "GPU": "Ampere or newer"}
    return {**told, "GPU": gpu.name, "compute capability": gpu.compute_capability}
