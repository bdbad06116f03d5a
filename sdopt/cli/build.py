"""`sdopt build BUNDLE --backend tensorrt`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from sdopt.bundle.precision import precision_word
from sdopt.errors import BackendError, UsageError

EXTRA = 'the builder needs onnx-ir and onnx: pip install "sdopt[tensorrt]" (or "sdopt[tensorrt-rtx]", "sdopt[build]")'
FLAGS = {
    "refit": "weights can be changed later with TensorRT's own Refitter; may be slower",
    "version_compatible": "runs with newer TensorRT versions too; may be slower",
    "hardware_compatible": "runs on every GPU from Ampere on; slower",
    "weight_streaming": "weights may stay in the host's memory; slower",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="the folder that `sdopt export` made")
    add(
        "--backend", required=True,
        help="tensorrt, or tensorrt:1 for the second GPU; tensorrt-rtx (GeForce; builds without a GPU); "
        "ort (a graph for ONNX Runtime on the CPU) or ort:cuda",
    )  # fmt: skip
    add("--component", action="append", metavar="NAME", help="build only this one; may be given again")
    add(
        "--precision", default="auto", type=precision_word,
        help="fp16, bf16 or fp32 (default: fp16, on a CPU fp32; what overflows in fp16 is built in bf16 or fp32)",
    )  # fmt: skip
    add(
        "--profile", action="append", default=[], metavar="RANGES",
        help='sizes that the engines take, e.g. "batch=1:1:4 height=512:512:768 width=512": smallest:best:largest; '
        "may be given again: several narrow ones run faster than a wide one (default: the bundle's size, batch 1 to 4)",
    )  # fmt: skip
    add(
        "--static",
        action="store_true",
        help="an engine of its own for each profile, for its best sizes only; the fastest",
    )
    add("--opt-level", type=int, default=3, metavar="0-5", help="how long TensorRT searches (default: 3)")
    add("--workspace", type=float, metavar="GIB", help="memory that a kernel may use (default: what is free)")
    for name, meaning in FLAGS.items():
        add(_flag(name), action="store_true", help=meaning)
    add("--recipe", type=Path, metavar="FILE", help="which engines, with which float32 islands (default: sdopt's own)")


def run(args: argparse.Namespace) -> int:
    try:
        from sdopt.build.jobs import BuildOptions, build
        from sdopt.build.recipe import read_recipe
    except ImportError as error:
        raise BackendError(f"{error}; {EXTRA}") from error
    from sdopt.bundle.files import Bundle

    _refuse_for_ort(args)
    if args.workspace is not None and args.workspace < 1 / 1024:
        raise UsageError(f"--workspace {args.workspace:g}; allowed are GiB from 0.001 on, e.g. --workspace 4")
    options = BuildOptions(
        precision=args.precision,
        opt_level=args.opt_level,
        workspace=None if args.workspace is None else int(args.workspace * (1 << 30)),
        **{name: getattr(args, name) for name in FLAGS},
    )
    with Bar() as bar:
        folders = build(
            Bundle.open(args.bundle),
            args.backend,
            components=args.component,
            profiles=args.profile,
            static=args.static,
            options=options,
            recipe=read_recipe(args.recipe),
            command=command(args),
            report=bar.report,
            progress=bar,
        )
    print(*folders, sep="\n")
    return 0


def _refuse_for_ort(args: argparse.Namespace) -> None:
    """Raises: UsageError for options that mean nothing in a graph for ONNX Runtime."""
    if args.backend.partition(":")[0] != "ort":
        return
    plain: dict[str, Any] = {
        "profile": [],
        "static": False,
        "opt_level": 3,
        "workspace": None,
        **dict.fromkeys(FLAGS, False),
    }
    given = [_flag(name) for name, default in plain.items() if getattr(args, name) != default]
    if given:
        raise UsageError(
            f"{', '.join(given)}: a graph for ONNX Runtime takes every size, and its library optimises it when it "
            "loads; leave it out, or build for --backend tensorrt"
        )


def command(args: argparse.Namespace) -> str:
    """The command with these options, for an engine's record. BUNDLE stands for the bundle, which may move.

    It has no components and no profiles, so that others can be built with the same options.
    """
    words = ["sdopt", "build", "BUNDLE", "--backend", args.backend]
    for name, default in (("precision", "auto"), ("opt_level", 3), ("workspace", None), ("recipe", None)):
        if getattr(args, name) != default:
            words += [_flag(name), str(getattr(args, name))]
    words += [_flag(name) for name in FLAGS if getattr(args, name)]
    return shlex.join(words)


def _flag(name: str) -> str:
    """The command line's flag of an option: --opt-level of opt_level."""
    return f"--{name.replace('_', '-')}"


class Bar:
    """A progress bar of TensorRT's phases, shown only on a terminal. Lines of the report go to stderr."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def report(self, line: str) -> None:
        """Print a line of the report."""
        if self._bar is not None:
            self._bar.clear()
        print(line, file=sys.stderr, flush=True)

    def __call__(self, phase: str, done: int, of: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(leave=False, disable=not sys.stderr.isatty())
        self._bar.set_description_str(phase, refresh=False)
        self._bar.total, self._bar.n = max(of, done), done
        self._bar.refresh()
