"""The Dockerfile copies all that the package is built from, and nothing that is not there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

TEXT = (ROOT / "docker/Dockerfile").read_text()


def test_what_it_copies_is_there_and_is_enough_to_build_the_wheel(tmp_path: Path) -> None:
    copies = [line.split()[1:] for line in TEXT.splitlines() if line.startswith("COPY ") and "--from" not in line]
    for *sources, target in copies:
        for source in sources:
            path = tmp_path / (source if target in (".", "./") else target)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(ROOT / source, path) if (ROOT / source).is_dir() else shutil.copy(ROOT / source, path)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path / "out"), str(tmp_path)],
        check=True, capture_output=True,
    )  # fmt: skip
    wheel = next((tmp_path / "out").glob("sdopt-*.whl"))
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], check=True, capture_output=True, text=True
    )
    for needed in ("sdopt/cli/main.py", "sdopt/py.typed", "sdopt/emoji/manifest.json", "sdopt/emoji/unet.onnx.data"):
        assert needed in names.stdout


def test_it_does_not_run_as_root_and_installs_extras_that_exist() -> None:
    stages = re.split(r"^FROM ", TEXT, flags=re.MULTILINE)
    assert all("USER 10001" in stage for stage in stages if "ENTRYPOINT" in stage)
    project = (ROOT / "pyproject.toml").read_text()
    for extra in {name for group in re.findall(r"\.\[([\w,]+)\]", TEXT) for name in group.split(",")}:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
