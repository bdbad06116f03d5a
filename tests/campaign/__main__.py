"""The campaign from a command line; README.md beside this file explains it.

python -m tests.campaign --minutes 10
python -m tests.campaign --kind manifest --seed 123 --case 45        # one case again
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.campaign.cases import Case, Outcome, Result, rate, table
from tests.campaign.kinds import KINDS
from tests.campaign.pool import Worker, run_all
from tests.campaign.schedule import Schedule

FOLDER = Path("scratch/campaign")
SHOWN = 2  # faults of one root that are printed in full


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, help="end after so long, whatever is left")
    parser.add_argument("--inputs", type=int, default=20_000, help="inputs of all quick kinds (default: 20000)")
    parser.add_argument("--kills", type=int, default=100, help="processes to kill (default: 100)")
    parser.add_argument("--storms", type=int, default=16, help="storms of threads (default: 16)")
    parser.add_argument("--soaks", type=int, default=4, help="processes that make many pictures (default: 4)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"default: {','.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where it works (default: {FOLDER})")
    parser.add_argument("--kind", choices=KINDS, help="with --case: run one case, and print all of its outcome")
    parser.add_argument("--case", type=int)
    return parser.parse_args()


def export_tiny(folder: Path) -> Path:
    """The tiny bundles of the tests, exported once."""
    from tests import tiny

    for name in ("tiny", "sdxl"):
        if not (folder / name / "manifest.json").exists():
            from sdopt.export import export

            checkpoint = (tiny.sd if name == "tiny" else tiny.sdxl)(folder / f"{name}-checkpoint")
            export(checkpoint, folder / name, report=lambda _: None)
    return folder


def main() -> int:
    args = arguments()
    folder = args.folder.absolute()
    kept = export_tiny(folder / "kept")
    if args.case is not None:
        worker = Worker(folder / "one", kept)
        outcome = worker.run(Case(args.kind, args.seed, args.case))
        worker.close()
        assert outcome is not None
        print(f"{outcome.name}\n{outcome.description}\n{outcome.detail}")
        return int(outcome.is_fault)
    began = time.monotonic()
    end = None if args.minutes is None else began + 60 * args.minutes
    signatures: dict[str, int] = {}
    results: list[Result] = []
    counts = {"kills": args.kills, "threads": args.storms, "soak": args.soaks}
    schedule = Schedule([args.kind] if args.kind else args.kinds.split(","), args.seed, args.inputs, counts)

    def report(case: Case, outcome: Outcome, seconds: float) -> None:
        results.append((case, outcome, seconds))
        signatures[outcome.signature] = signatures.get(outcome.signature, 0) + outcome.is_fault
        if outcome.is_fault and signatures[outcome.signature] <= SHOWN:
            again = f"python -m tests.campaign {case}"
            print(f"{outcome.name}: {again}\n    {outcome.description}\n    {outcome.detail.strip()}\n", flush=True)
        if len(results) % 500 == 0:
            print(f"-- {len(results)} cases, {rate(results, time.monotonic() - began)}", flush=True)

    run_all(schedule, end, folder, kept, args.workers, report)
    print(table(results))
    print(rate(results, time.monotonic() - began))
    for signature, count in sorted(signatures.items()):
        if count:
            print(f"{count:>6}  {signature}")
    return int(any(outcome.is_fault for _, outcome, _ in results))


if __name__ == "__main__":
    sys.exit(main())
