"""`sdopt batch LIST -o FOLDER`: a picture of each line of a list; the same command again makes what is left."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.bundle.precision import precision_word
from sdopt.cli import terminal
from sdopt.cli.generate import check_threads, file_and_token, with_device
from sdopt.cli.loras import CommandLoras
from sdopt.cli.parser import as_typed
from sdopt.errors import SdoptError, UsageError

if TYPE_CHECKING:
    from sdopt.cli.parser import Parser
    from sdopt.offline.folders import Folder
    from sdopt.offline.recipe import Recipe
    from sdopt.offline.run import Outcome, Run
    from sdopt.pipeline import Pipeline

STDIN = "-"
MOST_SHOWN = 5  # failures on stderr; the report has all
MOST_WORKERS = 1024


def add_arguments(parser: Parser) -> None:
    from sdopt.cli.flags import add_flags

    add = parser.add_argument
    add("list", metavar="LIST.jsonl", help='a JSON object in each line: "id" and the keywords of Python; - is stdin')
    add = parser.add_argument_group("files").add_argument
    add(
        "-o",
        "--output",
        required=True,
        metavar="FOLDER",
        help="for FOLDER/ID-DIGEST.png and FOLDER/report.jsonl",
    )
    add("--dry-run", action="store_true", help="check every line, say what would be made, and end")
    add("--json", action="store_true", help="print the result as JSON")
    add = parser.add_argument_group("machines").add_argument
    add("--workers", type=int, metavar="N", help="worker processes, or with --ray actors (default: this process)")
    add("--device", action="append", default=[], metavar="NAME",
        help="cpu, cuda:0, ...; several have a worker process each; may be repeated")  # fmt: skip
    add("--slots", type=int, metavar="N", help="pictures that are under way at once in each process (default: 8)")
    add("--ray", action="store_true", help="on a Ray cluster: that of --address, or a new one of this machine")
    add("--address", default="", metavar="HOST:PORT", help="with --ray: a cluster that runs; auto is this machine's")
    add = parser.add_argument_group("model and engine").add_argument
    add("-m", "--model", type=Path, metavar="BUNDLE", help="the bundle; without it the embedded text-to-emoji model")
    add("--embedding", action="append", default=[], metavar="FILE[=TOKEN]", help="a textual inversion; may be repeated")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]",
        help="a LoRA and its weight, by default 1, for all lines; may be repeated")  # fmt: skip
    add("--backend", default="auto", help="ort (or ort:cpu, ort:cuda), openvino, tensorrt, tensorrt-rtx")
    add(
        "--precision",
        default="auto",
        type=precision_word,
        help="fp32, bf16 if the processor has it, or one that was built",
    )
    add("--threads", type=int, help="threads of each engine (default: the cores, divided by the workers)")
    add("--no-cache", action="store_true", help="store nothing for the next start (see `sdopt cache`)")
    add("--paranoid", action="store_true", help="hash every file again, even those that have not changed")
    add("--trust-engines", action="store_true", help="load engines that somebody else built; they can run any code")
    add_flags(parser, of_all=True)
    parser.examples(
        "sdopt batch prompts.jsonl -o pictures",
        "sdopt batch prompts.jsonl -o pictures -m sd15 --steps 20     (for the lines that do not say it)",
        "sdopt batch prompts.jsonl -o pictures --dry-run",
        "sdopt batch prompts.jsonl -o pictures -m sd15 --backend tensorrt --device cuda:0 --device cuda:1",
        "sdopt batch prompts.jsonl -o pictures --ray --workers 4",
    )


def run(args: Any) -> int:
    from sdopt.offline import folders
    from sdopt.offline.lines import deciding, lines, read
    from sdopt.offline.run import begin, listed, plan_all

    started = time.perf_counter()
    defaults = _defaults(args)
    _check(args)
    if args.list == STDIN:
        objects, source = read(_stdin(), "stdin"), folders.folder("")
    else:
        objects, source = listed(args.list)
    target = folders.folder(args.output)
    folders.check(target)
    with terminal.busy("loading"):
        recipe, pipe = _opened(args, defaults)
    with pipe:
        batch = begin(lines(objects, defaults, source, deciding(pipe)), target)
        with terminal.bar("checking", len(batch.left)) as checking:
            plan_all(pipe, batch.left, source, checking.update)
        if args.dry_run:
            return _told(args, batch, started)
        with _outcomes(args, recipe, pipe, batch, source, target) as outcomes:
            folders.make(target)
            with folders.alone(target):
                _take(batch, outcomes)
    return _told(args, batch, started)


def _take(batch: Run, outcomes: Iterable[Outcome]) -> None:
    """Take in all outcomes, with a bar, and with a line for the first ones that failed."""
    with terminal.bar("making", len(batch.left)) as bar:
        bar.update(0)

        def told(outcome: Outcome) -> None:
            bar.update()
            if outcome.status == "failed" and batch.count("failed") <= MOST_SHOWN:
                terminal.note(f"{outcome.id}: {outcome.error}")

        try:
            batch.take(outcomes, told)
        except KeyboardInterrupt:
            made, left = batch.count("made"), batch.count("left")
            terminal.say(f"{made} made, {left} left; the same command again makes the rest")
            raise


@contextmanager
def _outcomes(
    args: Any, recipe: Recipe, pipe: Pipeline, batch: Run, source: Folder, target: Folder
) -> Generator[Iterable[Outcome]]:
    """The outcomes of the lines that are left. What makes the pictures ends with the block."""
    from sdopt.offline.makers import SLOTS, OneProcess, Workers, devices
    from sdopt.offline.run import made

    slots = args.slots or SLOTS
    if not batch.left:
        yield ()
    elif args.ray:
        from sdopt.offline.ray import made_by_actors

        how: dict[str, Any] = {"address": args.address, "workers": args.workers, "slots": slots}
        with (
            redirect_stdout(sys.stderr),
            closing(made_by_actors(recipe, batch.left, source, target, **how)) as outcomes,
        ):
            yield outcomes  # Ray prints what happens to its processes
    else:
        is_alone = args.workers is None and len(args.device) < 2
        maker = OneProcess(pipe, slots) if is_alone else Workers(recipe, devices(args.device, args.workers), slots)
        with closing(maker):
            yield made(maker, batch.left, source, target)


def _opened(args: Any, defaults: dict[str, Any]) -> tuple[Recipe, Pipeline]:
    """How each process opens the pipeline, and this one's. `defaults` gets what a LoRA for few steps wants."""
    from sdopt.offline.recipe import Recipe

    backend, precision = with_device(args.device[0] if args.device else None, args.backend, args.precision)
    recipe = Recipe(
        None if args.model is None else str(args.model),
        backend,
        precision,
        threads=args.threads,
        paranoid=args.paranoid,
        trust_engines=args.trust_engines,
        cache=not args.no_cache,
        embeddings=tuple(_embedding(text) for text in args.embedding),
    )
    pipe = recipe.open()
    loras = CommandLoras(pipe, args.lora, None)
    loras.use("", reads_tags=False)
    loras.suggest(defaults)
    return replace(recipe, loras=loras.entries), pipe


