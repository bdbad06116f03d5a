"""Full-size engines built with TensorRT-RTX, which needs no GPU: do they build, how large are they, how long it takes.

    python benchmarks/rtx_builds.py                         all cases; those that are in the record are left out
    python benchmarks/rtx_builds.py --models sd15 --components vae_decoder --precisions bf16 --shapes static

The models are those of `models.py`, in build-out/models/NAME/bundle. Each build runs in a process of its own with a
time limit, and its entry is written the moment it ends: a run that is stopped goes on where it was. Finished plans are
removed. `precision` is what was asked for; `built` what the model got: SDXL's VAE overflows in fp16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from models import CACHE

from sdopt.bench.machine import machine
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions
from sdopt.bundle.disk import write_whole
from sdopt.bundle.files import Bundle
from sdopt.engine.store import PLAN, stored
from sdopt.errors import SdoptError

BACKEND = "tensorrt-rtx"
RESULTS = Path(__file__).parent / "results/rtx-builds.json"
MODELS = ("sd15", "sd21", "sdxl")
COMPONENTS = ("unet_step", "vae_decoder", "vae_encoder")  # attention of a VAE has one head, of 512 features
PRECISIONS = ("fp16", "bf16")
SHAPES = ("static", "two profiles")


@dataclass(frozen=True)
class Case:
    """One build."""

    model: str
    component: str
    precision: str
    shapes: str

    def profiles(self, bundle: Bundle) -> list[str]:
        """One picture of the bundle's own size; and, as a second profile, up to four of half to whole that size."""
        own = {"height": bundle.manifest.defaults.height, "width": bundle.manifest.defaults.width}
        sizes = " ".join(f"{name}={length // 2}:{length}:{length}" for name, length in own.items())
        return ["batch=1", f"batch=1:1:4 {sizes}"][: 1 if self.shapes == "static" else 2]


def built(case: Case, cache: Path, opt_level: int) -> dict[str, Any]:
    """What is found when this process builds a case."""
    bundle = Bundle.open(cache / case.model / "bundle", verify=False)
    started = time.perf_counter()
    (folder,) = build(
        bundle, BACKEND, components=[case.component], profiles=case.profiles(bundle), static=case.shapes == "static",
        options=BuildOptions(precision=case.precision, opt_level=opt_level),
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    (record,) = (engine.record for engine in stored(bundle, BACKEND) if engine.folder == folder)
    plan = (folder / PLAN).stat().st_size
    shutil.rmtree(folder)
    notes = {name: record.notes[name] for name in ("layers", "lowered", "fixed", "warning") if name in record.notes}
    return {
        "built": record.options["precision"],
        "profiles": [str(profile) for profile in record.profiles],
        "version": record.environment["tensorrt_rtx"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(resource.getrusage(resource.RUSAGE_SELF).ru_utime, 1),  # of all threads
        "plan_bytes": plan,
        "weight_bytes": record.notes["weight_bytes"],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **notes,
    }


def in_own_process(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The same from a process that may fail, or take too long."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(case)), "--cache", str(args.cache)]
    command += ["--opt-level", str(args.opt_level)]
    with tempfile.TemporaryDirectory(prefix="rtx-builds-") as own:  # no timing cache of an earlier build
        environment = {**os.environ, "XDG_CACHE_HOME": own, "XDG_STATE_HOME": own}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=args.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"error": f"took longer than {args.limit:.0f} s"}
    if process.returncode:
        last = output.strip().splitlines()[-1:]
        return {"error": " ".join(last) or f"the process ended with {process.returncode}"}
    return json.loads(output.splitlines()[-1])


def read(path: Path) -> dict[str, Any]:
    """The record that is there, or a new one."""
    return json.loads(path.read_text()) if path.exists() else {"machine": machine(), "units": "s, bytes", "builds": []}


def cases(args: argparse.Namespace) -> list[Case]:
    """All that are asked for, the most telling first: every model's UNet comes before any VAE."""
    chosen = itertools.product(args.components, args.models, args.precisions, args.shapes)
    return [Case(model, component, precision, shapes) for component, model, precision, shapes in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    """Build what the record lacks; 0 if all of it was built."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--components", nargs="+", default=COMPONENTS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, choices=SHAPES)
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for each build (default: 1800)")
    parser.add_argument("--opt-level", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="build also what failed before")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        try:
            print(json.dumps(built(Case(**json.loads(args.one)), args.cache, args.opt_level)))
        except SdoptError as error:
            print(str(error).replace("\n", " "))
            return 1
        return 0
    for name in args.models:
        folder = args.cache / name / "bundle"
        if not folder.is_dir() and name not in MODELS:
            parser.error(f"--models {name}: there is no {folder}, and the models are {', '.join(MODELS)}")
        if not folder.is_dir():
            parser.error(f"{folder} is missing; make it: python benchmarks/models.py {name} --cache {args.cache}")
    found = read(args.output)
    failures = 0
    for case in cases(args):
        known = next((b for b in found["builds"] if all(b[k] == v for k, v in asdict(case).items())), None)
        if known is not None and not (args.again and "error" in known):
            continue
        entry = {**asdict(case), **in_own_process(case, args)}
        failures += "error" in entry
        found["builds"] = [b for b in found["builds"] if b is not known] + [entry]
        write_whole(args.output, json.dumps(found, indent=1) + "\n")
        print(json.dumps(entry))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
