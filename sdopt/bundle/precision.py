"""The words for precision, inside and in all that is printed or recorded.

In int8 and fp8, layers multiply 8 bits. In int8-weights, weights alone have 8 bits, and layers multiply wider numbers.

The names of dtypes, such as "float16" for a tensor, are other words for other things. A user may type them for a
precision all the same; they are translated once, where they come in.
"""

from __future__ import annotations

import re

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int8-weights")
OTHER_WORDS = {
    "float32": "fp32",
    "float": "fp32",
    "f32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "f16": "fp16",
    "bfloat16": "bf16",
}


def precision_word(text: str) -> str:
    """The precision that a user means: "fp16" for "float16"; a word that is none of these as it is."""
    return OTHER_WORDS.get(text, text)


def with_precision_words(text: str) -> str:
    """A name or a sentence with the words of this module, e.g. "eager-fp32" for "eager-float32"."""
    return re.sub(r"\b(float32|float16|bfloat16)\b", lambda match: OTHER_WORDS[match[0]], text)
