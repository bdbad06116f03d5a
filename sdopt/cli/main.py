"""The `sdopt` command: a table of commands. Only the command that was typed is imported.

Exit codes: 0 ok, 1 failed, 2 usage, 3 bad bundle or model, 4 environment (a backend or device is missing),
5 a gate was not met, 130 interrupted (143 by SIGTERM).
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from sdopt import __version__, progress
from sdopt.cli import signals, terminal
from sdopt.cli.native import native_escaped
from sdopt.cli.parser import Parser, as_typed
from sdopt.errors import SdoptError, UsageError, cut

COMMANDS = {
    "bench": "measure sdopt beside PyTorch and its peers; compare and report the results",
    "export": "export a diffusers checkpoint as a bundle of ONNX graphs, checked against PyTorch",
    "build": "build a bundle's engines for this machine's GPU, in half precision",
    "generate": "make a picture from a prompt",
    "batch": "make a picture of each line of a list, on one machine or many",
    "serve": "serve bundles over HTTP: OpenAI's Images API, AUTOMATIC1111's, jobs, and a page",
    "tune": "measure time and fidelity of a bundle's settings here, and write presets of the best",
    "inspect": "show what is in a bundle",
    "diagnose": "show layer by layer where half precision differs from fp32",
    "engines": "list and remove the engines that `sdopt build` made for a bundle",
    "cache": "list and clear what is kept for quicker starts",
    "doctor": "show what this machine has, and which engine and precision sdopt would use on it",
    "samplers": "show the samplers, their tables and plots",
}
BRIEF = {
    "bench": "sdopt bench BUNDLE [--baseline CHECKPOINT] | compare OLD NEW | report RESULT... -o FILE.md",
    "export": "sdopt export SOURCE -o BUNDLE [options]",
    "build": "sdopt build BUNDLE --backend BACKEND [options]",
    "generate": "sdopt generate PROMPT -o PATH [options]",
    "batch": "sdopt batch LIST.jsonl -o FOLDER [options]",
    "serve": "sdopt serve [BUNDLE ...] [--port PORT] [options]",
    "tune": "sdopt tune [BUNDLE] --floor DB | --budget SECONDS [options]",
    "inspect": "sdopt inspect [BUNDLE] [--json]",
    "diagnose": "sdopt diagnose [BUNDLE] [options]",
    "engines": "sdopt engines [BUNDLE] [--remove KEY] [--json]",
    "cache": "sdopt cache [--clear] [--json]",
    "doctor": "sdopt doctor [--json]",
    "samplers": "sdopt samplers [NAME ...] [options]",
}
RUNS_OTHERS = ("bench",)  # commands that start programs which write to the terminal themselves
OF_PICTURES = ("generate",)  # commands whose flags are keywords of a request
LESS_MEMORY = {  # command -> what to do where the memory is full
    "generate": "take a smaller --size, fewer pictures, or --vae-tile 64",
    "batch": "take fewer --slots or --workers, a smaller --size, or --vae-tile 64",
    "diagnose": "take a smaller --latent",
}
OTHERS_LESS_MEMORY = "close other programs, or work on a machine that has more"
# command -> (the word that may be left out, all words that may follow).
# `sdopt bench BUNDLE` is short for `sdopt bench run BUNDLE`.
IMPLIED = {"bench": ("run", ("run", "compare", "report", "-h", "--help"))}


class PrintCompletion(argparse.Action):
    """Print the completion script of a shell, and end."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        from sdopt.cli.completion import script  # late, as a command is

        print(script(build_parser(*COMMANDS), str(values)))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    is_own_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if is_own_process:
        terminal.fill_closed()
    arrived = signals.Arrived()
    try:
        with signals.caught() if is_own_process else nullcontext(arrived) as arrived:
            return _main(argv, is_own_process, arrived)
    except KeyboardInterrupt:  # between two lines of `_main`
        print(arrived.line(), file=sys.stderr)
        return arrived.code()


