"""A terminal shows progress that is never wider than it and leaves nothing behind. A file gets lines, or nothing."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sdopt
from sdopt import progress
from tests.conftest import PHASES, ROOT
from tests.terminal import on_a_terminal, screen

PICTURE = ("generate", "a", "--steps", 30, "--size", "64x64", "--seed", 1)
CALL = "import sdopt; sdopt.load()('a', height=64, width=64, seed=1, num_inference_steps=30, progress=True)"


def bars(written: str) -> list[str]:
    """What was written over one line, one after the other."""
    return [text for text in written.replace("\x1b[K", "").split("\r") if text.strip()]


@pytest.mark.parametrize("columns", [0, 5, 20, 80, 300])
def test_the_bar_of_generate_fits_the_terminal_and_is_removed(columns: int, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    written, code = on_a_terminal(("-m", "sdopt", *PICTURE, "-o", path), columns, NO_COLOR="1")
    assert code == 0
    # the path and the seed are no bars: they may go on in the next line
    end = written.index(str(path))
    assert screen(written[:end], columns) == [""]
    assert written[end:].startswith(f"{path}\r\nseed 1; ")
    assert written.isascii()
    assert all(len(text) <= (columns or 80) for text in bars(written[:end]))
    if columns >= 20:
        assert {"loading", "denoising", "decoding"} <= {text.partition(":")[0].split()[0] for text in bars(written)}
        assert any("/30" in text for text in bars(written))


def test_a_terminal_that_becomes_narrower_shows_no_rest_of_a_wider_bar(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    written, _ = on_a_terminal(("-m", "sdopt", *PICTURE, "-o", path), 120, then=30)
    assert screen(written[: written.index(str(path))], 30) == [""]
    widths = [len(text) for text in bars(written[: written.index(str(path))])]
    assert max(widths[2:]) <= 30


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}, {"NO_COLOR": "1"}], ids=str)
def test_a_call_in_python_leaves_its_bar_on_the_terminal(environment: dict[str, str]) -> None:
    written, code = on_a_terminal(("-c", CALL), 80, **environment)
    assert code == 0
    assert written.isascii()
    shown = screen(written, 80)
    assert len(shown) == 2
    assert shown[0].startswith("denoising: 100% 30/30 |####")
    assert shown[1] == ""


def test_a_terminal_without_a_cursor_gets_no_bar_from_a_command_and_lines_from_a_call(tmp_path: Path) -> None:
    written, _ = on_a_terminal(("-m", "sdopt", *PICTURE, "-o", tmp_path / "a.png"), 200, TERM="dumb")
    assert written.startswith(f"{tmp_path / 'a.png'}\r\nseed 1; ")
    written, _ = on_a_terminal(("-c", CALL), 80, TERM="dumb")
    assert written.split("\r\n") == ["denoising 1/30", "denoising 30/30", "decoding", ""]


def test_a_file_gets_lines() -> None:
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, cwd=ROOT, check=True)
    assert (done.stdout, done.stderr.splitlines()) == ("", ["denoising 1/30", "denoising 30/30", "decoding"])


def test_quiet_prints_the_result_alone_and_verbose_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for words in (("--quiet", *PICTURE), (*PICTURE, "--quiet")):
        written, code = on_a_terminal(("-m", "sdopt", *words, "-o", path), 200)
        assert (written, code) == (f"{path}\r\n", 0)
    written, _ = on_a_terminal(("-m", "sdopt", *PICTURE, "--verbose", "-o", path), 200)
    shown = screen(written, 200)
    assert any(line.startswith("sdopt: unet is open on ort, after ") for line in shown)
    assert str(path) in shown
    assert not any("denoising" in line for line in shown)


PHASED = """
import time
from sdopt.cli import terminal
with terminal.escaped(), terminal.messages(), terminal.Phases() as phases:
    for done, phase in enumerate(("tracing unet", "checking unet", "tracing \x1b[31mvae")):
        phases(phase, done, 3)
        terminal.say(f"line {done}")
