"""The pages say what the project does: their commands and code run, their lists are complete, their links work.

A command that needs no network, no GPU and no model but the embedded one is run; of any other one the parser that the
user meets has to take every word. What a page makes in one line, its next line may use.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdopt.cli.main import COMMANDS, main
from sdopt.request.keywords import KEYWORDS
from tests.conftest import EMOJI_BUNDLE, ROOT, sdopt
from tests.test_architecture import ARROWS

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

README = (ROOT / "README.md").read_text()
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "*/*.md", "*/*/*.md")
    for path in ROOT.glob(pattern)
    if path.relative_to(ROOT).parts[0] not in ("build-out", "scratch", ".venv", ".pytest_cache")
)
EMOJI = "engines/emoji/bundle"
FOLDERS = "benchmarks/results"  # what commands of pages read, beside the embedded model
NOT_OURS = {  # what they do is not a promise of a page
    "pytest", "ruff", "pyright", ".ci/run", "docker", "kubectl", "openssl", "mkdir", "cat", "cp", "printf",
}  # fmt: skip
SLOW = ("export", "bench run", "tune")  # tests/export and tests/bench run them
GPU = ("tensorrt", "tensorrt-rtx", "ort:cuda")
ADDRESS = "127.0.0.1:8000"  # of the server that a page speaks of
NOT_HERE = (  # the reader's own; what not every processor has
    "sd15", "sd3", "flux", "old.json", "bf16", "build-out/emoji",
)  # fmt: skip


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[list[str]]:
    """The words of every command of a page's sh blocks, without comments; `a && b` is two of them."""
    found: list[list[str]] = []
    for block in blocks(name, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                at = words.index("&&")
                found.append(words[:at])
                words = words[at + 1 :]
            found.append(words)
    return [words for words in found if words]


def runs_here(words: Sequence[str]) -> bool:
    """Whether a command of sdopt can run without a network, a GPU or a model that is not here, in seconds."""
    is_run = words[0] == "bench" and words[1] not in ("compare", "report")
    if words[0] == "serve" or "--ray" in words:  # it would not end; tests/offline/test_ray.py begins clusters
        return False
    not_here = [word for word in words if word in NOT_HERE or word.startswith(GPU)]
    return not not_here and ("bench run" if is_run else words[0]) not in SLOW


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A folder to follow a page in, with the files that pages speak of as the reader's own."""
    text = page(request.node.callspec.params["name"])
    if EMOJI in text:
        shutil.copytree(EMOJI_BUNDLE, tmp_path / EMOJI, ignore=shutil.ignore_patterns("engines"))
    if FOLDERS in text:
        shutil.copytree(ROOT / FOLDERS, tmp_path / FOLDERS)
        for name in ("README.md", "benchmarks/README.md"):
            shutil.copy(ROOT / name, tmp_path / name)
    if "image=@apple.png" in text:
        Image.fromarray(np.full((128, 128, 3), 99, np.uint8)).save(tmp_path / "apple.png")
    if "mask.png" in text:
        mask = np.zeros((128, 128), np.uint8)
        mask[40:90, 40:90] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
    if "me.safetensors" in text:
        rows = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
        header = json.dumps({"<me>": {"dtype": "F32", "shape": [2, 128], "data_offsets": [0, rows.nbytes]}}).encode()
        (tmp_path / "me.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + rows.tobytes())
    if "batch prompts.jsonl" in text:
        (tmp_path / "prompts.jsonl").write_text("".join(blocks("sdopt/offline/README.md", "jsonl")))
    if "report emoji.json" in text:
        shutil.copy(ROOT / FOLDERS / "emoji.json", tmp_path / "emoji.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a server listens, if the page speaks of one."""
    if ADDRESS not in page(request.node.callspec.params["name"]):
        yield ADDRESS
        return
    serving = pytest.importorskip("tests.serve.conftest", reason="the extra `server` is not installed")
    with serving.running(tmp_path_factory.mktemp("server")) as server:
        yield server.url.removeprefix("http://")


def asks_the_server(words: Sequence[str], address: str) -> None:
    """A command of curl gets an answer that is no error. Where there is no curl, other tests ask the same routes."""
    if shutil.which("curl") is None:
        return
    there = [word.replace(ADDRESS, address) for word in words]
    assert subprocess.run([*there, "--fail"], capture_output=True, check=False, timeout=120).returncode == 0, words


@pytest.mark.parametrize("name", [name for name in PAGES if commands(name)])
def test_the_commands_of_a_page_run_or_are_taken_by_their_parser(
    name: str, desk: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in commands(name):
        if words[0] == "sdopt" and runs_here(words[1:]):
            assert main(words[1:]) == 0, words
        elif words[0] == "sdopt":
            taken_by_its_parser(words[1:], monkeypatch)
        elif words[:2] == ["pip", "install"]:
            extras_exist(words[2:])
        elif words[0] == "curl":
            asks_the_server(words, address)
        elif words[0] == "python":
            options_exist(words[1:])
        else:
            assert words[0] in NOT_OURS, words
    for made in ("README.md", "benchmarks/README.md"):  # every figure on these pages is that of the records
        if FOLDERS in page(name):
            assert (desk / made).read_text() == page(made)
    if FOLDERS in page(name):
        for plot in (ROOT / FOLDERS).glob("*.svg"):
            assert (desk / FOLDERS / plot.name).read_text() == plot.read_text()


def taken_by_its_parser(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is read as the user's own, and stops where it would begin to work."""
    taken: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module(f"sdopt.cli.{words[0]}"), "run", lambda args: taken.append(args) or 0)
        assert main(words) == 0, words
    assert taken


def extras_exist(words: Sequence[str]) -> None:
    project = tomllib.loads(page("pyproject.toml"))["project"]
    named = {extra for word in words for group in re.findall(r"\.\[([\w,-]+)\]", word) for extra in group.split(",")}
    assert named <= set(project["optional-dependencies"])


def options_exist(words: Sequence[str]) -> None:
    """A script is there, and its own help has every option and word that a page gives it."""
    script, *rest = words
    if script == "-m":
        script, *rest = rest
        script = f"{script.replace('.', '/')}/__main__.py"
    assert (ROOT / script).is_file(), script
    word = [rest[0]] if rest and Path(script).name == "skeleton.py" else []  # its words have a help each
    shown = subprocess.run(
        [sys.executable, ROOT / script, *word, "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    for option in (word for word in rest if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown), (script, option)


@pytest.mark.parametrize("name", [name for name in PAGES if blocks(name, "python")])
def test_the_python_of_a_page_runs(name: str, desk: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    host, _, port = address.partition(":")
    for code in blocks(name, "python"):
        there = code.replace(ADDRESS, address).replace('host="127.0.0.1", port=8000', f'host="{host}", port={port}')
        exec(there.replace('"sd15"', repr(str(EMOJI_BUNDLE))), names)
    assert name != "README.md" or capsys.readouterr().out.startswith("1/20  sigma ")


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page(name)) + re.findall(r'src="([^"]+)"', page(name))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_reached_from_the_readme() -> None:
    reached, left = set[str](), ["README.md"]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", page(name))]
            left += [os.path.relpath((ROOT / name).parent / link, ROOT) for link in links if "://" not in link]
    assert reached == set(PAGES)


def test_the_first_two_commands_are_the_set_up() -> None:
    first, second = (block.strip() for block in blocks("README.md", "sh")[:2])
    assert first == 'pip install ".[cpu]" && sdopt generate "a red apple on a blue background" -o apple.png'
    assert second == 'pip install ".[cpu,export,test]" && pytest -n auto'
    assert f"\n{second}\n" in page(".ci/run")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_the_command_line_has_every_option(command: str) -> None:
    name = "sdopt/cli/README.md"
    assert f"[`sdopt {command}`](#" in page(name)
    section = re.search(rf"^## `sdopt {command}.*?(?=^## |\Z)", page(name), re.DOTALL | re.MULTILINE)[0]
    words = [[command, "run"], [command, "compare"], [command, "report"]] if command == "bench" else [[command]]
    everywhere = {"--help", "--quiet", "--verbose"}  # the head of the page has them
    assert everywhere <= options(page(name).split("\n## ")[0])
    there = {option for word in words for option in options(sdopt(*word, "--help").stdout)} - everywhere
    assert options(section) == there


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


def test_the_page_of_engines_has_every_option_of_a_build() -> None:
    everywhere = {"--help", "--quiet", "--verbose"}
    assert options(sdopt("build", "--help").stdout) - everywhere <= options(page("engines/README.md")) | {"--backend"}


def test_the_page_of_the_house_has_every_keyword_and_every_room() -> None:
    text = page("sdopt/README.md")
    assert {name for name in KEYWORDS if f"`{name}`" not in text} == set()
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text.split("## The rooms")[1], re.MULTILINE)
    assert sorted(rows) == sorted(set(ARROWS) - {"sdopt", "__main__"})
    for i, room in enumerate(rows):  # the table is in the order of imports
        assert not set(ARROWS[room].split()) & set(rows[:i]), room


def test_the_format_it_specifies_is_the_format_of_the_shipped_bundle() -> None:
    manifest = json.loads((EMOJI_BUNDLE / "manifest.json").read_text())
    assert "(sdopt/bundle/README.md)" in README
    specification = page("sdopt/bundle/README.md")
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

    specification = page("sdopt/bundle/README.md")
    assert f"format, version {format.FORMAT_VERSION}" in specification
    classes = [kind for kind in vars(format).values() if dataclasses.is_dataclass(kind) and isinstance(kind, type)]
    names = {f.name for kind in classes if kind is not format.Rule for f in dataclasses.fields(kind)}
    assert len(names) > 40
    assert not {name for name in names if f"`{name}`" not in specification}


def test_the_exit_codes_it_lists_are_those_of_the_errors() -> None:
    from sdopt import errors

    text = re.search(r"Exit codes: (.*)", page("sdopt/cli/README.md"))[1]
    codes = {int(code) for code in re.findall(r"(?:^|, )(\d+) ", text)}
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.SdoptError)]
    assert {kind.exit_code for kind in kinds} | {0, 130, 143} == codes


def test_the_page_of_the_server_has_every_metric() -> None:
    metrics = pytest.importorskip("sdopt.serve.metrics", reason="the extra `server` is not installed")
    text = page("sdopt/serve/README.md")
    names = {family.name for family in metrics.Metrics().registry.collect()}
    assert len(names) > 10
    assert {name for name in names if f"`{name}`" not in text and f"`{name}_total`" not in text} == set()
    listed = set(re.findall(r"`(sdopt_\w+)`", text))
    assert {name.removesuffix("_total") for name in listed} == names
