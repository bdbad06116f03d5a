"""The states of several text encoders as one sequence: side by side in features, or one after another in tokens.

    CLIP-L | CLIP-G | zeros     SD3: both side by side, filled up to the width of T5,
    T5                          then T5's tokens, or zeros in their place

Ref: Esser et al. 2024, arXiv:2403.03206, section 4 and figure 2.
"""

from __future__ import annotations

from dataclasses import field

import numpy as np

from sdopt.bundle.specs import Float32
from sdopt.dataclass import dataclass


@dataclass(frozen=True)
class Joined:
    """What the encoders gave for so many texts; `add` takes the states in the order of the encoders.

    `features` and `tokens` hold states [texts, tokens, features], `pooled` holds pooled texts [texts, features].
    """

    texts: int
    features: list[Float32] = field(default_factory=list[Float32])
    tokens: list[Float32] = field(default_factory=list[Float32])
    pooled: list[Float32] = field(default_factory=list[Float32])

    def add(self, join: str, state: Float32) -> None:
        """Take the state of an encoder, [texts * chunks, tokens, features]; `join`: see `Encoder`."""
        rows = state.reshape(self.texts, -1, state.shape[-1])
        (self.features if join == "features" else self.tokens).append(rows)

    def embeddings(self, width: int, sequence: int) -> Float32:
        """The sequence [texts, tokens, width]; narrower states end in zeros.

        `sequence`: so many rows of zeros are at its end where no encoder gave tokens.
        """
        parts = [np.concatenate(self.features, 2)] if self.features else []
        parts += self.tokens
        if sequence and not self.tokens:
            parts.append(np.zeros((self.texts, sequence, width), np.float32))
        return np.concatenate([_widened(part, width) for part in parts], 1)


def _widened(state: Float32, width: int) -> Float32:
    missing = width - state.shape[2]
    return np.pad(state, ((0, 0), (0, 0), (0, missing))) if missing > 0 else state
