"""`sdopt bench BUNDLE --baseline CHECKPOINT`, `sdopt bench compare OLD NEW` and `sdopt bench report RESULTS...`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

CASES = Path("benchmarks/cases.toml")
CACHE = Path("build-out/peers")
GATE = 5  # exit code of a gate that is not met


def add_arguments(parser: argparse.ArgumentParser) -> None:
    words = parser.add_subparsers(dest="word", required=True, metavar="run | compare | report")

    def add_word(name: str, text: str) -> argparse.ArgumentParser:
        return words.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    run_ = add_word("run", "measure a bundle beside its checkpoint (the word may be left out)")
    compare_ = add_word("compare", "two records of one machine; exit code 5 when the second is slower than allowed")
    report_ = add_word("report", "tables and plots from records")
    _run_arguments(run_)
    compare_.add_argument("old", type=Path, metavar="OLD.json")
    compare_.add_argument("new", type=Path, metavar="NEW.json")
    compare_.add_argument("--fail-over", type=percent, metavar="5%", help="exit with 5 when slower by more, for sure")
    compare_.add_argument("--side", default="sdopt", metavar="NAME", help="what is compared (default: sdopt)")
    compare_.add_argument(
        "--against", metavar="NAME", help="another side of OLD to compare it with (default: the same)"
    )
    compare_.add_argument("--anyway", action="store_true", help="compare records of unlike machines")
    compare_.add_argument("--json", action="store_true", help="print the changes as JSON")
    report_.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    report_.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.md", help="written, or filled in")
    report_.add_argument("--plots", type=Path, metavar="FOLDER", help="where the plots go (default: beside FILE.md)")
    report_.add_argument(
        "--curves",
        type=Path,
        nargs="+",
        default=[],
        metavar="RESULT.json",
        help="only for the plots of cost against steps, pixels and images",
    )
    parser.epilog = "\n".join(p.format_usage().replace("usage: ", "") for p in (run_, compare_, report_))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="what is measured")
    add("--baseline", type=Path, required=True, metavar="CHECKPOINT", help="the diffusers folder that it came from")
    add("--baselines", type=names, metavar="NAMES", help="eager-fp32,eager-bf16-nhwc,... (default: by the device)")
    add("--peer", type=peer, action="append", default=[], metavar="NAME=COMMAND", help="see benchmarks/peers/README.md")
    add(
        "--case", action="append", default=[], metavar="NAME", help="of --cases (default: what the bundle makes itself)"
    )
    add("--cases", type=Path, default=CASES, metavar="FILE", help=f"default: {CASES}")
    add("--rounds", type=int, default=5, metavar="R", help="timed calls of each side, taking turns (default: 5)")
    add("--warmup", type=int, default=1, metavar="W", help="calls before them (default: 1)")
    add("--cold-rounds", type=int, default=3, metavar="R", help="fresh processes of each side (default: 3; 0: none)")
    add("--threads", type=int, help="of every side (default: the cores that this process may use)")
    add(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="of the baselines (default: as PyTorch finds)"
    )
    add("--cache", type=Path, default=CACHE, metavar="FOLDER", help=f"what peers convert (default: {CACHE})")
    add("--json", type=Path, metavar="PATH", help="write the record here (default: to stdout)")
    add("--report", type=Path, metavar="FILE.md", help="also write tables and plots")


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
    return {"run": _run, "compare": _compare, "report": _report}[args.word](args)


def _run(args: argparse.Namespace) -> int:
    from sdopt.bench import baseline, harness, record
    from sdopt.bench.cases import Case, pick, read_cases
    from sdopt.bundle.files import Bundle
    from sdopt.engine.cores import usable_cores

    device = baseline.find_device(args.device)
    bundle = Bundle.open(args.bundle)
    cases = pick(read_cases(args.cases), args.case) if args.case else [Case.of_bundle(bundle)]
    setup = harness.Setup(
        args.bundle, args.baseline, args.threads or usable_cores(),
        args.baselines or baseline.DEFAULTS[device], dict(args.peer), args.rounds, args.warmup, args.cold_rounds,
        device, args.cache,
    )  # fmt: skip
    measured = harness.new_record(_command(args))
    for case in cases:
        result = harness.run_case(case, setup, lambda line: print(line, file=sys.stderr, flush=True))
        measured["results"].append(result)
        if args.json:
            record.write(args.json, measured)
    if args.json:
        print(args.json)
    else:
        print(json.dumps(record.check(measured)))
    if args.report:
        from sdopt.bench import report

        report.write(args.report, [measured])
        print(args.report, file=sys.stdout if args.json else sys.stderr)
    return 0


def _command(args: argparse.Namespace) -> str:
    """The command that measures this again."""
    words: list[str] = ["sdopt", "bench", str(args.bundle), "--baseline", str(args.baseline)]
    given: list[tuple[str, Any]] = [
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
    for flag, value in given:
        if value is not None:
            words += [flag, str(value)]
    return shlex.join(words)


def _compare(args: argparse.Namespace) -> int:
    from sdopt.bench import compare, record
    from sdopt.errors import UsageError

    old, new = record.read(args.old), record.read(args.new)
    differences = compare.unlike(old, new)
    if differences and not args.anyway:
        raise UsageError(f"unlike machines ({'; '.join(differences)}): measure on one, or add --anyway")
    changes = compare.changes(old, new, side=args.side, against=args.against)
    slow = [] if args.fail_over is None else [change for change in changes if change.too_slow(args.fail_over)]
    if args.json:
        print(json.dumps([compare.to_json(change, args.fail_over) for change in changes]))
    else:
        print("\n".join(compare.table(changes, args.fail_over)))
    for change in slow:
        print(
            f"sdopt: {change.case}, {change.component}: slower by {change.ratio.low - 1:.1%} at least (95 %); "
            f"allowed is {args.fail_over:.1%}",
            file=sys.stderr,
        )
    return GATE if slow else 0


def _report(args: argparse.Namespace) -> int:
    from sdopt.bench import record, report

    results = [record.read(path) for path in args.results]
    curves = [record.read(path) for path in args.curves]
    written = report.write(args.output, results, args.plots, curves)
    print(*written, sep="\n")
    return 0
