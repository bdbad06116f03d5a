"""Every extra of pyproject.toml works alone: what must import with it does, and the commands say what they need.

A child process sees the standard library, sdopt and what the extra requires, directly or not; every other installed
package is as if it were not there. TensorRT's bindings and CUDA's are stand-ins, of a machine without a driver.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sdopt.cli.main import COMMANDS
from sdopt.errors import install
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT, ROOT

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GRAPHS = ("sdopt.graph", "sdopt.build")  # packages with all that is in them
ONNX_RUNTIME = ("sdopt.engine.ort", "sdopt.engine.ort_device")
BOTH = (
    "sdopt.build.calibrate",
    "sdopt.build.calibrations",
    "sdopt.build.choices",
    "sdopt.build.diagnose",
    "sdopt.build.observe",
    "sdopt.build.sensitivity",
    "sdopt.build.simulate",
)  # need onnx-ir and ONNX Runtime
# extra -> what imports with it, beside what imports without any
ALONE: dict[str, tuple[str, ...]] = {
    "": (),
    "cpu": ONNX_RUNTIME,
    "cuda": ONNX_RUNTIME,
    "build": GRAPHS,
    "tensorrt": GRAPHS,
    "tensorrt-rtx": GRAPHS,
    "openvino": ("sdopt.engine.openvino", "sdopt.engine.openvino_int8"),
    "export": (*GRAPHS, "sdopt.export"),
    "completion": (),
    "control": (),
    "server": ("sdopt.serve",),
    "ray": ("sdopt.serve",),
    "build,cpu": (*GRAPHS, *ONNX_RUNTIME, *BOTH),
}
TOOLS = {"test", "browser", "train", "dev"}  # extras of this repository, which sdopt itself never imports
SAME = {"onnxruntime-gpu": "onnxruntime"}  # packages that give the same module
STAND_INS = {
    "tensorrt/__init__.py": "",
    "tensorrt_rtx/__init__.py": "",
    "cuda/bindings/__init__.py": "",
    "cuda/bindings/runtime.py": "cudaDriverGetVersion = lambda: (0, 0)\ncudaRuntimeGetVersion = lambda: (0, 13000)\n",
}
STOOD_IN = {  # package -> the module of its stand-in
    "tensorrt": "tensorrt",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
    "cuda-bindings": "cuda",
}
CHILD = """
import contextlib, importlib, io, json, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

task = json.loads(sys.argv[1])
seen = {*task["seen"], *sys.stdlib_module_names, "sdopt", "__main__"}

class Seen(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        return super().find_spec(name, path, target) if top in seen or top.startswith("_sysconfigdata") else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Seen]
sys.path[:0] = task["paths"]
for name in [n for n in sys.modules if n.partition(".")[0] not in seen]:  # what a .pth file imported
    del sys.modules[name]

