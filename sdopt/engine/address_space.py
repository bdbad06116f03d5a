"""The address space of this process, which `ulimit -v` limits.

Libraries that find it full in the middle of their work may wait for ever, for example for a thread that could not be
made. So what is known to need more than the limit is refused before it begins.
"""

from __future__ import annotations

from sdopt.bundle.disk import bytes_text
from sdopt.engine.cores import usable_cores
from sdopt.errors import BackendError

EXPORT_BYTES = 1_700_000_000  # PyTorch for a CPU, diffusers and ONNX Runtime: what an export of 14 MB takes, measured
THREAD_BYTES = 80_000_000  # the stack of a thread, and the memory that the C library sets aside for it
COPIES = 3  # of the weights: as they are read, in the graph, and in the engine that checks it


def limit() -> int | None:
    """The bytes of address space that this process may take; None without a limit, and where no system has one."""
    try:
        import resource  # late: Windows has none
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def require_for_export(nbytes: int = 0) -> None:
    """Raises: BackendError if an export of so many bytes of weights needs more than this process may take."""
    allowed = limit()
    needed = EXPORT_BYTES + usable_cores() * THREAD_BYTES + COPIES * nbytes
    if allowed is not None and allowed < needed:
        raise BackendError(
            f"this process may take {bytes_text(allowed)} of address space (ulimit -v), and an export takes about "
            f"{bytes_text(needed)}; raise the limit: ulimit -v unlimited"
        )
