"""Everything that only a GPU can show, the most valuable first, within a time budget; the record grows case by case.

    python benchmarks/gpu.py --budget 1800 -o benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --smoke --budget 600 -o smoke.json     # does it run? the emoji, two steps

The models have random weights (`models.py`), made once, in build-out/models; making them counts against the budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from models import CACHE, prepared

from sdopt.bench import record
from sdopt.bench.baseline import DEFAULTS, find_device
from sdopt.bench.cases import Case, read_cases
from sdopt.bench.harness import Setup, new_record, run_case
from sdopt.bench.machine import usable_cores
from sdopt.engine import installed_backends
from sdopt.errors import SdoptError

HERE = Path(__file__).parent
EMOJI = HERE.parent / "engines/emoji"
BACKENDS = {"cuda": ("tensorrt", "ort:cuda"), "cpu": ("ort:cpu",)}  # best first
# (case, seconds that it takes at least: with less left it is not begun)
LADDER = (("sd15", 240), ("sdxl", 420), ("sdxl-turbo", 240), ("sd21", 240))
SMOKE = (("emoji", 0),)


def backends(device: str) -> list[str]:
    """The backends for the device whose library is installed, best first."""
    return [name for name in BACKENDS[device] if name.partition(":")[0] in installed_backends()]


def models_of(case: Case, cache: Path) -> tuple[Path, Path]:
    """(checkpoint, bundle) of the case's model."""
    return (EMOJI / "checkpoint", EMOJI / "bundle") if case.model == "emoji" else prepared(case.model, cache)


def main(argv: list[str] | None = None) -> int:
    """Climb the ladder; 0 if every rung that was begun ended well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, required=True, metavar="SECONDS")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RECORD.json")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="two steps of the emoji model, one round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args(argv)
    ends = time.monotonic() + args.budget
    device, cases = find_device(args.device), read_cases(HERE / "cases.toml")
    words = sys.argv[1:] if argv is None else argv
    found = new_record(shlex.join(["python", "benchmarks/gpu.py", *words]))
    failures = 0
    for name, seconds in SMOKE if args.smoke else LADDER:
        for backend in backends(device):
            left = ends - time.monotonic()
            if left < seconds or left <= 0:
                print(f"{name} on {backend}: {left:.0f} s left, {seconds} needed; left out", file=sys.stderr)
                continue
            case = dataclasses.replace(cases[name], name=f"{name}@{backend}", backend=backend)
            case = dataclasses.replace(case, steps=2) if args.smoke else case
            try:
                found["results"].append(measure(case, device, args))
            except SdoptError as error:  # the next rung may stand
                failures += 1
                print(f"{case.name}: {error}", file=sys.stderr)
            else:
                record.write(args.output, found)
    print(args.output)
    return 1 if failures or not found["results"] else 0


def measure(case: Case, device: str, args: argparse.Namespace) -> dict[str, object]:
    """The result of one case."""
    checkpoint, bundle = models_of(case, args.cache)
    rounds, cold, baselines = (1, 0, DEFAULTS[device][:1]) if args.smoke else (args.rounds, 3, DEFAULTS[device])
    setup = Setup(
        bundle, checkpoint, usable_cores(), baselines=baselines, rounds=rounds, cold_rounds=cold, device=device
    )
    return run_case(case, setup, lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == "__main__":
    sys.exit(main())
