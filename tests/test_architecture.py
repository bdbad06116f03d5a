"""Imports go one way, and the runtime never meets the export side."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# room -> the rooms that it imports from: exactly these, so an arrow that nothing uses any more is deleted here too
ARROWS = {
    "errors": "",
    "privacy": "",
    "progress": "",
    "cluster": "errors",
    "bundle": "errors",
    "metrics": "bundle errors",
    "adapters": "bundle errors",
    "engine": "bundle errors privacy",
    "graph": "bundle errors",
    "samplers": "bundle errors",
    "image": "bundle engine errors",
    "request": "bundle errors image samplers",
    "text": "bundle engine errors request",
    "denoise": "bundle engine errors request samplers",
    "result": "errors image",
    "pipeline": "adapters bundle denoise engine errors image progress request result samplers sdopt text",
    "export": "bundle engine errors graph metrics samplers sdopt text",
    "build": "bundle engine errors graph metrics pipeline samplers sdopt",
    "bench": "bundle engine errors metrics pipeline samplers sdopt",
    "serve": "adapters bundle cluster denoise engine errors image pipeline request samplers sdopt",
    "offline": "adapters bundle cluster engine errors image pipeline progress request serve",
    "cli": "adapters bench build bundle engine errors export image offline pipeline progress request samplers sdopt"
    " serve text",
    "__main__": "cli",
    "sdopt": "bundle engine errors export image pipeline privacy request result samplers",  # sdopt/__init__.py, lazily
}
FOR_EVERY_ROOM = {"dataclass", "logs"}
NOT_AT_RUN_TIME = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "scipy",
    "matplotlib",
    "huggingface_hub",
)


def modules() -> dict[str, Path]:
    """Every module of sdopt by its name."""
    found: dict[str, Path] = {}
    for path in sorted((ROOT / "sdopt").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """ "sdopt.engine.ort" -> "engine"; "sdopt" -> "sdopt" """
    return module.split(".")[1] if "." in module else module


def imports(module: str) -> set[str]:
    """The modules of sdopt that a module imports, also late or for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sdopt":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "sdopt"}
    return found


@pytest.mark.parametrize("name", ARROWS)
def test_a_room_imports_from_exactly_these(name: str) -> None:
    outside = {room(i) for module in MODULES if room(module) == name for i in imports(module)}
    assert outside - FOR_EVERY_ROOM - {name} == set(ARROWS[name].split())


def test_every_room_is_in_the_table() -> None:
    assert {room(module) for module in MODULES} - FOR_EVERY_ROOM == set(ARROWS)


def test_arrows_point_one_way_but_for_the_lazy_front_door() -> None:
    refuse_cycles({name: set(arrows.split()) - {"sdopt"} for name, arrows in ARROWS.items() if name != "sdopt"})


@pytest.mark.parametrize("name", sorted({room(module) for module in MODULES}))
def test_inside_of_a_room_imports_point_one_way_too(name: str) -> None:
    inside = {module for module in MODULES if room(module) == name}
    refuse_cycles({module: (imports(module) & inside) - {module} for module in inside})


def refuse_cycles(needs: dict[str, set[str]]) -> None:
    remaining = dict(needs)
    while remaining:
        leaves = {name for name, wanted in remaining.items() if not wanted & set(remaining)}
        assert leaves, f"a cycle among {sorted(remaining)}"
        remaining = {name: wanted for name, wanted in remaining.items() if name not in leaves}


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True, text=True, cwd=ROOT, check=True, env={**os.environ},
    )  # fmt: skip
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_process_that_makes_a_picture_never_imports_the_export_side(tmp_path: Path) -> None:
    command = ["generate", "a red apple", "--steps", "2", "-o", str(tmp_path / "a.png")]
    loaded = modules_after(f"from sdopt.cli.main import main; assert main({command!r}) == 0")
    assert (tmp_path / "a.png").exists()
    assert not {m for m in loaded if m.split(".")[0] in NOT_AT_RUN_TIME}
    assert not {m for m in loaded if m.startswith(("sdopt.export", "sdopt.build", "sdopt.bench"))}


def test_import_sdopt_loads_nothing_else() -> None:
    loaded = modules_after("import sdopt; dir(sdopt)")
    assert not {m for m in loaded if m.split(".")[0] in (*NOT_AT_RUN_TIME, "numpy", "PIL", "tokenizers", "onnxruntime")}


def test_a_pipeline_loads_no_library_that_only_some_calls_need() -> None:
    loaded = modules_after("import sdopt; sdopt.load().close()")
    assert "sdopt.text.textual_inversion" in loaded  # it reads safetensors
    assert not loaded & {"safetensors", "filelock"}


def test_every_public_name_is_there_and_listed() -> None:
    import sdopt

    assert all(getattr(sdopt, name) is not None for name in sdopt.__all__)
    assert set(sdopt.__all__) <= set(dir(sdopt))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sdopt.nothing
