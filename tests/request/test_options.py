"""Each keyword is declared once; its check, flag, help, record and replay follow from that."""

from __future__ import annotations

import enum
import itertools
import json
import math
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.cli.main import main
from sdopt.errors import UsageError
from sdopt.image.pil import read_parameters
from sdopt.request import arrays, control_mode, kinds
from sdopt.request.keyword import Flag, Keyword
from sdopt.request.keywords import KEYWORDS, checked, describe, replayed
from sdopt.request.options import Options
from sdopt.request.plan import Plan, make_plan


@pytest.fixture(scope="module")
def bundle() -> sdopt.Bundle:
    with sdopt.load() as pipe:
        return pipe.bundle


class Hostile(float):
    """A number that raises whenever it is looked at."""

    def __float__(self) -> float:
        raise RuntimeError("no")

    __index__ = __len__ = __iter__ = __repr__ = __eq__ = __lt__ = __le__ = __float__
    __hash__ = object.__hash__


NOBODYS = (  # what no keyword takes
    object(), {}, set(), b"bytes", bytearray(b"b"), 1j, lambda: 0, type, NotImplemented, math.nan, math.inf, -math.inf,
    10**400, 10**5000, "caf\udce9", "\ud800", "", [], [[]], ["\ud800"], [None], [object()], iter([1]),
    itertools.count(), Decimal("sNaN"), np.float32("nan"),
    np.array(["a"]), np.array([object()]), np.zeros((2, 2, 2, 2, 2), np.float32),
    np.zeros((0, 3, 3), np.float32), np.full((1, 3, 3), np.nan, np.float32), np.complex64(1j), np.datetime64("2020"),
    np.array(1j), Hostile(1), [Hostile(1)], Path("a"), range(0), np.ma.masked, np.ma.masked_array([1.0], [True]),
)  # fmt: skip
IMAGES = np.zeros((1, 4, 3, 3), np.float32)
WRONG: dict[type[kinds.Kind], tuple[Any, ...]] = {
    kinds.Integer: (True, np.bool_(True), 1.5, "1", -1, 2**64, [1], np.float32(1), np.array([1])),
    kinds.Number: (True, np.bool_(True), "1", 1e300, -1e300, [0.5], np.array([0.5]), np.array("1")),
    kinds.Switch: (1, 0, "False", "no", [True], np.array([True])),
    kinds.Word: (1, True, " fast", "fast ", "a\nb", ["fast"]),
    kinds.Texts: (1, True, ["a", 1], [b"a"], "a" * 9000, ["a" * 9000]),
    kinds.Choice: ("Plain ", 1, True, ["plain"]),
    kinds.Name: ("no such name", 1, True, ["euler"]),
    kinds.Word: (1, True, "", " tiny", "ti\nny", ["tiny"], "a" * 9000),
    kinds.Several: (1, True, "123", [1, "2"], [1, math.nan], [-1], [True], list(range(10_001))),
    kinds.OneOrMore: (True, "1", [True], ["1"], -1e300, [-1e300], np.array([[1]]), (1.5, None)),
    kinds.Pair: (1, (1,), (1, 2, 3), (1, -1), (1.5, 2), (True, 1), "12", (1, None), (1, 10**400)),
    kinds.Interval: (0.5, (0.5,), (0.5, 0.5), (0.8, 0.1), (-1, 1), (0, 2), "01", (0, math.nan), (True, 1)),
    arrays.Tensor: (
        1, [[1.0]], IMAGES.astype(np.float64), IMAGES.astype(np.float16), IMAGES[0, 0, 0], np.full_like(IMAGES, np.inf),
        np.ma.masked_array(IMAGES, IMAGES == 0),
    ),
    arrays.Picture: (
        1, "cat.png", Image.new("F", (8, 8)), Image.new("I", (8, 8)), Image.new("LAB", (8, 8)), Image.new("L", (0, 8)),
        np.zeros((8, 8, 5)), np.zeros((3, 8, 8)), np.full((8, 8, 3), 2.0), np.full((8, 8, 3), -0.1), np.zeros(8),
        np.zeros((8, 8, 3), complex), [Image.new("L", (8, 8)), 1], IMAGES.astype(np.float64),
        np.full_like(IMAGES, np.nan), np.ma.masked_array(np.zeros((8, 8, 3)), True),
    ),
    arrays.PicturesByName: (
        1, "cat.png", Image.new("F", (8, 8)), {}, {1: Image.new("L", (8, 8))}, {"a": "cat.png"}, {"a": []},
        [Image.new("L", (8, 8)), 1], [[Image.new("L", (8, 8))], [Image.new("L", (8, 8))]],
    ),
    arrays.EmbedsByName: (
        1, [[1.0]], IMAGES.astype(np.float64), IMAGES[0, 0, 0], np.full_like(IMAGES, np.inf), {}, {1: IMAGES}, {"a": 1},
        [IMAGES, IMAGES], {"a": [IMAGES]},
    ),
    control_mode.Modes: (
        True, -1, 1.5, 1000, [True], [[[1]]], [[-1]], {"a": -1}, {"a": [[1]]}, {"a": None}, {1: 1}, " depth", [""],
    ),
}  # fmt: skip


