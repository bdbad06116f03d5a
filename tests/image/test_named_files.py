"""A file that the user names is written as any program writes it: through links, with its mode, unless read-only."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

import sdopt
from sdopt.cli.main import main
from sdopt.errors import SdoptError
from sdopt.result import Result

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other links and permissions")


def by_command(path: Path) -> None:
    code = main(["generate", "a cat", "--steps", "1", "-o", str(path)])
    if code:
        raise SdoptError(f"exit code {code}")


def by_result(path: Path) -> None:
    made().save(path)


@cache
def made() -> Result[list[Image.Image]]:
    with sdopt.load() as pipe:
        return pipe("a cat", num_inference_steps=1, seed=1, height=64, width=64)


WRITERS = pytest.mark.parametrize("write", [by_command, by_result])
Write = Callable[[Path], None]


@WRITERS
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_file_is_written(write: Write, suffix: str, exists: bool, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / f"elsewhere/real{suffix}", tmp_path / f"link{suffix}"
    if exists:
        real.write_bytes(b"old")
    link.symlink_to(Path("elsewhere") / real.name)
    write(link)
    assert link.is_symlink()
    assert Image.open(real).size[0] >= 8
    assert sorted(os.listdir(tmp_path / "elsewhere")) == [real.name]


@WRITERS
def test_a_file_that_is_read_only_is_left_as_it_is(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    path.chmod(0o444)
    link = tmp_path / "link.png"
    link.symlink_to(path)
    for target in (path, link):
        with pytest.raises(SdoptError) as caught:
            write(target)
        assert "read-only" in str(caught.value) + capsys.readouterr().err
    assert path.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["a.png", "link.png"]


@WRITERS
def test_a_file_keeps_its_mode(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Image.open(path).size[0] >= 8


@WRITERS
def test_a_link_to_itself_or_to_no_folder_is_named(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop, lost = tmp_path / "loop.png", tmp_path / "lost.png"
    loop.symlink_to("loop.png")
    lost.symlink_to("nowhere/a.png")
    for link in (loop, lost):
        with pytest.raises(SdoptError) as caught:
            write(link)
        message = str(caught.value) + capsys.readouterr().err
        assert link.stem in message or "nowhere" in message
        assert link.is_symlink()


def test_no_clobber_keeps_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    link = tmp_path / "a.png"
    link.symlink_to("real.png")
    assert main(["generate", "a cat", "--steps", "1", "--no-clobber", "-o", str(link)]) == 2
    assert not (tmp_path / "real.png").exists()


def test_a_plot_is_written_through_a_link(tmp_path: Path) -> None:
    link = tmp_path / "plot.svg"
    link.symlink_to("real.svg")
    assert main(["samplers", "euler", "--plot", str(link)]) == 0
    assert link.is_symlink()
    assert (tmp_path / "real.svg").read_text().startswith("<svg")
