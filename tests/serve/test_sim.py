"""The simulator: arithmetic that can be done by hand, and the promises of each policy."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def sim() -> Any:
    spec = importlib.util.spec_from_file_location("serve_sim", ROOT / "benchmarks/serve_sim.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_sim"] = module
    spec.loader.exec_module(module)
    return module


PAYS = {1: 1.0, 2: 1.1, 4: 1.4, 8: 2.2}
PAYS_NOT = {1: 1.0, 2: 2.0, 4: 4.0}


def test_one_request_takes_its_steps_and_its_decoding(sim: Any) -> None:
    for policy in sim.POLICIES:
        outcome = sim.simulate([sim.Arrival(5.0, 10)], PAYS, 0.5, policy)
        assert outcome.latencies == (10.5,)
        assert outcome.images_per_call == 1.0


def test_a_newcomer_joins_at_the_next_step(sim: Any) -> None:
    trace = [sim.Arrival(0.0, 10), sim.Arrival(3.5, 2)]
    steps = sim.simulate(trace, PAYS, 0.0, "steps").latencies
    # four calls alone, two with both, four alone; the newcomer begins at 4.0
    assert steps == pytest.approx((10.2, 2.7))
    assert sim.simulate(trace, PAYS, 0.0, "requests").latencies == pytest.approx((10.0, 8.5))
    assert sim.simulate(trace, PAYS, 0.0, "one by one").latencies == pytest.approx((10.0, 8.5))


def test_where_batches_pay_step_batches_are_soonest_and_short_requests_gain_most(sim: Any) -> None:
    steps = [8, 20, 50]
    trace = sim.poisson(0.9 * sim.capacity(PAYS, 1.0, steps), 2000, steps)
    one, requests, step = (sim.simulate(trace, PAYS, 1.0, policy).described() for policy in sim.POLICIES)
    assert step["mean_s"] < requests["mean_s"] < one["mean_s"]
    assert step["p95_of_8_steps_s"] < 0.5 * requests["p95_of_8_steps_s"]


def test_where_batches_do_not_pay_nobody_is_worse_off(sim: Any) -> None:
    steps = [8, 20, 50]
    trace = sim.poisson(0.8 * sim.capacity(PAYS_NOT, 1.0, steps), 2000, steps)
    one, _, step = (sim.simulate(trace, PAYS_NOT, 1.0, policy).described() for policy in sim.POLICIES)
    assert step["mean_s"] <= one["mean_s"] * 1.02
    assert step["images_per_call"] == 1.0


def test_work_is_never_lost_and_devices_share_it(sim: Any) -> None:
    steps = [8, 20, 50]
    trace = sim.poisson(3 * sim.capacity(PAYS, 1.0, steps), 900, steps)
    one, four = (sim.simulate(trace, PAYS, 1.0, devices=n) for n in (1, 4))
    assert len(one.latencies) == len(four.latencies) == 900
    assert min(four.latencies) >= 8 * PAYS[1] * 0.99
    assert four.described()["p95_s"] < one.described()["p95_s"] / 3


def test_it_is_deterministic(sim: Any) -> None:
    trace = sim.poisson(0.05, 300, [8, 20, 50], seed=3)
    assert sim.simulate(trace, PAYS, 1.0) == sim.simulate(trace, PAYS, 1.0)
    assert trace == sim.poisson(0.05, 300, [8, 20, 50], seed=3)


def test_percentiles_are_nearest_ranks(sim: Any) -> None:
    assert [sim.percentile(list(range(1, 101)), p) for p in (50, 95, 99)] == [50, 95, 99]
    assert sim.percentile([7.0], 99) == 7.0
