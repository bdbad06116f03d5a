"""What the errors in TensorRT's log mean, and what helps."""

from __future__ import annotations

LESS_MEMORY = "the GPU's memory is full: close other programs, or give a smaller profile"
# words in the log -> what they mean. The first that occur in the log are taken. "cudaError 35" is in every log of a
# machine without a driver, whatever the cause, so it is last.
MEANINGS = {
    "Could not find any implementation": "no kernel fits into the memory that it may use: free some of the GPU's, "
    "or give a smaller profile",
    "no tactics": "no kernel fits into the workspace: give more with --workspace, or a smaller profile",
    "out of memory": LESS_MEMORY,
    "OutOfMemory": LESS_MEMORY,
    "libnvinfer_lean": "--version-compatible needs TensorRT's lean library beside it: pip install tensorrt-lean",
    "graph_jit": "--refit needs a GPU while it builds: leave it out, or build where the GPU is",
    "not supported by a dedicated kernel": "there is no attention kernel for this precision: build with fp16",
    "does not support this compute capability": "this library has no kernels for this GPU: use --backend tensorrt",
    "Unsupported SM": "this TensorRT is older than this GPU: install a newer one",
    "cudaError 35": "this option needs an NVIDIA driver while it builds",
}
OUT_OF_MEMORY = ("Could not find any implementation", "no tactics", "out of memory", "OutOfMemory")


def meaning(errors: str) -> str:
    """What TensorRT's errors mean, followed by its own words."""
    explanation = next((text for words, text in MEANINGS.items() if words in errors), None)
    return errors if explanation is None else f"{explanation}. TensorRT says: {errors}"


def is_out_of_memory(errors: str) -> bool:
    """Whether a build with less workspace may succeed."""
    return any(words in errors for words in OUT_OF_MEMORY)
