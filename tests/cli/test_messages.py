"""Messages name what the user gave, and advise what the command has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sdopt
from sdopt.cli.main import COMMANDS, build_parser, main
from sdopt.errors import BundleError, UsageError

LONG = "x" * 3000


def failed(capsys: pytest.CaptureFixture[str], *words: object, code: int | None = None) -> str:
    found = main([str(word) for word in words])
    assert found == code if code is not None else found
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [("generate", "a", "-o", "a.png", "-m"), ("inspect",), ("diagnose",), ("engines",), ("build",)]
)
def test_a_name_of_thousands_of_characters_is_cut(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    rest = ("--backend", "ort") if command == ("build",) else ()
    error = failed(capsys, *command, LONG, *rest)
    assert "x" * 100 in error
    assert "xxx...xxx" in error
    assert len(error) < 1000


def test_a_cut_message_keeps_its_ends_and_its_argument() -> None:
    error = UsageError(f"begin {LONG} end", "name")
    assert str(error).startswith("begin xxx")
    assert str(error).endswith("xxx end")
    assert error.param == "name"
    assert str(UsageError("a b " * 1000)) == "a b " * 1000


def test_the_source_of_an_export_may_have_a_name_that_is_too_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failed(capsys, "export", LONG, "-o", tmp_path / "bundle", code=3)
    assert "File name too long; give a path that this system can have" in error
    assert "free" not in error.lower()


def test_a_file_is_not_called_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for name, advice in (("model.safetensors", "sdopt export .*model.safetensors -o BUNDLE"), ("a.txt", "is a file")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(BundleError, match=advice):
            sdopt.load(tmp_path / name)


def test_advice_for_a_full_memory_has_options_of_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("sdopt.bundle.files.Bundle.open", full)
    commands = {"generate": ("a", "-o", tmp_path / "a.png"), "diagnose": (), "inspect": (), "engines": ()}
    for command, words in commands.items():
        error = failed(capsys, command, *words, code=1)
        options = {
            option for action in build_parser(*COMMANDS).commands[command]._actions for option in action.option_strings
        }
        named = {word.strip(",;") for word in error.split() if word.startswith("--")}
        assert "there is not enough memory" in error
        assert named <= options


def test_diagnose_names_the_latents_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for latent in ("0", "100000"):
        error = failed(capsys, "diagnose", "--latent", latent, code=2)
        assert f"--latent {latent}; allowed are whole numbers from 1 to 2048" in error


def test_bench_outside_a_clone_says_where_the_cases_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with sdopt.load() as pipe:
        bundle = pipe.bundle.path
    error = failed(capsys, "bench", "run", bundle, "--case", "sd15", code=2)
    assert "there is no such file. The cases of sdopt are in benchmarks/cases.toml of its repository" in error
    assert "--cases FILE" in error


def test_an_example_of_sigmas_can_be_typed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    request = ("generate", "a cat", "--sampler", "euler", "-o", tmp_path / "a.png", "--sigmas")
    error = failed(capsys, *request, "14.6", code=2)
    example = error.strip().rpartition("--sigmas ")[2].split()
    assert float(example[-1]) == 0
    assert main([str(word) for word in (*request, *example)]) == 0
