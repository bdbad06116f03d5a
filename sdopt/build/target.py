"""What engines are built with, and for: `tensorrt`, `tensorrt:1`, `tensorrt-rtx`, `ort:cpu`, `ort:cuda`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sdopt.build.int8 import FP8_PRODUCTS, LARGEST, SEVEN_BITS, Arithmetic
from sdopt.build.recipe import EngineSpec
from sdopt.build.trt_build import has_bf16
from sdopt.dataclass import dataclass
from sdopt.engine.cuda import Gpu
from sdopt.engine.device import shared_device
from sdopt.engine.trt_api import LIBRARIES, TensorRT, environment
from sdopt.errors import BackendError, UsageError, choices, install

ORT, OPENVINO = "ort", "openvino"
BUILT = {  # what is built for those without a builder
    ORT: ("fp32", "fp16", "bf16", "int8", "int8-weights"),
    OPENVINO: ("fp32", "int8", "int8-weights"),
}
PROVIDERS = {"": "CPU", "cpu": "CPU", "cuda": "CUDA"}  # device of "ort" -> what runs its graphs
BF16_FROM = 8.0  # compute capability: Ampere


def parse_backend(text: str) -> tuple[str, str]:
    """("tensorrt", "1") of "tensorrt:1". The device is "" if the text names none.

    Raises: UsageError for a backend without engines to build, or a device that it does not have.
    """
    name, _, device = text.partition(":")
    if name not in (*LIBRARIES, ORT, OPENVINO):
        raise UsageError(f"backend {text!r} builds no engines; these do: {choices(name, (*LIBRARIES, ORT, OPENVINO))}")
    if name == ORT and device not in PROVIDERS:
        raise UsageError(f"backend {text!r} is not known; there are ort, ort:cpu and ort:cuda")
    if name == OPENVINO and device not in ("", "cpu"):
        raise UsageError(f"backend {text!r} builds no engines; there is openvino, on the CPU")
    if name not in (ORT, OPENVINO) and (device or ":" in text) and not device.isdecimal():
        raise UsageError(f"backend {text!r} is not known; there are {name}, {name}:0, {name}:1, ...")
    return name, device


def refuse_precision(backend: str, precision: str) -> None:
    """Raises: UsageError for a precision in which nothing is built for this backend."""
    allowed = BUILT.get(backend)
    if allowed is not None and precision not in allowed:
        own = ". In bf16 it computes without a build" if backend == OPENVINO else ""
        text = f"precision {precision!r}: for {backend} {', '.join(allowed[:-1])} and {allowed[-1]} are built{own}"
        raise UsageError(text, "precision")


def refuse_part(backend: str, part: EngineSpec, precision: str) -> None:
    """Raises: UsageError for an engine that this backend cannot run, and for one that it needs no build for."""
    if backend != OPENVINO:
        return
    if part.fuse:
        raise UsageError(f"component {part.name!r}: OpenVINO runs no fused steps; build unet", "component")
    if precision == "fp32" and not part.cache:
        raise UsageError(
            f"component {part.name!r}: OpenVINO computes it in fp32 without a build; give --precision int8, or "
            "--cache-depth 1 for a feature cache",
            "precision",
        )


@dataclass(frozen=True)
class Target:
    """A library and this machine's GPU, if it has one. `device` is the index of the GPU, or ONNX Runtime's device."""

    backend: str
    lib: TensorRT | None
    gpu: Gpu | None
    free: int | None
    device: str = ""

    @staticmethod
    def here(backend: str) -> Target:
        """This machine as the target. TensorRT-RTX and ONNX Runtime's graphs can be built without a GPU.

        Raises: UsageError for an unknown backend; BackendError for a library, driver or GPU that is missing.
        """
        name, device = parse_backend(backend)
        if name in (ORT, OPENVINO):
            return Target(name, None, None, None, device)
        try:
            cuda = shared_device(int(device or 0)).cuda  # before TensorRT: its builder names no missing driver
        except BackendError as error:
            if name == "tensorrt":
                raise BackendError(
                    f"{error}. Without a GPU, --backend tensorrt-rtx builds: only running needs one"
                ) from error
            if device:
                raise
            return Target(name, TensorRT(name), None, None)
        with cuda.current():
            free, _ = cuda.memory()
        return Target(name, TensorRT(name), cuda.gpu, free, device)

    @property
    def index(self) -> int:
        """The index of the GPU."""
        return int(self.device) if self.device.isdecimal() else 0

    @property
    def precision(self) -> str:
        """The precision to use if the user gives none."""
        return "fp32" if self.is_cpu else "fp16"

    @property
    def is_cpu(self) -> bool:
        """Whether the graphs run on the CPU."""
        return self.lib is None and PROVIDERS[self.device] == "CPU"

    @property
    def has_bf16(self) -> bool:
        """Whether the GPU is known to compute in bf16, and the library too."""
        if self.gpu is None or (self.lib is not None and not has_bf16(self.lib)):
            return False
        return float(self.gpu.compute_capability) >= BF16_FROM

    def environment(self, options: Mapping[str, Any]) -> dict[str, str]:
        """What must be the same on a machine that runs the engine."""
        if self.lib is None:
            is_int8 = self.backend == OPENVINO and options["precision"] == "int8"
            own: dict[str, str] = self._openvino().environment(options) if is_int8 else {}
            return {"provider": PROVIDERS[self.device], **own}
        return environment(self.lib, self.gpu, options)

    def arithmetic(self, precision: str) -> Arithmetic:
        """What it multiplies in a precision of 8 bits."""
        if precision == FP8_PRODUCTS.kind:
            return FP8_PRODUCTS
        if self.lib is not None:
            return Arithmetic()
        saturates = self.backend == OPENVINO and self._openvino().sums_saturate()
        return Arithmetic(unsigned=True, largest_weight=SEVEN_BITS if saturates else LARGEST["int8"])

    @staticmethod
    def _openvino() -> Any:
        """What is known of int8 on OpenVINO. Raises: BackendError where OpenVINO is missing."""
        try:
            return importlib.import_module("sdopt.engine.openvino_int8")
        except ImportError as error:
            raise BackendError(f"backend 'openvino': OpenVINO is missing ({error}): {install('openvino')}") from error

    def uses(self, precision: str) -> str:
        """A sentence about a graph for ONNX Runtime: what it is, and the options that load it."""
        if self.backend == OPENVINO:
            return f"a graph for OpenVINO, {precision}; taken by --backend openvino --precision {precision}"
        kind = PROVIDERS[self.device]
        words = f"--backend ort:{kind.lower()}"
        if kind == "CPU" and precision != "fp32":
            words += f" --precision {precision}"
        place = "the CPU" if kind == "CPU" else "CUDA"
        sentence = f"a graph for ONNX Runtime on {place}, {precision}; taken by {words}"
        if kind == "CUDA" and not _ort_has_cuda():
            sentence += f". There is no ONNX Runtime with CUDA here: it is for another machine, or {install('cuda')}"
        return sentence

    def current(self) -> AbstractContextManager[None]:
        """A context in which this thread builds on this target's GPU."""
        return nullcontext() if self.gpu is None else shared_device(self.index).cuda.current()


def _ort_has_cuda() -> bool:
    """Whether the ONNX Runtime that is installed, if any, can compute on CUDA."""
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        return False
    return "CUDAExecutionProvider" in runtime.get_available_providers()