"""


def test_the_bar_of_phases_names_them_and_makes_room_for_lines() -> None:
    written, code = on_a_terminal(("-c", PHASED), 60)
    assert code == 0, written
    assert [text.partition(":")[0] for text in bars(written) if "|" in text] == [
        "tracing unet", "checking unet", "tracing \\x1b[31mvae",
    ]  # fmt: skip
    assert screen(written, 60) == ["line 0", "line 1", "line 2", ""]


def test_an_export_tells_its_phases(tiny_bundle: Path) -> None:
    components = ("unet", "text_encoder", "vae_decoder", "vae_encoder")
    phases = [f"{what} {name}" for name in components for what in ("tracing", "checking")]
    told = [json.loads(line) for line in tiny_bundle.with_name(PHASES).read_text().splitlines()]
    assert [phase for phase, _, _ in told] == ["reading the weights", *phases, "fitting previews"]
    assert [(done, of) for _, done, of in told] == [(done, 10) for done in range(10)]


@pytest.fixture(scope="module")
def pipe() -> Any:
    with sdopt.load() as pipeline:
        yield pipeline


SMALL: dict[str, Any] = {"height": 64, "width": 64, "seed": 1, "num_inference_steps": 2}


def test_a_pipeline_shows_progress_as_its_config_or_the_call_says(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    def shown(**options: Any) -> str:
        pipe("a", **SMALL, **options)
        out, err = capfd.readouterr()
        assert out == ""
        return err

    lines = "denoising 1/2\ndenoising 2/2\ndecoding\n"
    assert shown() == ""
    assert shown(progress=True) == lines
    assert shown(progress=True, output_type="latent") == lines.replace("decoding\n", "")
    pipe.set_progress_bar_config(disable=False)
    assert shown() == lines
    assert shown(progress=False) == ""
    pipe.set_progress_bar_config(disable=None)  # a file is no terminal
    assert shown() == ""
    pipe.set_progress_bar_config(disable=True)
    assert shown() == ""


@pytest.mark.parametrize("value", [1, "yes", []])
def test_progress_is_true_or_false(pipe: Any, value: Any) -> None:
    with pytest.raises(sdopt.UsageError, match="progress = .*; allowed are True and False") as caught:
        pipe("a", **SMALL, progress=value)
    assert caught.value.param == "progress"


def test_other_options_of_a_bar_are_refused(pipe: Any) -> None:
    with pytest.raises(sdopt.UsageError, match=r"set_progress_bar_config\(desc=...\): allowed is disable"):
        pipe.set_progress_bar_config(desc="mine")


def test_a_picture_with_a_bar_is_the_picture_without(pipe: Any) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        shown = pipe("a", **SMALL, progress=True, output_type="np").images
    assert (shown == pipe("a", **SMALL, output_type="np").images).all()


@pytest.mark.parametrize("stream", [None, "closed"])
def test_without_stderr_there_is_no_progress(stream: str | None, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = io.StringIO() if stream else None
    if broken is not None:
        broken.close()
    monkeypatch.setattr(sys, "stderr", broken)
    pipe("a", **SMALL, progress=True)


class Gone(io.StringIO):
    """The stream of a terminal that was closed meanwhile."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("tty", [True, False])
def test_a_terminal_that_goes_away_costs_no_picture(tty: bool, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Gone(tty))
    assert pipe("a", **SMALL, progress=True).images


def test_no_thread_is_left_behind_a_bar() -> None:
    code = f"{CALL}; import threading; print([t.name for t in threading.enumerate()])"
    written, _ = on_a_terminal(("-c", code), 80)
    assert "['MainThread']" in written


def test_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with progress.bar("denoising", 6) as shown:
        for _ in range(6):
            shown.update()
    assert capsys.readouterr().err.splitlines() == ["denoising 1/6", "denoising 4/6", "denoising 6/6"]
