"""A file that is written by one rename: a process that is killed in the middle leaves nothing for good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sdopt.bundle.disk import read_given, write_cached, write_whole
from sdopt.cli.main import main
from tests.conftest import EMOJI_BUNDLE, ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")

KILLED = """
import os, signal, sys
from pathlib import Path
from sdopt.bundle.disk import write_whole
sys.addaudithook(lambda event, _: os.kill(os.getpid(), signal.SIGKILL) if event == "os.rename" else None)
write_whole(Path(sys.argv[1]), b"new")
"""


def killed(path: Path) -> None:
    """A process that dies when the content is written and the file has no name yet."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


def test_the_next_writer_removes_what_a_killed_one_has_left(tmp_path: Path) -> None:
    path = tmp_path / "a[1].png"
    path.write_bytes(b"old")
    other = tmp_path / ".a[1].png.not-ours"
    other.touch()
    killed(path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 3
    write_whole(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_in_a_cache_what_a_killed_writer_has_left_goes_with_the_next_file_of_any_name(tmp_path: Path) -> None:
    killed(tmp_path / "one")
    assert len(list(tmp_path.iterdir())) == 1
    write_cached(tmp_path / "two", b"2", 10)
    assert list(tmp_path.iterdir()) == [tmp_path / "two"]
    assert (tmp_path / "two").stat().st_mode & 0o777 == 0o600


def test_writers_at_once_do_not_remove_the_files_of_each_other(tmp_path: Path) -> None:
    path, errors = tmp_path / "a", list[BaseException]()

    def write(number: int) -> None:
        try:
            for i in range(100):
                write_whole(path, f"{number} {i}" * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["bench", "report", "PIPE", "-o", "a.md"], 2),
        (["bench", "report", "RECORD", "-o", "PIPE"], 2),
        (["bench", "compare", "PIPE", "RECORD"], 2),
        (["bench", "BUNDLE", "--cases", "PIPE", "--case", "a"], 2),
        (["build", "BUNDLE", "--backend", "ort", "--recipe", "PIPE"], 2),
        (["diagnose", "--inputs", "PIPE"], 2),
        (["samplers", "--config", "PIPE"], 2),
        (["inspect", "PIPE.safetensors"], 2),
        (["generate", "a", "--lora", "PIPE.safetensors", "-o", "a.png"], 2),
        (["generate", "a", "--embedding", "PIPE.safetensors", "-o", "a.png"], 2),
        (["generate", "a", "--image", "PIPE", "-o", "a.png"], 2),
        (["generate", "--replay", "PIPE", "-o", "a.png"], 2),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_no_command_waits_for_a_pipe_in_place_of_a_file(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    record = min((ROOT / "benchmarks/results").glob("*.json"))
    places = {
        "PIPE": "pipe",
        "PIPE.safetensors": "pipe.safetensors",
        "RECORD": str(record),
        "BUNDLE": str(EMOJI_BUNDLE),
    }
    os.mkfifo("pipe")
    os.mkfifo("pipe.safetensors")
    assert main([places.get(word, word) for word in words]) == code
    assert "sdopt: error: " in capsys.readouterr().err
    assert sorted(os.listdir()) == ["pipe", "pipe.safetensors"]


def test_a_file_that_the_user_named_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text")
    (tmp_path / "link").symlink_to("a")
    assert read_given(tmp_path / "link", 4) == b"text"
    with pytest.raises(OSError, match="has 4 bytes; allowed are 3"):
        read_given(tmp_path / "link", 3)
    with pytest.raises(IsADirectoryError):
        read_given(tmp_path, 3)
