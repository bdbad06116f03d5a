"""`sdopt export SOURCE -o BUNDLE`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from sdopt.errors import BackendError

EXTRA = 'the exporter needs PyTorch and diffusers: pip install "sdopt[cpu,export]"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a diffusers folder, an id on the hub (owner/name), or a .safetensors file")
    add("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="the folder to make")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--variant", help="weights to read, e.g. fp16")
    add("--offline", action="store_true", help="never ask the hub (as HF_HUB_OFFLINE=1)")
    add("--config", metavar="FOLDER", help="a diffusers folder of the same model, for a single file's configurations")
    add("--opset", type=int, default=23, help="18 for parsers that do not read 23 (default: 23)")
    add("--floor", type=float, default=80.0, metavar="DB", help="parity below this fails the export (default: 80)")
    add("--steps", type=int, metavar="N", help="the bundle's default number of steps (default: the model's own)")
    add("--guidance", type=float, metavar="SCALE", help="the bundle's default guidance (default: the model's own)")
    add("--no-verify", action="store_true", help="skip the parity gate; the manifest records it")
    add("--force", action="store_true", help="replace a bundle of this name")


def run(args: argparse.Namespace) -> int:
    try:
        from sdopt.export import export
    except ImportError as error:
        raise BackendError(f"{error}; {EXTRA}") from error
    started = time.perf_counter()
    path = export(
        args.source,
        args.output,
        revision=args.revision,
        variant=args.variant,
        offline=args.offline,
        config=args.config,
        opset=args.opset,
        verify=not args.no_verify,
        floor_db=args.floor,
        steps=args.steps,
        guidance=args.guidance,
        force=args.force,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(path)
    print(f"{time.perf_counter() - started:.1f} s in all", file=sys.stderr)
    return 0
