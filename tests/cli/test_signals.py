"""Ctrl-C and SIGTERM end a command with one line and its exit code, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdopt.bundle.unfinished import SCRATCH, remove_dead_scratch, scratch
from tests.conftest import ROOT, hears_interrupts

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
BOTH = pytest.mark.parametrize(("number", "code", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
HOLDS = """
import sys, time
from sdopt.bundle.unfinished import scratch
from sdopt.cli import main, signals
def run(argv):
    with scratch() as folder:
        (folder / "weights").write_text("large")
        print(folder, flush=True)
        time.sleep(60)
main._flushed = run
sys.argv = ["sdopt"]
sys.exit(main.main())
"""


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}


def holding(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a folder for a while, and the folder."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS], env=environment(folder), text=True, preexec_fn=hears_interrupts, **pipes
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@BOTH
def test_a_folder_for_a_while_goes_with_its_process(number: int, code: int, word: str, tmp_path: Path) -> None:
    process, folder = holding(tmp_path)
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o77 == 0
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, f"sdopt: {word}\n")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_at_the_next_start_and_what_lives_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    others = tmp_path / f".{SCRATCH}-others"
    others.mkdir()
    (dead, left), (living, used) = holding(tmp_path), holding(tmp_path)
    dead.kill()
    dead.communicate()
    assert (left / "weights").exists()
    remove_dead_scratch()
    assert sorted(tmp_path.iterdir()) == sorted([others, used])
    with scratch() as folder:
        assert folder.parent == tmp_path
    living.kill()
    living.communicate()
    with scratch():
        assert not used.exists()
    assert list(tmp_path.iterdir()) == [others]


@BOTH
def test_a_library_that_makes_an_error_of_the_signal_is_not_believed(
    number: int, code: int, word: str, tmp_path: Path
) -> None:
    library = tmp_path / "onnxruntime.py"
    library.write_text(
        f"import os, time\ntry:\n    os.kill(os.getpid(), {number})\n    time.sleep(9)\n"
        "except KeyboardInterrupt:\n    raise ImportError('DLL load failed')\n"
    )
    command = [sys.executable, "-m", "sdopt", "generate", "a cat", "--backend", "ort", "-o", str(tmp_path / "a.png")]
    variables = {**environment(tmp_path), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, check=False, preexec_fn=hears_interrupts
    )
    assert (done.returncode, done.stderr) == (code, f"sdopt: {word}\n")


def test_a_signal_that_the_shell_ignores_stays_ignored(tmp_path: Path) -> None:
    command = ["sh", "-c", f"trap '' INT TERM; exec {sys.executable} -c '{HOLDS.replace('60', '1')}'"]
    process = subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    time.sleep(0.2)
    assert process.poll() is None
    process.communicate(timeout=30)
