"""`sdopt --print-completion SHELL`: the script by which a shell completes the commands, options and values of sdopt.

`shtab` writes the script from the parsers of all commands. It is a snapshot: make it again after an upgrade.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable
from typing import Any

from sdopt.cli.parser import Parser
from sdopt.errors import BackendError, UsageError, install

SHELLS = ("bash", "zsh", "fish")
FOLDERS = ("BUNDLE", "CHECKPOINT", "FOLDER")  # metavars that stand for folders
FILES = ("SOURCE", "PATH", "PNG")  # and for files; so does every metavar with FILE in it
EXTRA = f"completion needs shtab: {install('completion')}"


def script(parser: Parser, shell: str) -> str:
    """The completion script of a shell for the commands of `parser`.

    Raises: UsageError for an unknown shell; BackendError if shtab is not installed, or too old for the shell.
    """
    if shell not in SHELLS:
        raise UsageError(f"--print-completion {shell}; allowed are {', '.join(SHELLS)}")
    try:
        library: Any = importlib.import_module("shtab")  # optional, so its types may be absent
    except ImportError as error:
        raise BackendError(f"{error}; {EXTRA}") from error
    if shell not in library.SUPPORTED_SHELLS:
        raise BackendError(f"this shtab ({library.__version__}) knows no {shell}; {EXTRA}")
    for action in _actions(parser):
        _complete(action, library)
    return str(library.complete(parser, shell))


def _actions(parser: Parser) -> Iterable[argparse.Action]:
    """The options and arguments of a parser and of all commands below it."""
    yield from parser._actions  # pyright: ignore[reportPrivateUsage]  # argparse has no public list
    for command in parser.commands.values():
        yield from _actions(command)


def _complete(action: argparse.Action, library: Any) -> None:
    """Say what completes the value of an action: names, folders or files. The parser checks nothing with them."""
    words = {str(action.metavar)} if isinstance(action.metavar, str) else set[str]()
    if action.choices is None and action.dest in _NAMES:
        action.choices = list(_NAMES[action.dest]())
    elif words & set(FOLDERS):
        action.complete = library.DIRECTORY  # type: ignore[attr-defined]  # shtab reads this attribute
    elif words & set(FILES) or any("FILE" in word or ".json" in word for word in words):
        action.complete = library.FILE  # type: ignore[attr-defined]


def _samplers() -> Iterable[str]:
    from sdopt.samplers import SAMPLERS

    return SAMPLERS


def _schedules() -> Iterable[str]:
    from sdopt.samplers import SCHEDULES

    return SCHEDULES


def _backends() -> Iterable[str]:
    from sdopt.engine import BACKENDS

    return BACKENDS


def _precisions() -> Iterable[str]:
    from sdopt.engine import PRECISIONS

    return PRECISIONS


def _generators() -> Iterable[str]:
    from sdopt.samplers.noise import GPU_THREADS

    return ("cpu", "numpy", "cuda", *(f"cuda:{gpu}" for gpu in GPU_THREADS))


# the names of `sdopt.export.single_file.published.PUBLISHED`, which takes PyTorch to import
PUBLISHED = (
    *("sd1", "sd1-inpaint", "sd1-lcm", "sd2", "sd2-base", "sd2-inpaint"),
    *("sdxl-base", "sdxl-inpaint", "sdxl-lcm", "sdxl-refiner"),
)
_NAMES = {  # destination of an option -> the names that it takes
    "sampler": _samplers,
    "show": _samplers,
    "names": _samplers,
    "schedule": _schedules,
    "backend": _backends,
    "precision": _precisions,
    "rng": _generators,
    "config": lambda: PUBLISHED,
    "variant": lambda: ("fp16", "bf16", "ema", "non_ema"),
    "remove": lambda: ("all",),  # a script cannot know the keys of a bundle
    "prompt_style": lambda: ("plain", "a1111"),
}
