"""The scripts of `--print-completion` complete in real shells; without the library a sentence says what to install."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdopt.cli.completion import PUBLISHED, SHELLS
from tests.conftest import ROOT, sdopt

needs_shtab = pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="shtab is not installed")
BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_sdopt sdopt "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
COMPLETED = [  # what is typed, and what bash and fish complete its last word to
    ("ge", ["generate"]),
    ("bench com", ["compare"]),
    ("generate --sam", ["--sampler"]),
    ("generate --sampler eul", ["euler", "euler_a"]),
    ("generate apple --schedule k", ["karras"]),
    ("samplers --print eul", ["euler", "euler_a"]),
    ("build bundle --backend te", ["tensorrt", "tensorrt-rtx"]),
    ("diagnose --precision f", ["fp16"]),
    ("generate apple --rng n", ["numpy"]),
    ("export model.safetensors --config sdxl-b", ["sdxl-base"]),
    ("export model --variant f", ["fp16"]),
    ("engines bundle --remove a", ["all"]),
]
FILES = [("inspect eng", ["engines"]), ("inspect LIC", [""]), ("generate apple -o LIC", ["LICENSE"])]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    paths = {shell: folder / f"sdopt.{shell}" for shell in SHELLS}
    for shell, path in paths.items():
        done = sdopt("--print-completion", shell)
        assert done.returncode == 0, done.stderr
        path.write_text(done.stdout)
    return paths


@needs_shtab
@pytest.mark.parametrize(("typed", "completed"), [*COMPLETED, *FILES])
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(scripts: dict[str, Path], typed: str, completed: list[str]) -> None:
    command = ["bash", "--norc", "-c", BASH, "bash", str(scripts["bash"]), "sdopt", *typed.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert (done.stdout.splitlines(), done.stderr) == (completed, "")


@needs_shtab
@pytest.mark.parametrize(("typed", "completed"), COMPLETED)
@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(scripts: dict[str, Path], typed: str, completed: list[str]) -> None:
    code = f"source {scripts['fish']}; complete -C 'sdopt {typed}'"
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == completed


@needs_shtab
@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_script(scripts: dict[str, Path]) -> None:
    assert scripts["zsh"].read_text().startswith("#compdef sdopt")
    subprocess.run(["zsh", "-n", str(scripts["zsh"])], check=True)


def test_the_names_of_published_models_are_those_of_the_exporter() -> None:
    from sdopt.export.single_file import published

    assert list(PUBLISHED) == list(published.PUBLISHED)


def test_another_shell_is_a_mistake() -> None:
    done = sdopt("--print-completion", "ksh")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sdopt: error: --print-completion ksh; allowed are bash, zsh, fish\n"


def test_without_the_library_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "shtab.py").write_text("raise ImportError('No module named shtab')")
    search = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "sdopt", "--print-completion", "bash"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": search}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (4, "")
    assert 'pip install "sdopt[completion]"' in done.stderr
