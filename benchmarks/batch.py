"""`sdopt batch` measured: worker processes and Ray Data beside processes that know nothing of each other, and kills.

    python benchmarks/batch.py                       writes benchmarks/results/batch.json
    python benchmarks/batch.py --pictures 12 --steps 4 --size 64x64 --rounds 1 -o build-out/batch.json
    python benchmarks/batch.py --parts kills

Parts, each with real commands in processes of their own; every engine has one thread:

speed   the sides in turns, each with the same list in a new folder: one process; `bare`, two commands with half of the
        list each, which is what the machine can do; `--workers 2`; Ray with 1 and with 2 actors. A side's speed is that
        of its pictures without the first and the last tenth, by the times of their files, so that no start is in it
kills   lists whose driver, worker or actor of Ray is killed, until they are done: what is lost, made twice or cut off
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from sdopt.bench.machine import machine, versions
from sdopt.bundle.disk import write_whole

RESULTS = Path(__file__).parent / "results/batch.json"
SIDES = {  # name -> (options of each command, what it is compared with)
    "one": ((), ""),
    "bare": ((), "one"),  # twice, with half of the list each
    "workers 2": (("--workers", "2"), "bare"),
    "ray 1": (("--ray", "--workers", "1"), "one"),
    "ray 2": (("--ray", "--workers", "2"), "bare"),
}
KILLS = {  # what is killed -> (options, words in its command line; none: the driver itself)
    "driver": ((), ""),
    "worker": (("--workers", "2"), "spawn_main"),
    "driver of workers": (("--workers", "2"), ""),
    "actor of ray": (("--ray", "--workers", "2"), "ray::MapWorker"),
    "driver of ray": (("--ray", "--workers", "2"), ""),
}


def begun(path: Path, out: Path, args: Any, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """One command, on a model that is the same for all."""
    own = ["-m", args.model] if args.model else []
    command = [sys.executable, "-m", "sdopt", "batch", str(path), "-o", str(out), "--quiet", "--threads", "1"]
    how = [*own, "--steps", str(args.steps), "--size", args.size, *options]
    return subprocess.Popen([*command, *how], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command. Raises: RuntimeError if it failed."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode())


def write_list(path: Path, ids: range) -> Path:
    path.write_text("".join(f'{{"id": {i}, "prompt": "a picture, number {i}"}}\n' for i in ids))
    return path


def speed(args: Any) -> dict[str, Any]:
    """Pictures a second of each side, in turns, and the ratios of the same round."""
    rounds: list[dict[str, dict[str, float]]] = []
    for i in range(args.rounds):
        names = list(SIDES)
        random.Random(i).shuffle(names)
        rounds.append({name: timed(name, args) for name in names})
        print(json.dumps(rounds[-1]), flush=True)
    ratios = {
        name: [one[name]["pictures_per_second"] / one[other]["pictures_per_second"] for one in rounds]
        for name, (_, other) in SIDES.items()
        if other
    }
    return {
        "compared_with": {name: other for name, (_, other) in SIDES.items() if other},
        "ratios": {name: {"median": median(values), "all": values} for name, values in ratios.items()},
        "rounds": rounds,
    }


def timed(name: str, args: Any) -> dict[str, float]:
    """One side: its speed without the first and the last tenth of its pictures, and the seconds of all."""
    options, _ = SIDES[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder, count = Path(scratch), args.pictures
        parts = (range(0, count, 2), range(1, count, 2)) if name == "bare" else (range(count),)
        lists = [write_list(folder / f"{i}.jsonl", part) for i, part in enumerate(parts)]
        began = time.monotonic()
        processes = [begun(path, folder / f"out-{i}", args, options) for i, path in enumerate(lists)]
        for process in processes:
            ended(process)
        seconds = time.monotonic() - began
        rates = [rate(sorted(file.stat().st_mtime for file in out.glob("*.png"))) for out in folder.glob("out-*")]
    return {"pictures_per_second": sum(rates), "seconds": seconds}


def rate(times: Sequence[float]) -> float:
    """Files a second, without the first tenth, while processes start, and the last one, while some have ended."""
    tenth = len(times) // 10
    inner = times[tenth : len(times) - tenth]
    return (len(inner) - 1) / (inner[-1] - inner[0])


def kills(args: Any) -> dict[str, Any]:
    return {name: killed(name, args) for name in KILLS}


def killed(name: str, args: Any) -> dict[str, int]:
    """One list, whose run is killed at several times and resumed until it is done."""
    options, words = KILLS[name]
    counts = {"pictures": args.pictures, "kills": 0, "runs": 0, "failed": 0, "twice": 0, "cut_off": 0, "lost": 0}
    with tempfile.TemporaryDirectory() as scratch:
        out, seen = Path(scratch) / "out", dict[str, int]()
        path = write_list(Path(scratch) / "list.jsonl", range(args.pictures))
        marks = [args.pictures * part // 4 for part in range(3)]
        while True:
            process = begun(path, out, args, options)
            counts["runs"] += 1
            while marks and process.poll() is None:
                if len(list(out.glob("*.png"))) <= marks[0] or not (targets := victims(process.pid, words)):
                    time.sleep(0.005)
                    continue
                os.kill(targets[0], signal.SIGKILL)
                counts["kills"] += 1
                marks.pop(0)
            _, errors = process.communicate()
            for file in out.glob("*.png"):
                counts["twice"] += seen.setdefault(file.name, file.stat().st_mtime_ns) != file.stat().st_mtime_ns
                counts["cut_off"] += not is_whole(file)
            if process.returncode == 0:
                break
            counts["failed"] += process.returncode == 1  # a line had two workers that died; the next run makes it
            if process.returncode not in (1, -signal.SIGKILL):
                raise RuntimeError(errors.decode())
        counts["lost"] = args.pictures - len({file.name.rpartition("-")[0] for file in out.glob("*.png")})
        counts["twice"] += len(list(out.glob("*.png"))) - (args.pictures - counts["lost"])
    print(name, json.dumps(counts), flush=True)
    return counts


def victims(pid: int, words: str) -> list[int]:
    """The processes below a driver whose command lines have these words; without words the driver."""
    return [one for one in below(pid) if words in Path(f"/proc/{one}/cmdline").read_text()] if words else [pid]


def below(pid: int) -> Iterator[int]:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            for child in (thread / "children").read_text().split():
                yield int(child)
                yield from below(int(child))
        except OSError:  # it has ended
            continue


def is_whole(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("-m", "--model", default="", help="a bundle; without it the embedded model")
    parser.add_argument("--parts", default="speed,kills")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    chosen = {name: {"speed": speed, "kills": kills}[name] for name in args.parts.split(",")}
    settings = {name: getattr(args, name) for name in ("model", "pictures", "steps", "size", "rounds")}
    record: dict[str, Any] = {"machine": machine(), "versions": versions(), "settings": settings}
    for name, part in chosen.items():
        record[name] = part(args)
        write_whole(args.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
