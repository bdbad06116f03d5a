"""Texts of strangers reach the terminal escaped, whatever prints them."""

from __future__ import annotations

import io
import json
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdopt.cli.terminal import CONTROL, Escaped, escape, escaped, one_line
from tests.conftest import edit_manifest, sdopt

TITLE = "\x1b]0;PWNED\x07\x9b2J\u202e"
HOSTILE = ("\x1b", "\x07", "\x9b", "\u202e")


def printed(*arguments: object) -> str:
    done = sdopt(*arguments)
    text = done.stdout + done.stderr
    assert not [character for character in HOSTILE if character in text], repr(text)
    return text


@pytest.mark.parametrize(
    "changes",
    [
        {"family": f"sd{TITLE}"},
        {"source": {"folder": TITLE}},
        {"versions": {TITLE: TITLE}},
        {"scheduler": {"_class_name": TITLE}},
        {"files": {f"{TITLE}x": {"bytes": 1, "sha256": ""}}},
        {"name": TITLE},
        {f"unknown{TITLE}": 1},
    ],
    ids=lambda changes: escape(next(iter(changes))),
)
def test_what_a_bundle_says_is_escaped(changes: dict[str, object], bundle_copy: Path, tmp_path: Path) -> None:
    edit_manifest(bundle_copy, **changes)
    for command in ("inspect", "engines"):
        printed(command, bundle_copy)
    printed("generate", "a", "--steps", "1", "--size", "32x32", "-m", bundle_copy, "-o", tmp_path / "a.png")


def test_what_a_png_says_is_escaped(tmp_path: Path) -> None:
    for carried in ({"prompt": "a", "model": TITLE, "bundle": "x"}, {"prompt": "a", "embeddings": {TITLE: TITLE}}):
        info = PngInfo()
        info.add_text("sdopt", json.dumps({**carried, "seed": 1, "backend": TITLE, "precision": TITLE}))
        Image.new("RGB", (8, 8)).save(tmp_path / "replay.png", pnginfo=info)
        assert "\\x1b" in printed("generate", "--replay", tmp_path / "replay.png", "-o", tmp_path / "o.png")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a", "--sampler", TITLE, "-o", "o.png"),
        ("generate", "a", f"--{TITLE}", "-o", "o.png"),
        ("generate", "a", "-o", f"no{TITLE}/o.png"),
        ("generate", "a", "--image", TITLE, "-o", "o.png"),
        ("inspect", TITLE),
        ("engines", "--remove", TITLE),
        (TITLE,),
        ("samplers", "--print", TITLE),
        ("build", TITLE, "--backend", TITLE),
        ("bench", "compare", TITLE, TITLE),
    ],
    ids=lambda arguments: escape(" ".join(arguments))[:40],
)
def test_what_a_mistake_quotes_is_escaped(arguments: tuple[str, ...]) -> None:
    assert "\\x1b" in printed(*arguments)


def test_a_path_of_bytes_that_are_not_utf8_is_printed(tmp_path: Path) -> None:
    done = sdopt("inspect", tmp_path / "caf\udce9")
    assert "caf\\xe9 is not a bundle: there is no such folder" in done.stderr
    assert done.returncode == 3


@given(st.text())
def test_nothing_of_a_text_but_its_control_characters_is_changed(text: str) -> None:
    shown = escape(text)
    assert not CONTROL.search(shown)
    shown.encode()
    assert "\n" not in one_line(text)
    if not CONTROL.search(text):
        assert shown == text


def test_a_terminal_without_the_character_gets_its_number() -> None:
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, "ascii", write_through=True)
    print("ünïcode 🍎", file=Escaped(stream))  # type: ignore[arg-type]
    assert content.getvalue() == rb"\xfcn\xefcode \U0001f34e" + b"\n"


def test_tracebacks_are_escaped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with escaped():
        try:
            raise RuntimeError(TITLE)
        except RuntimeError:
            traceback.print_exc()
    assert "\x1b" not in stream.getvalue()
    assert "PWNED" in stream.getvalue()
    assert sys.stderr is stream
