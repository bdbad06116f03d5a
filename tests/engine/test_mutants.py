"""Every mutant of `mutants` can still be made; the script itself, which takes minutes, is run by hand."""

from __future__ import annotations

import ast

import pytest

from tests.engine.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_can_be_made(mutant: Mutant) -> None:
    ast.parse(mutant.source(ROOT))
    assert mutant.old != mutant.new


def test_a_mutant_whose_line_is_gone_is_named() -> None:
    with pytest.raises(ValueError, match="mutant 'none': its text stands 0 times in bound_context.py"):
        Mutant("none", "bound_context.py", "no such line", "").source(ROOT)
