"""A precision has one word, and a user may type another."""

from __future__ import annotations

import pytest

from sdopt.bundle.precision import OTHER_WORDS, PRECISIONS, precision_word, with_precision_words
from sdopt.engine import BACKENDS
from sdopt.engine import PRECISIONS as OF_ENGINES


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("float32", "fp32"), ("half", "fp16"), ("float16", "fp16"), ("bfloat16", "bf16"), ("bf16", "bf16"), ("x", "x")],
)
def test_a_user_may_type_other_words(typed: str, meant: str) -> None:
    assert precision_word(typed) == meant


def test_every_table_has_the_same_words() -> None:
    assert {*OTHER_WORDS.values()} <= {*PRECISIONS}
    assert {*OF_ENGINES} - {"auto"} <= {*PRECISIONS}
    assert {word for backend in BACKENDS.values() for word in backend.precisions} <= {*PRECISIONS}


def test_the_words_are_changed_inside_of_a_name() -> None:
    assert with_precision_words("eager-float32") == "eager-fp32"
    assert with_precision_words("fp16 (vae_decoder bfloat16, vae_encoder float32)") == (
        "fp16 (vae_decoder bf16, vae_encoder fp32)"
    )
