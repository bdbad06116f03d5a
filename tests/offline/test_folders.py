"""Folders of pictures: a disk and an object store keep the same promises."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdopt.errors import BackendError, UsageError
from sdopt.offline import folders
from sdopt.offline.folders import Disk, Folder
from tests.conftest import ROOT


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A folder that is not there yet: on a disk, and in a store that lives in this process's memory."""
    if request.param == "disk":
        return folders.folder(f"file://{tmp_path}/a/b")
    pytest.importorskip("pyarrow", reason="the extra `ray` is not installed")
    pytest.importorskip("fsspec", reason="the extra `ray` is not installed")
    return folders.folder(f"memory://{uuid.uuid4().hex}/a")


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, format="PNG")
    return content.getvalue()


def test_a_folder_has_what_was_written_into_it(folder: Folder) -> None:
    assert folder.names() == set()
    folders.make(folder)
    folder.write("a.png", png())
    folder.write("a.png", b"other")
    folder.write("b", b"")
    assert folder.names() == {"a.png", "b"}
    assert pickle.loads(pickle.dumps(folder)).names() == folder.names()  # as actors get it
    assert folder.read("a.png") == b"other"
    folder.set_aside("a.png")
    folder.set_aside("a.png")
    assert folder.names() == {"b"}
    assert folder.read("older/a.png") == b"other"
    with pytest.raises(OSError, match=r"gone"):
        folder.read("gone")


@pytest.mark.parametrize("cut", [0, 1, 8, 20, -1])
def test_half_a_picture_is_none(cut: int, folder: Folder) -> None:
    folders.make(folder)
    folder.write("whole.png", png())
    folder.write("half.png", png()[:cut])
    folder.write("text.png", b"a text")
    assert [folder.is_complete(f"{name}.png") for name in ("whole", "half", "text", "gone")] == [
        True,
        False,
        False,
        False,
    ]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for refuses in (folders.check, folders.make):
            with pytest.raises(UsageError, match=r"no pictures can be written there: .*; name another folder"):
                refuses(Disk(path))
    folders.check(Disk(tmp_path / "new" / "newer"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match=r"is no folder; name a folder"):
        Disk(tmp_path / "file").names()


def test_a_store_that_nothing_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow", reason="the extra `ray` is not installed")
    with pytest.raises(UsageError, match=r"^nowhere://a: .*Allowed are paths, s3:// and gs:// addresses"):
        folders.folder("nowhere://a")
    monkeypatch.setitem(sys.modules, "pyarrow.fs", None)
    with pytest.raises(BackendError, match=r'^s3://a: object stores need pyarrow .*pip install "sdopt\[ray\]"'):
        folders.folder("s3://a")


HOLDS = """
import sys
from pathlib import Path
from sdopt.offline.folders import Disk, alone
with alone(Disk(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
@pytest.mark.parametrize("end", ["killed", "ended"])
def test_one_run_at_a_time_writes_to_a_folder(end: str, tmp_path: Path) -> None:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], cwd=ROOT, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    words = r"another run writes to this folder; wait until it ends, or name another"
    with pytest.raises(UsageError, match=words), folders.alone(Disk(tmp_path)):
        pass
    if end == "killed":
        process.kill()
    process.communicate()
    with folders.alone(Disk(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []
