"""An empty value, as that of a variable which is not set in a script, is never taken for a value that is left out."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

import sdopt
from sdopt.cli.main import COMMANDS, build_parser, main
from sdopt.cli.parser import Parser
from sdopt.errors import UsageError
from sdopt.result import Result


def options() -> Iterator[tuple[str, str, int]]:
    """Every command with each of its options that has a value, and how many values it has."""

    def walk(parser: Parser, words: str) -> Iterator[tuple[str, str, int]]:
        for action in parser._actions:
            takes_value = action.nargs != 0 and action.option_strings
            if takes_value and action.dest not in parser.may_be_empty:
                yield words, action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1
        for name, command in parser.commands.items():
            yield from walk(command, f"{words} {name}".strip())

    yield from walk(build_parser(*COMMANDS), "")


@pytest.mark.parametrize(("command", "option", "values"), options())
def test_no_option_takes_an_empty_value(
    command: str, option: str, values: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), option, *[""] * values])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert "it is empty; give a value, or leave it out" in error


@pytest.mark.parametrize("command", ["inspect", "engines", "diagnose", "build", "export", "samplers", "bench run"])
def test_no_argument_is_empty(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), ""])
    assert ended.value.code == 2
    assert "it is empty" in capsys.readouterr().err


def test_an_empty_text_is_a_prompt() -> None:
    parser = build_parser("generate")
    args = parser.parse_args(["generate", "", "--negative", "", "--prompt-2", "", "-o", "a.png"])
    assert isinstance(args, argparse.Namespace)
    assert args.prompt == [""]


def test_in_python_an_empty_name_is_no_name() -> None:
    for call in (
        lambda: sdopt.load(""), lambda: sdopt.load(backend=""), lambda: sdopt.load(backend="ort:"),
        lambda: sdopt.load(precision=""), lambda: sdopt.load().load_lora_weights(""),
        lambda: sdopt.load().load_embedding(""), lambda: Result([], (), ()).save(""),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="''|'ort:'"):
            call()