def _embedding(text: str) -> tuple[str, str | None]:
    """The file and the token of --embedding. Processes on other machines may have another current folder."""
    file, token = file_and_token(text)
    return str(Path(file).absolute()), token


def _defaults(args: Any) -> dict[str, Any]:
    """The keywords of lines that do not have them: those whose flags were typed."""
    from sdopt.cli import flags
    from sdopt.offline.lines import checked

    try:
        return checked(flags.given(args))
    except UsageError as error:
        raise UsageError(as_typed(str(error)), error.param) from error


def _check(args: Any) -> None:
    """Raises: UsageError for options that are wrong, or do not go together."""
    check_threads(args.threads)
    for name, most in (("workers", MOST_WORKERS), ("slots", 64)):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"--{name} {value}; allowed are 1 to {most}", name)
    if args.address and not args.ray:
        raise UsageError(f"--address {args.address} is of a Ray cluster: add --ray", "address")
    if args.ray and args.device:
        raise UsageError(f"--ray and --device {args.device[0]}: Ray gives each actor its device; leave out --device")
    if args.output == STDIN:
        raise UsageError("-o -: pictures are not written to stdout; name a folder, e.g. -o pictures", "output")


def _stdin() -> bytes:
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise UsageError("LIST -: stdin is closed; name a file", "list")
    return sys.stdin.buffer.read()


def _told(args: Any, batch: Run, started: float) -> int:
    """Print what became of the list. Returns the exit code."""
    from sdopt.offline.run import REPORT

    report = f"{batch.folder}/{REPORT}"
    older = sum(map(len, batch.older.values()))
    counts = {status: batch.count(status) for status in ("made", "kept", "failed", "left")}
    if args.dry_run:
        if args.json:
            print(json.dumps({**counts, "older": older}))
        else:
            changed = f", {older} of changed lines would go to {batch.folder}/older" if older else ""
            print(f"{counts['left']} to make, {counts['kept']} are there{changed}")
        return 0
    seconds = time.perf_counter() - started
    if args.json:
        print(json.dumps({**counts, "older": older, "report": report, "seconds": round(seconds, 3)}))
    else:
        print(report)
        aside = f"; {older} of changed lines are in {batch.folder}/older" if older else ""
        words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        terminal.say(f"{words}{aside}; {seconds:.2f} s")
    if counts["failed"]:
        raise SdoptError(f"{counts['failed']} of {len(batch.lines)} lines failed; {report} says why")
    return 0
