"""Who is next: shares of callers, turns of groups, order inside a group. All of it in numbers, without a clock."""

from __future__ import annotations

import pytest

from sdopt.serve.costs import Costs
from sdopt.serve.schedule import LATE, Standing, Ticket, Turns, Waiting, first


def test_a_caller_with_many_orders_does_not_hold_up_one_with_few() -> None:
    waiting = Waiting()
    for i in range(10):
        waiting.push(Ticket(f"many-{i}", "many", 4.0, i * 0.01))
    waiting.push(Ticket("few-0", "few", 4.0, 1.0))
    waiting.push(Ticket("few-1", "few", 4.0, 1.1))
    order = [waiting.pop(2.0).id for _ in range(len(waiting))]
    assert order[:4] == ["many-0", "few-0", "many-1", "few-1"]
    assert order[4:] == [f"many-{i}" for i in range(2, 10)]


def test_shares_are_of_work_and_not_of_orders() -> None:
    waiting = Waiting()
    for i in range(8):
        waiting.push(Ticket(f"large-{i}", "large", 8.0, 0.0))
        waiting.push(Ticket(f"small-{i}", "small", 2.0, 0.0))
    first_ten = [waiting.pop(1.0).id for _ in range(10)]
    assert sum(name.startswith("small") for name in first_ten) == 8  # 16 s of work beside 16 s
    assert sum(name.startswith("large") for name in first_ten) == 2


def test_who_waits_too_long_goes_first() -> None:
    waiting = Waiting(patience=10.0)
    for i in range(5):
        waiting.push(Ticket(f"busy-{i}", "busy", 100.0, 0.0))
    assert waiting.pop(1.0).id == "busy-0"
    for i in range(50):
        waiting.push(Ticket(f"other-{i}", f"caller-{i}", 1.0, 5.0))
    assert waiting.pop(6.0).id.startswith("other")
    assert waiting.pop(10.5).id == "busy-1"


def test_an_order_that_is_taken_back_costs_its_caller_nothing() -> None:
    waiting = Waiting()
    waiting.push(Ticket("gone", "a", 100.0, 0.0))
    assert waiting.remove("gone")
    assert not waiting.remove("gone")
    waiting.push(Ticket("a", "a", 1.0, 1.0))
    waiting.push(Ticket("b", "b", 1.0, 2.0))
    assert (waiting.position("a"), waiting.position("b"), waiting.position("c")) == (0, 1, None)
    assert waiting.pop(3.0).id == "a"
    assert waiting.cost == 1.0


def test_an_idle_caller_saves_no_share_for_later() -> None:
    waiting = Waiting()
    waiting.push(Ticket("early", "idle", 1.0, 0.0))
    waiting.pop(0.0)
    for i in range(20):
        waiting.push(Ticket(f"a-{i}", "a", 1.0, 1.0))
    for _ in range(15):
        waiting.pop(2.0)
    for i in range(10):
        waiting.push(Ticket(f"idle-{i}", "idle", 1.0, 3.0))
    order = [waiting.pop(4.0).id.split("-")[0] for _ in range(8)]
    assert order.count("idle") in (4, 3)


def test_nothing_waits() -> None:
    with pytest.raises(KeyError):
        Waiting().pop(0.0)


def run(
    turns: Turns, groups: dict[str, tuple[int, float]], switch: float, seconds: float
) -> tuple[dict[str, float], int]:
    """The seconds that each group got, and how often the weights changed; a group is (orders, seconds of a call)."""
    got, loaded, changes, now = dict.fromkeys(groups, 0.0), next(iter(groups)), 0, 0.0
    while now < seconds:
        key = str(turns.choose({name: 0.0 if name == loaded else switch for name in groups}))
        spent = groups[key][1] + (switch if key != loaded else 0.0)
        changes += key != loaded
        loaded, now = key, now + spent
        got[key] += groups[key][1]
        turns.paid(key, spent, {name: orders for name, (orders, _) in groups.items()})
    return got, changes


def test_groups_get_time_by_their_number_of_orders() -> None:
    got, _ = run(Turns(), {"a": (3, 1.0), "b": (1, 0.4)}, 0.0, 1000.0)
    assert got["a"] / got["b"] == pytest.approx(3.0, rel=0.02)


def test_weights_change_the_less_the_more_that_costs() -> None:
    _, cheap = run(Turns(), {"a": (1, 1.0), "b": (1, 1.0)}, 0.1, 1000.0)
    got, dear = run(Turns(), {"a": (1, 1.0), "b": (1, 1.0)}, 10.0, 1000.0)
    assert dear < cheap / 5
    assert got["a"] / got["b"] == pytest.approx(1.0, rel=0.15)
    assert 10.0 * dear < 500.0  # of a thousand seconds


def test_the_least_work_goes_first_unless_somebody_is_late() -> None:
    standings = [
        Standing("long", 40.0, 50.0, 0.0),
        Standing("short", 4.0, 5.0, 3.0),
        Standing("middle", 20.0, 20.0, 2.0),
    ]
    assert first(standings, 3, 4.0) == ["long", "short", "middle"]
    assert first(standings, 2, 4.0) == ["short", "middle"]
    assert first(standings, 1, 4.0) == ["short"]
    assert first(standings, 1, LATE * 50.0 + 1) == ["long"]


def test_costs_are_measured_and_estimated() -> None:
    costs = Costs()
    assert costs.call("x", 100) == 1.0
    kind = ("sd15", True)
    for images, seconds in ((1, 1.0), (2, 1.2), (4, 2.0), (8, 4.0)):
        costs.record(kind, 100, images, seconds)
    assert costs.call(kind, 100, 4) == 2.0
    assert costs.call(kind, 200, 4) == 4.0
    assert costs.call(("sd15", False), 100, 2) == 1.2
    assert costs.call(("other", True), 100, 2) == 2.0
    assert costs.cap(kind, 100, 16) == 4
    assert costs.cap(kind, 100, 2) == 2
    costs.record(kind, 100, 8, 1.0)
    assert costs.call(kind, 100, 8) == pytest.approx(3.1)
    assert costs.cap(kind, 100, 8) == 8


def test_where_more_images_do_not_pay_each_has_its_own_call() -> None:
    costs = Costs()
    costs.record("x", 100, 1, 1.0)
    assert costs.cap("x", 100, 8) == 8  # nothing is known against it
    costs.record("x", 100, 2, 2.0)
    assert costs.cap("x", 100, 8) == 1
