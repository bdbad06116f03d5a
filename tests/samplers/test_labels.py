"""The web UI's words for samplers and schedules, both ways: what a label makes is labelled by it."""

from __future__ import annotations

import itertools

import pytest

from sdopt.cli.samplers import DEFAULT_CONFIG
from sdopt.errors import UsageError
from sdopt.samplers import SAMPLERS
from sdopt.samplers.labels import ALIASES, AUTOMATIC, SCHEDULES_BY_LABEL, from_labels, labels_of, name_of

TITLES = [sampler.title for sampler in SAMPLERS.values() if sampler.family == "diffusion"]
DISTILLED = ("LCM", "TCD")  # their steps are those that the model was distilled with, whatever the schedule


def test_what_a_label_makes_is_labelled_by_it() -> None:
    made: dict[str, int] = dict.fromkeys(SCHEDULES_BY_LABEL, 0)
    for title, label in itertools.product(TITLES, SCHEDULES_BY_LABEL):
        try:
            sampler, schedule = from_labels(title, label)
            labels = labels_of(DEFAULT_CONFIG, 10, sampler=sampler, schedule=schedule)
        except UsageError:  # not every sampler has every schedule
            continue
        assert labels.sampler == title
        assert labels.schedule == label or title in DISTILLED
        made[label] += 1
    assert min(made.values()) >= 3


@pytest.mark.parametrize("label", SCHEDULES_BY_LABEL)
def test_a_scheduler_has_several_spellings(label: str) -> None:
    expected = ("euler", SCHEDULES_BY_LABEL[label])
    for word in (label, label.lower(), name_of(label), *ALIASES.get(label, ())):
        assert from_labels("Euler", word) == expected
    for other in (label, *ALIASES.get(label, ())):
        assert from_labels(f"Euler {other}") == expected
        assert from_labels(f"Euler {other}", label) == expected


def test_automatic_is_the_samplers_own() -> None:
    for word in (None, "", AUTOMATIC, "automatic"):
        assert from_labels("DPM++ 2M", word) == ("dpmpp_2m", None)
        assert from_labels("DPM++ 2M Karras", word) == ("dpmpp_2m", "karras")


@pytest.mark.parametrize(
    ("sampler", "scheduler", "param", "said"),
    [
        ("Restart", None, None, "Restart"),
        ("Euler", "KL Optimal", "schedule", "Karras"),
        ("Euler Karras", "Beta", "schedule", "one of them"),
        ("DPM++ 2M", "Normal", "schedule", "SGM Uniform"),
        ("", None, None, "unknown"),
    ],
)
def test_what_is_not_there_is_named(sampler: str, scheduler: str | None, param: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        from_labels(sampler, scheduler)
    assert caught.value.param == param
