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

# part of sdopt -> the parts that it may import
ALLOWED = {
    "errors": set(),
    "specs": {"errors"},
    "likeness": {"specs"},
    "stamps": {"errors"},
    "bundle": {"specs", "stamps", "errors"},
    "engine": {"bundle", "specs", "stamps", "errors"},
    "graph": {"specs", "errors"},
    "noise": {"errors", "specs"},
    "schedules": {"errors", "specs"},
    "samplers": {"schedules", "errors", "specs"},
    "tokenizer": {"errors", "specs"},
    "images": {"errors", "specs"},
    "masks": {"images", "errors", "specs"},
    "previews": {"bundle", "errors", "specs"},
    "embeddings": {"errors", "specs"},
    "arguments": {"bundle", "samplers", "images", "masks", "tiling", "specs", "errors"},
    "request": {"arguments", "bundle", "samplers", "images", "masks", "tiling", "specs", "errors"},
    "prompts": {"tokenizer", "specs"},
    "tiling": {"specs", "errors"},
    "tasks": {"request", "samplers", "specs", "errors"},
    "conditioning": {"engine", "bundle", "embeddings", "prompts", "request", "tokenizer", "specs", "errors"},
    "guidance": {"engine", "specs"},
    "stepper": {"engine", "guidance", "request", "tasks", "samplers", "specs", "errors"},
    "capabilities": {"arguments", "bundle", "conditioning"},
    "pipeline": {
        "guidance",
        "stepper",
        "conditioning",
        "engine",
        "bundle",
        "arguments",
        "request",
        "tasks",
        "prompts",
        "tiling",
        "previews",
        "samplers",
        "noise",
        "tokenizer",
        "images",
        "specs",
        "errors",
    },
    "export": {"graph", "likeness", "engine", "bundle", "samplers", "schedules", "noise", "specs", "errors", ""},
    "build": {"graph", "likeness", "engine", "bundle", "samplers", "specs", "stamps", "errors", ""},
    "bench": {"likeness", "pipeline", "engine", "bundle", "images", "samplers", "specs", "errors", ""},
    "commands": {
        "engine",
        "export",
        "build",
        "bench",
        "pipeline",
        "arguments",
        "request",
        "samplers",
        "images",
        "bundle",
        "errors",
        "capabilities",
        "specs",
        "",
    },
    "cli": {"commands", "errors", ""},
    "__main__": {"cli"},
    "": {"pipeline", "engine", "bundle", "samplers", "errors"},  # sdopt/__init__.py, lazily
}
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


def part_of(module: str) -> str:
    """ "sdopt.engine.ort" -> "engine"; "sdopt" -> "" """
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """The parts of sdopt that a file imports, also late or for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "sdopt":
            parts = {a.name for a in node.names}
            found |= {p if p in ALLOWED else "" for p in parts}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sdopt."):
            found.add(part_of(node.module))
        elif isinstance(node, ast.Import):
            found |= {part_of(a.name) for a in node.names if a.name.split(".")[0] == "sdopt"}
    return found


def sources() -> list[Path]:
    return sorted((ROOT / "sdopt").rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT / "sdopt").with_suffix("").parts
    part = "" if parts == ("__init__",) else parts[0]
    assert imports(path) <= ALLOWED[part] | {part}


def test_the_allowed_imports_have_no_cycle_but_the_lazy_front_door() -> None:
    remaining = {part: needs - {""} for part, needs in ALLOWED.items() if part}
    while remaining:
        leaves = {part for part, needs in remaining.items() if not needs & set(remaining)}
        assert leaves, f"a cycle among {sorted(remaining)}"
        remaining = {part: needs for part, needs in remaining.items() if part not in leaves}


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True, text=True, cwd=ROOT, check=True, env={**os.environ},
    )  # fmt: skip
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_process_that_makes_a_picture_never_imports_the_export_side(tmp_path: Path) -> None:
    command = ["generate", "a red apple", "--steps", "2", "-o", str(tmp_path / "a.png")]
    loaded = modules_after(f"from sdopt.cli import main; assert main({command!r}) == 0")
    assert (tmp_path / "a.png").exists()
    assert not {m for m in loaded if m.split(".")[0] in NOT_AT_RUN_TIME}
    assert not {m for m in loaded if m.startswith(("sdopt.export", "sdopt.build", "sdopt.bench"))}


def test_import_sdopt_loads_nothing_else() -> None:
    loaded = modules_after("import sdopt; dir(sdopt)")
    assert not {m for m in loaded if m.split(".")[0] in (*NOT_AT_RUN_TIME, "numpy", "PIL", "tokenizers", "onnxruntime")}


def test_every_public_name_is_there_and_listed() -> None:
    import sdopt

    assert all(getattr(sdopt, name) is not None for name in sdopt.__all__)
    assert set(sdopt.__all__) <= set(dir(sdopt))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sdopt.nothing
