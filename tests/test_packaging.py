"""What is in the distributions: the licences, and a first page whose links work outside of the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("hatchling", reason="hatchling is not installed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that is built from the source distribution, as an index and pip build it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build"]
    search = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*build, "-t", "sdist", "-d", folder], check=True, cwd=ROOT, capture_output=True, env=search)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("sdopt-*/"))
    subprocess.run([*build, "-t", "wheel", "-d", folder], check=True, cwd=source, capture_output=True, env=search)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def text(wheel: zipfile.ZipFile, end: str) -> str:
    return wheel.read(next(name for name in wheel.namelist() if name.endswith(end))).decode()


def test_the_wheel_has_the_licences_of_the_code_and_of_the_font(wheel: zipfile.ZipFile) -> None:
    assert "Apache License" in text(wheel, "licenses/LICENSE")
    notice = text(wheel, "licenses/NOTICE")
    assert "Noto Color Emoji" in notice
    assert "SIL OPEN FONT LICENSE" in notice
    names = set(wheel.namelist())
    assert {"sdopt/emoji/manifest.json", "sdopt/emoji/unet.onnx.data", "sdopt/recipe.toml", "sdopt/py.typed"} <= names
    assert "sdopt/neon.safetensors" in names  # beside sdopt/emoji, where `--lora neon` looks for it


def test_every_link_of_the_page_on_an_index_is_an_address_of_a_file_that_is_there(wheel: zipfile.ZipFile) -> None:
    page = text(wheel, "METADATA").partition("\n\n")[2]
    links = re.findall(r"\]\(([^)\s]+)\)", page) + re.findall(r'src="([^"]+)"', page)
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://"), link
        place = re.match(r"https://(?:raw\.githubusercontent|github)\.com/sdopt/sdopt/(?:blob/)?main/([^#]+)", link)
        assert place is None or Path(ROOT / place[1]).is_file(), link
    assert any(link.startswith("https://raw.githubusercontent.com/") and link.endswith(".jpg") for link in links)
