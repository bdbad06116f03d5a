"""`sdopt batch` in processes of its own: pictures are those of `pipe(...)`, and no end of a run loses or breaks one."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.image.pil import read_parameters
from sdopt.offline import make
from sdopt.offline.folders import folder
from tests.conftest import ROOT
from tests.offline.common import (
    SMALL,
    assert_whole,
    batch,
    begun,
    numbered,
    pictures,
    pixels,
    report,
    until,
    write_list,
)

NEON = "engines/emoji/neon.safetensors"
SIZE: dict[str, Any] = {"height": 64, "width": 64}


@pytest.fixture
def pipe() -> Iterator[sdopt.Pipeline]:
    with sdopt.load(threads=1) as opened:
        yield opened


@pytest.mark.parametrize("how", [(), ("--workers", "2")], ids=["one process", "workers"])
def test_pictures_are_those_of_a_call_with_the_same_keywords(
    how: tuple[str, ...], pipe: sdopt.Pipeline, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    photo = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    photo.save(tmp_path / "photos" / "noise.png")
    entries: list[dict[str, Any]] = [
        {"id": "plain", "prompt": "a red apple", "seed": 1},
        {"id": "own steps", "prompt": "a (red:1.3) apple", "seed": 2, "num_inference_steps": 7, "sampler": "euler_a"},
        {"id": "../from a photo", "prompt": "a fox", "seed": 3, "image": "photos/noise.png", "strength": 0.6},
        {"id": 4, "prompt": "a cat", "seed": 4, "hires": 2.0, "hires_steps": 3},
        *({"id": f"many {i}", "prompt": "a dog", "num_inference_steps": 2 + i} for i in range(6)),
    ]
    path = write_list(tmp_path / "list.jsonl", entries)
    defaults = ("--steps", "3", "--prompt-style", "a1111", "--lora", "neon:0.7")
    pipe.load_lora_weights(NEON)
    pipe.set_adapters("neon", 0.7)
    code, out, errors = batch(path, "-o", tmp_path / "out", *defaults, *SMALL, *how)
    assert (code, out) == (0, f"{tmp_path / 'out'}/report.jsonl\n"), errors
    told = report(tmp_path / "out")
    assert_whole(tmp_path / "out", [told[str(entry["id"])]["file"].rpartition("-")[0] for entry in entries])
    for entry in entries:
        line = told[str(entry["id"])]
        options: dict[str, Any] = {
            "num_inference_steps": 3,
            "prompt_style": "a1111",
            **SIZE,
            **entry,
            "seed": line["seed"],
        }
        del options["id"]
        if "image" in options:
            options["image"] = photo
        result = cast("Any", pipe)(options.pop("prompt"), **options)
        file = tmp_path / "out" / line["file"]
        assert np.array_equal(pixels(file), np.asarray(result.images[0])), entry
        assert read_parameters(file) == json.loads(json.dumps(result.parameters[0]))


def test_a_second_run_makes_what_was_changed_and_nothing_else(tmp_path: Path) -> None:
    entries, out = numbered(4, steps=2), tmp_path / "out"
    path = write_list(tmp_path / "list.jsonl", entries)
    assert json.loads(batch(path, "-o", out, *SMALL, "--json")[1])["made"] == 4
    first = {id: (file.name, file.stat().st_mtime_ns) for id, file in pictures(out).items()}
    (out / "fox-2-0123456789abcdef.png").write_bytes(b"of a run that was killed before it moved this")
    write_list(path, [{**entries[0], "prompt": "a cat"}, entries[2], entries[1], {"id": "new", "prompt": "a"}])
    assert batch(path, "-o", out, *SMALL, "--steps", "2", "--dry-run")[1] == (
        f"2 to make, 2 are there, 2 of changed lines would go to {out}/older\n"
    )
    assert len(list(out.iterdir())) == 6  # nothing is changed
    counts = json.loads(batch(path, "-o", out, *SMALL, "--steps", "2", "--json")[1])
    assert {name: counts[name] for name in ("made", "kept", "failed", "left", "older")} == {
        "made": 2, "kept": 2, "failed": 0, "left": 0, "older": 2
    }  # fmt: skip
    assert {file.name for file in (out / "older").iterdir()} == {first["fox-0"][0], "fox-2-0123456789abcdef.png"}
    now = pictures(out)
    assert set(now) == {"fox-0", "fox-1", "fox-2", "fox-3", "new"}  # fox-3 is of another list, perhaps
    assert all(now[id].stat().st_mtime_ns == first[id][1] for id in ("fox-1", "fox-2", "fox-3"))
    assert {id: line["status"] for id, line in report(out).items()} == {
        "fox-0": "made", "fox-1": "kept", "fox-2": "kept", "new": "made"
    }  # fmt: skip


@pytest.mark.parametrize("how", [(), ("--workers", "1")], ids=["one process", "a worker"])
def test_a_line_that_fails_stops_no_other(how: tuple[str, ...], tmp_path: Path) -> None:
    tensors: Any = importlib.import_module("safetensors.numpy")
    hot = {
        name: np.asarray(array.astype(np.float32) * 1e18, np.float32) for name, array in tensors.load_file(NEON).items()
    }
    tensors.save_file(hot, tmp_path / "hot.safetensors")
    entries = [{"id": f"{i}", "prompt": "a fox", "num_inference_steps": 2, "lora_scale": 0} for i in range(5)]
    entries[2]["lora_scale"] = 1
    path, out = write_list(tmp_path / "list.jsonl", entries), tmp_path / "out"
    words = (path, "-o", out, *SMALL, "--lora", tmp_path / "hot.safetensors", *how)
    code, printed, errors = batch(*words)
    assert (code, printed) == (1, f"{out}/report.jsonl\n")
    assert f"sdopt: error: 1 of 5 lines failed; {out}/report.jsonl says why\n" in errors
    assert sorted(pictures(out)) == ["0", "1", "3", "4"]
    failed = report(out)["2"]
    assert failed["status"] == "failed"
    assert failed["error"] in errors
    assert "file" not in failed
    code, printed, _ = batch(*words, "--json")  # it is tried again
    counts = json.loads(printed)
    assert (code, counts["made"], counts["kept"], counts["failed"]) == (1, 0, 4, 1)


def test_a_list_from_stdin(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sdopt", "batch", "-", "-o", str(tmp_path / "out"), "--steps", "2", *SMALL],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    process.communicate('{"id": "a", "prompt": "a fox"}\n')
    assert process.returncode == 0
    assert_whole(tmp_path / "out", ["a"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--workers", "0"), "--workers 0; allowed are 1 to 1024"),
        (("--slots", "0"), "--slots 0; allowed are 1 to 64"),
        (("--threads", "0"), "--threads 0; allowed are 1 to"),
        (("--steps", "0"), "--steps 0; allowed are whole numbers from 1"),
        (("--address", "auto"), "--address auto is of a Ray cluster: add --ray"),
        (("--ray", "--device", "cpu"), "--ray and --device cpu: Ray gives each actor its device"),
        (("-o", "-"), "-o -: pictures are not written to stdout; name a folder"),
        (("--image", "a.png"), "--image is not known here"),
        (("-m", "nowhere"), "nowhere"),
        (("--backend", "ort:rocket"), "rocket"),
        (("--precision", "int3"), "int3"),
        (("--precision", "int8"), "int8"),  # no such engine was built
    ],
)
def test_wrong_options_are_named_before_the_work(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    path = write_list(tmp_path / "list.jsonl", numbered(1))
    code, _, errors = batch(path, "-o", tmp_path / "out", *words)
    assert code in (2, 3, 4)
    assert said in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ runs that end early


def resumed(path: Path, out: Path, count: int, *how: str) -> int:
    """Run the list to its end, and check all of it. How many pictures had to be made."""
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")} if out.exists() else {}
    code, printed, errors = batch(path, "-o", out, *SMALL, "--json", *how)
    assert code == 0, errors
    assert_whole(out, [f"fox-{i}" for i in range(count)])
    after = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
    assert all(after[name] == changed for name, changed in before.items())  # nothing is made twice
    counts = json.loads(printed)
    assert counts["kept"] == len(before)
    return int(counts["made"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("how", [(), ("--workers", "2")], ids=["one process", "workers"])
def test_a_run_that_is_killed_at_any_time_is_resumed(how: tuple[str, ...], tmp_path: Path) -> None:
    count, out = 14, tmp_path / "out"
    path = write_list(tmp_path / "list.jsonl", numbered(count, steps=6))
    for least in (0, 1, 5, 9):
        process = begun(path, "-o", out, *SMALL, *how)
        until(lambda least=least, process=process: process.poll() is not None or len(list(out.glob("*.png"))) >= least)
        process.kill()
        process.communicate()
        for file in out.glob("*.png"):
            pixels(file)
    assert resumed(path, out, count, *how) <= count - 9
    assert resumed(path, out, count, *how) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("how", [(), ("--workers", "2")], ids=["one process", "workers"])
def test_an_interrupt_leaves_finished_pictures_and_a_report(
    number: int, code: int, how: tuple[str, ...], tmp_path: Path
) -> None:
    count, out = 30, tmp_path / "out"
    path = write_list(tmp_path / "list.jsonl", numbered(count, steps=12))
    process = begun(path, "-o", out, *SMALL, *how)
    until(lambda: len(list(out.glob("*.png"))) >= 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.splitlines()[-1] == f"sdopt: {'interrupted' if code == 130 else 'terminated'}"
    assert "left; the same command again makes the rest" in errors
    assert "Traceback" not in errors
    there = pictures(out)
    assert_whole(out, sorted(there))
    assert {id for id, line in report(out).items() if line["status"] == "made"} == set(there)
    assert resumed(path, out, count, *how) == count - len(there)


def children(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes of a run."""
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    found = [one for thread in threads for one in (thread / "children").read_text().split()]
    return [int(one) for one in found if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system has no /proc")
def test_a_worker_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    count, out = 24, tmp_path / "out"
    path = write_list(tmp_path / "list.jsonl", numbered(count, steps=12))
    process = begun(path, "-o", out, *SMALL, "--workers", "2", "--json")
    for least in (2, 8):
        until(lambda least=least: len(list(out.glob("*.png"))) >= least)
        os.kill(children(process)[0], signal.SIGKILL)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(printed)["made"] == count
    assert_whole(out, [f"fox-{i}" for i in range(count)])


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    count, out = 12, tmp_path / "out"
    path = write_list(tmp_path / "list.jsonl", numbered(count, steps=10))
    first = begun(path, "-o", out, *SMALL)
    until(lambda: list(out.glob("*.png")))
    first.send_signal(signal.SIGSTOP)
    code, _, errors = batch(path, "-o", out, *SMALL)
    first.send_signal(signal.SIGCONT)
    assert code == 2
    assert f"{out}: another run writes to this folder; wait until it ends" in errors
    assert first.wait(timeout=60) == 0
    assert resumed(path, out, count) == 0


WITHOUT_LOCKS = """
import sys
from contextlib import nullcontext
from sdopt.offline import folders
folders.alone = lambda target: nullcontext()  # as on a file system that has none
from sdopt.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_two_runs_on_one_folder_without_locks(tmp_path: Path) -> None:
    count, out = 10, tmp_path / "out"
    path = write_list(tmp_path / "list.jsonl", numbered(count))
    command = [sys.executable, "-c", WITHOUT_LOCKS, "batch", str(path), "-o", str(out), *SMALL]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert resumed(path, out, count) == 0


def test_from_python(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    entries = numbered(3, steps=2)
    run = make(pipe, entries, tmp_path / "out", **SIZE)
    assert {id: outcome.status for id, outcome in run.outcomes.items()} == {f"fox-{i}": "made" for i in range(3)}
    assert_whole(tmp_path / "out", [f"fox-{i}" for i in range(3)])
    again = make(pipe, entries, tmp_path / "out", **SIZE)
    assert again.count("kept") == 3
    path = write_list(tmp_path / "list.jsonl", entries)
    code, printed, _ = batch(path, "-o", tmp_path / "out", *SMALL, "--json")  # the command has the same names
    assert (code, json.loads(printed)["kept"]) == (0, 3)
    with pytest.raises(sdopt.UsageError, match=r"request 1: unknown keyword 'size'"):
        make(pipe, [entries[0], {**entries[1], "size": 7}], tmp_path / "out")


def test_a_list_and_its_pictures_in_an_object_store(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    for needed in ("pyarrow", "fsspec"):
        pytest.importorskip(needed, reason="the extra `ray` is not installed")
    store = folder(f"memory://{tmp_path.name}")
    photo = Image.new("RGB", (64, 64), "red")
    photo.save(tmp_path / "photo.png")
    store.write("photo.png", (tmp_path / "photo.png").read_bytes())
    entry = {"id": "a", "prompt": "a fox", "seed": 1, "image": "photo.png", "num_inference_steps": 4}
    store.write("list.jsonl", json.dumps(entry).encode())
    places = (f"memory://{tmp_path.name}/list.jsonl", f"memory://{tmp_path.name}/out")
    assert make(pipe, *places).count("made") == 1
    run = make(pipe, *places)
    assert run.count("kept") == 1
    names = folder(places[1]).names()
    assert names == {run.lines[0].name, "report.jsonl"}
    (tmp_path / "made.png").write_bytes(folder(places[1]).read(run.lines[0].name))
    alone = pipe("a fox", seed=1, image=photo, num_inference_steps=4).images[0]
    assert np.array_equal(pixels(tmp_path / "made.png"), np.asarray(alone))


def test_a_disk_that_is_full_ends_the_run_and_nothing_is_half_written(small_disk: Path, tmp_path: Path) -> None:
    out = small_disk / "out"
    path = write_list(tmp_path / "list.jsonl", numbered(6, steps=2))
    out.mkdir()
    (out / "filler").write_bytes(b"0" * ((4 << 20) - 40_000))
    code, _, errors = batch(path, "-o", out, "--size", "128x128", "--threads", "1")
    assert code == 1
    assert "No space left on device; free some space" in errors
    for file in out.glob("*.png"):
        pixels(file)
    (out / "filler").unlink()
    assert batch(path, "-o", out, "--size", "128x128", "--threads", "1")[0] == 0
    assert_whole(out, [f"fox-{i}" for i in range(6)])