def wrong_values(keyword: Keyword) -> list[Any]:
    values = [*NOBODYS, *WRONG[type(keyword.kind)], *([] if keyword.optional else [None])]
    empty = isinstance(keyword.kind, kinds.Texts)  # "" is a prompt
    return [value for value in values if not (empty and isinstance(value, str) and not value)]


@pytest.mark.parametrize("name", KEYWORDS)
def test_every_wrong_value_of_every_keyword_is_refused_by_its_name(name: str, bundle: sdopt.Bundle) -> None:
    for value in wrong_values(KEYWORDS[name]):
        prompt, options = (value, {}) if name == "prompt" else ("a cat", {name: value})
        with pytest.raises(UsageError) as caught:
            make_plan(bundle, prompt, options)
        message = str(caught.value)
        assert caught.value.param == name, message
        assert name in message
        assert any(word in message for word in ("allowed", "use one of", "known are")), message
        assert message.isprintable(), message
        assert len(message) < 9000


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_keyword_can_be_described_in_json_and_takes_its_own_example_and_default(name: str) -> None:
    keyword = KEYWORDS[name]
    entry = json.loads(json.dumps(keyword.describe(name), allow_nan=False))
    assert entry["name"] == name
    assert entry["help"]
    assert "type" in entry or "anyOf" in entry
    names = {"np": np, "PIL": type("PIL", (), {"Image": Image})}
    if not isinstance(keyword.kind, arrays.Tensor | arrays.Picture | arrays.PicturesByName | arrays.EmbedsByName):
        assert keyword.check(name, eval(keyword.kind.example, names)) is not None
    if keyword.default is not None:
        assert keyword.check(name, keyword.default) == keyword.default
    if keyword.optional and name != "prompt":
        assert keyword.check(name, None) == keyword.default
    told = keyword.default is not None or keyword.otherwise
    assert told or not keyword.flag or name in {"prompt", "image", "mask_image", "control_image", "ip_adapter_image"}
    json.dumps(describe())


HINTS = {
    kinds.Integer: {int}, kinds.Number: {float}, kinds.Switch: {bool}, kinds.Choice: {str}, kinds.Name: {str},
}  # fmt: skip


def test_the_type_that_an_editor_shows_is_the_type_that_is_checked() -> None:
    hints = get_type_hints(Options, include_extras=True)
    assert ["prompt", *hints] == list(KEYWORDS)
    for name, hint in hints.items():
        type_ = get_args(hint)[0]
        kinds_of = HINTS.get(type(KEYWORDS[name].kind))
        if kinds_of is not None:
            shown = {str if get_origin(part) is Literal else part for part in get_args(type_) or (type_,)}
            assert shown - {type(None)} == kinds_of, name
        assert KEYWORDS[name].optional == (type_ is Any or type(None) in get_args(type_)), name


class Sampler(str, enum.Enum):
    EULER = "euler"


def test_friendly_values_become_plain_ones() -> None:
    given = {
        "seed": np.array([1, 2], np.uint64), "guidance_scale": np.array([1, 2.5], np.float16), "eta": Decimal("0.5"),
        "clip_skip": np.int8(1), "sampler": Sampler.EULER, "vae_slice": np.bool_(True), "timesteps": range(9, 0, -4),
        "original_size": [np.int64(3), 4], "strength": np.array(0.5), "guidance_rescale": 1,
    }  # fmt: skip
    found = checked(given)
    expected = {
        "seed": [1, 2], "guidance_scale": [1.0, 2.5], "eta": 0.5, "clip_skip": 1, "sampler": "euler", "vae_slice": True,
        "timesteps": [9.0, 5.0, 1.0], "original_size": (3, 4), "strength": 0.5, "guidance_rescale": 1.0,
    }  # fmt: skip
    assert {name: found[name] for name in given} == expected
    assert type(found["sampler"]) is str
    assert all(type(found[name]) is type(value) for name, value in expected.items())


def test_an_unknown_keyword_names_those_there_are_the_nearest_first() -> None:
    with pytest.raises(UsageError, match="unknown argument clipskip; there are clip_skip, ") as caught:
        checked({"clipskip": 1})
    assert caught.value.param == "clipskip"