def _main(argv: list[str], is_own_process: bool, arrived: signals.Arrived) -> int:
    escapes_native = is_own_process and not (argv and argv[0] in RUNS_OTHERS)
    with native_escaped() if escapes_native else nullcontext(), terminal.escaped():
        try:
            code = _flushed(argv)
        except BrokenPipeError:  # `sdopt inspect ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer goes nowhere
            return 1
        except KeyboardInterrupt:
            print(arrived.line(), file=sys.stderr)
            return arrived.code()
        except Exception as error:
            if arrived.number:  # what a library made of the interrupt, e.g. an ImportError
                print(arrived.line(), file=sys.stderr)
                return arrived.code()
            message, code = _explained(error, argv[_place_of_command(argv) :][:1])
            if not message:  # a mistake in sdopt, whose traceback is needed
                traceback.print_exc()
                message = "this is a fault of sdopt: please report it with the lines above"
            print(f"sdopt: error: {cut(message)}", file=sys.stderr)
        finally:
            if is_own_process:
                terminal.settle(progress.stderr())
        return code


def _flushed(argv: list[str]) -> int:
    """Run one command, and write all that it has printed, also where it ends with `--help`. Returns the exit code.

    Raises: OSError where stdout cannot be written.
    """
    try:
        code = _run(argv)
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _run(argv: list[str]) -> int:
    """Run one command. Returns the exit code."""
    args = build_parser(*argv[_place_of_command(argv) :][:1]).parse_args(_with_implied_word(argv))
    is_of_pictures = args.command in OF_PICTURES
    worded = as_typed if is_of_pictures else str
    try:
        with terminal.messages(quiet=args.quiet, verbose=args.verbose, worded=worded):
            return importlib.import_module(f"sdopt.cli.{args.command}").run(args)
    except UsageError as error:
        if not is_of_pictures:
            raise
        raise UsageError(as_typed(str(error)), error.param) from error


def _explained(error: Exception, command: list[str]) -> tuple[str, int]:
    """A sentence for an error of a command, and the exit code. It is empty for an error that nobody expects."""
    if isinstance(error, SdoptError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        what = f" ({error})" if str(error) else ""
        advice = LESS_MEMORY.get("".join(command), OTHERS_LESS_MEMORY)
        return f"there is not enough memory{what}: {advice}", 1
    if isinstance(error, OSError):
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        return f"{': '.join([*names, error.strerror or str(error)])}{_advice(error.errno)}", 1
    return "", 1


def _advice(number: int | None) -> str:
    """What to do about an error of the operating system."""
    return {
        errno.ENOSPC: "; free some space, or write to another disk",
        errno.EDQUOT: "; free some space, or write to another disk",
        errno.EACCES: "; change its permissions, or name another place",
        errno.EROFS: "; name a place that can be written",
    }.get(number or 0, "")


def _place_of_command(argv: Sequence[str]) -> int:
    """Where the command stands: behind options of `sdopt` itself, such as --quiet."""
    return next((place for place, word in enumerate(argv) if not word.startswith("-")), len(argv))


def _with_implied_word(argv: list[str]) -> list[str]:
    """The arguments, with the word that may be left out added if it was."""
    place = _place_of_command(argv) + 1
    command = argv[place - 1 : place]
    if len(argv) <= place or command[0] not in IMPLIED:
        return argv
    implied, words = IMPLIED[command[0]]
    return argv if argv[place] in words else [*argv[:place], implied, *argv[place:]]


def build_parser(*command_names: str) -> Parser:
    """The parser of the command line. Only the commands that are named get their arguments; the others are just listed.

    So no other command has to be imported.
    """
    parser = Parser(
        prog="sdopt",
        description="Stable Diffusion without PyTorch at run time.",
        brief="sdopt COMMAND [options]",
        epilog="`sdopt COMMAND --help` explains its options and has examples",
    )
    parser.add_argument("--version", action="version", version=f"sdopt {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        metavar="SHELL",
        help="print the script by which bash, zsh or fish completes what you type, and end",
    )
    _add_messages(parser, False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        text = summary[0].upper() + summary[1:] + "."
        command = commands.add_parser(name, help=summary, description=text, brief=BRIEF[name])
        if name in command_names:
            importlib.import_module(f"sdopt.cli.{name}").add_arguments(command)
            for one in (command, *command.commands.values()):
                _add_messages(one, argparse.SUPPRESS)
    return parser


def _add_messages(parser: Parser, default: Any) -> None:
    """Add the options that say how much is printed, which every command takes."""
    only_one = parser.add_argument_group("messages").add_mutually_exclusive_group()
    add = only_one.add_argument
    add("--quiet", action="store_true", default=default, help="print results and errors only: no bars, no remarks")
    add("--verbose", action="store_true", default=default, help="also print what is done, from the log of the library")
