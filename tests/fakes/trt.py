"""A TensorRT whose plans are ONNX graphs that ONNX Runtime runs in the memory of the fake GPU.

It plays one of `FLAVOURS`, and refuses what that version refuses, with an error in its log:

| what                                                                | how it is refused                            |
|---------------------------------------------------------------------|----------------------------------------------|
| a run without scratch memory, or with less than its shapes need     | execute_async_v3 gives False                 |
| a run whose inputs have no shape: a profile chosen after them       | execute_async_v3 gives False                 |
| a run inside of a capture before one outside, as it is bound        | the capture is invalid                       |
| scratch memory for shapes that are not known                        | update_device_memory_size_for_shapes gives 0 |
| a profile that another context uses, in 8.6 without profile sharing | set_optimization_profile_async gives False   |
| weights, or a context, for which the GPU has no memory              | None                                         |
| a capture while a fallback kernel runs (TensorRT-RTX, LAZY)         | is_stream_capturable gives False             |
| a context that is dropped while its work is queued                  | the GPU's context is lost: 700               |

In 8.6 a layer whose precision is not set may become half when the flag FP16 is set: here it always does, and the
inspector tells.
Ref: NVIDIA TensorRT, C++ API, IExecutionContext and IRuntimeConfig; sections "CUDA graphs", "Dynamic shapes".
"""

from __future__ import annotations

import itertools
import json
import weakref
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime

from sdopt.bundle.specs import Array
from sdopt.engine.trt_api import SEVERITIES
from tests.fakes.gpu import ILLEGAL_ADDRESS, Refused, Simulator

CONTEXT_BYTES, MOST_SCRATCH = 4096, 8000
SHARES = True  # whether a plan of 8.6 that was built with profile sharing has it
FLAVOURS = {  # what it plays -> the module's name; every one calls its version "fake"
    "10": "tensorrt",
    "10.0": "tensorrt",
    "8.6": "tensorrt",
    "rtx": "tensorrt_rtx",
}


class DataType(IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, INT64, BF16 = 0, 1, 2, 3, 4, 5, 8, 7


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = 0, 1, 2


TYPES = {
    "tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64, "tensor(bool)": DataType.BOOL,
}  # fmt: skip
NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT32: np.int32, DataType.INT64: np.int64,
         DataType.BOOL: np.bool_}  # fmt: skip
WORDS = {DataType.FLOAT: "Row major linear FP32", DataType.HALF: "Row major linear FP16 format",
         DataType.BF16: "Row major linear BFloat16"}  # fmt: skip


def fake_tensorrt(simulator: Simulator, flavour: str = "10") -> ModuleType:
    """A module that is TensorRT of this flavour to the code under test."""
    name = FLAVOURS[flavour]
    trt = ModuleType(name)
    trt.__spec__ = ModuleSpec(name, None)
    library = Library(simulator, flavour, trt)
    names = ["DETAILED", "LAYER_NAMES_ONLY", "NONE"]
    trt.__dict__.update(
        __version__="fake",
        fake=library,
        ILogger=type("ILogger", (), {name: i for i, name in enumerate(SEVERITIES)}),
        Runtime=lambda log: FakeRuntime(library, log),
        DataType=DataType, TensorIOMode=TensorIOMode,
        ProfilingVerbosity=IntEnum("ProfilingVerbosity", {n: i for i, n in enumerate(names)}),
        LayerInformationFormat=IntEnum("LayerInformationFormat", {"ONELINE": 0, "JSON": 1}),
        MemoryPoolType=IntEnum("MemoryPoolType", {"WORKSPACE": 0}),
    )  # fmt: skip
    if flavour != "8.6":
        trt.__dict__["ExecutionContextAllocationStrategy"] = IntEnum("Strategy", {"STATIC": 0, "USER_MANAGED": 2})
    if flavour == "rtx":
        members = {"LAZY": 0, "EAGER": 1, "NONE": 2}
        trt.__dict__["DynamicShapesKernelSpecializationStrategy"] = IntEnum("Specialization", members)
        trt.__dict__["ComputeCapability"] = IntEnum("ComputeCapability", {"SM80": 80, "SM90": 90, "SM120": 120})
    from tests.fakes import trt_builder, trt_refit

    trt_builder.add_to(trt, library)
    trt_refit.add_to(trt, library)
    return trt


