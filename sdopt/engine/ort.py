"""ONNX Runtime: the portable engine, on the CPU or, with onnxruntime-gpu, on CUDA."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import onnxruntime

from sdopt.bundle import Bundle, Component
from sdopt.errors import BackendError, BundleError, UsageError
from sdopt.specs import Array, TensorSpec, check_inputs

ort = cast(Any, onnxruntime)  # its bindings are not typed
ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}  # best first


def open_component(
    bundle: Bundle, name: str, threads: int | None, device: str | None, trust: bool, backend: str
) -> OrtEngine:
    """The engine of component `name` on `device`; its graph must take and give what the manifest says."""
    return OrtEngine(bundle.component(name), threads, device)


class OrtEngine:
    """One ONNX Runtime session behind the Engine contract."""

    def __init__(self, component: Component, threads: int | None = None, device: str | None = None) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        self._session: Any = _session(component.graph, threads, _providers(device))
        for kind, specs, nodes in (
            ("input", self.inputs, self._session.get_inputs()),
            ("output", self.outputs, self._session.get_outputs()),
        ):
            _check_signature(component, kind, specs, nodes)
        self._output_names = [s.name for s in self.outputs]

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        if self._session is None:
            raise UsageError(f"{self.name}: this engine is closed; open it again with open_engine")
        check_inputs(self.name, self.inputs, arrays)
        return dict(zip(self._output_names, self._session.run(self._output_names, arrays), strict=True))

    def close(self) -> None:
        """Free the session and its memory."""
        self._session = None

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _providers(device: str | None) -> list[str]:
    """The execution providers to try in turn: the one that `device` names, or all that are there, best first."""
    available: list[str] = ort.get_available_providers()
    if device is None:
        return [provider for provider in PROVIDERS.values() if provider in available]
    if device not in PROVIDERS:
        raise UsageError(f"backend 'ort:{device}' is not known; there are ort:{', ort:'.join(PROVIDERS)}")
    if PROVIDERS[device] not in available:
        raise BackendError(
            f"backend 'ort:{device}': this onnxruntime has {', '.join(available)}. "
            'For NVIDIA GPUs: pip uninstall onnxruntime && pip install "sdopt[cuda]"'
        )
    return [PROVIDERS[device]]


def _session(graph: Path, threads: int | None, providers: list[str]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cores()
    try:
        return ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # the library raises its own classes for every kind of fault
        text = f"{graph}: ONNX Runtime {ort.__version__} cannot load it: {error}"
        if "opset" in str(error) or "NOT_IMPLEMENTED" in str(error):
            raise BackendError(f"{text}\nUpgrade onnxruntime, or export the bundle with --opset 18.") from error
        raise BundleError(text) from error


def _check_signature(component: Component, kind: str, specs: tuple[TensorSpec, ...], nodes: list[Any]) -> None:
    wanted = {s.name: (s.dtype, len(s.shape)) for s in specs}
    found = {n.name: (ONNX_TYPES.get(n.type, n.type), len(n.shape)) for n in nodes}
    if wanted != found:
        raise BundleError(f"{component.graph}: its {kind}s are {found}, the manifest says {wanted}; export it again")


def usable_cores() -> int:
    """How many cores this process may use: 0 (the library's own choice) unless affinity or a CPU quota limits it.

    ONNX Runtime starts a thread per physical core of the machine; in a container with a quota that is too many.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = min(affinity, _cgroup_quota())
    return limit if limit < (os.cpu_count() or 1) else 0


def _cgroup_quota() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return 1 << 30
