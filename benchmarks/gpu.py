"""Everything that only a GPU can show, the most valuable first, within a time budget.

    python benchmarks/gpu.py --list                                    the parts, with their seconds
    python benchmarks/gpu.py --budget 600 -o results/gpu               one line of JSON a part: results/gpu/parts.jsonl
    python benchmarks/gpu.py --device cpu --budget 600 -o results/cpu  does it run? the emoji, few steps, no GPU
    python benchmarks/gpu.py --table results/gpu/parts.jsonl           the medians, as Markdown
    python benchmarks/gpu.py --store-reference                         keep what a machine without ONNX Runtime needs

Each part is a process of its own with a limit of its own, and its line is on the disk the moment it ends. A part that
fails, crashes or is stopped is a line that says so, and the next one begins. Engines and baselines may need two
environments: --engines-python and --torch-python. Models of full size have random weights: exported ones
(`models.py`) from --models, else skeletons (`skeleton.py`) from --skeletons, which need neither torch nor a network.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from gpu_ladder import CPU, LADDER, QUICK, Part, listed

from sdopt.bench import machine
from sdopt.bench.cases import read_cases
from sdopt.errors import SdoptError, UsageError

HERE = Path(__file__).parent
TAIL = 2000  # characters of what a part said that its line keeps when it fails
MISSING = 4  # the exit code of a part whose environment lacks a library
GRACE = 5.0  # seconds between asking a process group to end and ending it


def chosen(args: argparse.Namespace) -> Sequence[Part]:
    """The parts of this run, in order."""
    parts = CPU if args.device == "cpu" else LADDER
    names = {part.name for part in parts}
    unknown = [name for name in args.only if name not in names]
    if unknown:
        raise SystemExit(f"gpu.py: part {unknown[0]!r} is not known; there are {', '.join(p.name for p in parts)}")
    if args.smoke:
        parts = tuple(part for part in parts if part.model == "emoji")
    return [part for part in parts if not args.only or part.name in args.only]


class Climb:
    """One run of the ladder: its lines, and which parts ended well."""

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.args, self.ends = args, time.monotonic() + args.budget
        self.cases = read_cases(HERE / "cases.toml")
        self.path = args.output / "parts.jsonl"
        self.good, self.failed = set[str](), 0
        self._running: subprocess.Popen[str] | None = None
        args.output.mkdir(parents=True, exist_ok=True)
        args.work.mkdir(parents=True, exist_ok=True)
        self.write(
            {"command": command, "commit": machine.commit(), "budget": args.budget, "versions": machine.versions()}
        )

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; it is on the disk when this returns."""
        line = {"at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **line}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def run(self, parts: Sequence[Part]) -> int:
        """Every part in turn; 0 if all that began ended well, and at least one did."""
        for part in parts:
            reason = self.why_not(part)
            line = {"status": "left out", "reason": reason} if reason else self.measure(part)
            self.good |= {part.name} if line["status"] == "ok" else set()
            self.failed += line["status"] not in ("ok", "left out")
            self.write({"part": part.name, "does": part.does, "model": part.model, **line})
            print(f"{part.name}: {line['status']} {_brief(line)}", file=sys.stderr, flush=True)
        return 1 if self.failed or not self.good else 0

    def why_not(self, part: Part) -> str:
        """Why a part is not begun; empty if it is."""
        missing = [name for name in part.needs if name not in self.good and name not in self.args.done]
        left = self.ends - time.monotonic()
        if missing:
            return f"it needs {', '.join(missing)}, which did not end well in this run"
        if left < part.seconds:
            return f"{left:.0f} s are left, it is planned with {part.seconds}"
        return ""

    def measure(self, part: Part) -> dict[str, Any]:
        """The line of a part that is run now."""
        limit = min(part.limit, self.ends - time.monotonic())
        python = shlex.split(self.args.torch_python if part.env == "torch" else self.args.engines_python)
        with tempfile.TemporaryDirectory(prefix="sdopt-gpu-") as folder:
            options, result, said = (Path(folder) / name for name in ("options.json", "result.json", "said.txt"))
            options.write_text(json.dumps(self.options(part)))
            command = [*python, str(HERE / "gpu_parts.py"), str(options), "-o", str(result)]
            started = time.monotonic()
            status = self.wait(command, said, limit)
            line = {"status": status, "seconds_taken": round(time.monotonic() - started, 2), "limit": round(limit, 1)}
            if status == "ok" and result.is_file():
                return {**line, "result": json.loads(result.read_text())}
            words = _tail(said)
            if status == "left out":
                return {**line, "reason": words.strip()}
            told = [row.partition("error: ")[2].strip() for row in words.splitlines() if "error: " in row]
            why = {"reason": told[-1]} if told else {}  # the error itself, and not only who ended with which code
            return {**line, "status": "failed" if status == "ok" else status, **why, "said": words}

    def options(self, part: Part) -> dict[str, Any]:
        args, model = self.args, part.model
        case = dataclasses.replace(self.cases[model], **QUICK) if args.smoke else self.cases[model]
        paths = {name: str(getattr(args, name).absolute()) for name in ("work", "models", "skeletons", "output")}
        return {
            "part": part.name, "does": part.does, "case": case.on(part.backend, part.precision).to_json(), **paths,
            "rounds": args.rounds, "static": part.static, "components": part.components, "baselines": part.baselines,
        }  # fmt: skip

    def wait(self, command: Sequence[str], said: Path, limit: float) -> str:
        """Run a process in a group of its own up to its limit, and leave nothing of the group behind; how it ended."""
        with said.open("w") as stream:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, text=True, start_new_session=True
                )
            except OSError as error:
                stream.write(str(error))
                return "failed"
            self._running = process
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                self.stop()
                return "stopped at its limit"
            finally:
                _signal_group(process.pid, signal.SIGKILL)
                self._running = None
        if code < 0:
            return f"crashed: {signal.Signals(-code).name}"
        return {0: "ok", MISSING: "left out"}.get(code, "failed")

    def stop(self) -> None:
        """End the part that runs, with all that it started."""
        process = self._running
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # it is gone already
        return


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-TAIL:] if path.is_file() else ""


