"""Where ONNX Runtime computes: one row for each device that a backend may name, as in `ort:cuda` or `ort:dml`.

A device is a row of `PROVIDERS`: the execution provider that computes there, its options, and the package that has it.
The tests run `cpu` in full and `cuda` on a GPU. `dml`, `coreml`, `rocm` and `openvino` are untested: their options are
those of their pages, and no one has compared their pictures with those of a CPU.
Ref: https://onnxruntime.ai/docs/execution-providers/, one page for each provider. ONNX Runtime 1.23 dropped its
provider "ROCM"; on GPUs of AMD it computes with MIGraphX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, cast

import onnxruntime

from sdopt.bundle.disk import is_private, user_folder
from sdopt.dataclass import dataclass
from sdopt.engine.cuda import sees_gpu
from sdopt.errors import BackendError, UsageError, install

ort = cast(Any, onnxruntime)  # its bindings are not typed
Providers = list[tuple[str, dict[str, str]]]


@dataclass(frozen=True)
class Provider:
    """One row.

    `name`: ONNX Runtime's name of it. `package`: a sentence that says what to install. `number`: the option that takes
    the number of a GPU, as 1 in `ort:cuda:1`; empty where there is one device. `memory`: ONNX Runtime's name of the
    memory in which a run keeps its tensors. `one_call_at_a_time`: threads have to wait for each other.
    """

    name: str
    package: str
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    number: str = ""
    memory: str = "cpu"
    one_call_at_a_time: bool = False


# Each of these packages brings the module `onnxruntime`; two at once overwrite each other's files.
NVIDIA = f"For NVIDIA GPUs: pip uninstall onnxruntime && {install('cuda')}"
# Best first. cuDNN chooses convolutions by its rules; trying each shape is slow. Graphs in float32 are computed in
# float32 where a provider lets one choose: TF32 is off, and Core ML does without the neural engine, all fp16.
PROVIDERS = {
    "cuda": Provider(
        "CUDAExecutionProvider",
        NVIDIA,
        {"cudnn_conv_algo_search": "HEURISTIC", "cudnn_conv_use_max_workspace": "1", "use_tf32": "0"},
        number="device_id",
        memory="cuda",
    ),
    "cpu": Provider("CPUExecutionProvider", f"Every onnxruntime has it: {install('cpu')}"),
    # only if named
    "tensorrt": Provider(
        "TensorrtExecutionProvider", NVIDIA, {"trt_engine_cache_enable": "1"}, number="device_id", memory="cuda"
    ),
    "dml": Provider(
        "DmlExecutionProvider",
        "For any GPU on Windows: pip uninstall onnxruntime && pip install onnxruntime-directml",
        number="device_id",
        one_call_at_a_time=True,
    ),
    "coreml": Provider(
        "CoreMLExecutionProvider",
        "It is part of onnxruntime on macOS: pip install onnxruntime",
        {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndGPU"},
    ),
    "rocm": Provider(
        "MIGraphXExecutionProvider",
        "For AMD GPUs on Linux with ROCm: pip uninstall onnxruntime && pip install onnxruntime-migraphx",
        number="device_id",
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        "For Intel processors: pip uninstall onnxruntime && pip install onnxruntime-openvino, or --backend openvino",
        {"device_type": "CPU", "precision": "FP32"},
    ),
}


@dataclass(frozen=True)
class Device:
    """Where ONNX Runtime computes: a row of `PROVIDERS`, and which GPU."""

    kind: str
    index: int = 0

    @property
    def memory(self) -> str:
        """What ONNX Runtime calls the memory that a run keeps its tensors in."""
        return PROVIDERS[self.kind].memory

    @property
    def provider(self) -> str:
        """Whose engines of `sdopt build` it takes: "CPU" or "CUDA"; elsewhere a word that none is built for."""
        return (self.memory if self.memory == "cuda" else self.kind).upper()


def find_device(device: str | None) -> Device:
    """The device that "cpu", "cuda", "cuda:1", "dml" or another row names; None is a GPU if "cuda" can be used here.

    Raises: UsageError for another word; BackendError if this onnxruntime cannot compute there.
    """
    available: list[str] = ort.get_available_providers()
    if device is None:
        has_gpu = PROVIDERS["cuda"].name in available and sees_gpu()
        return Device("cuda" if has_gpu else "cpu")
    kind, colon, number = device.partition(":")
    entry = PROVIDERS.get(kind)
    if entry is None or (colon and not (entry.number and number.isdecimal())):
        known = ", ".join(f"ort:{name}" for name in PROVIDERS)
        raise UsageError(f"backend 'ort:{device}' is not known; there are {known}, and ort:cuda:1 for the second GPU")
    if entry.name not in available:
        raise BackendError(
            f"backend 'ort:{device}' needs ONNX Runtime's {entry.name}, and this onnxruntime has "
            f"{', '.join(available)}. {entry.package}"
        )
    return Device(kind, int(number or 0))


def providers(device: Device) -> Providers:
    """The execution providers of a session on `device`; ONNX Runtime adds the CPU's for nodes that they cannot run."""
    entry = PROVIDERS[device.kind]
    options = {**entry.options, **({entry.number: str(device.index)} if entry.number else {})}
    if device.kind != "tensorrt":
        return [(entry.name, options)]
    plans = _own_plans()
    kept = {"trt_engine_cache_enable": "0"} if plans is None else {"trt_engine_cache_path": str(plans)}
    return [(entry.name, {**options, **kept}), *providers(Device("cuda", device.index))]


def _own_plans() -> Path | None:
    """Where ONNX Runtime's TensorRT keeps its plans, which are code; None where others could have written one.

    It is not the folder where a process happens to run.
    """
    try:
        plans = user_folder("XDG_CACHE_HOME", ".cache") / "ort-tensorrt"
        plans.mkdir(parents=True, exist_ok=True, mode=0o700)
        return plans if all(is_private(path) for path in (plans, *plans.iterdir())) else None
    except (OSError, BackendError):
        return None


def preload() -> None:
    """Load the libraries of CUDA and cuDNN from their pip packages, if the system has none.

    Without them ONNX Runtime only warns, and computes on the CPU.
    """
    if hasattr(ort, "preload_dlls"):  # 1.21 and newer
        ort.preload_dlls()


def refuse_fallback(session: Any, device: Device) -> None:
    """Raises: BackendError if a session does not compute where it was asked to."""
    entry, active = PROVIDERS[device.kind], session.get_providers()
    if entry.name in active:
        return
    reason = f"A library that it needs is missing or too old, or the driver is. {entry.package}"
    if entry.memory == "cuda":
        reason = (
            "Its libraries of CUDA and cuDNN are missing or too old, or the driver is: "
            'pip install "onnxruntime-gpu[cuda,cudnn]"'
        )
    raise BackendError(
        f"backend 'ort:{device.kind}': ONNX Runtime {ort.__version__} could not start its {entry.name} and would "
        f"compute on {', '.join(active)} instead. {reason}, see the warning above; or use --backend ort:cpu"
    )
