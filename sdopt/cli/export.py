"""`sdopt export SOURCE -o BUNDLE`: export a checkpoint as a bundle."""

from __future__ import annotations

import argparse
import importlib
import re
import time
from pathlib import Path
from typing import Any

from sdopt.bundle.adapter import ADAPTERS, check_name
from sdopt.bundle.write import check_target
from sdopt.cli import terminal
from sdopt.cli.parser import Parser
from sdopt.engine.address_space import require_for_export
from sdopt.errors import BackendError, UsageError, install

EXTRA = (
    f"the exporter needs PyTorch and diffusers: {install('cpu,export')}. On Linux this brings PyTorch for NVIDIA GPUs, "
    "about 2.7 GB; for the smaller one of the CPU first: "
    "pip install torch --index-url https://download.pytorch.org/whl/cpu"
)
BUNDLE_FLAGS = ("opset", "steps", "guidance")  # that only a bundle is made with
FLAGS = {
    "floor_db": "--floor",
    "source": "SOURCE",
    "target": "-o",
    "image_encoder": "--image-encoder",
}  # where a flag differs from its argument


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="a diffusers folder, an id on the hub (owner/name), or a .safetensors file"
    )
    add = parser.group("files")
    add("-o", "--output", type=Path, metavar="BUNDLE", help="the folder to make")
    add("--onto", type=Path, metavar="BUNDLE", help="add a ControlNet or another adapter to a bundle, instead of -o")
    add("--name", help="with --onto: what the adapter is called there, e.g. canny")
    add("--force", action="store_true", help="replace a bundle, or an adapter, of this name")
    add = parser.group("which checkpoint")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--variant", help="variant of the weights to read, e.g. fp16")
    add("--offline", action="store_true", help="never connect to the hub (as HF_HUB_OFFLINE=1 does)")
    add(
        "--config",
        metavar="MODEL",
        help="whose configurations a single file has: a diffusers folder, an id on the hub, or sd1, sd2, sd2-base, "
        "sdxl-base and so on; with --onto a folder (default: the model that its tensors are like)",
    )
    add(
        "--image-encoder",
        metavar="FOLDER",
        help="with --onto: what an IP-Adapter sees with, a folder or an id on the hub (default: the folder "
        "image_encoder beside its file)",
    )
    add = parser.group("how it is made")
    add("--opset", type=int, help="18 for parsers that do not read 23 (default: 23)")
    add("--floor", type=float, default=80.0, metavar="DB", help="parity below this fails the export (default: 80)")
    add("--no-verify", action="store_true", help="skip the parity gate; the manifest records it")
    add = parser.group("defaults of the bundle")
    add("--steps", type=int, metavar="N", help="the bundle's default number of steps (default: the model's own)")
    add("--guidance", type=float, metavar="SCALE", help="the bundle's default guidance (default: the model's own)")
    parser.examples(
        "sdopt export engines/emoji/checkpoint -o emoji",
        "sdopt export stable-diffusion-v1-5/stable-diffusion-v1-5 -o sd15 --variant fp16",
        "sdopt export model.safetensors -o model --offline",
        "sdopt export lllyasviel/sd-controlnet-canny --onto sd15 --name canny",
        "sdopt export control-lora-canny-rank128.safetensors --onto sdxl --name canny",
        "sdopt export h94/IP-Adapter/models/ip-adapter_sd15.safetensors --onto sd15 --name face",
    )


def run(args: argparse.Namespace) -> int:
    _check_place(args)  # before PyTorch is imported, which takes seconds
    require_for_export()
    try:
        importlib.import_module("sdopt.export")
    except ImportError as error:
        raise BackendError(f"{error}; {EXTRA}") from error
    started = time.perf_counter()
    try:
        with terminal.Phases() as phases:
            path = _export(args, phases) if args.onto is None else _add(args, phases)
    except UsageError as error:
        raise UsageError(_as_typed(error), error.param) from error
    print(path)
    terminal.say(f"{time.perf_counter() - started:.1f} s in all")
    return 0


def _check_place(args: argparse.Namespace) -> None:
    """Raises: UsageError, BundleError unless the command says where to, and that can be written."""
    if args.onto is None:
        if args.output is None:
            raise UsageError("say where to: -o BUNDLE makes one; --onto BUNDLE --name NAME adds to one")
        if args.name is not None:
            raise UsageError(f"--name {args.name} needs --onto BUNDLE; leave it out")
        if args.image_encoder is not None:
            raise UsageError(f"--image-encoder {args.image_encoder} needs --onto BUNDLE; leave it out")
        check_target(args.output, args.force)
        return
    if args.output is not None:
        raise UsageError("-o and --onto: give one of the two")
    if args.name is None:
        raise UsageError("--onto needs --name NAME, e.g. --name canny")
    for flag in BUNDLE_FLAGS:
        if getattr(args, flag) is not None:
            raise UsageError(f"--{flag} is for a bundle, and --onto adds to one; leave it out")
    check_name(args.name)
    if not args.onto.is_dir():
        raise UsageError(f"--onto {args.onto}: there is no such folder; give a bundle, as `sdopt export -o` makes it")
    check_target(args.onto / ADAPTERS / args.name, args.force)


def _as_typed(error: UsageError) -> str:
    """The text of an error in the words of the command line: `--floor nan` for `floor_db = nan`."""
    if error.param is None:
        return str(error)
    return re.sub(rf"^{error.param} = '?([^';:]*)'?", rf"{FLAGS.get(error.param, '--' + error.param)} \1", str(error))


def _add(args: argparse.Namespace, phases: terminal.Phases) -> Path:
    from sdopt.export.onto import add_adapter

    return add_adapter(args.source, args.onto, args.name, image_encoder=args.image_encoder, **_of_both(args, phases))


def _export(args: argparse.Namespace, phases: terminal.Phases) -> Path:
    from sdopt.export import export

    opset = 23 if args.opset is None else args.opset
    own = {"opset": opset, "steps": args.steps, "guidance": args.guidance}
    return export(args.source, args.output, **own, **_of_both(args, phases))


def _of_both(args: argparse.Namespace, phases: terminal.Phases) -> dict[str, Any]:
    """The options that a bundle and an adapter are made with."""
    return {
        "revision": args.revision,
        "variant": args.variant,
        "offline": args.offline,
        "config": args.config,
        "verify": not args.no_verify,
        "floor_db": args.floor,
        "force": args.force,
        "report": terminal.say,
        "progress": phases,
    }