def _brief(line: dict[str, Any]) -> str:
    if line["status"] == "ok":
        return f"in {line['seconds_taken']} s; " + "; ".join(f"{k} {v}" for k, v in figures(line["result"]))
    words = line.get("reason") or line.get("said", "").strip()
    return words.splitlines()[-1] if words else ""


# ------------------------------------------------------------------------------------------------------ the table


def figures(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of the figures of a part: medians of its timings, likeness, memory."""
    for name, series in result.get("seconds", {}).items():
        yield name, f"{1e3 * median(series):.3f} ms"
    for name, unit, factor in (("host_step", "us", 1e6), ("device_step", "ms", 1e3)):
        series = result.get("loop", {}).get(name)
        if series:
            yield name, f"{factor * median(series):.3f} {unit}"
    for name in ("picture_db", "unet_db", "vae_db"):
        if result.get(name) is not None:
            yield name, f"{result[name]:.1f} dB"
    for side, parity in result.get("parity", {}).items():
        yield from ((f"{side} {name}", f"{value:.1f} dB") for name, value in parity.items() if value is not None)
    if result.get("peak_device_bytes") is not None:
        yield "peak GPU memory", f"{result['peak_device_bytes'] / 1e6:.0f} MB"
    for inner in [name for name in ("graph", "plain", "build") if name in result]:
        yield from ((f"{inner}.{name}", text) for name, text in figures(result[inner]))
    if "bit_for_bit" in result:
        yield "bit for bit", str(result["bit_for_bit"])


def table(path: Path) -> str:
    """The lines of a run as Markdown: one row for each figure, and for each part without one why."""
    rows = [["part", "device", "weights", "figure", "value"]]
    if not path.is_file():
        raise UsageError(f"--table {path}: there is no such file; `gpu.py -o FOLDER` writes FOLDER/parts.jsonl")
    lines = [line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if "part" in line]
    for line in {line["part"]: line for line in lines}.values():  # of several runs, the newest
        result = line.get("result", {})
        about = [line["part"], str(result.get("device", "-")), str(result.get("weights", "-"))]
        found = list(figures(result)) or [(line["status"], _brief(line) if line["status"] != "ok" else "-")]
        rows += [[*about, name, text.replace("|", "/")] for name, text in found]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---|---|---|---|---:|", *body]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Climb the ladder; 0 if every part that began ended well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--budget", type=float, default=600, metavar="SECONDS", help="no part begins or goes on after it (default: 600)"
    )
    add("-o", "--output", type=Path, metavar="FOLDER", help="where parts.jsonl, pictures and records go")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--smoke", action="store_true", help="only the emoji model, at 64x64 in three steps")
    add("--only", action="append", default=[], metavar="PART", help="may be given again")
    add("--done", action="append", default=[], metavar="PART", help="count this one as done: its work is in --work")
    add("--rounds", type=int, default=10, help="timed calls of each kind (default: 10)")
    add("--work", type=Path, default=Path("build-out/gpu"), metavar="FOLDER", help="engines and filled bundles")
    add("--models", type=Path, default=Path("build-out/models"), metavar="FOLDER", help="what models.py made")
    add("--skeletons", type=Path, default=Path("build-out/skeletons"), metavar="FOLDER", help="MODEL/ in it")
    add("--engines-python", default=shlex.quote(sys.executable), metavar="COMMAND", help="which has the engines")
    add("--torch-python", default=shlex.quote(sys.executable), metavar="COMMAND", help="which has torch and diffusers")
    add("--list", action="store_true", help="print the parts and do nothing")
    add("--store-reference", action="store_true", help="keep the picture that the emoji's engines are compared with")
    add("--table", type=Path, metavar="PARTS.jsonl", help="print the medians of a run and do nothing")
    args = parser.parse_args(argv)
    args.smoke = args.smoke or args.device == "cpu"
    if args.table:
        print(table(args.table), end="")
        return 0
    if args.store_reference:
        from gpu_tools import EMOJI, store_reference

        print(store_reference(read_cases(HERE / "cases.toml")["emoji"], EMOJI / "bundle"))
        return 0
    parts = chosen(args)
    if args.list:
        print("\n".join(listed(parts)))
        return 0
    if args.output is None:
        parser.error("-o FOLDER is needed: where the lines go")
    climb = Climb(args, shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)]))

    def ended(number: int, frame: Any) -> None:
        climb.stop()
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, ended)
    try:
        code = climb.run(parts)
    finally:
        climb.stop()  # also when a person stops it
        signal.signal(signal.SIGTERM, before)
    print(climb.path)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SdoptError as error:
        sys.exit(f"gpu.py: {error}")