def test_an_error_keeps_its_parameter_on_its_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(UsageError("seed = -1", "seed")))
    assert (str(error), error.param) == ("seed = -1", "seed")
    assert UsageError("no").param is None


def test_a_plan_has_the_checked_value_of_every_keyword(bundle: sdopt.Bundle) -> None:
    plan = make_plan(bundle, "a cat", {"clip_skip": np.int64(1), "vae_tile": None})
    assert isinstance(plan, Plan)
    assert set(plan.options) == set(KEYWORDS)
    assert plan.clip_skip == plan.options["clip_skip"] == 1
    assert plan.vae_tile is None


def test_a_new_keyword_has_its_flag_check_help_record_and_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bundle: sdopt.Bundle
) -> None:
    sparkle = Keyword("how bright it shines, 0 to 1", kinds.Number(0, 1), 0.25, flag=Flag(metavar="LIGHT"))
    monkeypatch.setitem(KEYWORDS, "sparkle", sparkle)
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert " ".join(capsys.readouterr().out.split()).count(
        "--sparkle LIGHT how bright it shines, 0 to 1 (default: 0.25)"
    )
    first, again = str(tmp_path / "first.png"), str(tmp_path / "again.png")
    request = ["generate", "a cat", "--steps", "1", "-o"]
    assert main([*request, first, "--sparkle", "0.5"]) == 0
    assert read_parameters(first)["sparkle"] == 0.5
    assert main(["generate", "--replay", first, "-o", again]) == 0
    assert read_parameters(again) == read_parameters(first)
    assert main([*request, again]) == 0
    assert "sparkle" not in read_parameters(again)  # the default need not be told
    capsys.readouterr()
    assert main(["generate", "--replay", first, "-o", again, "--sparkle", "0.5"]) == 2
    assert "leave out --sparkle" in capsys.readouterr().err
    assert main([*request, again, "--sparkle", "7"]) == 2
    assert "--sparkle 7.0; allowed are numbers from 0 to 1, e.g. --sparkle 0.5" in capsys.readouterr().err
    with pytest.raises(UsageError, match="sparkle = 'x'; allowed are numbers from 0 to 1") as caught:
        make_plan(bundle, "a cat", {"sparkle": "x"})  # pyright: ignore
    assert caught.value.param == "sparkle"
    assert describe()[-1]["maximum"] == 1


def test_replay_takes_the_flags_that_say_how_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = str(tmp_path / "first.png"), str(tmp_path / "again.png")
    assert main(["generate", "a cat", "--steps", "1", "--guidance", "3", "-o", first]) == 0
    seen: list[int] = []
    own = Plan.parameters
    monkeypatch.setattr(Plan, "parameters", lambda plan, i: seen.append(plan.guidance_batch) or own(plan, i))
    assert main(["generate", "--replay", first, "--guidance-batch", "1", "-o", again]) == 0
    assert set(seen) == {1}
    values = {"--size": ["8x8"], "--vae-slice": [], "--guidance-interval": ["0", "1"], "--image": [first]}
    values |= {"--mask": [first], "--rng": ["cpu"], "-n": ["1"]}
    capsys.readouterr()
    for flag in (*values, "--prompt-2", "--original-size", "--timesteps", "--strength", "--steps"):
        given = values.get(flag, ["1", "1"] if flag == "--original-size" else ["1"])
        assert main(["generate", "--replay", first, "-o", again, flag, *given]) == 2, flag
        assert "--replay takes everything from the PNG; leave out" in capsys.readouterr().err


def test_a_prompt_that_is_not_unicode_ends_before_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "caf\udce9", "-o", str(tmp_path / "a.png")]) == 2
    assert r"PROMPT 'caf\udce9' is not UTF-8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"embeddings": [1]}, {"embeddings": "x"}, {"embeddings": None}, {"embeddings": {"<cat>": 1}},
        {"loras": None}, {"loras": [1]}, {"loras": [{"name": "a", "sha256": "1f", "weights": {"unet": "1"}}]},
        {"prompt": ["a", "b"]}, {"prompt": 5}, {"prompt": None}, {"negative_prompt": ["a"]},
        {"seed": [1, 2]}, {"seed": None}, {"seed": "1"}, {"height": "tall"}, {"backend": 1}, {"precision": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_sdopt_did_not_write_is_refused(change: dict[str, Any]) -> None:
    record = {"prompt": "a cat", "seed": 1, "height": 64, "embeddings": {"<cat>": "1f"}, "backend": "ort"}
    assert replayed(record) == {"prompt": "a cat", "seed": 1, "height": 64}
    with pytest.raises(UsageError, match=f"not those that sdopt wrote: {next(iter(change))} is "):
        replayed({**record, **change})
