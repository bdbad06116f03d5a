"""Lists are checked before anything is made, and a picture's name says what it depends on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sdopt
from sdopt.bundle.presets import Preset, write_preset
from sdopt.errors import UsageError
from sdopt.offline.folders import Disk
from sdopt.offline.lines import Line, checked, deciding, id_in, lines, read, written
from sdopt.offline.run import plan_all
from tests.conftest import EMOJI_BUNDLE


@pytest.fixture(scope="module")
def pipe() -> Iterator[sdopt.Pipeline]:
    with sdopt.load() as opened:
        yield opened


def lined(pipe: sdopt.Pipeline, folder: Path, *entries: dict[str, Any], **defaults: Any) -> list[Line]:
    content = "\n".join(map(json.dumps, entries)).encode()
    return lines(read(content, "list.jsonl"), checked(defaults), Disk(folder), deciding(pipe))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "list.jsonl: there is no line in it; write a JSON object in each line"),
        (b"\n \n", "there is no line in it"),
        (b'{"id": "a", "prompt": "b"}\nnope', "list.jsonl:2: it is no JSON object"),
        (b"[1]", "list.jsonl:1: it is no JSON object (got [1])"),
        (b'\xef\xbb\xbf{"id": "\xff"}', "list.jsonl:1: it is not UTF-8"),
        (b'{"id": "a", "prompt": "b", "prompt": "c"}', "a key is given twice"),
        (b'{"id": "a", "prompt": "b", "seed": NaN}', "NaN is not a number"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_list_is_named_with_its_line(content: bytes, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(content, "list.jsonl")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"prompt": "a"}, 'id is missing; allowed are texts and whole numbers, one for each line, e.g. "id": "fox-1"'),
        ({"id": "", "prompt": "a"}, "id = ''"),
        ({"id": True, "prompt": "a"}, "id = True"),
        ({"id": "\ud800", "prompt": "a"}, "is no text in Unicode"),
        ({"id": 1}, 'prompt is missing; write "prompt": "a fox"'),
        ({"id": 1, "promt": "a"}, "unknown keyword 'promt'; there are prompt, "),
        ({"id": 1, "prompt": ["a", "b"]}, "allowed is one text: write a line for each picture"),
        ({"id": 1, "prompt": "a", "seed": [1, 2]}, "allowed is one number: write a line for each picture"),
        ({"id": 1, "prompt": "a", "num_images_per_prompt": 2}, "write a line for each"),
        ({"id": 1, "prompt": "a", "latents": [1]}, "latents takes arrays, which JSON has not"),
        (
            {"id": 1, "prompt": "a <lora:neon:1>", "prompt_style": "a1111"},
            "<lora:neon> names a LoRA, and those of a list",
        ),
        ({"id": 1, "prompt": "a", "num_inference_steps": 0}, "num_inference_steps = 0; allowed are whole numbers"),
        ({"id": 1, "prompt": "a", "image": 7}, "image = 7; allowed are files of pictures, relative to the list"),
        ({"id": 1, "prompt": "a", "image": "gone.png"}, "image: gone.png cannot be read"),
        ({"id": 1, "prompt": "a", "control_image": {"canny": "gone.png"}}, "control_image: gone.png cannot be read"),
    ],
)
def test_a_wrong_line_is_named(entry: dict[str, Any], words: str, pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        lined(pipe, tmp_path, {"id": "right", "prompt": "b"}, entry)
    assert str(caught.value).startswith("list.jsonl:2: ")
    assert words in str(caught.value)


def test_all_wrong_lines_are_named_at_once(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    wrong = [{"id": i} for i in range(25)]
    with pytest.raises(UsageError) as caught:
        lined(pipe, tmp_path, {"id": "7", "prompt": "a"}, {"id": 7, "prompt": "b"}, *wrong)
    first, *others = str(caught.value).splitlines()
    assert first == "list.jsonl:2: id = '7' is that of list.jsonl:1 too; each line has its own"
    assert len(others) == 20
    assert others[-1] == "and 6 other lines are wrong"


def test_what_does_not_go_together_is_named_too(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    given = lined(
        pipe, tmp_path, {"id": 1, "prompt": "a", "strength": 0.5}, {"id": 2, "prompt": "a", "image": "no.png"}
    )
    with pytest.raises(UsageError) as caught:
        plan_all(pipe, given, Disk(tmp_path))
    first, second = str(caught.value).splitlines()
    assert first == "list.jsonl:1: strength needs an image: give image=..."
    assert second == "list.jsonl:2: image is no PNG, JPEG or WebP picture: no.png"


def test_keywords_without_effect_are_logged_once(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    idle = [{"id": i, "prompt": "a", "guidance_scale": 1.0, "negative_prompt": "b"} for i in range(3)]
    given = lined(pipe, tmp_path, *idle)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("sdopt.offline").addHandler(handler)
    try:
        plan_all(pipe, given, Disk(tmp_path))
    finally:
        logging.getLogger("sdopt.offline").removeHandler(handler)
    assert len(said) == 1
    assert said[0].startswith("list.jsonl:1 and 2 other lines: negative_prompt")


def test_a_name_depends_on_what_decides_the_picture_and_on_nothing_else(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    os.link(tmp_path / "a.png", tmp_path / "same.png")
    entry = {"id": "x", "prompt": "a fox", "seed": 1, "image": "a.png"}
    with sdopt.load() as pipe:

        def name(folder: Path = tmp_path, defaults: dict[str, Any] | None = None, **changes: Any) -> str:
            own = {key: value for key, value in {**entry, **changes}.items() if value is not ...}
            return lined(pipe, folder, own, **(defaults or {}))[0].name

        first = name()
        assert first == name(image="same.png") == name(image=str(tmp_path / "a.png"), strength=None)
        assert first == name(seed=..., defaults={"seed": 1}) == name(defaults={"seed": 2})
        assert name(guidance_scale=5) == name(guidance_scale=5.0) == name(defaults={"guidance_scale": 5})
        changed = [name(id="y"), name(prompt="a cat"), name(seed=2), name(seed=...), name(strength=0.5)]
        Image.new("RGB", (64, 64), "blue").save(tmp_path / "a.png")
        changed += [name(), name(image=...)]
        pipe.load_lora_weights("engines/emoji/neon.safetensors")
        changed.append(name())
        pipe.set_adapters("neon", 0.5)
        changed.append(name())
    assert len({first, *changed}) == len(changed) + 1


def test_a_line_without_a_seed_gets_the_same_one_in_any_list(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    one, two = {"id": "one", "prompt": "a"}, {"id": "two", "prompt": "a"}
    (alone,) = lined(pipe, tmp_path, two)
    first, second = lined(pipe, tmp_path, one, two)
    assert alone.options["seed"] == second.options["seed"] != first.options["seed"]
    assert alone.name == second.name


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=2, unique=True))
def test_no_two_ids_are_written_alike_and_each_is_the_name_of_a_file(ids: list[str]) -> None:
    names = [written(id) for id in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        assert set(name) <= set(f"{string.ascii_letters}{string.digits}_.-%~")
        assert not name.startswith(".")
        assert len(name) < 200
        assert id_in(f"{name}-0123456789abcdef.png") == name


def test_a_picture_that_was_changed_since_is_refused(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (line,) = lined(pipe, tmp_path, {"id": 1, "prompt": "a", "image": "a.png"})
    assert line.opened(Disk(tmp_path))["image"].getpixel((0, 0)) == (255, 0, 0)
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"image: a\.png was changed after the list was read; run the same command"):
        line.opened(Disk(tmp_path))


def test_a_preset_that_was_measured_anew_gives_other_names(tmp_path: Path) -> None:
    shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle")
    names: list[str] = []
    for steps in (4, 5, 5):
        fast = Preset("ort", "fp32", {"num_inference_steps": steps}, 0.5, 31.5, 0.93, "100 steps", "a processor")
        write_preset(sdopt.Bundle.open(tmp_path / "bundle"), "fast", fast)
        with sdopt.load(tmp_path / "bundle") as pipe:
            (line,) = lined(pipe, tmp_path, {"id": "fox", "prompt": "a fox", "preset": "fast"})
        names.append(line.name)
    assert names[0] != names[1] == names[2]
    with sdopt.load(tmp_path / "bundle") as pipe, pytest.raises(UsageError, match="fastest"):
        lined(pipe, tmp_path, {"id": "fox", "prompt": "a fox", "preset": "fastest"})
