"""A folder of another user: a sentence that says whose it is and what to type."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdopt.bundle.permission import refusal
from tests.conftest import ROOT

SOMEBODY = 12345
# Python may lie where only root may read, so all modules are imported before the process becomes somebody else.
RUN = """
import os, sys
from pathlib import Path
import sdopt
from sdopt.bundle.write import check_target
from sdopt.cli.main import main

own, words = sys.argv[1], ["generate", "a", "--steps", "1", "--size", "64x64", "--quiet", "-o"]
assert main([*words, own]) == 0
result = sdopt.load()("a", num_inference_steps=1, height=64, width=64)
if os.geteuid() == 0:
    os.setgid(12345)
    os.setuid(12345)
print(main([*words, "/usr/apple.png"]), file=sys.stderr)
for call in (lambda: result.save("/usr/apple.png"), lambda: check_target(Path("/usr/bundle"), False)):
    try:
        call()
    except sdopt.SdoptError as error:
        print(type(error).__name__, error, file=sys.stderr)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other permissions")


def test_a_folder_of_another_user_is_named_with_both_users(tmp_path: Path) -> None:
    """/usr belongs to root, and nobody else may write there."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "own.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    user = SOMEBODY if os.geteuid() == 0 else os.geteuid()
    why = f"the folder /usr cannot be written: it belongs to user 0, and this process is user {user}"
    what = 'in a container: start it with --user "$(id -u):$(id -g)"'
    assert done.stderr.splitlines() == [
        f"sdopt: error: -o /usr/apple.png: {why} ({what}); name another one",
        "2",
        f"SdoptError /usr/apple.png is not written: {why} ({what})",
        f"BundleError /usr/bundle cannot be made: {why} ({what}); choose another place",
    ]


def test_a_folder_that_can_be_written_is_not_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == ""


def test_a_read_only_file_system_is_named() -> None:
    mounts = (
        [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        if Path("/proc/mounts").exists()
        else []
    )
    folders = [
        Path(place) for _, place, _, options, *_ in mounts if "ro" in options.split(",") and Path(place).is_dir()
    ]
    if not folders:
        pytest.skip("no file system is mounted read-only here")
    assert refusal(folders[0]) == f"the folder {folders[0]} cannot be written: its file system is read-only"
