"""The project's `dataclass(frozen=True)` does what the standard library's does."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pytest

from sdopt.dataclass import dataclass


def made_by(decorate: Any) -> Any:
    class Point:
        x: int
        label: str = "a"
        hidden: int = dataclasses.field(default=0, compare=False, repr=False)
        many: Mapping[str, int] = dataclasses.field(default_factory=dict)

        @cached_property
        def twice(self) -> int:
            return 2 * self.x

    return decorate(Point)


Ours = made_by(dataclass(frozen=True))
Theirs = made_by(dataclasses.dataclass(frozen=True))


@dataclass(frozen=True)
class Place:
    x: int


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_fields_are_set_once(kind: Any) -> None:
    point = kind(1, many={"b": 2})
    for change in (
        lambda: setattr(point, "x", 2),
        lambda: setattr(point, "unknown", 2),
        lambda: delattr(point, "x"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    assert (point.x, point.label, point.many, point.twice) == (1, "a", {"b": 2}, 2)
    assert dataclasses.replace(point, x=3).x == 3
    assert point.x == 1
    assert [f.name for f in dataclasses.fields(point)] == ["x", "label", "hidden", "many"]


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_equal_fields_are_equal_instances(kind: Any) -> None:
    assert kind(1, hidden=1) == kind(1, hidden=2)
    assert kind(1) != kind(2)
    assert kind(1) != (1, "a", {})
    assert kind(1) != Place(1)
    assert repr(kind(1, hidden=1)).endswith("Point(x=1, label='a', many={})")
    with pytest.raises(TypeError, match="unhashable"):
        hash(kind(1))  # `many` is a dict


def test_hash_copy_and_pickle() -> None:
    assert {Place(1): "one"}[Place(1)] == "one"
    assert copy.deepcopy(Place(1)) == Place(1) == pickle.loads(pickle.dumps(Place(1)))


def test_eq_false_compares_by_identity() -> None:
    @dataclass(frozen=True, eq=False)
    class Own:
        x: int

    one = Own(1)
    assert one == one
    assert one != Own(1)
    assert hash(one) == hash(one)


def test_methods_of_the_class_are_kept() -> None:
    @dataclass(frozen=True)
    class Own:
        x: int

        def __repr__(self) -> str:
            return "mine"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, int)

    assert repr(Own(1)) == "mine"
    assert Own(1) == 2


def test_a_class_that_is_not_frozen_is_refused() -> None:
    with pytest.raises(TypeError, match="not frozen"):
        dataclass(frozen=False)(Place)
