"""The doctor says what would be used, and why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sdopt import engine
from sdopt.cli import doctor
from sdopt.cli.doctor import cuda_fault
from sdopt.cli.main import main
from sdopt.engine import BACKENDS, choose_backend, installed_backends
from tests.conftest import ROOT, sdopt


def test_it_names_every_backend_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings["backends"]) == set(BACKENDS)
    assert {name for name, entry in findings["backends"].items() if "version" in entry} == set(installed_backends())
    auto = findings["auto"]
    assert (auto["backend"], auto["precision"]) == choose_backend()
    assert findings["embedded_model"] is True
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out
    assert f"auto            {auto['backend']}, fp32: fp32 makes the picture that diffusers makes" in lines


def test_without_an_engine_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "installed_backends", lambda: ())
    assert main(["doctor"]) == 4
    printed = capsys.readouterr()
    assert "not installed: pip install" in printed.out
    assert "no engine library" in printed.err


def test_a_library_that_does_not_load_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def describe(name: str) -> dict[str, Any]:
        if name == "ort":
            raise OSError("libstdc++.so.6: version GLIBCXX_3.4.32 not found")
        return {"version": "2026.1", "precisions": ["fp32"], "devices": ["cpu"]}

    monkeypatch.setattr(engine, "installed_backends", lambda: ("ort", "openvino"))
    monkeypatch.setattr(engine, "describe", describe)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out
    assert "installed, but it cannot be used: OSError: libstdc++.so.6: version GLIBCXX_3.4.32 not found" in lines
    assert "but ort does not load here: say --backend openvino, or install it again" in lines


def test_without_a_home_folder_there_is_no_cache_and_that_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert main(["doctor"]) == 0
    assert (
        "cache           none: this user has no home folder (Could not determine home directory.): set HOME"
        in capsys.readouterr().out
    )


LOGGED = "\x1b[1;31m[E:onnxruntime] Failed to load library: libcublasLt.so.12: cannot open shared object file\x1b[m"


@pytest.mark.parametrize(
    ("library", "fault"),
    [
        (f"print({LOGGED!r}, file=sys.stderr)", "libcublasLt.so.12: cannot open shared object file"),
        ("print('\x1b[1;31mCUDA failure 35\x1b[m', file=sys.stderr)", "CUDA failure 35"),
        ("os.abort()", "it ended with code -6"),
        ("InferenceSession.get_providers = lambda self: ['CUDAExecutionProvider']", ""),
    ],
)
def test_why_onnx_runtime_does_not_compute_on_cuda(
    library: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime built with CUDA logs the reason and takes the CPU; a stand-in does so here."""
    (tmp_path / "onnxruntime.py").write_text(
        "import os, sys\n"
        "class SessionOptions: pass\n"
        "class GraphOptimizationLevel: ORT_DISABLE_ALL = 0\n"
        "class InferenceSession:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def get_providers(self): return ['CPUExecutionProvider']\n"
        f"{library}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cuda_fault(Path("graph.onnx")) == fault


@pytest.mark.parametrize(
    ("version", "fault", "expected"),
    [
        ("1.30.0", "libcudnn.so.9: cannot open", "lacks: its CUDA does not load, and it computes on the CPU: libcudnn"),
        ("1.24.4", "", 'pip install "onnxruntime-gpu>=1.25"'),
        ("1.30.0", "", "devices cuda cpu\n"),
    ],
)
def test_an_onnx_runtime_with_cuda_says_whether_it_computes_there(
    version: str, fault: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "installed_backends", lambda: ("ort",))
    entry = {"version": version, "precisions": ["fp32"], "devices": ["cuda", "cpu"]}
    monkeypatch.setattr(engine, "describe", lambda name: entry)
    monkeypatch.setattr(doctor, "cuda_fault", lambda graph: fault)
    assert main(["doctor"]) == 0
    assert expected in capsys.readouterr().out


def test_a_finding_of_several_lines_stays_in_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def describe(name: str) -> dict[str, Any]:
        raise SystemExit("the driver\nis too \x1b[31mold")

    monkeypatch.setattr(engine, "installed_backends", lambda: ("ort",))
    monkeypatch.setattr(engine, "describe", describe)
    assert main(["doctor"]) == 0
    assert "cannot be used: SystemExit: the driver is too \\x1b[31mold\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("library", "shown"),
    [
        ("import os; os.abort()", "its import ends the process by signal 6"),
        ("", "module 'onnxruntime' has no attribute"),
        ("raise ImportError('caf\\x1b[31m')", "onnxruntime cannot be loaded: caf\\x1b[31m"),
    ],
)
def test_it_prints_whatever_a_library_does(library: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text(library)
    search = f"{tmp_path}{os.pathsep}{ROOT}"
    done = sdopt("doctor", PYTHONPATH=search, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", HOME="/nowhere")
    assert done.returncode == 0, done.stderr
    assert "ort             installed, but it cannot be used: " in done.stdout
    assert shown in done.stdout
    assert done.stdout.isascii()
    assert done.stdout.splitlines()[-1].startswith("auto ")
