"""`sdopt tune BUNDLE --floor 30dB`: which settings are worth their time here, as presets of the bundle."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.bundle.precision import precision_word
from sdopt.cli import outputs, terminal
from sdopt.cli.build import EXTRA
from sdopt.cli.prompts import read_prompts
from sdopt.errors import BackendError, UsageError

if TYPE_CHECKING:
    from sdopt.bench.tune import Outcome
    from sdopt.bench.tune_choose import Choice
    from sdopt.bundle.files import Bundle
    from sdopt.cli.parser import Parser

PICTURES = 8
NOT_REACHED = 5  # exit code when no setting is good enough
DEPTHS = (1, 2)  # of the feature caches that --build builds


def add_arguments(parser: Parser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="default: the embedded model")
    group = parser.add_argument_group("what you accept")
    one = group.add_mutually_exclusive_group(required=True)
    one.add_argument(
        "--floor", type=decibels, metavar="DB", help="the least PSNR to the picture at many steps in fp32, e.g. 30dB"
    )
    one.add_argument("--budget", type=seconds, metavar="SECONDS", help="the most time of a picture, e.g. 2s or 800ms")
    add = parser.group("what is measured")
    add("--prompts", metavar="FILE", help="a prompt in each line, in UTF-8 (default: eight short ones)")
    add("--pictures", type=int, metavar="N", help=f"for each candidate at most (default: {PICTURES}, or the prompts)")
    add("--reference-steps", type=int, default=100, metavar="N", help="steps of the reference (default: 100)")
    add("--reference-sampler", default="", metavar="NAME", help="default: the bundle's own")
    add("--minutes", type=float, default=10.0, metavar="M", help="about how long to search (default: 10)")
    add("--threads", type=int, help="threads of every engine (default: the cores that this process may use)")
    add = parser.group("what is tried (default: all that runs here)")
    add("--backend", action="append", default=[], help="ort, openvino, tensorrt, ...; may be repeated")
    add("--precision", action="append", default=[], type=precision_word, help="fp32, bf16, ...; may be repeated")
    add(
        "--sampler", action="append", default=[], metavar="NAME",
        help="or NAME/SCHEDULE; may be repeated (default: the bundle's and five others)",
    )  # fmt: skip
    add("--steps", type=int, nargs="+", default=[], metavar="N", help="default: parts of the bundle's own number")
    add("--build", action="store_true", help="first build what is missing: feature caches, and int8 if it is named")
    add = parser.group("output")
    add("-o", "--output", type=Path, metavar="FILE.json", help="the record; one that is there is taken up again")
    add("--plot", type=Path, metavar="FILE.svg", help="a plot of time against PSNR")
    add("--no-presets", action="store_true", help="write no presets into the bundle")
    add("--json", action="store_true", help="print the presets as JSON")
    parser.examples(
        "sdopt tune sd15 --budget 20s -o sd15-tune.json --plot sd15-tune.svg",
        "sdopt tune sd15 --floor 30dB --prompts prompts.txt --precision bf16 --precision int8 --build",
    )


def decibels(text: str) -> float:
    """30 of "30dB" or "30"."""
    return _number(text, {"db": 1.0}, "30dB")


def seconds(text: str) -> float:
    """0.8 of "800ms", 2 of "2s" or "2"."""
    return _number(text, {"s": 1.0, "ms": 0.001}, "2s")


def _number(text: str, units: dict[str, float], example: str) -> float:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip().lower())
    factor = units.get(match[2] or next(iter(units))) if match else None
    value = float(match[1]) * factor if match and factor else math.nan
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed is a number above 0, e.g. {example}")
    return value


def run(args: Any) -> int:
    from sdopt.bench import tune, tune_choose
    from sdopt.bench.machine import versions
    from sdopt.bench.tune_record import Board
    from sdopt.bundle.disk import write_named
    from sdopt.bundle.files import Bundle, embedded
    from sdopt.bundle.presets import write_preset

    if args.output is not None and args.output == args.plot:
        raise UsageError(f"-o and --plot: both are {args.plot}; name two files", "plot")
    for flag, path, example in (("-o", args.output, "tune.json"), ("--plot", args.plot, "tune.svg")):
        if path is not None:
            outputs.check_file(path, flag, example=example)
    choice, setup = tune_choose.Choice(args.floor, args.budget), _setup(args)
    bundle = Bundle.open(args.bundle or embedded())
    if args.build:
        _build(bundle, args.backend, args.precision)
    settings = tune.settings(bundle, setup)
    board = Board.open(args.output, settings, versions())
    if board.pictures:
        terminal.say(f"{args.output}: {board.pictures} pictures are measured already")
    try:
        with terminal.bar("measuring") as bar:
            found = tune.tune(bundle, setup, choice, board, terminal.say, lambda: bar.update(label="measuring"))
    finally:
        board.save()
    board.finish(str(choice), tune_choose.as_json({"default": found.default, **found.presets}))
    if args.plot is not None:
        title = f"{bundle.manifest.name or bundle.path.name}: time and fidelity, {settings.machine}"
        write_named(args.plot, tune_choose.plot(title, found.points, found.default, found.presets))
    if not args.no_presets:
        for name, one in found.presets.items():
            preset = tune_choose.preset_of(one, settings.reference, settings.machine)
            terminal.say(f"preset {name}: {write_preset(bundle, name, preset)}")
    if args.json:
        print(json.dumps(tune_choose.as_json({"default": found.default, **found.presets})))
    else:
        print(tune_choose.table(found.points, found.default, found.presets))
    return _told(found, choice)


def _setup(args: Any) -> Any:
    """What is measured. Raises: UsageError for wrong numbers, and prompts that cannot be read."""
    from sdopt.bench.tune import Setup
    from sdopt.bench.tune_run import Reference
    from sdopt.bench.tune_space import PROMPTS, Wanted
    from sdopt.engine import checked_threads
    from sdopt.engine.cores import usable_cores

    try:
        prompts = PROMPTS if args.prompts is None else read_prompts([], args.prompts)
    except UsageError as error:
        raise UsageError(str(error).replace("--prompt-file", "--prompts"), "prompts") from error
    pictures = max(PICTURES, len(prompts)) if args.pictures is None else args.pictures
    if not 1 <= pictures <= 1000:
        raise UsageError(f"--pictures {pictures}; allowed are 1 to 1000", "pictures")
    if not 0 < args.minutes < 1e5:
        raise UsageError(f"--minutes {args.minutes:g}; allowed are minutes above 0", "minutes")
    if args.reference_steps < 2:
        raise UsageError(f"--reference-steps {args.reference_steps}; allowed are 2 or more", "reference_steps")
    if any(steps < 1 for steps in args.steps):
        raise UsageError(f"--steps {min(args.steps)}; allowed are 1 or more", "steps")
    wanted = Wanted(tuple(args.backend), tuple(args.precision), tuple(args.sampler), tuple(args.steps))
    threads = checked_threads(args.threads) or usable_cores()
    each = tuple(prompts[i % len(prompts)] for i in range(pictures))
    return Setup(each, Reference(args.reference_steps, args.reference_sampler), threads, wanted, args.minutes * 60)


def _build(bundle: Bundle, backends: list[str], precisions: list[str]) -> None:
    """Build the engines of feature caches, and those in int8 if it is named, that are not there."""
    try:
        from sdopt.build.jobs import BuildOptions, build
    except ImportError as error:
        raise BackendError(f"{error}; {EXTRA}") from error
    from sdopt.engine import choose_backend

    for backend in backends or [choose_backend("auto", "fp32", bundle)[0]]:
        name = backend.partition(":")[0]
        if "int8" in precisions:
            build(bundle, name, options=BuildOptions(precision="int8"), report=terminal.say)
        for depth in DEPTHS:
            build(bundle, name, cache_depth=depth, report=terminal.say)


def _told(found: Outcome, choice: Choice) -> int:
    """Say which presets there are not. Returns the exit code."""
    from sdopt.bench.tune_choose import looser

    best = max(found.points, key=lambda p: p.psnr_db)
    fastest = min(found.points, key=lambda p: p.seconds)
    for name, wanted in {"balanced": choice, "fast": looser(choice)}.items():
        if name not in found.presets:
            reached = f"{best.psnr_db:.1f} dB" if choice.floor is not None else f"{fastest.seconds:.3g} s"
            terminal.note(f"no preset {name}: nothing has {wanted}; the best is {reached}")
    return 0 if "balanced" in found.presets else NOT_REACHED
