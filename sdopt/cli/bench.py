"""`sdopt bench BUNDLE --baseline CHECKPOINT`, `sdopt bench compare OLD NEW` and `sdopt bench report RESULTS...`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from sdopt.cli import outputs, terminal
from sdopt.cli.parser import Parser
from sdopt.errors import SdoptError, UsageError

CASES = Path("benchmarks/cases.toml")
CACHE = Path("build-out/peers")
TOO_SLOW = 5  # exit code when a component is slower than allowed


def add_arguments(parser: Parser) -> None:
    words = parser.add_subparsers(dest="word", required=True, metavar="run | compare | report")

    def add_word(name: str, text: str) -> Parser:
        return words.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    run_parser = add_word("run", "measure a bundle beside its checkpoint (the word `run` may be left out)")
    compare_parser = add_word("compare", "compare two records of one machine; exit code 5 if slower than allowed")
    report_parser = add_word("report", "make tables and plots from records")
    _run_arguments(run_parser)
    _compare_arguments(compare_parser)
    _report_arguments(report_parser)
    usages = [p.format_usage().replace("usage: ", "") for p in (run_parser, compare_parser, report_parser)]
    examples = ("sdopt bench sd15", "sdopt bench sd15 --baseline checkpoint --json sd15.json --report sd15.md")
    parser.epilog = "\n".join([*usages, "examples:", *(f"  {line}" for line in examples)])


def _compare_arguments(parser: Parser) -> None:
    parser.add_argument("old", type=Path, metavar="OLD.json", help="the record that was made first")
    parser.add_argument("new", type=Path, metavar="NEW.json", help="the record that is compared with it")
    add = parser.group("what is compared")
    add("--fail-over", type=percent, metavar="5%", help="exit with 5 if NEW is certainly slower by more than this")
    add("--side", default="sdopt", metavar="NAME", help="the side that is compared (default: sdopt)")
    add("--against", metavar="NAME", help="another side of OLD to compare it with (default: the same side)")
    add("--anyway", action="store_true", help="compare records of different machines too")
    parser.group("output")("--json", action="store_true", help="print the changes as JSON")
    parser.examples("sdopt bench compare old.json new.json --fail-over 5%")


def _report_arguments(parser: Parser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="records of `sdopt bench run`")
    add = parser.group("files")
    add(
        "-o", "--output", type=Path, required=True, metavar="FILE.md",
        help="the file to write; if it has marks, only the text between them is replaced",
    )  # fmt: skip
    add("--plots", type=Path, metavar="FOLDER", help="where the plots go (default: beside FILE.md)")
    add(
        "--curves", type=Path, nargs="+", default=[], metavar="RESULT.json",
        help="more records, for the plots of cost against steps, pixels and images only",
    )  # fmt: skip
    parser.examples("sdopt bench report sd15.json -o sd15.md")


def _run_arguments(parser: Parser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle to measure")
    add = parser.group("beside what")
    add(
        "--baseline", type=Path, metavar="CHECKPOINT",
        help="the diffusers folder that it came from; without it the bundle is timed alone, and has no parity",
    )  # fmt: skip
    add("--baselines", type=names, metavar="NAMES", help="eager-fp32,eager-bf16-nhwc,... (default: by the device)")
    add("--peer", type=peer, action="append", default=[], metavar="NAME=COMMAND", help="see benchmarks/peers/README.md")
    add("--cache", type=Path, default=CACHE, metavar="FOLDER", help=f"what peers convert (default: {CACHE})")
    add = parser.group("what is measured")
    add(
        "--case", action="append", default=[], metavar="NAME",
        help="a case of --cases; may be repeated (default: the picture that the bundle makes by default)",
    )  # fmt: skip
    add("--cases", type=Path, default=CASES, metavar="FILE", help=f"default: {CASES}")
    add("--rounds", type=int, default=5, metavar="R", help="timed calls of each side, taking turns (default: 5)")
    add("--warmup", type=int, default=1, metavar="W", help="untimed calls before them (default: 1)")
    add("--cold-rounds", type=int, default=3, metavar="R", help="fresh processes of each side (default: 3; 0: none)")
    add("--threads", type=int, help="threads of every side (default: the cores that this process may use)")
    add(
        "--device", default="auto", choices=("auto", "cpu", "cuda"),
        help="where the baselines run (default: on the GPU if PyTorch finds one)",
    )  # fmt: skip
    add = parser.group("output")
    add("--json", type=Path, metavar="PATH", help="write the record here; the tables go to stdout")
    add("--report", type=Path, metavar="FILE.md", help="also write tables and plots")
    parser.examples(
        "sdopt bench run sd15",
        "sdopt bench run sd15 --baseline checkpoint --rounds 10 --json sd15.json --report sd15.md",
    )


def percent(text: str) -> float:
    """0.05 of "5%" or "5"."""
    try:
        fraction = float(text.removesuffix("%")) / 100
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage, e.g. 5%")
    return fraction


def names(text: str) -> list[str]:
    """The names in "a,b"."""
    return [name.strip() for name in text.split(",")]


def peer(text: str) -> tuple[str, list[str]]:
    """(name, command) of "openvino=.venv/bin/python adapter.py"."""
    name, sign, command = text.partition("=")
    if not (name and sign and command.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND, e.g. openvino='peer/bin/python adapter.py'")
    return name, shlex.split(command)


def run(args: argparse.Namespace) -> int:
    commands = {"run": _run, "compare": _compare, "report": _report}
    return commands[args.word](args)


def _run(args: argparse.Namespace) -> int:
    if args.baseline is None:
        return _run_alone(args)
    for flag, path, example in (("--json", args.json, "sd15.json"), ("--report", args.report, "sd15.md")):
        if path is not None:
            outputs.check_file(path, flag, example=example, make_folder=True)
    from sdopt.bench import baseline, harness, record, report, tables
    from sdopt.bench.cases import Case, pick, read_cases
    from sdopt.bundle.files import Bundle
    from sdopt.engine.cores import usable_cores

    if args.report is not None:
        report.marked_text(args.report)
    device = baseline.find_device(args.device)
    bundle = Bundle.open(args.bundle)
    cases = pick(read_cases(args.cases), args.case) if args.case else [Case.of_bundle(bundle)]
    setup = harness.Setup(
        bundle=args.bundle,
        checkpoint=args.baseline,
        threads=args.threads or usable_cores(),
        baselines=args.baselines or baseline.DEFAULTS[device],
        peers=dict(args.peer),
        rounds=args.rounds,
        warmup=args.warmup,
        cold_rounds=args.cold_rounds,
        device=device,
        cache=args.cache,
    )
    new_record, lost = harness.new_record(_command(args)), ""
    for case in cases:
        result = harness.run_case(case, setup, terminal.say)
        new_record["results"].append(result)
        if args.json:
            try:
                record.write(args.json, new_record)
                lost = ""
            except OSError as error:  # what was measured is printed all the same
                lost = f"--json {args.json} is not written: {error.strerror or error}"
    checked = record.check(new_record)
    for result in checked["results"]:
        print("\n\n".join(tables.result_tables(checked, result)))
    if args.json and not lost:
        terminal.say(str(args.json))
    if args.report:
        report.write(args.report, [new_record])
        terminal.say(str(args.report))
    if lost:
        raise SdoptError(lost)
    return 0


def _run_alone(args: argparse.Namespace) -> int:
    """Time a bundle without a baseline, and print the tables.

    Raises: UsageError for options that need a baseline.
    """
    from sdopt.bench import alone
    from sdopt.bench.cases import Case, pick, read_cases
    from sdopt.bundle.files import Bundle
    from sdopt.engine.cores import usable_cores

    needing = [f"--{name}" for name in ("baselines", "peer", "json", "report") if getattr(args, name)]
    if needing:
        raise UsageError(f"{', '.join(needing)}: a comparison needs --baseline CHECKPOINT; add it, or leave this out")
    if args.rounds < 1 or args.warmup < 0:
        raise UsageError(
            f"--rounds {args.rounds} --warmup {args.warmup}; allowed are 1 or more rounds, 0 or more calls"
        )
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads}; allowed is 1 or more")
    cases = pick(read_cases(args.cases), args.case) if args.case else [Case.of_bundle(Bundle.open(args.bundle))]
    threads = args.threads or usable_cores()
    for case in cases:
        timings = alone.time_alone(case, args.bundle, threads, args.rounds, args.warmup, terminal.say)
        print(alone.table(case, *timings))
    return 0


def _command(args: argparse.Namespace) -> str:
    """The command that repeats this measurement, for the record."""
    words: list[str] = ["sdopt", "bench", str(args.bundle), "--baseline", str(args.baseline)]
    flags: list[tuple[str, Any]] = [
        ("--baselines", args.baselines and ",".join(args.baselines)),
        *(("--peer", f"{name}={shlex.join(command)}") for name, command in args.peer),
        *(("--case", name) for name in args.case),
        ("--cases", None if args.cases == CASES else args.cases),
        ("--rounds", args.rounds),
        ("--warmup", args.warmup),
        ("--cold-rounds", args.cold_rounds),
        ("--threads", args.threads),
        ("--device", None if args.device == "auto" else args.device),
        ("--json", args.json),
    ]
    for flag, value in flags:
        if value is not None:
            words += [flag, str(value)]
    return shlex.join(words)


def _compare(args: argparse.Namespace) -> int:
    from sdopt.bench import compare, record

    old, new = record.read(args.old), record.read(args.new)
    differences = compare.unlike(old, new)
    if differences and not args.anyway:
        raise UsageError(f"unlike machines ({'; '.join(differences)}): measure on one, or add --anyway")
    changes = compare.changes(old, new, side=args.side, against=args.against)
    too_slow = [] if args.fail_over is None else [change for change in changes if change.too_slow(args.fail_over)]
    if args.json:
        print(json.dumps([compare.to_json(change, args.fail_over) for change in changes]))
    else:
        print("\n".join(compare.table(changes, args.fail_over)))
    for change in too_slow:
        print(
            f"sdopt: {change.case}, {change.component}: slower by {change.ratio.low - 1:.1%} at least (95 %); "
            f"allowed is {args.fail_over:.1%}",
            file=sys.stderr,
        )
    return TOO_SLOW if too_slow else 0


def _report(args: argparse.Namespace) -> int:
    from sdopt.bench import record, report

    outputs.check_file(args.output, example="report.md", make_folder=True)
    if args.plots is not None:
        outputs.check_file(args.plots / "bench.svg", "--plots", make_folder=True)
    results = [record.read(path) for path in args.results]
    curves = [record.read(path) for path in args.curves]
    written = report.write(args.output, results, args.plots, curves)
    print(*written, sep="\n")
    return 0
