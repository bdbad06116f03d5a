"""The builder's half of the fake TensorRT: a parser, networks, configurations, and plans with the graph inside."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.fakes.trt import DataType, Flavoured, Library, fake_plan

FLAGS = {
    "8.6": ("FP16", "INT8", "REFIT", "TF32", "VERSION_COMPATIBLE", "OBEY_PRECISION_CONSTRAINTS"),
    "10.0": ("FP16", "BF16", "REFIT", "TF32", "VERSION_COMPATIBLE", "WEIGHT_STREAMING", "OBEY_PRECISION_CONSTRAINTS"),
    "10": (
        "FP16",
        "BF16",
        "REFIT",
        "TF32",
        "VERSION_COMPATIBLE",
        "WEIGHT_STREAMING",
        "OBEY_PRECISION_CONSTRAINTS",
        "REFIT_INDIVIDUAL",
    ),
    "rtx": ("REFIT", "REFIT_INDIVIDUAL", "TF32", "VERSION_COMPATIBLE", "WEIGHT_STREAMING", "REQUIRE_USER_ALLOCATION"),
}
KINDS = {
    1: DataType.FLOAT,
    10: DataType.HALF,
    16: DataType.BF16,
    6: DataType.INT32,
    7: DataType.INT64,
    9: DataType.BOOL,
}
LAYERS = {  # operator -> layer, where it is not the same word
    "Conv": "CONVOLUTION",
    "ConvTranspose": "DECONVOLUTION",
    "MatMul": "MATRIX_MULTIPLY",
    "Gemm": "MATRIX_MULTIPLY",
}
LAYER_TYPES = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "CONSTANT", "SHAPE", "CAST", "ELEMENTWISE")
LEAST_WORKSPACE = 1 << 20
UNKNOWN = {  # flavour -> operators that its parser does not know
    "8.6": ("Attention", "GroupNormalization", "RMSNormalization", "Gelu"),
    "10.0": ("Attention", "RMSNormalization"),
}


def add_to(trt: ModuleType, library: Library) -> None:
    """Give a fake library its builder."""
    flavour = library.flavour
    creation = {"EXPLICIT_BATCH": 0} if flavour == "8.6" else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    trt.__dict__.update(
        Builder=lambda log: FakeBuilder(library, log),
        OnnxParser=lambda network, log: FakeParser(library, network, log),
        NetworkDefinitionCreationFlag=IntEnum("NetworkDefinitionCreationFlag", creation),
        BuilderFlag=IntEnum("BuilderFlag", {n: i for i, n in enumerate(FLAGS[flavour])}),
        HardwareCompatibilityLevel=IntEnum("HardwareCompatibilityLevel", {"NONE": 0, "AMPERE_PLUS": 1}),
        PreviewFeature=IntEnum(
            "PreviewFeature",
            {"PROFILE_SHARING_0806": 0, "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805": 1}
            if flavour == "8.6" else {"PROFILE_SHARING_0806": 0},
        ),
        TacticSource=IntEnum("TacticSource", {"EDGE_MASK_CONVOLUTIONS": 3, "JIT_CONVOLUTIONS": 4}),
        LayerType=IntEnum("LayerType", {name: i for i, name in enumerate(LAYER_TYPES)}),
        IProgressMonitor=type("IProgressMonitor", (), {}),
        IStreamWriter=type("IStreamWriter", (), {}),
    )  # fmt: skip


class FakeBuilder:
    def __init__(self, library: Library, log: Any) -> None:
        self.library, self.log = library, log
        if library.flavour in ("10", "rtx"):
            self.build_serialized_network_to_stream = self._to_stream

    def create_network(self, flags: int = 0) -> FakeNetwork:
        return FakeNetwork(self.library)

    def create_builder_config(self) -> FakeConfig:
        return FakeConfig(self.library)

    def create_optimization_profile(self) -> FakeProfile:
        return FakeProfile()

    def build_serialized_network(self, network: FakeNetwork, config: FakeConfig) -> bytes | None:
        if config.workspace is not None and config.workspace < LEAST_WORKSPACE:
            self.library.complain(self.log, "Could not find any implementation for node {ForeignNode[a...b]}")
            return None
        if not network.layers or not config.profiles:
            self.library.complain(self.log, "Network must have at least one output and one optimization profile")
            return None
        if {"REQUIRE_USER_ALLOCATION", "WEIGHT_STREAMING"} <= config.flags:
            self.library.complain(
                self.log, "Error Code: 35: no driver (cudaError 35)"
            )  # it is always there without one
            words = "is not compatible with BuilderFlag::kWEIGHT_STREAMING"
            self.library.complain(self.log, f"BuilderFlag::kREQUIRE_USER_ALLOCATION {words}")
            return None
        if {"REFIT", "REFIT_INDIVIDUAL"} <= config.flags:
            self.library.complain(self.log, "REFIT and REFIT_INDIVIDUAL are mutually exclusive")
            return None
        refittable = network.weights if "REFIT" in config.flags else {}
        if "REFIT_INDIVIDUAL" in config.flags:
            refittable = {name: kind for name, kind in network.weights.items() if name in network.marked}
        half = "FP16" in config.flags
        layers = {layer.outputs[0].name: layer.chosen(half).name for layer in network.layers if layer.outputs}
        streams, sharing = "WEIGHT_STREAMING" in config.flags, "PROFILE_SHARING_0806" in config.features
        monitor = getattr(config, "progress_monitor", None)
        if monitor is not None:
            monitor.phase_start("Building engine", None, 1)
            goes_on = monitor.step_complete("Building engine", 0)
            monitor.phase_finish("Building engine")
            if not goes_on:
                self.library.complain(self.log, "Error Code 7: BuildCanceled (Build canceled by user)")
                return None
        return fake_plan(
            network.inside, config.profiles, weights=len(network.inside), layers=layers, streams=streams,
            sharing=sharing, refittable=refittable,
        )  # fmt: skip

    def _to_stream(self, network: FakeNetwork, config: FakeConfig, writer: Any) -> bool:
        plan = self.build_serialized_network(network, config)
        if plan is None:
            return False
        with suppress(Exception):  # TensorRT-RTX 1.7.1 prints what a writer raises, looks at no count, and says True
            writer.write(plan)
        return True


class FakeNetwork(Flavoured):
    """INetworkDefinition. `weights`: the type of each floating-point initializer, by name."""

    def __init__(self, library: Library) -> None:
        self.flavour, self.weights, self.marked = library.flavour, dict[str, int](), set[str]()
        self.layers: list[FakeLayer] = []
        self.inputs: list[FakeTensor] = []
        self.outputs: list[FakeTensor] = []
        self.inside = b""

    def mark_weights_refittable(self, name: str) -> bool:
        if name in self.weights:
            self.marked.add(name)
        return name in self.weights

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_layer(self, i: int) -> FakeLayer:
        return self.layers[i]

    def get_input(self, i: int) -> FakeTensor:
        return self.inputs[i]

    def get_output(self, i: int) -> FakeTensor:
        return self.outputs[i]


class FakeTensor:
    def __init__(self, name: str, dtype: DataType, is_shape_tensor: bool = False) -> None:
        self.name, self.dtype, self.is_shape_tensor = name, dtype, is_shape_tensor


class FakeLayer:
    """One layer; `precision` is what was set, `types` what was set for its outputs."""

    def __init__(self, name: str, kind: str, outputs: list[FakeTensor], enum: Any) -> None:
        self.name, self.outputs, self.num_outputs = name, outputs, len(outputs)
        self.type = getattr(enum, LAYERS.get(kind, kind.upper()), enum.ELEMENTWISE)
        self.types: dict[int, DataType] = {}
        self._precision: DataType | None = None

    @property
    def precision(self) -> DataType:
        return self._precision or DataType.FLOAT

    @precision.setter
    def precision(self, value: DataType) -> None:
        self._precision = value

    @property
    def precision_is_set(self) -> bool:
        return self._precision is not None

    def get_output(self, i: int) -> FakeTensor:
        return self.outputs[i]

    def set_output_type(self, i: int, dtype: DataType) -> None:
        self.types[i] = dtype

    def chosen(self, half: bool) -> DataType:
        """The type that the builder gives the first output: as it was set, else half where it may be."""
        dtype = self.outputs[0].dtype
        own = self.type.name in ("CAST", "CONSTANT", "SHAPE")
        if own or not half or dtype not in (DataType.FLOAT, DataType.HALF):
            return dtype
        return self.types.get(0, self._precision if self._precision is not None else DataType.HALF)


class FakeParser:
    def __init__(self, library: Library, network: FakeNetwork, log: Any) -> None:
        self.library, self.network, self.log, self._errors = library, network, log, list[Any]()

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, i: int) -> Any:
        return self._errors[i]

    def supports_operator(self, name: str) -> bool:
        import onnx

        known = {schema.name for schema in onnx.defs.get_all_schemas()}
        return name in known and name not in UNKNOWN.get(self.library.flavour, ())

    def parse_from_file(self, path: str) -> bool:
        import onnx

        try:
            model = onnx.load(path)
        except Exception as error:  # protobuf's own
            return self._fail("", f"Failed to parse the ONNX model: {error}")
        unknown = [n for n in model.graph.node if not self.supports_operator(n.op_type)]
        if unknown:
            return self._fail(unknown[0].name, f"No importer registered for op: {unknown[0].op_type}")
        types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
        for value in model.graph.input:
            kind = KINDS.get(value.type.tensor_type.elem_type, DataType.FLOAT)
            self.network.inputs.append(FakeTensor(value.name, kind))
        for i, node in enumerate(model.graph.node):
            tensors = [FakeTensor(o, KINDS.get(types.get(o, 1), DataType.FLOAT)) for o in node.output if o]
            name = node.name or f"node_{i}"
            self.network.layers.append(FakeLayer(name, node.op_type, tensors, self.library.trt.LayerType))
        for value in model.graph.output:
            self.network.outputs.append(FakeTensor(value.name, KINDS[value.type.tensor_type.elem_type]))
        kinds = {t.name: KINDS.get(t.data_type) for t in model.graph.initializer}
        floats = (DataType.FLOAT, DataType.HALF, DataType.BF16)
        self.network.weights = {name: int(kind) for name, kind in kinds.items() if kind in floats}
        self.network.inside = _without_bfloat16(model).SerializeToString()  # last: it changes the types
        return True

    def _fail(self, node: str, text: str) -> bool:
        told: dict[str, Callable[[], Any]] = {"desc": lambda: text, "node": lambda: 0, "node_name": lambda: node}
        self._errors.append(SimpleNamespace(**told))
        self.library.complain(self.log, f"ModelImporter.cpp: {text}")
        return False


class FakeProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise ValueError(f"{name}: MIN <= OPT <= MAX")
        self.shapes[name] = [list(map(int, s)) for s in (low, best, high)]


class FakeConfig:
    def __init__(self, library: Library) -> None:
        self.library, self.flags, self.features = library, set[str](), set[str]()
        self.profiles: list[dict[str, Any]] = []
        self.workspace: int | None = None
        self.builder_optimization_level, self.hardware_compatibility_level = 3, 0
        self.profiling_verbosity: Any = None
        if library.flavour != "8.6":
            self.progress_monitor: Any = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def set_memory_pool_limit(self, pool: Any, nbytes: int) -> None:
        self.workspace = nbytes

    def set_preview_feature(self, feature: Any, on: bool) -> None:
        self.features.add(feature.name)

    def set_tactic_sources(self, mask: int) -> bool:
        return True

    def create_timing_cache(self, known: bytes) -> Any:
        return SimpleNamespace(known=known) if known in (b"", b"timings") else None  # it is damaged

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache is None:
            raise TypeError("set_timing_cache(): incompatible function arguments")
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"timings")

    def add_optimization_profile(self, profile: FakeProfile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


def _without_bfloat16(model: Any) -> Any:
    """The same graph in float32 where it has bfloat16, which ONNX Runtime's CPU kernels lack."""
    import onnx

    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type == narrow:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == narrow:
                attribute.i = wide
            if attribute.HasField("t") and attribute.t.data_type == narrow:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array, attribute.t.name))
    return model


def inputs_of(path: Path) -> dict[str, Any]:
    """What a plan of this fake says of itself, for tests."""
    return json.loads(path.read_bytes().partition(b"\n")[0])
