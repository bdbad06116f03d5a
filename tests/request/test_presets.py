"""Presets: written, read, used by a call, by `sdopt generate`, and by a pipeline; wrong files and names say so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle import presets
from sdopt.bundle.presets import Preset, preset_names, read_preset, write_preset
from sdopt.cli.main import main
from sdopt.engine.preset import engine_of_preset
from sdopt.errors import BundleError, UsageError
from sdopt.image.pil import read_parameters

KEYWORDS = {"sampler": "euler", "num_inference_steps": 3, "guidance_interval": [0.1, 0.9], "guidance_scale": 3.0}
FAST = Preset("ort", "fp32", KEYWORDS, 0.5, 31.5, 0.93, "100 steps of ddim in fp32", "a processor, 2 cores")
CALL: dict[str, Any] = {"prompt": "a cat", "seed": 1, "height": 64, "width": 64}


@pytest.fixture
def named(bundle: sdopt.Bundle) -> sdopt.Bundle:
    """A bundle with the preset `fast`."""
    write_preset(bundle, "fast", FAST)
    return bundle


@pytest.fixture
def pipe(named: sdopt.Bundle) -> Any:
    with sdopt.load(named.path, "ort", threads=1, verify=False) as opened:
        yield opened


def test_what_was_written_is_read(named: sdopt.Bundle) -> None:
    write_preset(named, "my-own_2", replace(FAST, seconds=1.0))
    assert preset_names(named) == ("fast", "my-own_2")
    assert read_preset(named, "fast") == FAST
    write_preset(named, "fast", replace(FAST, machine="another"))
    assert read_preset(named, "fast").machine == "another"
    assert sdopt.Bundle.open(named.path).digest == named.digest  # a bundle with presets is the same bundle


def test_where_a_bundle_cannot_be_written_presets_are_in_the_cache_of_the_user(
    bundle: sdopt.Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_preset(bundle, "shipped", FAST)
    write_preset(bundle, "fast", FAST)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(presets.os, "access", lambda path, mode: False)
    own = replace(FAST, seconds=0.25)
    path = write_preset(bundle, "fast", own)
    assert path.is_relative_to(tmp_path / "cache")
    assert preset_names(bundle) == ("fast", "shipped")
    assert read_preset(bundle, "fast") == own  # measured here, so it hides the one that came with the bundle
    assert read_preset(bundle, "shipped") == FAST


WRONG = {
    "no JSON": ("{", "Expecting"),
    "no object": ("[]", "the file is []"),
    "a field too many": (json.dumps({"x": 1}), "x"),
    "a keyword of the picture": ({"keywords": {"prompt": "a dog"}}, "sets prompt; allowed are sampler"),
    "an unknown keyword": ({"keywords": {"speed": 9}}, "sets speed; allowed are sampler"),
    "a value out of range": ({"keywords": {"num_inference_steps": 0}}, "num_inference_steps = 0; allowed are"),
    "no number": ({"seconds": "1"}, "seconds is '1'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_says_what_is_wrong(name: str, pipe: sdopt.Pipeline) -> None:
    change, words = WRONG[name]
    path = pipe.bundle.path / "presets/fast.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError, match="fast") as error:
        pipe.plan("a cat", preset="fast")
    assert words in str(error.value)


def test_links_are_refused(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    folder = pipe.bundle.path / "presets"
    (folder / "linked.json").symlink_to(folder / "fast.json")
    with pytest.raises(BundleError, match="linked.json"):
        pipe.plan("a cat", preset="linked")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="symbolic link"):
        pipe.plan("a cat", preset="fast")


@pytest.mark.parametrize("name", ["slow", "../fast", "fast.json", 5])
def test_an_unknown_preset_names_those_there_are_and_the_command(name: Any, pipe: sdopt.Pipeline) -> None:
    with pytest.raises(UsageError) as error:
        pipe.plan("a cat", preset=name)
    assert error.value.param == "preset"
    assert isinstance(name, int) or ("there are fast" in str(error.value) and "`sdopt tune" in str(error.value))


def test_a_name_that_no_file_can_have_is_not_written(bundle: sdopt.Bundle) -> None:
    with pytest.raises(UsageError, match="allowed are up to 64 letters"):
        write_preset(bundle, "../fast", FAST)
    with pytest.raises(UsageError, match="seconds is -1"):
        write_preset(bundle, "fast", replace(FAST, seconds=-1.0))
    assert preset_names(bundle) == ()


def test_a_preset_is_its_keywords(pipe: sdopt.Pipeline) -> None:
    made = pipe(**CALL, preset="fast", output_type="np")
    typed: Any = {**KEYWORDS, "guidance_interval": (0.1, 0.9)}
    expected = pipe(**CALL, **typed, output_type="np")
    np.testing.assert_array_equal(made.images, expected.images)
    assert made.parameters == expected.parameters  # a record needs no preset


OVER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what is given beside the preset -> what becomes of it
    "steps": ({"num_inference_steps": 5}, {"num_inference_steps": 5, "sampler": "euler", "guidance_scale": 3.0}),
    "timesteps": ({"timesteps": [999, 500, 250, 1]}, {"num_inference_steps": 4, "sampler": "euler"}),
    "sampler": ({"sampler": "ddim"}, {"num_inference_steps": 3, "sampler": "ddim"}),
    "None is as if left out": ({"sampler": None}, {"sampler": "euler"}),
}


@pytest.mark.parametrize("name", OVER)
def test_what_the_caller_names_takes_precedence(name: str, pipe: sdopt.Pipeline) -> None:
    given, expected = OVER[name]
    plan = pipe.plan(**CALL, **given, preset="fast")
    assert plan.remarks == ()
    assert {**plan.parameters(0), **expected} == plan.parameters(0)


def test_a_keyword_of_a_preset_without_effect_is_left_out_and_said_so(pipe: sdopt.Pipeline) -> None:
    plan = pipe.plan(**CALL, preset="fast", guidance_scale=1.0)
    assert plan.options["guidance_interval"] is None
    assert [line for line in plan.remarks if "preset 'fast': guidance_interval has no effect" in line]


def test_an_error_about_a_keyword_of_a_preset_says_whose_it_is(pipe: sdopt.Pipeline) -> None:
    write_preset(pipe.bundle, "cached", replace(FAST, keywords={"cache_schedule": [0, 9], "num_inference_steps": 4}))
    with pytest.raises(UsageError, match=r"no call 9.*preset 'cached' sets cache_schedule") as error:
        pipe.plan(**CALL, preset="cached")
    assert error.value.param == "cache_schedule"
    assert pipe.plan(**CALL, preset="cached", num_inference_steps=6).calls == 6


def test_a_preset_of_another_engine_says_so(pipe: sdopt.Pipeline) -> None:
    write_preset(pipe.bundle, "other", replace(FAST, backend="tensorrt", precision="fp16"))
    (line,) = pipe.plan(**CALL, preset="other").remarks
    assert "measured with tensorrt in fp16, and this is ort in fp32" in line
    assert pipe.plan(**CALL, preset="fast").remarks == ()


def test_the_engine_is_that_of_the_preset_unless_another_one_is_named() -> None:
    assert engine_of_preset(FAST, "auto", "auto") == ("ort", "fp32")
    assert engine_of_preset(replace(FAST, precision="int8"), "ort", "auto") == ("ort", "int8")
    assert engine_of_preset(replace(FAST, precision="int8"), "ort", "fp32") == ("ort", "fp32")
    assert engine_of_preset(replace(FAST, precision="int8"), "openvino", "auto") == ("openvino", "auto")
    assert engine_of_preset(replace(FAST, backend="notthere"), "auto", "auto") == ("auto", "auto")


def test_a_pipeline_with_a_preset_has_it_in_every_call(named: sdopt.Bundle) -> None:
    write_preset(named, "slow", replace(FAST, keywords={"num_inference_steps": 7}))
    with sdopt.load(named.path, preset="fast", threads=1, verify=False) as pipe:
        assert (pipe.backend, pipe.precision, pipe.preset) == ("ort", "fp32", "fast")
        assert pipe.plan(**CALL).calls == 3
        assert pipe.plan(**CALL, preset="slow").calls == 7
        assert pipe.plan(**CALL, preset=None).calls == 20
        with pytest.raises(UsageError, match="sdopt.load"):
            pipe.preset = "slow"
    with pytest.raises(UsageError, match="there are slow, fast"):
        sdopt.load(named.path, preset="none", verify=False)


def test_generate_replay_and_inspect(named: sdopt.Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, model = tmp_path / "one.png", tmp_path / "two.png", ["-m", str(named.path), "--threads", "1"]
    command = ["generate", "a cat", "--seed", "1", "--size", "64x64", *model]
    assert main([*command, "--preset", "fast", "-o", str(one)]) == 0
    carried = read_parameters(one)
    assert "preset" not in carried
    assert (carried["sampler"], carried["num_inference_steps"], carried["backend"]) == ("euler", 3, "ort")
    (named.path / "presets/fast.json").unlink()
    assert main(["generate", "--replay", str(one), *model, "-o", str(two)]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))
    capsys.readouterr()
    write_preset(named, "other", replace(FAST, backend="tensorrt", precision="fp16"))
    assert main([*command, "--preset", "other", "-o", str(two)]) == 0
    assert capsys.readouterr().err.count("measured with tensorrt in fp16") == 1
    (named.path / "presets/other.json").unlink()
    assert main([*command, "--preset", "fast", "-o", str(two)]) == 2
    assert "it has none. `sdopt tune" in capsys.readouterr().err
    write_preset(named, "fast", FAST)
    assert main(["generate", "--replay", str(one), *model, "--preset", "fast", "-o", str(two)]) == 2
    assert "leave out --preset" in capsys.readouterr().err
    (named.path / "presets/broken.json").write_text("{")
    assert main(["inspect", str(named.path)]) == 0
    shown = capsys.readouterr().out
    assert "fast                0.5   31.5  0.930  ort in fp32, sampler='euler', num_inference_steps=3" in shown
    assert "broken.json is no preset" in shown
    assert main(["inspect", str(named.path), "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["presets"]}
    assert entries["fast"]["keywords"] == KEYWORDS
    assert "error" in entries["broken"]
