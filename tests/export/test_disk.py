"""What stands in the way of an export is said in words: before the work where it can be known, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdopt.cli.main import main
from sdopt.errors import BundleError, CheckpointError, SdoptError, UsageError
from sdopt.export import export
from tests.conftest import EMOJI_CHECKPOINT, ROOT, sdopt, small_files
from tests.export.ldm import write_single_file


def ran(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_a_disk_that_is_too_small_is_refused_before_the_work(small_disk: Path) -> None:
    with pytest.raises(BundleError, match=rf"{small_disk} has 4\.\d\d MB free, about 18\.\d+ MB needed"):
        export(EMOJI_CHECKPOINT, small_disk / "b", report=pytest.fail)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_meanwhile_ends_the_export_in_words(least_checkpoint: Path, small_disk: Path) -> None:
    def filling(line: str) -> None:
        with (small_disk / "others").open("ab") as stream:
            stream.write(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))

    with pytest.raises(BundleError, match=rf"b is not written: .*; {small_disk} has \d+ bytes free"):
        export(least_checkpoint, small_disk / "b", report=filling)
    assert [path.name for path in small_disk.iterdir()] == ["others"]


def test_a_disk_of_temporary_files_that_is_too_small_is_refused_before_the_work(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.safetensors"
    with model.open("wb") as stream:
        stream.truncate(100_000_000)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(BundleError, match=rf"{small_disk} has 4\.\d\d MB free, about 100\.00 MB needed"):
        export(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_process_without_memory_says_so(
    least_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdopt.export.parity.references", lambda part: np.empty(1 << 50))  # more than there is
    with pytest.raises(SdoptError, match="emory"):
        export(least_checkpoint, tmp_path / "b", report=lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"opset": 9}, "opset = 9; allowed are"), ({"floor_db": float("nan")}, "floor_db = nan; allowed are decibels")],
)
def test_options_are_checked_before_the_checkpoint_is_opened(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export("no/such-model", tmp_path / "b", **options)


def test_the_command_checks_its_place_before_it_imports_pytorch(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    code = """
import sys
sys.modules["torch"] = None
from sdopt.cli.main import main
raise SystemExit(main(["export", "no/such-model", "-o", sys.argv[1]]))
"""
    done = ran(code, tmp_path / "b")
    assert (done.returncode, "exists already" in done.stderr) == (3, True), done.stderr


OFFLINE = """
import os, sys
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
import huggingface_hub, diffusers, transformers
from diffusers.utils import hub_utils
from huggingface_hub import constants
events = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        events.append((event, arguments[-1] if event == "socket.connect" else arguments[0]))
sys.addaudithook(watch)
import sdopt
try:
    def enough(line):  # the checkpoint is open, and its weights were read
        raise sdopt.SdoptError("enough")
    sdopt.export(sys.argv[1], sys.argv[2], offline=True, report=enough)
except sdopt.SdoptError as error:
    print(error)
print("events", events)
print("as before", constants.HF_HUB_OFFLINE, hub_utils.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE"))
try:
    huggingface_hub.model_info("owner/name")
except Exception:
    pass
print("watched", bool(events))
"""


@pytest.mark.parametrize(
    ("source", "said"),
    [("folder", "enough"), ("file", "its files lack"), ("owner/name", "not in the local cache")],
)
def test_offline_holds_where_the_libraries_were_imported_before(
    source: str, said: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    if source == "file":
        write_single_file(tiny_checkpoint, file)
    name = {"folder": tiny_checkpoint, "file": file}.get(source, source)
    done = ran(OFFLINE, name, tmp_path / "b", HF_HOME=str(tmp_path / "hf"))
    lines = done.stdout.splitlines()
    assert lines[-3:] == ["events []", "as before False False None", "watched True"], done.stderr[-2000:]
    assert said in lines[0]


def test_what_asks_the_hub_during_an_offline_export_is_refused(tmp_path: Path) -> None:
    """A library that ignores local_files_only meets the same wall."""
    code = """
import os
os.environ.pop("HF_HUB_OFFLINE", None)
import huggingface_hub
from sdopt.export.offline import offline
from threading import Barrier, Thread
barrier = Barrier(2)
def other():
    with offline(True):
        barrier.wait()
        barrier.wait()
thread = Thread(target=other)
with offline(True):
    thread.start()
    barrier.wait()
with offline(False):
    try:
        huggingface_hub.model_info("owner/name")
    except Exception as error:
        print(type(error).__name__)
barrier.wait()
thread.join()
print(huggingface_hub.constants.HF_HUB_OFFLINE)
"""
    assert ran(code).stdout.split() == ["OfflineModeIsEnabled", "False"]


def test_a_library_that_fails_is_named_and_nothing_is_left(
    least_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdopt.export.parity.references", lambda part: __import__("fractions").Fraction("no number"))
    with pytest.raises(CheckpointError, match="cannot be run: Invalid literal for Fraction"):
        export(least_checkpoint, tmp_path / "b", report=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_the_command_ends_with_a_sentence_where_files_may_not_be_large(
    least_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_files():
        code = main(["export", str(least_checkpoint), "-o", str(tmp_path / "b")])
    error = capsys.readouterr().err
    assert (code, "Traceback" in error, "b is not written: " in error) == (3, False, True), error
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = sdopt("export", EMOJI_CHECKPOINT, "-o", tmp_path / "file/b")
    assert (done.returncode, "is not a folder; choose another place" in done.stderr) == (3, True), done.stderr