class Library:
    """What all objects of one fake library share. `jit` counts what TensorRT-RTX compiled when a context was made."""

    def __init__(self, simulator: Simulator, flavour: str, trt: ModuleType) -> None:
        self.simulator, self.flavour, self.trt = simulator, flavour, trt
        self.jit = 0
        self.numbers = itertools.count()

    def complain(self, log: Any, text: str) -> None:
        log.log(SEVERITIES.index("ERROR"), text)


def fake_plan(graph: Path | bytes, profiles: list[dict[str, Any]], **more: Any) -> bytes:
    """The bytes of a plan: a graph, and for each profile the smallest, best and largest shape of each input."""
    inside = graph if isinstance(graph, bytes) else b""
    path = "" if inside else str(graph)
    return json.dumps({"graph": path, "profiles": profiles, **more}).encode() + b"\n" + inside


ALL_OLD = ("8.6", "10.0")
ABSENT = {  # member -> the flavours that lack it
    "create_execution_context": ("8.6",),
    "create_execution_context_without_device_memory": ("10.0", "10", "rtx"),
    "device_memory_size": ("10", "rtx"),
    "device_memory_size_v2": ALL_OLD,
    "create_runtime_config": ALL_OLD,
    "get_weight_streaming_automatic_budget": ALL_OLD,
    "weight_streaming_budget_v2": ALL_OLD,
    "weight_streaming_budget": ("8.6", "10", "rtx"),
    "update_device_memory_size_for_shapes": ("8.6",),
    "set_device_memory": ALL_OLD,
    "is_stream_capturable": ("8.6", "10.0", "10"),
    "dynamic_shapes_kernel_specialization_strategy": ("8.6", "10.0", "10"),
    "create_runtime_cache": ("8.6", "10.0", "10"),
    "set_runtime_cache": ("8.6", "10.0", "10"),
    "mark_weights_refittable": ALL_OLD,
}


class Flavoured:
    """An object that has the members of its flavour, and no others."""

    flavour = ""

    def __getattribute__(self, name: str) -> Any:
        if name in ABSENT and self.flavour in ABSENT[name]:
            raise AttributeError(f"TensorRT {self.flavour} has no {name}")
        return super().__getattribute__(name)


class FakeRuntime:
    def __init__(self, library: Library, log: Any) -> None:
        self._library, self._log = library, log

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        header, _, inside = bytes(plan).partition(b"\n")
        try:
            entry = json.loads(header)
        except ValueError:
            self._library.complain(self._log, "Serialization assertion: magicTagRead == kMAGIC_TAG failed")
            return None
        nbytes = int(entry.get("weights", 1 << 20))
        streams = bool(entry.get("streams"))
        if not self._library.simulator.hold("weights", 0 if streams else nbytes):
            self._library.complain(self._log, "[defaultAllocator.cpp] Cuda error: 2 (OutOfMemory)")
            return None
        return FakeEngine(self._library, self._log, inside or entry["graph"], entry, 0 if streams else nbytes)


