"""OpenVINO: the fast engine on CPUs, in fp32 or, where the processor multiplies it natively, in bf16."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import openvino

from sdopt.bundle.files import Bundle, Component
from sdopt.bundle.specs import Array, check_inputs
from sdopt.engine import EngineOptions, cache
from sdopt.errors import BackendError, BundleError, UsageError

ov = cast(Any, openvino)  # its bindings are not typed
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
DEVICES = {"cpu": "CPU", "gpu": "GPU"}


def open_component(bundle: Bundle, name: str, options: EngineOptions) -> OpenVinoEngine:
    """The engine of component `name` on `options.device`, computing in `options.precision`."""
    component, device = bundle.component(name), options.device or "cpu"
    opened = partial(OpenVinoEngine, component, options.threads, device, options.precision)
    if not options.cache or device != "cpu" or not cache.available():
        return opened()
    made_from = {"openvino": ov.__version__, "precision": options.precision, "threads": options.threads}
    folder = cache.entry(bundle, component, "openvino", {**made_from, **_source(component)})
    return cache.load(folder, 2 * bundle.nbytes(name), kept=opened, new=opened)


def _source(component: Component) -> dict[str, Any]:
    """The graph as OpenVINO names what it keeps: by path and time."""
    return {"path": str(component.graph.absolute()), "mtime_ns": component.graph.stat().st_mtime_ns}


def describe(backend: str) -> dict[str, Any]:
    """Version, precisions and devices, for `sdopt doctor`."""
    devices = [name.lower() for name in ov.Core().available_devices]
    precisions = [name for name in PRECISIONS if name == "fp32" or native_bf16()]
    return {"version": ov.__version__.partition("-")[0], "precisions": precisions, "devices": devices}


class OpenVinoEngine:
    """One compiled model and one inference request behind the Engine contract.

    With `kept`, a folder, the compiled model is read from there, or else left there for the next process.
    """

    def __init__(
        self,
        component: Component,
        threads: int | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        kept: Path | None = None,
    ) -> None:
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        if precision == "bf16" and not native_bf16(device):
            raise BackendError(f"precision bf16: {device} here does not compute in bf16 itself; use fp32")
        compiled = _compiled(component, _properties(threads, precision, kept), _device(device))
        _check_signature(component, compiled)
        self._request: Any = compiled.create_infer_request()

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        if self._request is None:
            raise UsageError(f"{self.name}: this engine is closed; open it again with open_engine")
        check_inputs(self.name, self.inputs, arrays)
        results = self._request.infer(arrays, share_inputs=True, share_outputs=False)
        return {spec.name: results[spec.name] for spec in self.outputs}

    def close(self) -> None:
        """Free the model and its memory."""
        self._request = None

    def __enter__(self) -> OpenVinoEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def native_bf16(device: str = "cpu") -> bool:
    """Whether the processor multiplies bf16 itself; elsewhere it only costs accuracy."""
    return "BF16" in ov.Core().get_property(_device(device), "OPTIMIZATION_CAPABILITIES")


def _device(device: str) -> str:
    if device not in DEVICES:
        raise UsageError(f"backend 'openvino:{device}' is not known; there are openvino:{', openvino:'.join(DEVICES)}")
    if not any(name.startswith(DEVICES[device]) for name in ov.Core().available_devices):
        raise BackendError(f"backend 'openvino:{device}': OpenVINO finds {', '.join(ov.Core().available_devices)} here")
    return DEVICES[device]


def _properties(threads: int | None, precision: str, kept: Path | None) -> dict[str, Any]:
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISIONS[precision]}
    chosen = {"INFERENCE_NUM_THREADS": threads, "CACHE_DIR": kept and str(kept)}
    return properties | {name: value for name, value in chosen.items() if value is not None}


def _compiled(component: Component, properties: dict[str, Any], device: str) -> Any:
    try:
        return ov.Core().compile_model(component.graph, device, properties)
    except Exception as error:  # the library raises RuntimeError for every kind of fault
        raise BundleError(
            f"{component.graph}: OpenVINO {ov.__version__} cannot load it: {error}\n"
            "Try --backend ort, or upgrade openvino."
        ) from error


def _check_signature(component: Component, compiled: Any) -> None:
    for kind, specs, ports in (
        ("input", component.inputs, compiled.inputs),
        ("output", component.outputs, compiled.outputs),
    ):
        wanted = {s.name: len(s.shape) for s in specs}
        actual = {port.get_any_name(): len(port.get_partial_shape()) for port in ports}
        if wanted != actual:
            raise BundleError(
                f"{component.graph}: its {kind}s are {actual}, the manifest says {wanted}; export it again"
            )
