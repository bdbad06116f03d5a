"""What a denoiser predicts, as the clean sample and as the noise: two numbers each, for [x, output].

In every frame x = alpha * clean + sigma * noise: alpha^2 + sigma^2 = 1 in the variance-preserving frame, alpha = 1 in
the exploding one, alpha = 1 - sigma in flow matching. With o the output and n^2 = alpha^2 + sigma^2:

| prediction      | predicts                        | clean                       | noise                       |
|-----------------|---------------------------------|-----------------------------|-----------------------------|
| epsilon         | noise                           | (x - sigma o) / alpha       | o                           |
| v_prediction    | (alpha noise - sigma clean) / n | alpha x / n^2 - sigma o / n | sigma x / n^2 + alpha o / n |
| sample          | clean                           | o                           | (x - alpha o) / sigma       |
| flow_prediction | noise - clean                   | x - sigma o                 | x + (1 - sigma) o           |

Ref: Salimans & Ho 2022, arXiv:2202.00512, appendix D (v prediction).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdopt.errors import UsageError, choices

Pair = NDArray[np.float64]  # coefficients of [x, output]
Level = tuple[float, float]  # (alpha, sigma): x = alpha * clean + sigma * noise

X: Pair = np.array([1.0, 0.0])
OUTPUT: Pair = np.array([0.0, 1.0])
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def ratio(alpha: float, sigma: float) -> float:
    """The noise level sigma / alpha, infinite at zero signal."""
    return sigma / alpha if alpha else math.inf


def clean_of(prediction: str, alpha: float, sigma: float) -> Pair:
    """The clean sample in terms of [x, output].

    Raises: UsageError where a noise prediction says nothing about the clean sample, because alpha is 0.
    """
    if prediction == "epsilon":
        if alpha == 0:
            raise UsageError(
                "at zero terminal SNR the first timestep is pure noise, and a model that predicts epsilon cannot say "
                'what is under it: use a checkpoint with prediction_type "v_prediction", or set '
                '"rescale_betas_zero_snr" to false.'
            )
        return (X - sigma * OUTPUT) / alpha
    if prediction == "v_prediction":
        n2 = alpha * alpha + sigma * sigma
        return alpha / n2 * X - sigma / n2**0.5 * OUTPUT
    if prediction in ("sample", "original_sample"):
        return OUTPUT
    if prediction == "flow_prediction":
        return X - sigma * OUTPUT
    raise UsageError(f"prediction_type {prediction!r} is unknown; use one of {choices(str(prediction), PREDICTIONS)}.")


def noise_of(prediction: str, alpha: float, sigma: float) -> Pair:
    """The noise in terms of [x, output]."""
    if prediction == "epsilon":
        return OUTPUT
    if prediction == "v_prediction":
        n2 = alpha * alpha + sigma * sigma
        return sigma / n2 * X + alpha / n2**0.5 * OUTPUT
    if prediction == "flow_prediction":
        return X + (1 - sigma) * OUTPUT
    return (X - alpha * clean_of(prediction, alpha, sigma)) / sigma
