"""A short part of the campaign with fixed seeds, and what the campaign itself promises."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign.cases import FAULTS, RIGHT, SAME, Case, Outcome, rate, table
from tests.campaign.kinds import KINDS
from tests.campaign.mutate import differences, mutated_bytes, mutated_json, restore
from tests.campaign.sandbox import Sandbox
from tests.campaign.schedule import Schedule
from tests.campaign.worker import run
from tests.conftest import EMOJI_BUNDLE

SHORT = {"manifest": 50, "files": 20, "arguments": 30, "commands": 25, "loras": 25}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("campaign")
    here = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        yield Sandbox(folder)
    os.chdir(here)


@pytest.mark.parametrize("kind", SHORT)
def test_a_short_campaign_finds_no_fault(kind: str, sandbox: Sandbox) -> None:
    outcomes = [(case, run(case, sandbox)) for case in (Case(kind, 1, number) for number in range(SHORT[kind]))]
    faults = [(str(case), outcome) for case, outcome in outcomes if outcome.is_fault]
    assert faults == []
    assert len({outcome.name for _, outcome in outcomes}) > 1  # not all of it is refused at the door


def test_a_case_does_the_same_again() -> None:
    entry = json.loads((EMOJI_BUNDLE / "manifest.json").read_bytes())
    for number in range(50):
        first, again = (mutated_json(Case("manifest", 3, number).random(), entry) for _ in range(2))
        assert first == again
        first, again = (mutated_bytes(Case("files", 3, number).random(), first[0]) for _ in range(2))
        assert first == again


def test_differences_are_found_and_taken_back() -> None:
    old = {"a": [1, {"b": 2}], "c": None}
    new = {"a": [1, {"b": 3}], "d": 4}
    assert list(differences(old, new)) == [(("a", 1, "b"), 3), (("d",), 4)]
    restore(old, new, ("a", 1, "b"))
    restore(old, new, ("d",))
    assert new == {"a": [1, {"b": 2}]}


def test_a_picture_that_changes_in_silence_is_a_fault(sandbox: Sandbox) -> None:
    from tests.campaign.manifest import is_legal
    from tests.campaign.sandbox import as_right

    right = sandbox.right("emoji")
    assert not as_right("", right)(right).is_fault
    assert as_right("", right)(right + 1).is_fault
    assert is_legal(("defaults", "guidance_scale"), 2.0)
    assert is_legal(("scheduler", "timestep_spacing"), "trailing")
    assert not is_legal(("scheduler", "timestep_spacing"), "trailling")
    assert not is_legal(("latents", "factor"), 4)


def test_the_table_counts_every_case_once() -> None:
    cases = [(Case("manifest", 0, i), Outcome((*RIGHT, *FAULTS)[i]), 0.1) for i in range(len(RIGHT) + len(FAULTS))]
    results = [*cases, (Case("files", 0, 0), Outcome(SAME), 0.2), (Case("kills", 0, 0), Outcome(SAME), 2.0)]
    rows = [line.split()[:3] for line in table(results).splitlines()]
    assert rows[1:] == [["manifest", "13", "100"], ["files", "1", "200"], ["kills", "1", "2000"], ["all", "15", "233"]]
    assert rate(results, 60) == "14 inputs and 1 kills in 1.0 minutes: 0.2 inputs a second"


def test_every_kind_gets_its_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tests.campaign.schedule.time.monotonic", lambda: now[0])
    schedule = Schedule(list(KINDS), 1, 20_000, {"kills": 100, "threads": 16, "soak": 4})
    spent = dict.fromkeys(KINDS, 0.0)
    while now[0] < 600 and (case := schedule.next()):
        now[0] += {"kills": 4.0, "threads": 10.0, "soak": 30.0}.get(case.kind, 0.05)
        spent[case.kind] += schedule.ended(case)
    for kind in ("kills", "threads", "soak"):
        assert spent[kind] == pytest.approx(6 * KINDS[kind].time, abs=31)
    assert spent["manifest"] > spent["files"] > spent["commands"] > 0


def test_all_cases_come_once() -> None:
    schedule = Schedule(["manifest", "tools", "kills"], 1, 50, {"kills": 3})
    cases: list[Case] = []
    while case := schedule.next():
        cases.append(case)
        schedule.ended(case)
    assert len(set(cases)) == len(cases) == 53
    assert {case.kind for case in cases} == {"manifest", "tools", "kills"}
    assert set(KINDS) >= set(SHORT)
