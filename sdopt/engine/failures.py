"""What a library raises while it computes, as errors of sdopt with a sentence."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from sdopt.bundle.specs import Array
from sdopt.errors import BackendError, SdoptError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
MEMORY_IS_FULL = (  # words of ONNX Runtime, OpenVINO, oneDNN, C++ and Linux, in lower case
    "bad_alloc",
    "bad alloc",
    "out of memory",
    "failed to allocate",
    "cannot allocate memory",
    "not enough memory",
    "can't allocate memory",
    "allocation failed",
    "array_new_length",
)
DISK_IS_FULL = ("no space left", "disk quota exceeded")
LESS_MEMORY = (
    "Smaller pictures and fewer at once need less memory, and so do vae_tile=512, vae_slice=True, guidance_batch=1 and "
    'memory="low" (--vae-tile 512, --vae-slice, --guidance-batch 1)'
)


def shapes_of(arrays: Mapping[str, Array]) -> dict[str, Sequence[int]]:
    return {name: array.shape for name, array in arrays.items()}


def failure(component: str, library: str, shapes: Mapping[str, Sequence[int]], error: Exception) -> BackendError:
    """The error to raise where `library` failed on a call of `component` with inputs of these shapes."""
    sizes = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    if memory_is_full(error):
        return BackendError(
            f"{component}: the memory of this process is full. The call was {sizes}. {LESS_MEMORY}. "
            f"{library} says: {error}"
        )
    return BackendError(
        f"{component}: {library} failed while it computed. The call was {sizes}. Try another --backend, and --no-cache."
        f" It says: {error}"
    )


def memory_is_full(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in MEMORY_IS_FULL)


@contextmanager
def memory_in_words(what: str) -> Generator[None]:
    """Raises: BackendError in place of a MemoryError; `what` names the work inside."""
    try:
        yield
    except MemoryError as error:
        detail = f" ({error})" if str(error) else ""
        raise BackendError(f"{what}: the memory of this process is full{detail}. {LESS_MEMORY}") from error


class _FromCaller(BaseException):
    """What a function of the caller has raised, on its way through code that explains what libraries raise."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def of_caller(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of the caller, such as `report`, whose exceptions pass through `foreign_in_words` as they are."""

    def called(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return function(*arguments, **named)
        except Exception as error:
            raise _FromCaller(error) from error

    return called


@contextmanager
def foreign_in_words(what: str, kind: type[SdoptError], less_memory: str) -> Generator[None]:
    """Raises: `kind` in place of what the system or a library raises in the block; BackendError where memory is full.

    `what` says what does not happen, and `less_memory` what to do about memory. An error that sdopt's own code has
    raised by mistake passes as it is, and so does one of the caller (see `of_caller`).
    """
    try:
        yield
        return
    except _FromCaller as passing:
        own = passing.error
    except Exception as error:
        explained = _explained(what, kind, less_memory, error)
        if explained is None:
            raise
        raise explained from error
    raise own


def first_line(reason: object) -> str:
    """The first line of an error's text that says anything; "\n" alone ends one, for names may have other marks."""
    return str(reason).strip().partition("\n")[0].rstrip()


def _explained(what: str, kind: type[SdoptError], less_memory: str, error: Exception) -> SdoptError | None:
    """The error to raise in place of a foreign one; None for one of sdopt's own."""
    reason = error.__cause__ if type(error) is kind and error.__cause__ is not None else error
    detail = f" ({first_line(reason)})" if str(reason).strip() else ""
    if memory_is_full(reason) and not isinstance(reason, SdoptError):
        return BackendError(f"{what}: the memory of this process is full{detail}. {less_memory}")
    library = _where_raised(error)
    if isinstance(error, SdoptError) or (library == "sdopt" and not isinstance(error, OSError)):
        return None
    if any(words in str(error).lower() for words in DISK_IS_FULL):
        return kind(f"{what}: a disk is full{detail}; free some space, also for temporary files")
    if isinstance(error, OSError):
        names = [os.fsdecode(name) for name in (error.filename,) if isinstance(name, (str, bytes))]
        return kind(f"{what}: {': '.join([*names, error.strerror or str(error)])}")
    return kind(f"{what}: {library} raised {type(error).__name__}{detail}; please report it")


def _where_raised(error: BaseException) -> str:
    """The package whose code raised an error; one that is written in C counts as its caller."""
    trace, package = error.__traceback__, "sdopt"
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        trace = trace.tb_next
    return package
