"""OpenVINO: the fast engine on CPUs, in fp32 or, where the processor multiplies it natively, in bf16."""

from __future__ import annotations

from collections import deque
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from sdopt import privacy
from sdopt.bundle.files import Component, ModelFolder
from sdopt.bundle.specs import Array, check_inputs
from sdopt.bundle.weights import Overlay, Weights
from sdopt.engine import EngineOptions, cache
from sdopt.engine.built import built_graph
from sdopt.engine.failures import LESS_MEMORY, failure, memory_is_full, shapes_of
from sdopt.engine.openvino_int8 import INT8, environment
from sdopt.engine.process import Native, library_call
from sdopt.errors import BackendError, BundleError, SdoptError, UsageError

with privacy.without_openvino_telemetry():
    import openvino

ov = cast(Any, openvino)  # its bindings are not typed
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
PICTURE_SIZES = {"latent_height": "height", "latent_width": "width", "height": "latent_height", "width": "latent_width"}
DEVICES = {"cpu": "CPU", "gpu": "GPU"}
CPU = "CPU"  # the provider that engines of `sdopt build` are for
IN_INT8 = (INT8, "int8-weights")  # precisions of graphs, or of their weights


def open_component(bundle: ModelFolder, name: str, options: EngineOptions) -> OpenVinoEngine:
    """The engine of component `name` on `options.device`, computing in `options.precision`."""
    built, device = built_graph(bundle, name, options, CPU, environment), options.device or "cpu"
    component = bundle.component(name) if built is None else built[1]
    precision = _rest(device) if options.precision in IN_INT8 else options.precision
    opened = partial(OpenVinoEngine, component, options.threads, device, precision, factor=bundle.factor)
    if options.overlay is not None:  # nothing of it is kept for another process
        return opened(overlay=options.overlay)
    if built is not None or not options.cache or device != "cpu" or not cache.usable(bundle):
        return opened()
    made_from = {"openvino": ov.__version__, "precision": precision, "threads": options.threads}
    folder = cache.entry(bundle, component, "openvino", {**made_from, **_source(component)})
    return cache.load(bundle, name, folder, kept=opened, new=opened)


def open_int8(component: Component, factor: int = 8) -> OpenVinoEngine:
    """The engine of a graph that is not built yet, as `open_component` will open it on the CPU."""
    return OpenVinoEngine(component, precision=_rest("cpu"), factor=factor)


def _rest(device: str) -> str:
    """The precision of what is not int8 in such a graph, and beside it."""
    return "bf16" if native_bf16(device) else "fp32"


def _source(component: Component) -> dict[str, Any]:
    """The graph as OpenVINO names what it keeps: by path and time."""
    return {"path": str(component.graph.absolute()), "mtime_ns": component.graph.stat().st_mtime_ns}


def describe(backend: str) -> dict[str, Any]:
    """Version, precisions and devices, for `sdopt doctor`."""
    devices = [name.lower() for name in ov.Core().available_devices]
    precisions = [name for name in PRECISIONS if name == "fp32" or native_bf16()]
    return {"version": ov.__version__.partition("-")[0], "precisions": precisions, "devices": devices}


