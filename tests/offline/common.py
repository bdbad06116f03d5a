"""Lists, and what became of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.conftest import ROOT, hears_interrupts

SMALL = ("--size", "64x64", "--threads", "1")


def write_list(path: Path, entries: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return path


def numbered(count: int, steps: int = 4) -> list[dict[str, Any]]:
    """Lines with other numbers of steps, so that they are at different steps at any time."""
    return [{"id": f"fox-{i}", "prompt": f"a fox {i}", "num_inference_steps": steps + i % 3} for i in range(count)]


def begun(*args: object) -> subprocess.Popen[str]:
    """The command in a process of its own, which hears Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-m", "sdopt", "batch", *map(str, args)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ},
        preexec_fn=hears_interrupts,
    )  # fmt: skip


def batch(*args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command."""
    process = begun(*args)
    out, errors = process.communicate(timeout=170)
    return process.returncode, out, errors


def pictures(folder: Path) -> dict[str, Path]:
    """The pictures in a folder by their ids; each id has one."""
    paths = sorted(folder.glob("*.png"))
    found = {path.name.rpartition("-")[0]: path for path in paths}
    assert len(found) == len(paths)
    return found


def pixels(path: Path) -> Any:
    image: Any = Image.open(path)
    with image:
        image.load()  # a file that is cut off raises
        return np.asarray(image)


def report(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of the report by id."""
    return {entry["id"]: entry for entry in map(json.loads, (folder / "report.jsonl").read_text().splitlines())}


def until(what: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_whole(folder: Path, ids: Sequence[str]) -> None:
    """One complete picture for each id, and nothing else but the report."""
    assert sorted(pictures(folder)) == sorted(ids)
    for path in pictures(folder).values():
        pixels(path)
    assert {path.name for path in folder.iterdir()} == {*(p.name for p in pictures(folder).values()), "report.jsonl"}
