"""A record is read as strictly as it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdopt.bench.record import read, write
from sdopt.errors import UsageError
from tests.bench.records import record, side, steady
from tests.conftest import ROOT

OF_SCRIPTS = (
    "batch.json",
    "cache.json",
    "controlnet.json",
    "half-kinds.json",
    "large.json",
    "layers.json",
    "loop.json",
    "lora.json",
    "ray.json",
    "rtx-builds.json",
    "serve.json",
    "serve-bf16.json",
    "slices.json",
    "sooner.json",
    "sooner-amx.json",
    "sooner-emoji.json",
    "tune-emoji.json",
)  # of scripts, with no side to compare


def complete() -> dict[str, Any]:
    return record(side("sdopt", {"picture": steady(1.0)}), side("eager-fp32", {"picture": steady(2.0)}))


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "results/one.json"
    write(path, complete())
    assert read(path) == complete()
    assert [p.name for p in path.parent.iterdir()] == ["one.json"]


def first(entry: dict[str, Any]) -> dict[str, Any]:
    return entry["results"][0]["sides"][0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.update(schema=3), "schema 3; this sdopt reads records of schema 2"),
        (lambda r: r.pop("schema"), "schema None"),
        (lambda r: r.update(extra=1), "record.extra is unknown; record has schema, created"),
        (lambda r: r["machine"].pop("cpu"), "record.machine"),
        (lambda r: r["machine"].update(cores="two"), "record.machine.cores is 'two'; allowed is a whole number"),
        (lambda r: r["machine"].update(cores=True), "record.machine.cores"),
        (lambda r: r["results"][0]["case"].update(colour="red"), r"results\[0\].case.colour is unknown"),
        (lambda r: r["results"][0]["sides"].reverse(), "sdopt comes first"),
        (lambda r: r["results"][0]["sides"].append(first(r)), "each once"),
        (
            lambda r: first(r)["seconds"].update(picture=[]),
            r"seconds.picture is \[\]; allowed is a list of one timing or more",
        ),
        (
            lambda r: first(r)["seconds"].update(picture=[-1.0]),
            r"seconds.picture\[0\] is -1.0; allowed is a number above 0",
        ),
        (lambda r: first(r)["seconds"].update(picture=["1"]), r"picture\[0\] is '1'; allowed is a"),
        (lambda r: first(r)["parity"].update(picture_db=31.0), "quotable is True, its parity"),
        (lambda r: first(r).update(failed="it broke"), "quotable is True"),
    ],
)
def test_a_record_that_is_damaged_or_changed_by_hand_is_refused_with_the_place(
    damage: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    damaged, path = complete(), tmp_path / "one.json"
    damage(damaged)
    path.write_text(json.dumps(damaged))
    with pytest.raises(UsageError, match=message):
        read(path)


@pytest.mark.parametrize("text", ["", "[1", "[]", "null", '{"schema": 1, "created": NaN}'])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(text)
    with pytest.raises(UsageError, match=r"one\.json"):
        read(tmp_path / "one.json")


def test_a_record_that_would_be_refused_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write(tmp_path / "one.json", {**complete(), "schema": 7})
    assert not list(tmp_path.iterdir())


def test_the_records_that_are_kept_can_be_read() -> None:
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        if path.name not in OF_SCRIPTS:
            assert read(path)["results"]


def test_a_record_of_schema_1_is_read_in_the_words_of_today(tmp_path: Path) -> None:
    path, old = tmp_path / "one.json", {**complete(), "schema": 1}
    old["results"][0]["case"]["precision"] = "float32"
    for entry, name in zip(old["results"][0]["sides"], ("sdopt", "eager-float32"), strict=True):
        entry.update(name=name, precision="float32")
    path.write_text(json.dumps(old))
    assert read(path) == complete()
    old["results"][0]["sides"] = [7]
    path.write_text(json.dumps(old))
    with pytest.raises(UsageError, match=r"sides\[0\] is 7; allowed is an object"):
        read(path)
