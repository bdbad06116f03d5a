"""Statistics on timings whose answer is known, and the order in which sides take turns."""

from __future__ import annotations

import numpy as np
import pytest

from sdopt.bench.stats import paired_ratio, slowdown, summary
from sdopt.bench.timing import Sample, interleaved, timed
from sdopt.errors import UsageError


def test_a_summary_is_the_median_and_the_outer_tenths() -> None:
    s = summary([11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6])
    assert (s.n, s.p10, s.median, s.p90) == (11, 2, 6, 10)


def test_a_drift_of_the_machine_cancels_in_pairs() -> None:
    drift = np.linspace(1, 3, 9)
    e = paired_ratio((2 * drift).tolist(), drift.tolist())
    assert (e.value, e.low, e.high) == (2, 2, 2)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        e = slowdown(rng.lognormal(0, 0.1, 40).tolist(), rng.lognormal(np.log(1.2), 0.1, 40).tolist(), seed)
        assert e.low <= e.value <= e.high
        covered += e.low <= 1.2 <= e.high
    assert 88 <= covered <= 100


def test_an_interval_is_the_same_each_time_and_narrows_with_more_rounds() -> None:
    rng = np.random.default_rng(0)
    old, new = rng.lognormal(0, 0.2, 200).tolist(), rng.lognormal(0, 0.2, 200).tolist()
    few, many = slowdown(old[:10], new[:10]), slowdown(old, new)
    assert slowdown(old, new) == many
    assert many.high - many.low < 0.5 * (few.high - few.low)


@pytest.mark.parametrize("series", [[], [0.0], [-1.0], [float("nan")]])
def test_timings_that_cannot_be_are_refused(series: list[float]) -> None:
    with pytest.raises(UsageError, match="positive seconds"):
        summary(series)


def test_pairs_are_of_one_length() -> None:
    with pytest.raises(UsageError, match="2 timings beside 1"):
        paired_ratio([1, 2], [1])


def test_sides_take_turns_and_the_order_turns_round() -> None:
    order: list[str] = []

    def call(name: str) -> Sample:
        order.append(name)
        return Sample(float(len(order)), parts={"half": len(order) / 2})

    series = interleaved({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=3, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert series["a"].seconds == (3, 6, 7)
    assert series["b"].parts["half"] == (2, 2.5, 4)


def test_a_timed_call_gives_its_output_and_its_share() -> None:
    output = np.ones(3)
    sample, fraction = timed(lambda: output)(), timed(lambda: output, per=10**9)()
    assert sample.output is output
    assert 0 < fraction.seconds < sample.seconds


def test_no_rounds_are_refused() -> None:
    with pytest.raises(UsageError, match="rounds = 0"):
        interleaved({}, 0)