class FakeEngine(Flavoured):
    """ICudaEngine."""

    device_memory_size = device_memory_size_v2 = MOST_SCRATCH

    def __init__(self, library: Library, log: Any, graph: Any, entry: dict[str, Any], nbytes: int) -> None:
        self.flavour = library.flavour
        self.library, self.log, self.entry, self.profiles = library, log, entry, entry["profiles"]
        self.open(graph)
        self.input_names = [n.name for n in self.session.get_inputs()]
        self.output_names = [n.name for n in self.session.get_outputs()]
        self.types = {n.name: TYPES[n.type] for n in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.tensors = [*self.input_names, *self.output_names]
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(self.profiles)
        self.streamable_weights_size = int(entry.get("weights", 1 << 20)) if entry.get("streams") else 0
        self.weight_streaming_budget_v2 = self.streamable_weights_size  # all of it on the GPU
        self.weight_streaming_budget = 0  # 10.0: no streaming
        self.used: dict[int, int] = {}  # profile -> the context that has it
        weakref.finalize(self, library.simulator.let_go, "weights", nbytes)

    def open(self, graph: Any) -> None:
        """Compute with this graph from now on: the bytes of a file, or its path."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.graph = graph
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def get_tensor_name(self, i: int) -> str:
        return self.tensors[i]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.input_names else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.types[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[profile][name]

    def get_weight_streaming_automatic_budget(self) -> int:
        return min(self.streamable_weights_size, self.library.simulator.cudaMemGetInfo()[1] // 2)

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig(self.library)

    def create_engine_inspector(self) -> FakeInspector:
        return FakeInspector(self.entry)

    def create_execution_context_without_device_memory(self) -> Any:
        return self._context(None)

    def create_execution_context(self, given: Any) -> Any:
        strategy = given.strategy if isinstance(given, FakeConfig) else given
        assert strategy.name == "USER_MANAGED"
        return self._context(given if isinstance(given, FakeConfig) else None)

    def _context(self, config: FakeConfig | None) -> Any:
        nbytes = CONTEXT_BYTES + self.resident()
        if not self.library.simulator.hold("contexts", nbytes):
            self.library.complain(self.log, "[executionContext.cpp] Cuda error: 2 (OutOfMemory)")
            return None
        known = config.cache.known if config is not None and config.cache is not None else set[str]()
        if self.flavour == "rtx" and self.entry["graph"] not in known:
            self.library.jit += 1
            known.add(self.entry["graph"])
        context = FakeContext(self, config)
        weakref.finalize(context, self.library.simulator.let_go, "contexts", nbytes)
        return context

    def resident(self) -> int:
        """Bytes of streamable weights that a context keeps on the GPU."""
        size = self.streamable_weights_size
        if self.flavour != "10.0":
            return min(self.weight_streaming_budget_v2, size) if size else 0
        automatic = min(size, self.library.simulator.cudaMemGetInfo()[1] // 2)
        return {0: size, -1: automatic}.get(self.weight_streaming_budget, self.weight_streaming_budget)


class FakeConfig(Flavoured):
    """IRuntimeConfig."""

    def __init__(self, library: Library) -> None:
        self.flavour, self.strategy, self.cache = library.flavour, None, None
        if library.flavour == "rtx":
            lazy = library.trt.DynamicShapesKernelSpecializationStrategy.LAZY
            self.dynamic_shapes_kernel_specialization_strategy = lazy

    strategy: Any
    cache: FakeCache | None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache()

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        self.cache = cache
        return True


class FakeCache:
    """IRuntimeCache: the names of what was compiled."""

    def __init__(self) -> None:
        self.known = set[str]()

    def deserialize(self, blob: Any) -> bool:
        try:
            self.known = set(json.loads(bytes(blob)))
        except ValueError:
            return False
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.known)).encode()


class FakeInspector:
    def __init__(self, entry: dict[str, Any]) -> None:
        self._layers = entry.get("layers", {})

    def get_engine_information(self, form: Any) -> str:
        return json.dumps({"Layers": [
            {"Name": name, "Outputs": [{"Name": name, "Format/Datatype": WORDS[DataType[kind]]}]}
            for name, kind in self._layers.items() if DataType[kind] in WORDS
        ]})  # fmt: skip


class FakeContext(Flavoured):
    """IExecutionContext; what it is bound to counts when it is told to run, as in CUDA."""

    def __init__(self, engine: FakeEngine, config: FakeConfig | None) -> None:
        self.flavour, self.engine, self.addresses = engine.flavour, engine, dict[str, int]()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.memory, self.needed, self.profile, self.warm = (0, 0), MOST_SCRATCH, 0, False
        self._key = next(engine.library.numbers)
        strategy = (
            None if self.flavour != "rtx" or config is None else config.dynamic_shapes_kernel_specialization_strategy
        )
        self._lazy = self.flavour == "rtx" and (strategy is None or strategy.name == "LAZY")
        weakref.finalize(self, _release_profile, engine.used, self._key)

    def is_stream_capturable(self, stream: int) -> bool:
        return not self._lazy

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        used = self.engine.used
        shares = self.flavour != "8.6" or (SHARES and self.engine.entry.get("sharing", False))
        if not shares and used.get(profile, self._key) != self._key:
            self._complain(f"Profile {profile} has been chosen by another context")
            return False
        _release_profile(used, self._key)
        used[profile] = self._key
        self.profile, self.shapes, self.warm = profile, {}, False
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            self._complain(f"Set dimensions are {list(shape)}; expected {name} in profile {self.profile}: {low}-{high}")
            return False
        self.shapes[name], self.warm = tuple(shape), False
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            if set(self.engine.input_names) - set(self.shapes):
                return (-1,)
            zeros = {n: np.zeros(s, NUMPY[self.engine.types[n]]) for n, s in self.shapes.items()}
            outputs = self.engine.session.run(self.engine.output_names, zeros)
            self.shapes |= {n: o.shape for n, o in zip(self.engine.output_names, outputs, strict=True)}
        return self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.types or address % 256:
            self._complain(f"Given invalid tensor name or address: {name} {address}")
            return False
        self.addresses[name], self.warm = address, False
        return True

    def execute_async_v3(self, stream: int) -> bool:
        simulator, missing = self.engine.library.simulator, set(self.engine.input_names) - set(self.shapes)
        unbound = set(self.engine.tensors) - set(self.addresses)
        if missing or unbound:
            self._complain(f"Error Code 3: no shape of {sorted(missing)}, no address of {sorted(unbound)}")
            return False
        if not self.memory[0] or self.memory[1] < self.needed:
            self._complain(f"Error Code 3: device memory of {self.memory[1]} bytes, {self.needed} needed")
            return False
        if simulator.capturing(stream) and (
            not self.warm or self.engine.resident() < self.engine.streamable_weights_size
        ):
            simulator.invalidate(stream)  # it allocates, and loads modules
        addresses, memory = dict(self.addresses), self.memory
        shapes = {n: self.get_tensor_shape(n) for n in self.engine.tensors}
        self.warm = True
        alive = weakref.ref(self)

        def run() -> None:
            context = alive()
            if context is None:
                simulator.lose()
                raise Refused(ILLEGAL_ADDRESS)
            context.run(addresses, memory, shapes)

        return simulator.compute(stream, run)

    def run(self, addresses: dict[str, int], memory: tuple[int, int], shapes: dict[str, tuple[int, ...]]) -> None:
        self.engine.library.simulator.at(*memory).fill(0x7F)  # scratch memory is scratched
        given = {n: self._array(n, addresses, shapes) for n in self.engine.input_names}
        outputs = self.engine.session.run(self.engine.output_names, given)
        for name, array in zip(self.engine.output_names, outputs, strict=True):
            np.copyto(self._array(name, addresses, shapes), array)

    def _array(self, name: str, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> Array:
        dtype, shape = np.dtype(NUMPY[self.engine.types[name]]), shapes[name]
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return self.engine.library.simulator.at(addresses[name], nbytes).view(dtype).reshape(shape)

    def update_device_memory_size_for_shapes(self) -> int:
        if set(self.engine.input_names) - set(self.shapes):
            self._complain("updateDeviceMemorySizeForShapes: not all input shapes are known")
            return 0
        self.needed = 1000 * self.shapes[self.engine.input_names[0]][0]
        return self.needed

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.memory, self.warm = (address, nbytes), False

    @property
    def device_memory(self) -> int:
        return self.memory[0]

    @device_memory.setter
    def device_memory(self, address: int) -> None:
        nbytes = next((len(b) for a, b in self.engine.library.simulator.blocks.items() if a == address), 0)
        self.memory, self.warm = (address, nbytes), False

    def _complain(self, text: str) -> None:
        self.engine.library.complain(self.engine.log, text)


def _release_profile(used: dict[int, int], key: int) -> None:
    for profile in [p for p, owner in used.items() if owner == key]:
        del used[profile]