failed, results = {}, []
for name in task["modules"]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
for words in task["commands"]:
    from sdopt.cli.main import main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as error:  # --help
            code = error.code
    results.append({"words": words, "code": code, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps({"failed": failed, "results": results}))
"""


@cache
def required(extra: str) -> tuple[frozenset[str], frozenset[str]]:
    """(the packages that sdopt and these extras bring, those of them that are not installed here)."""
    entries = [*PROJECT["dependencies"]]
    for name in filter(None, extra.split(",")):
        entries += PROJECT["optional-dependencies"][name]
    todo = [Requirement(entry) for entry in entries]
    found, missing = set[str](), set[str]()
    done = set[tuple[str, frozenset[str]]]()
    while todo:
        wanted = todo.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if (name, extras) in done:
            continue
        done.add((name, extras))
        if name == "sdopt":
            todo += [Requirement(e) for other in extras for e in PROJECT["optional-dependencies"][other]]
            continue
        name = SAME.get(name, name)
        try:
            needs = [Requirement(entry) for entry in requires(name) or ()]
        except PackageNotFoundError:
            missing.add(name)
            continue
        found.add(name)
        for need in needs:
            chosen = [e for e in ("", *extras) if need.marker is None or need.marker.evaluate({"extra": e})]
            if chosen:
                need.marker = None
                todo.append(need)
    return frozenset(found), frozenset(missing)


@cache
def owners_of_modules() -> dict[str, set[str]]:
    """Top-level module -> the installed packages that it comes from."""
    return {top: {*map(canonicalize_name, owners)} for top, owners in packages_distributions().items()}


@cache
def modules() -> list[str]:
    """Every module of sdopt but `__main__`, which runs a command when it is imported."""
    paths = [path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "sdopt").rglob("*.py")]
    names = [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in paths]
    return sorted(name for name in names if name != "sdopt.__main__")


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def expected(extra: str) -> list[str]:
    """The modules that must import with an extra alone."""
    special = {place for places in ALONE.values() for place in places}
    free = [name for name in modules() if not within(name, tuple(special))]
    mine = [name for name in modules() if within(name, ALONE[extra])]
    return sorted({*free, *(name for name in mine if name not in BOTH or name in ALONE[extra])})


def alone(extra: str, tmp_path: Path, commands: list[list[str]] | None = None, imports: bool = False) -> dict[str, Any]:
    """What a process that sees only what an extra brings could not import, and what its commands said."""
    found, missing = required(extra)
    if missing - set(STOOD_IN):
        pytest.skip(f"not installed here: {', '.join(sorted(missing - set(STOOD_IN)))}")
    for name, text in STAND_INS.items():
        path = tmp_path / "stand-ins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    seen = [top for top, owners in owners_of_modules().items() if found & owners]
    seen += [STOOD_IN[name] for name in (found | missing) & set(STOOD_IN)]
    task = {
        "seen": seen,
        "paths": [str(tmp_path / "stand-ins"), str(ROOT)],
        "modules": modules() if imports else [],
        "commands": commands or [],
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(task)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_table_has_every_extra() -> None:
    named = {name for extra in ALONE for name in extra.split(",")} - {""}
    assert named == set(PROJECT["optional-dependencies"]) - TOOLS
    assert sorted({name for extra in ALONE for name in expected(extra)}) == modules()
    page = (ROOT / "docker/README.md").read_text()
    assert {name for name in named if f"`{name}`" in page} == named


@pytest.mark.parametrize("extra", ALONE)
def test_an_extra_alone_imports_what_it_is_for_and_runs_what_needs_no_engine(extra: str, tmp_path: Path) -> None:
    everywhere = [["--help"], ["samplers"], ["inspect"], ["doctor"], ["doctor", "--json"]]
    everywhere += [[command, "--help"] for command in COMMANDS]
    done = alone(extra, tmp_path, everywhere, imports=True)
    assert {name: error for name, error in done["failed"].items() if name in expected(extra)} == {}
    # without any engine library `doctor` says so, and fails
    engines = extra not in ("", "build", "export", "completion", "control", "server", "ray")
    for result in done["results"]:
        wanted = 4 if result["words"][0] == "doctor" and "--help" not in result["words"] and not engines else 0
        assert result["code"] == wanted, result
        assert result["out"]


DRIVER = "there is no NVIDIA driver on this machine"
GENERATE = ["generate", "a red apple", "-o", "apple.png"]
BUILD = ["build", str(EMOJI_BUNDLE), "--backend"]


@pytest.mark.parametrize(
    ("extra", "words", "told"),
    [
        ("tensorrt", [*BUILD, "tensorrt"], DRIVER),
        ("tensorrt", [*GENERATE, "--backend", "tensorrt"], DRIVER),
        ("tensorrt-rtx", [*GENERATE, "--backend", "tensorrt-rtx"], DRIVER),
        ("tensorrt", GENERATE, 'ort: pip install "sdopt[cpu]"'),
        ("tensorrt", ["diagnose"], 'pip install "sdopt[build,cpu]"'),
        ("cpu", ["diagnose"], 'pip install "sdopt[build,cpu]"'),
        ("cpu", [*BUILD, "tensorrt"], 'pip install "sdopt[tensorrt]"'),
        ("cpu", [*GENERATE, "--backend", "tensorrt"], 'pip install "sdopt[tensorrt]"'),
        ("cpu", ["export", "checkpoint", "-o", "bundle"], 'pip install "sdopt[cpu,export]"'),
        ("export", ["export", str(EMOJI_CHECKPOINT), "-o", "bundle"], 'needs onnxruntime: pip install "sdopt[cpu]"'),
        ("cpu", ["bench", str(EMOJI_BUNDLE), "--baseline", "checkpoint"], 'pip install "sdopt[export]"'),
        ("", GENERATE, 'ort: pip install "sdopt[cpu]"'),
        ("cpu", ["serve"], 'pip install "sdopt[server]"'),
        ("cpu,server", ["serve", "--ray"], 'pip install "sdopt[ray]"'),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else str(value)[:24],
)
def test_a_command_that_cannot_run_says_what_is_missing(
    extra: str, words: list[str], told: str, tmp_path: Path
) -> None:
    (result,) = alone(extra, tmp_path, [words])["results"]
    assert result["code"] == 4, result
    assert told in result["err"]
    assert not (tmp_path / "apple.png").exists()
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_the_doctor_of_a_machine_with_tensorrt_alone_says_what_it_can_do_and_what_is_missing(
    backend: str, tmp_path: Path
) -> None:
    as_json, as_text = alone(backend, tmp_path, [["doctor", "--json"], ["doctor"]])["results"]
    found = json.loads(as_json["out"])
    assert (as_json["code"], as_text["code"]) == (0, 0)
    assert found["auto"] == {}
    assert f"only if asked: --backend {backend}" in found["why"]
    assert DRIVER in found["backends"][backend]["lacks"]
    assert DRIVER in as_text["out"]


def test_each_extra_that_has_an_engine_of_its_own_makes_a_picture(tmp_path: Path) -> None:
    for extra, backend in (("cpu", "ort"), ("openvino", "openvino")):
        folder = tmp_path / extra
        folder.mkdir()
        (result,) = alone(extra, folder, [[*GENERATE, "--steps", "2", "--json"]])["results"]
        assert result["code"] == 0, result
        assert json.loads(result["out"])["backend"] == backend
        assert (folder / "apple.png").is_file()


def test_every_hint_names_an_extra_that_exists_for_an_index_and_for_a_clone() -> None:
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "sdopt").rglob("*.py")}
    hints = re.findall(r"install\(['\"]([\w,-]+)['\"]\)", "".join(sources.values()))
    assert len(hints) > 8
    assert {extra for hint in hints for extra in hint.split(",")} <= set(PROJECT["optional-dependencies"])
    assert install("cpu") == 'pip install "sdopt[cpu]" (in a clone of sdopt: pip install ".[cpu]")'
    assert [name for name, text in sources.items() if 'pip install "sdopt[' in text] == ["sdopt/errors.py"]
