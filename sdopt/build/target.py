"""What engines are built with, and for: `tensorrt`, `tensorrt:1`, `tensorrt-rtx`, `ort:cpu`, `ort:cuda`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from sdopt.build.trt_build import has_bf16
from sdopt.engine.cuda import Gpu
from sdopt.engine.device import shared_device
from sdopt.engine.trt_api import LIBRARIES, TensorRT, environment
from sdopt.errors import BackendError, UsageError, choices

ORT = "ort"
PROVIDERS = {"": "CPU", "cpu": "CPU", "cuda": "CUDA"}  # device of "ort" -> what runs its graphs
BF16_FROM = 8.0  # compute capability: Ampere


def parse_backend(text: str) -> tuple[str, str]:
    """("tensorrt", "1") of "tensorrt:1"; the device is "" where none is named.

    Raises: UsageError for a backend that builds nothing, or a device that it does not have.
    """
    name, _, device = text.partition(":")
    if name not in (*LIBRARIES, ORT):
        raise UsageError(f"backend {text!r} builds no engines; these do: {choices(name, (*LIBRARIES, ORT))}")
    if name == ORT and device not in PROVIDERS:
        raise UsageError(f"backend {text!r} is not known; there are ort, ort:cpu and ort:cuda")
    if name != ORT and (device or ":" in text) and not device.isdecimal():
        raise UsageError(f"backend {text!r} is not known; there are {name}, {name}:0, {name}:1, ...")
    return name, device


@dataclass(frozen=True)
class Target:
    """A library, and the GPU that is here, if any; `device` is its index, or ONNX Runtime's device."""

    backend: str
    lib: TensorRT | None
    gpu: Gpu | None
    free: int | None
    device: str = ""

    @staticmethod
    def here(backend: str) -> Target:
        """This machine; TensorRT-RTX and ONNX Runtime's graphs need no GPU to be built.

        Raises: UsageError for an unknown backend; BackendError for a library, driver or GPU that is missing.
        """
        name, device = parse_backend(backend)
        if name == ORT:
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
        """The GPU's."""
        return int(self.device) if self.device.isdecimal() else 0

    @property
    def precision(self) -> str:
        """The precision where none is asked for."""
        return "fp32" if self.backend == ORT and PROVIDERS[self.device] == "CPU" else "fp16"

    @property
    def has_bf16(self) -> bool:
        """Whether the GPU is known to compute in bf16, and the library too."""
        if self.gpu is None or (self.lib is not None and not has_bf16(self.lib)):
            return False
        return float(self.gpu.compute_capability) >= BF16_FROM

    def environment(self, options: Mapping[str, Any]) -> dict[str, str]:
        """What must be the same where an engine runs."""
        if self.lib is None:
            return {"provider": PROVIDERS[self.device]}
        return environment(self.lib, self.gpu, options)

    def uses(self, precision: str) -> str:
        """What a graph for ONNX Runtime is, and what takes it, in a sentence."""
        kind = PROVIDERS[self.device]
        words = f"--backend ort:{kind.lower()}"
        if kind == "CPU" and precision != "fp32":
            words += f" --precision {precision}"
        told = f"a graph for ONNX Runtime on {'the CPU' if kind == 'CPU' else 'CUDA'}, {precision}; taken by {words}"
        if kind == "CUDA" and not _ort_has_cuda():
            told += '. There is no ONNX Runtime with CUDA here: it is for another machine, or pip install "sdopt[cuda]"'
        return told

    def current(self) -> AbstractContextManager[None]:
        """Inside, this thread builds on the GPU that was asked for."""
        return nullcontext() if self.gpu is None else shared_device(self.index).cuda.current()


def _ort_has_cuda() -> bool:
    """Whether the ONNX Runtime that is installed, if any, can compute on CUDA."""
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        return False
    return "CUDAExecutionProvider" in runtime.get_available_providers()