class OpenVinoEngine:
    """One compiled model behind the Engine contract, with an inference request for each call that runs at once.

    A request has the tensors of one call, so two calls never share one. It is kept for the next call.
    With `kept`, a folder, the compiled model is read from there, or else left there for the next process.
    `factor`: pixels per latent. `overlay`: other numbers for some of its weights.
    """

    def __init__(
        self,
        component: Component,
        threads: int | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        kept: Path | None = None,
        factor: int = 8,
        overlay: Overlay | None = None,
    ) -> None:
        self._factor = factor
        self.name, self.inputs, self.outputs = component.name, component.inputs, component.outputs
        if precision == "bf16" and not native_bf16(device):
            raise BackendError(f"precision bf16: {device} here does not compute in bf16 itself; use fp32")
        with library_call():
            compiled = _compiled(component, _properties(threads, precision, kept), _device(device), overlay)
        _check_signature(component, compiled)
        self._model = Native(self.name, (compiled, deque[Any]()))  # the model, and its requests that are idle

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        compiled, idle = self._model.get()
        dims = check_inputs(self.name, self.inputs, arrays)
        try:
            with library_call():
                request = _taken(idle) or compiled.create_infer_request()
                results = request.infer(arrays, share_inputs=True, share_outputs=False)
            self._refuse_stale(results, dims)
        except Exception as error:  # the library raises RuntimeError for every kind of fault
            raise failure(self.name, f"OpenVINO {ov.__version__}", shapes_of(arrays), error) from error
        outputs = {spec.name: results[spec.name] for spec in self.outputs}
        idle.append(request)
        return outputs

    def _refuse_stale(self, results: Any, dims: dict[str, int]) -> None:
        """Raises: MemoryError where OpenVINO gave the output of an earlier call, as it does when memory is short."""
        known = dims | {
            other: length * self._factor if name.startswith("latent_") else length // self._factor
            for name, other in PICTURE_SIZES.items()
            if (length := dims.get(name)) is not None
        }
        for spec in self.outputs:
            shape = results[spec.name].shape
            due = [
                known.get(d, length) if isinstance(d, str) else d for d, length in zip(spec.shape, shape, strict=True)
            ]
            if list(shape) != due:
                raise MemoryError(f"{spec.name} is {list(shape)} and not {due}")

    def close(self) -> None:
        """Free the model and its memory."""
        self._model.close()

    def __enter__(self) -> OpenVinoEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _taken(idle: deque[Any]) -> Any:
    """A request that no call uses; None if all are in use."""
    try:
        return idle.pop()
    except IndexError:
        return None


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
    # beside weights in int8 it would round what they are multiplied with, on processors with VNNI
    properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    chosen = {"INFERENCE_NUM_THREADS": threads, "CACHE_DIR": kept and str(kept)}
    return properties | {name: value for name, value in chosen.items() if value is not None}


def _compiled(component: Component, properties: dict[str, Any], device: str, overlay: Overlay | None) -> Any:
    try:
        source = component.graph if overlay is None else _overlaid(component, overlay)
        return ov.Core().compile_model(source, device, properties)
    except SdoptError:
        raise
    except Exception as error:  # the library raises RuntimeError for every kind of fault
        if memory_is_full(error):
            raise BackendError(
                f"{component.graph}: OpenVINO {ov.__version__} cannot load it: {error}\n{LESS_MEMORY}"
            ) from error
        raise BundleError(
            f"{component.graph}: OpenVINO {ov.__version__} cannot load it: {error}\n"
            "Try --backend ort, or upgrade openvino."
        ) from error


def _overlaid(component: Component, overlay: Overlay) -> Any:
    """The model with other numbers: constants are replaced, in float32, before anything is compiled.

    Raises: BackendError if OpenVINO has no constant for one of them.
    """
    model = ov.Core().read_model(component.graph)
    constants = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"}
    for part, numbers in overlay.merged(component.name, Weights.of(component)):
        old = constants.get(part.name)
        if old is None:
            raise BackendError(
                f"OpenVINO {ov.__version__} has no constant {part.name!r} in {component.graph}; try --backend ort"
            )
        old.output(0).replace(ov.op.Constant(numbers).output(0))
    return model


def _check_signature(component: Component, compiled: Any) -> None:
    for kind, specs, ports in (
        ("input", component.inputs, compiled.inputs),
        ("output", component.outputs, compiled.outputs),
    ):
        wanted = {s.name: len(s.shape) for s in specs}
        # a port also has the names of tensors that OpenVINO found to be equal to it
        names = [next(iter(wanted.keys() & port.get_names()), port.get_any_name()) for port in ports]
        actual = {name: len(port.get_partial_shape()) for name, port in zip(names, ports, strict=True)}
        if wanted != actual:
            raise BundleError(
                f"{component.graph}: its {kind}s are {actual}, the manifest says {wanted}; export it again"
            )
