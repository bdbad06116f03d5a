"""The README says what the project does: its commands are CI's commands, its code runs, its lists are complete."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from sdopt.cli.main import COMMANDS
from tests.conftest import EMOJI_BUNDLE, ROOT, sdopt

README = (ROOT / "README.md").read_text()


def test_the_first_two_commands_are_the_set_up() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert blocks[0].strip() == 'pip install ".[cpu]" && sdopt generate "a red apple on a blue background" -o apple.png'
    assert blocks[1].strip() == 'pip install ".[cpu,export,test]" && pytest'
    assert f"\n{blocks[1].strip()}\n" in (ROOT / ".ci/run").read_text()


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"sd15"', repr(str(EMOJI_BUNDLE))), {})
    assert (tmp_path / "astronaut.png").exists()
    assert capsys.readouterr().out.startswith("1/20  sigma ")


def test_every_command_and_option_it_names_exists() -> None:
    for command in COMMANDS:
        assert f"`sdopt {command}" in README
        row = next(line for line in README.splitlines() if line.startswith(f"| `sdopt {command}"))
        for option in re.findall(r"--[a-z-]+", row):
            assert option in sdopt(command, "--help").stdout


def test_the_format_it_specifies_is_the_format_of_the_shipped_bundle() -> None:
    manifest = json.loads((EMOJI_BUNDLE / "manifest.json").read_text())
    assert "(sdopt/bundle/README.md)" in README
    specification = (ROOT / "sdopt/bundle/README.md").read_text()
    component = manifest["components"]["unet"]
    for keys in (
        manifest,
        component,
        manifest["components"],
        manifest["latents"],
        manifest["defaults"],
        manifest["tokenizers"]["tokenizer"],
        manifest["conditioning"],
    ):
        assert not {key for key in keys if f"`{key}`" not in specification}


def test_the_format_it_specifies_names_every_field() -> None:
    from sdopt.bundle import format

    specification = (ROOT / "sdopt/bundle/README.md").read_text()
    assert f"format, version {format.FORMAT_VERSION}" in specification
    classes = [kind for kind in vars(format).values() if dataclasses.is_dataclass(kind) and isinstance(kind, type)]
    names = {f.name for kind in classes if kind is not format.Rule for f in dataclasses.fields(kind)}
    assert len(names) > 40
    assert not {name for name in names if f"`{name}`" not in specification}


def test_the_exit_codes_it_lists_are_those_of_the_errors() -> None:
    from sdopt import errors

    text = re.search(r"Exit codes: (.*)", README)[1]
    codes = {int(code) for code in re.findall(r"(?:^|, )(\d+) ", text)}
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.SdoptError)]
    assert {kind.exit_code for kind in kinds} | {0, 130} == codes
