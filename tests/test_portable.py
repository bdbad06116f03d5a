"""What is packed for a machine without a network is unpacked whole there, or not at all."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "docker/portable.py"
PIECE = 3000
pytestmark = [
    pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python from 3.11 on"),
    pytest.mark.skipif(not (shutil.which("xz") and shutil.which("sha256sum")), reason="needs xz and sha256sum"),
]


@pytest.fixture(scope="module")
def portable() -> ModuleType:
    spec = importlib.util.spec_from_file_location("portable", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["portable"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packed(portable: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tree of two archives, in pieces."""

    def fill(folder: Path, order: object) -> None:
        (folder / "site").mkdir()
        (folder / "site/noise").write_bytes(os.urandom(3 * PIECE))
        (folder / "other").mkdir()
        (folder / "other/word").write_text("word")

    monkeypatch.setitem(portable.TREES, "site", portable.Tree("3.12", fill, "#!/bin/sh\necho python {python}\n"))
    portable.pack("site", portable.Order(Path(sys.executable)), tmp_path / "pieces", PIECE, 1)
    return tmp_path / "pieces"


def unpack(pieces: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(pieces / "unpack.sh"), *map(str, words)], capture_output=True, text=True, check=False
    )


def test_pieces_are_no_larger_than_was_asked_and_unpack_to_the_same_files(packed: Path, tmp_path: Path) -> None:
    pieces = sorted(packed.glob("site.tar.xz.*"))
    assert [path.stat().st_size for path in pieces[:-1]] == [PIECE] * (len(pieces) - 1)
    assert len(pieces) > 3
    done = unpack(packed, tmp_path / "a folder")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a folder/other/word").read_text() == "word"
    assert (tmp_path / "a folder/site/noise").stat().st_size == 3 * PIECE
    assert f"{tmp_path / 'a folder'}/run -m sdopt doctor" in done.stdout
    assert subprocess.run([tmp_path / "a folder/run"], capture_output=True, check=True).stdout == b"python 3.12\n"


@pytest.mark.parametrize("fault", ["damaged", "missing"])
def test_a_piece_that_is_damaged_or_missing_is_named_and_nothing_is_unpacked(
    packed: Path, tmp_path: Path, fault: str
) -> None:
    piece = packed / "site.tar.xz.001"
    piece.unlink() if fault == "missing" else piece.write_bytes(bytes(PIECE))
    done = unpack(packed, tmp_path / "there")
    assert done.returncode == 1
    assert piece.name in done.stdout + done.stderr
    assert "copy it again" in done.stderr
    assert not (tmp_path / "there").exists()


def test_a_packer_that_fails_is_told_with_what_helps(
    portable: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/xz").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "bin/xz").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "site").mkdir()
    with pytest.raises(SystemExit, match=r"packing site: .*xz ended with code -9; if memory is short.* a lower --xz"):
        portable.compress(tmp_path, "site", tmp_path, PIECE, 9)


def test_without_a_folder_it_says_what_to_type(packed: Path) -> None:
    done = unpack(packed)
    assert done.returncode == 2
    assert f"type: sh {packed}/unpack.sh FOLDER" in done.stderr


def test_each_python_gets_what_pyproject_asks_for_on_it(portable: ModuleType) -> None:
    old, new = portable.requirements("3.10"), portable.requirements("3.12", ["tensorrt-rtx"])
    names = [{portable.Requirement(entry).name for entry in entries} for entries in (old, new)]
    assert names[0] >= {"numpy", "tokenizers", "onnx", "onnx-ir", "cuda-bindings", "onnxruntime", "tomli", "pytest"}
    assert "tomli" not in names[1]
    assert "tensorrt-rtx-cu13-libs" in names[1]
    assert "tensorrt" not in names[0] | names[1]
    with_cuda = portable.requirements("3.12", ["onnxruntime-gpu"])
    assert [entry for entry in with_cuda if entry.startswith("onnxruntime")] == ["onnxruntime-gpu"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["site", "-o", "x", "--piece", "0"], "--piece 0.0: allowed is 1 or more"),
        (
            ["site", "-o", "x", "--check-only", "--python", "python3"],
            "x has no unpack.sh; pack it first: portable.py site",
        ),
        (["tensorrt-8.6", "-o", "x", "--with", "tensorrt-rtx"], "--with is for the tree site"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_packed(
    words: list[str], told: str, tmp_path: Path
) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "x").exists()
