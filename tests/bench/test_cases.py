"""Cases are data, checked when they are read."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from sdopt.bench.cases import Case, pick, read_cases
from sdopt.bundle.files import Bundle
from sdopt.errors import UsageError
from tests.conftest import EMOJI_BUNDLE, ROOT

FIELDS = {"model": "emoji", "width": 64, "height": 64, "steps": 2, "guidance": 2.0}


def test_every_case_of_the_project_is_of_a_model_that_can_be_made() -> None:
    cases = read_cases(ROOT / "benchmarks/cases.toml")
    models = runpy.run_path(str(ROOT / "benchmarks/models.py"))["MODELS"]
    assert {case.model for case in cases.values()} == {"emoji", *models}
    assert cases["sdxl"].guided
    assert not cases["sdxl-turbo"].guided


def test_without_a_name_the_case_is_what_the_bundle_makes() -> None:
    case = Case.of_bundle(Bundle.open(EMOJI_BUNDLE))
    assert (case.width, case.height, case.steps, case.guidance) == (128, 128, 20, 4.0)


def test_a_case_survives_json(tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"small": FIELDS}))
    case = read_cases(path)["small"]
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


@pytest.mark.parametrize(
    ("changes", "floors"),
    [
        ({}, (60, 80)),
        ({"backend": "ort:cuda"}, (60, 80)),
        ({"backend": "tensorrt", "precision": "fp16"}, (45, 50)),
        ({"backend": "tensorrt", "precision": "fp32"}, (45, 50)),  # TF32
        ({"backend": "tensorrt", "precision": "bf16"}, (27, 32)),
        ({"precision": "bf16", "picture_floor_db": 35.0}, (35, 32)),
    ],
)
def test_floors_are_those_of_the_precision_unless_they_are_given(changes: dict, floors: tuple[int, int]) -> None:
    case = Case.from_json({"name": "any", **FIELDS, **changes})
    assert (case.picture_floor_db, case.unet_floor_db) == floors
    assert case.on("ort", "fp32").unet_floor_db == 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "wrong.colour is unknown; wrong has name, model"),
        ({"width": 0}, "wrong.width is 0; allowed is a whole number from 1"),
        ({"steps": 2.5}, "steps is 2.5; allowed is a whole number"),
        ({"batch": True}, "batch is True; allowed is a whole number"),
        ({"guidance": "high"}, "guidance is 'high'; allowed is a finite number"),
        ({"guidance": float("inf")}, "guidance is inf; allowed is a finite number"),
        ({"precision": "float31"}, "precision is 'float31'; allowed is one of"),
    ],
)
def test_a_case_that_cannot_be_is_refused_with_its_field(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Case.from_json({"name": "wrong", **FIELDS, **changes}, "wrong")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UsageError, match="wrong.height is missing; allowed is a whole number"):
        Case.from_json({"name": "wrong", **{k: v for k, v in FIELDS.items() if k != "height"}}, "wrong")


def test_an_unknown_name_lists_the_nearest_first() -> None:
    with pytest.raises(UsageError, match="'sdxl-turb' is not known; there are sdxl-turbo"):
        pick(read_cases(ROOT / "benchmarks/cases.toml"), ["sdxl-turb"])


@pytest.mark.parametrize(("name", "text"), [("a.toml", "steps = "), ("a.toml", "steps = 2"), ("a.json", "[]")])
def test_a_file_that_is_not_of_cases_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=name):
        read_cases(tmp_path / name)
