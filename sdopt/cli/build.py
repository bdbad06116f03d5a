"""`sdopt build BUNDLE --backend tensorrt`: build a bundle's engines for this machine."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from sdopt.bundle.disk import read_given
from sdopt.bundle.precision import precision_word
from sdopt.cli import terminal
from sdopt.cli.parser import Parser
from sdopt.errors import BackendError, UsageError, install

EXTRA = f"the builder needs onnx-ir and onnx: {install('tensorrt')}, or the extra tensorrt-rtx, or build"
ON_CPU = {"ort": "ONNX Runtime", "openvino": "OpenVINO"}
QUANTIZED = (("floor", None), ("prompts", None))  # options of a build in 8 bits
MAX_PROMPTS = 1 << 20  # bytes
MAX_WORKSPACE = 1 << 20  # GiB: more than any GPU has
FLAGS = {
    "version_compatible": "runs with newer TensorRT versions too; may be slower",
    "hardware_compatible": "runs on every GPU from Ampere on; slower",
    "weight_streaming": "weights may stay in the host's memory; slower",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder that `sdopt export` made")
    add = parser.group("what is built")
    add(
        "--backend", required=True,
        help="tensorrt, or tensorrt:1 for the second GPU; tensorrt-rtx (GeForce; builds without a GPU); "
        "ort (a graph for ONNX Runtime on the CPU) or ort:cuda; openvino (int8, int8-weights)",
    )  # fmt: skip
    add("--component", action="append", metavar="NAME", help="build only this one; may be repeated")
    add(
        "--adapter", "--control", dest="adapters", action="append", default=[], metavar="NAME",
        help="build for this adapter of the bundle, a ControlNet, a T2I-Adapter, an IP-Adapter or a tiny autoencoder; "
        "may be repeated, for several at once. The engine is taken where exactly these are given to generate",
    )  # fmt: skip
    add(
        "--cache-depth", type=int, metavar="LAYERS",
        help="build the two engines of a feature cache, and nothing else: all of the UNet, and so many of its last "
        "layers",
    )  # fmt: skip
    add(
        "--precision", default="auto", type=precision_word,
        help="fp16, bf16, fp32, int8, fp8 for TensorRT on Ada and later, or int8-weights, for T5 (default: "
        "fp16, on a CPU fp32; what overflows in fp16 is built in bf16 or fp32)",
    )  # fmt: skip
    add(
        "--floor", type=float, metavar="DB",
        help="int8, fp8: how close each component's output must stay to float32; layers that lose more stay as they "
        "are (default: 25)",
    )  # fmt: skip
    add(
        "--prompts", type=Path, metavar="FILE",
        help="int8, fp8: a prompt in each line; pictures of them are made in float32 to find the scales (default: six "
        "common subjects)",
    )  # fmt: skip
    add("--recipe", type=Path, metavar="FILE", help="which engines, with which float32 islands (default: sdopt's own)")
    add = parser.group("sizes, for TensorRT")
    add(
        "--profile", action="append", default=[], metavar="RANGES",
        help='sizes that the engines take, e.g. "batch=1:1:4 height=512:512:768 width=512": smallest:best:largest; '
        "may be repeated: several narrow ones run faster than a wide one (default: the bundle's size, batch 1 to 4)",
    )  # fmt: skip
    add(
        "--static",
        action="store_true",
        help="build a separate engine for each profile, for its best sizes only; the fastest",
    )
    add = parser.group("how it is built, for TensorRT")
    add("--opt-level", type=int, default=3, metavar="0-5", help="how long TensorRT searches (default: 3)")
    add("--workspace", type=float, metavar="GIB", help="memory that a kernel may use (default: what is free)")
    add(
        "--refit", nargs="?", const=True, default=False, type=_refit, metavar="lora",
        help="lora: LoRA files can be used without another build; may be slower. Without a word, all weights can be "
        "changed later with TensorRT's own Refitter",
    )  # fmt: skip
    add(
        "--lora", action="append", default=[], metavar="FILE:WEIGHT",
        help="build a LoRA in, e.g. style.safetensors:0.8; may be repeated. The engine runs where exactly these are "
        "given to generate, as fast as one without",
    )  # fmt: skip
    for name, meaning in FLAGS.items():
        add(_flag(name), action="store_true", help=meaning)
    parser.examples(
        "sdopt build sd15 --backend ort",
        "sdopt build sd15 --backend openvino --precision int8",
        "sdopt build sd15 --backend ort --cache-depth 1",
        "sdopt build sd15 --backend tensorrt --static",
        "sdopt build sd15 --backend tensorrt --adapter canny",
        'sdopt build sd15 --backend tensorrt --profile "batch=1:1:4 height=512:512:768 width=512"',
    )


def run(args: argparse.Namespace) -> int:
    try:
        from sdopt.build.jobs import BuildOptions, build
        from sdopt.build.recipe import read_recipe
    except ImportError as error:
        raise BackendError(f"{error}; {EXTRA}") from error
    from sdopt.bundle.files import Bundle
    from sdopt.cli.loras import overlay_of

    _refuse_for_ort(args)
    if args.workspace is not None and not 1 / 1024 <= args.workspace <= MAX_WORKSPACE:  # NaN is none either
        allowed = f"allowed are GiB from 0.001 to {MAX_WORKSPACE}, e.g. --workspace 4"
        raise UsageError(f"--workspace {args.workspace:g}; {allowed}", "workspace")
    options = BuildOptions(
        precision=args.precision,
        opt_level=args.opt_level,
        workspace=None if args.workspace is None else int(args.workspace * (1 << 30)),
        refit=args.refit,
        floor=args.floor,
        prompts=_prompts(args.prompts),
        **{name: getattr(args, name) for name in FLAGS},
    )
    bundle = Bundle.open(args.bundle)
    with terminal.Phases() as phases:
        folders = build(
            bundle,
            args.backend,
            components=args.component,
            adapters=args.adapters,
            cache_depth=args.cache_depth,
            profiles=args.profile,
            static=args.static,
            options=options,
            recipe=read_recipe(args.recipe),
            overlay=overlay_of(bundle, args.lora) if args.lora else None,
            command=command(args),
            report=terminal.say,
            progress=phases,
        )
    print(*folders, sep="\n")
    return 0


def _refuse_for_ort(args: argparse.Namespace) -> None:
    """Raises: UsageError for options of TensorRT if the backend is ONNX Runtime."""
    name = args.backend.partition(":")[0]
    if name not in ON_CPU:
        return
    defaults: dict[str, Any] = {
        "profile": [],
        "static": False,
        "opt_level": 3,
        "workspace": None,
        "refit": False,
        "lora": [],
        **dict.fromkeys(FLAGS, False),
    }
    refused = [_flag(name) for name, default in defaults.items() if getattr(args, name) != default]
    if refused:
        raise UsageError(
            f"{', '.join(refused)}: a graph for {ON_CPU[name]} takes every size, and its library optimises it when it "
            "loads; leave it out, or build for --backend tensorrt"
        )


def _prompts(path: Path | None) -> tuple[str, ...]:
    """The prompts in a file, one in each line.

    Raises: UsageError for a file that cannot be read, or has fewer than two.
    """
    if path is None:
        return ()
    try:
        lines = read_given(path, MAX_PROMPTS).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--prompts {path}: {error}; it is a text file with a prompt in each line", "prompts"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if len(prompts) < 2:
        raise UsageError(f"--prompts {path}: it has {len(prompts)} prompts; two or more are needed", "prompts")
    return prompts


def command(args: argparse.Namespace) -> str:
    """The command with these options, for an engine's record. It says BUNDLE, because a bundle's path may change.

    Components and profiles are left out, so that others can be built with the same options.
    """
    words = ["sdopt", "build", "BUNDLE", "--backend", args.backend]
    for name, default in (("precision", "auto"), ("opt_level", 3), ("workspace", None), ("recipe", None), *QUANTIZED):
        if getattr(args, name) != default:
            words += [_flag(name), str(getattr(args, name))]
    if args.refit:
        words += ["--refit"] if args.refit is True else ["--refit", args.refit]
    for text in args.lora:
        words += ["--lora", text]
    words += [_flag(name) for name in FLAGS if getattr(args, name)]
    return shlex.join(words)


def _refit(word: str) -> str:
    """The word behind --refit, which may be left out."""
    if word != "lora":
        raise argparse.ArgumentTypeError(f"{word!r}; allowed is lora, or nothing. BUNDLE stands before it")
    return word


def _flag(name: str) -> str:
    """The command line's flag of an option: --opt-level of opt_level."""
    return f"--{name.replace('_', '-')}"
