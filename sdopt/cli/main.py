"""The `sdopt` command: a table of commands, each imported only when it is the one that was typed.

Exit codes: 0 ok, 1 failed, 2 usage, 3 bad bundle or model, 4 environment (a backend or device is missing),
5 a gate was not met, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from sdopt import __version__
from sdopt.errors import SdoptError

COMMANDS = {
    "bench": "sdopt beside PyTorch and its peers; compare and report the results",
    "export": "a diffusers checkpoint into a bundle of ONNX graphs, checked against PyTorch",
    "build": "engines of a bundle for this machine's GPU, in half precision",
    "generate": "a prompt into a picture",
    "inspect": "what is in a bundle",
    "diagnose": "where half precision leaves float32, layer by layer",
    "doctor": "what this machine has, and which engine and precision it would use",
    "samplers": "the samplers, their tables and plots",
}
# command -> (the word that may be left out, all of its words): `sdopt bench BUNDLE` is `sdopt bench run BUNDLE`
IMPLIED = {"bench": ("run", ("run", "compare", "report", "-h", "--help"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(argv[0] if argv else None).parse_args(_spelled_out(argv))
        return importlib.import_module(f"sdopt.cli.{args.command}").run(args)
    except SdoptError as error:
        print(f"sdopt: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `sdopt inspect ... | head`
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("sdopt: interrupted", file=sys.stderr)
        return 130


def _spelled_out(argv: list[str]) -> list[str]:
    """The arguments with the word that was left out."""
    implied, words = IMPLIED.get(argv[0] if argv else "", ("", ()))
    return [argv[0], implied, *argv[1:]] if implied and argv[1:] and argv[1] not in words else argv


def _parser(typed: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdopt", description="Stable Diffusion without PyTorch at run time.")
    parser.add_argument("--version", action="version", version=f"sdopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == typed:
            importlib.import_module(f"sdopt.cli.{name}").add_arguments(command)
    return parser
