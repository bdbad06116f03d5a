"""Errors of CUDA, told apart by what can still be done after them.

Ref: NVIDIA, CUDA Runtime API, data types, enum cudaError.
"""

from __future__ import annotations

from typing import Any

from sdopt.errors import BackendError

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
LOST_CONTEXT = {  # after these every later call of the process fails too
    214,  # cudaErrorECCUncorrectable
    220,  # cudaErrorNvlinkUncorrectable
    226,  # cudaErrorContained
    700,  # cudaErrorIllegalAddress
    702,  # cudaErrorLaunchTimeout
    709,  # cudaErrorContextIsDestroyed
    710,  # cudaErrorAssert
    714,  # cudaErrorHardwareStackError
    715,  # cudaErrorIllegalInstruction
    716,  # cudaErrorMisalignedAddress
    717,  # cudaErrorInvalidAddressSpace
    718,  # cudaErrorInvalidPc
    719,  # cudaErrorLaunchFailure
    721,  # cudaErrorTensorMemoryLeak
}
CAPTURE = range(900, 910)  # the work cannot become a graph; the context still works


class CudaError(BackendError):
    """A CUDA call failed. The context still works unless this is a `LostContextError`."""


class OutOfMemoryError(CudaError):
    """The GPU's memory is full. Nothing is broken: free some and try again."""


class CaptureError(CudaError):
    """What was queued cannot become a graph."""


class LostContextError(CudaError):
    """The GPU's context is lost for this process: only a new process helps, and nothing is tried again."""


def check(runtime: Any, result: tuple[Any, ...], what: str) -> Any:
    """What a CUDA call returned, without its status.

    Raises: the subclass of CudaError that says whether anything can still be done.
    """
    status, *values = result
    code = int(status)
    if code:
        raise _error(code, _text(runtime, status), what)
    return values[0] if len(values) == 1 else tuple(values)


def _error(code: int, text: str, what: str) -> CudaError:
    message = f"{what}: CUDA error {code}, {text}"
    if code == OUT_OF_MEMORY:
        return OutOfMemoryError(message)
    if code in CAPTURE:
        return CaptureError(message)
    if code in LOST_CONTEXT:
        return LostContextError(f"{message}. The GPU is lost to this process: start a new one.")
    return CudaError(message)


def _text(runtime: Any, status: Any) -> str:
    _, text = runtime.cudaGetErrorString(status)
    return text.decode() if isinstance(text, bytes) else str(text)
