"""What a library writes to stderr past Python reaches it escaped, whatever becomes of the process."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, hears_interrupts, sdopt

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork a process")

# perror(3) of the C library writes to file descriptor 2 by itself, as C++ and Rust do
HEAD = """
import ctypes, os, sys
from sdopt.cli import engines
from sdopt.cli.main import main
perror, real = ctypes.CDLL(None).perror, engines.run
def run(args):
    perror(b"native \\x1b[31m\\xff \\xc2\\x9b31m")
    print("python \\x1b[32m", file=sys.stderr)
    {then}
    return real(args)
engines.run = run
sys.argv = ["sdopt", "engines"]
raise SystemExit(main())
"""
SHOWN = b"native \\x1b[31m\\xff \\x9b31m: "


def started(then: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", HEAD.replace("{then}", then)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=ROOT, preexec_fn=hears_interrupts)


@pytest.mark.parametrize(
    ("then", "code"),
    [("pass", 0), ("os.abort()", -signal.SIGABRT), ("os._exit(7)", 7), ("os.kill(os.getpid(), 9)", -signal.SIGKILL)],
)
def test_it_is_escaped_and_arrives_however_the_process_ends(then: str, code: int) -> None:
    process = started(then)
    out, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert SHOWN in error
    assert b"python \\x1b[32m\n" in error
    assert b"\x1b" not in error
    assert (b"without --backend" in out) == (code == 0)


def test_more_than_a_pipe_holds_is_written_while_python_waits() -> None:
    """A library that writes while it holds Python's lock waits for nobody."""
    code = "[ctypes.PyDLL(None).perror(b'x' * 1000) for _ in range(1000)]"
    _, error = started(code).communicate(timeout=60)
    assert error.count(b"x" * 1000) == 1000


def test_an_interrupt_ends_the_command_as_ever() -> None:
    process = started("print('ready', flush=True); __import__('time').sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert SHOWN in error
    assert b"sdopt: interrupted\n" in error  # the native line may come after it, through a pipe


def test_a_process_that_outlives_the_command_does_not_hold_it() -> None:
    began = time.monotonic()
    code = "import subprocess; subprocess.Popen(['sleep', '30'], stdout=subprocess.DEVNULL)"
    process = started(code)
    assert process.wait(25) == 0
    assert time.monotonic() - began < 25
    process.kill()


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", "2>/dev/full"])
def test_a_command_without_stderr_works_all_the_same(closed: str) -> None:
    command = f"{sys.executable} -m sdopt engines {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, "without --backend" in done.stdout) == (0, True)


def test_a_command_without_stdin_and_stdout_escapes_too() -> None:
    code = HEAD.replace("{then}", "pass")
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, code]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
    assert SHOWN in done.stderr


def test_errors_of_python_arrive_whole_and_last() -> None:
    done = sdopt("engines", "no/bundle")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr


def in_a_shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command line with redirections; `sdopt` is the command, and pictures are written in `folder`."""
    command = f"{shlex.quote(sys.executable)} -m sdopt"
    line = line.replace("sdopt", command).replace("PICTURE", f"--steps 1 --size 64x64 --seed 1 -o {folder}/a.png")
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("sdopt --version >/dev/full", 1),
        ("sdopt --help >/dev/full", 1),
        ("sdopt generate --help >/dev/full", 1),
        ("sdopt samplers >/dev/full", 1),
        ("sdopt generate a PICTURE 2>/dev/full", 0),
        ("sdopt nonsense 2>/dev/full", 2),
        ("sdopt inspect nowhere 2>/dev/full", 3),
        ("sdopt bench compare no no 2>/dev/full", 2),
    ],
)
def test_output_that_cannot_be_written_is_an_error_and_a_remark_is_not(line: str, code: int, tmp_path: Path) -> None:
    done = in_a_shell(line, tmp_path)
    assert done.returncode == code, done.stderr
    assert ("No space left on device" in done.stderr) == (code == 1)
    assert (tmp_path / "a.png").exists() == ("PICTURE" in line)


def test_remarks_of_a_process_whose_stderr_is_closed_are_nowhere(tmp_path: Path) -> None:
    done = in_a_shell("sdopt generate a PICTURE --json 2>&-", tmp_path)
    assert (done.returncode, json.loads(done.stdout)["images"][0]["seed"]) == (0, 1)
    for line, code in (("sdopt inspect nowhere 2>&-", 3), ("sdopt nonsense 2>&-", 2), ("sdopt inspect >&- 2>&-", 0)):
        done = in_a_shell(line, tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_prompt_from_a_stdin_that_is_closed_is_a_mistake(tmp_path: Path) -> None:
    done = in_a_shell("sdopt generate - PICTURE <&-", tmp_path)
    assert (done.returncode, "stdin is closed" in done.stderr) == (2, True)
