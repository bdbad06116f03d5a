"""The table of any linear diffusers scheduler, found by running it.

A scheduler that is linear in (sample, model outputs, noise) is known once it has been run on one-hot vectors. The first
sample is e0, the i-th model output is e(1+i), and every noise has a vector of its own. So each sample that comes back
is the list of its own coefficients. A second run, on random vectors, tests whether the scheduler is linear at all: it
must give what those coefficients predict.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sdopt.errors import CheckpointError
from sdopt.export.observe import Float64, Observation, observe, one_hot, widen
from sdopt.samplers import SamplerTable
from sdopt.samplers.prediction import OUTPUT, PREDICTIONS, Level, Pair, X, clean_of, noise_of

NONLINEAR = 1e-6  # a larger relative deviation of the second run means that the scheduler is not linear
EXACT = 1e-10  # a smaller relative error means that a sample is explained
ZERO = 1e-15  # a smaller relative coefficient is taken for 0
TINY = 1e-300  # stands for the size of a vector of zeros


def probe(scheduler: Any, steps: int, *, begin: int = 0) -> SamplerTable:
    """The table of a diffusers scheduler for `steps` steps. As in image to image, `begin` timesteps can be left out.

    The table's history is of model outputs, clean samples or noises, whichever can be the shortest. eta is 0, as in
    diffusers' pipelines. If the scheduler does not give its clean samples, what previews show (`denoised`) follows from
    the prediction type.

    Raises: CheckpointError if the scheduler cannot be run, is not linear, or needs more than its history.
    """
    name = type(scheduler).__name__
    try:
        return _probe(copy.deepcopy(scheduler), name, steps, begin)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{name} could not be run on its own to find its table: {error}") from error


def _probe(scheduler: Any, name: str, steps: int, begin: int) -> SamplerTable:
    scheduler.set_timesteps(steps)
    calls = len(scheduler.timesteps) - begin
    size = 1 + 2 * calls  # the sample, the outputs, at most one noise a call
    levels = [_level(scheduler, begin + k) for k in range(calls)]
    fresh = copy.deepcopy(scheduler)
    observed = observe(
        scheduler,
        begin,
        one_hot(size, 0),
        lambda i: one_hot(size, 1 + i),
        lambda j: one_hot(size, 1 + calls + j),
        eta=0.0,
    )
    if observed.draws.max() > 1:
        raise CheckpointError(f"{name} draws noise more than once in a step; no table can say that.")
    _refuse_nonlinear(fresh, name, begin, observed, calls)
    prediction = _prediction_type(scheduler)
    clean = _clean_samples(observed, prediction, levels)
    update, kept = _shortest_fit(observed, _kept_candidates(prediction, levels, clean), name)
    return SamplerTable(
        name=name,
        timestep=observed.timesteps,
        sigma=np.array([sigma / alpha if alpha > 0 else np.inf for alpha, sigma in levels]),
        c_in=_input_scales(observed, name),
        c_skip=kept[:, 0],
        c_out=kept[:, 1],
        update=update,
        denoised=np.array(clean),
        draws=observed.draws.astype(bool),
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        level=np.array([*levels, _end(levels, kept, update, clean)]),
        notes=(f"found by running {name} for {steps} steps; other numbers of steps need a table of their own",),
    )


def _end(levels: Sequence[Level], keep: Float64, update: Float64, clean: Sequence[Pair]) -> Level:
    """(alpha, sigma) after the last call, if the denoiser is perfect.

    A perfect denoiser's output makes `clean` equal to the clean image. All kept values follow from it.
    """
    kept = list[Float64]()
    for level, (c_skip, c_out), (of_x, of_output) in zip(levels, keep, clean, strict=True):
        output = (np.array([1.0, 0.0]) - of_x * np.array(level)) / of_output
        kept.append(c_skip * np.array(level) + c_out * output)
    row, history = update[-1], kept[::-1]
    weights, gain = row[1:-1][: len(history)], row[-1]
    alpha, sigma = row[0] * np.array(levels[-1]) + sum(w * m for w, m in zip(weights, history, strict=False))
    return float(alpha), math.hypot(sigma, gain)


def _refuse_nonlinear(scheduler: Any, name: str, begin: int, observed: Observation, calls: int) -> None:
    """Raises: CheckpointError if a run on random vectors does not give what the coefficients predict."""
    random = torch.Generator().manual_seed(0)
    vectors = 3 * torch.randn(1 + 2 * calls, 64, dtype=torch.float64, generator=random)

    def vector(i: int) -> torch.Tensor:
        return vectors[i].reshape(1, 64, 1, 1)

    second = observe(scheduler, begin, vector(0), lambda i: vector(1 + i), lambda j: vector(1 + calls + j), eta=0.0)
    expected = observed.samples @ vectors.numpy()
    error = np.abs(second.samples - expected).max(axis=1) / np.abs(expected).max(axis=1)
    is_linear = error < NONLINEAR  # False where the error is NaN
    if not is_linear.all():
        first = int(np.argmin(is_linear))  # a sample; call k makes sample k + 1
        raise CheckpointError(
            f"{name} is not linear: on random vectors, call {first - 1} is off by {error[first]:.1%} of what its "
            "coefficients say. Look for thresholding, clip_sample or a learned variance in scheduler_config.json and "
            "set it to false, or name another sampler."
        )


def _level(scheduler: Any, index: int) -> Level:
    """(alpha, sigma) at a timestep: the factors with which the scheduler mixes an image and noise there."""
    fresh = copy.deepcopy(scheduler)
    widen(fresh)
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(index)
    image, noise = torch.eye(2, dtype=torch.float64)[:, None]
    t = fresh.timesteps[index : index + 1]
    if hasattr(fresh, "add_noise"):
        mixed = fresh.add_noise(image, noise, t)
    elif hasattr(fresh, "scale_noise"):
        mixed = fresh.scale_noise(image, t, noise)
    else:
        return 1.0, 1.0
    return float(mixed[0, 0]), float(mixed[0, 1])


def _prediction_type(scheduler: Any) -> str:
    """What the model predicts. If the configuration does not say, it follows from how the scheduler mixes in noise."""
    is_flow = hasattr(scheduler, "scale_noise") and not hasattr(scheduler, "add_noise")
    return str(scheduler.config.get("prediction_type", "flow_prediction" if is_flow else "epsilon"))


def _clean_samples(observed: Observation, prediction: str, levels: Sequence[Level]) -> list[Pair]:
    """The clean samples in terms of [x, output]: the scheduler's own or, if it has none, by the prediction type."""
    pairs: list[Pair] = []
    for k, level in enumerate(levels):
        pair = _given_clean_sample(observed, k)
        if pair is None:
            pair = clean_of(prediction, *level) if prediction in PREDICTIONS else X - level[1] * OUTPUT
        pairs.append(pair)
    return pairs


def _given_clean_sample(observed: Observation, k: int) -> Pair | None:
    """The clean sample of call k in terms of [x, output]. None if there is none, or if it needs other terms too."""
    if not np.isfinite(observed.clean[k]).all():
        return None
    output = np.eye(observed.samples.shape[1])[1 + k]
    return _coefficients(np.stack([observed.samples[k], output]), observed.clean[k])


def _kept_candidates(prediction: str, levels: Sequence[Level], clean: Sequence[Pair]) -> Iterator[Float64]:
    """What a scheduler may keep of each call, in terms of [x, output]: its output, clean sample or noise."""
    yield np.tile(OUTPUT, (len(levels), 1))
    yield np.array(clean)
    if prediction in PREDICTIONS:
        yield np.array([noise_of(prediction, *level) for level in levels])


def _input_scales(observed: Observation, name: str) -> Float64:
    """c_in: how the scheduler scales the sample for the model."""
    scales = list[float]()
    for x, model_input in zip(observed.samples, observed.inputs, strict=False):  # the last sample is no input
        scale = _coefficients(x[None], model_input)
        if scale is None:
            raise CheckpointError(f"{name} does more than scale the sample before the model sees it.")
        scales.append(float(scale[0]))
    return np.array(scales)


def _shortest_fit(observed: Observation, candidates: Iterator[Float64], name: str) -> tuple[Float64, Float64]:
    """(update, kept) of the candidate with the shortest history. If several are equally short, the first one wins.

    Raises: CheckpointError if no history of any candidate explains every step.
    """
    fits: list[tuple[Float64, Float64]] = []
    for kept in candidates:
        update = _fit(observed, kept)
        if update is not None:
            fits.append((update, kept))
    if not fits:
        raise CheckpointError(f"{name} needs a sample or a noise of an earlier step that its history does not tell.")
    return min(fits, key=lambda fit: fit[0].shape[1])


def _fit(observed: Observation, keep: Float64) -> Float64 | None:
    """The update of every step with the shortest history of `keep`. None if no history explains all steps."""
    if not np.isfinite(keep).all():
        return None
    unit, calls = np.eye(observed.samples.shape[1]), len(keep)
    kept = [keep[k, 0] * observed.samples[k] + keep[k, 1] * unit[1 + k] for k in range(calls)]
    rows, drawn = list[Float64](), 0
    for k in range(calls):
        noise = unit[1 + calls + drawn] if observed.draws[k] else np.zeros_like(unit[0])
        drawn += int(observed.draws[k])
        latest_first = kept[k::-1]
        row = _shortest(observed.samples[k], latest_first, noise, observed.samples[k + 1])
        if row is None:
            return None
        rows.append(row)
    width = max(len(row) for row in rows)
    return np.array([[*row[:-1], *[0.0] * (width - len(row)), row[-1]] for row in rows])


def _shortest(x: Float64, history: Sequence[Float64], noise: Float64, after: Float64) -> Float64 | None:
    """The coefficients of the next sample in [x, kept..., noise], with the shortest history that explains it."""
    for length in range(1, len(history) + 1):
        row = _coefficients(np.stack([x, *history[:length], noise]), after)
        if row is not None:
            return row
    return None


def _coefficients(basis: Float64, target: Float64) -> Float64 | None:
    """The coefficients of `target` in the rows of `basis`. None if it is not in their span."""
    lengths = np.linalg.norm(basis, axis=1)
    scale = np.where(lengths > 0, lengths, 1.0)
    rows: Float64 = basis / scale[:, None]
    coefficients = np.asarray(np.linalg.lstsq(np.transpose(rows), target, rcond=1e-14)[0], dtype=np.float64)
    error = np.abs(coefficients @ rows - target).max()
    largest = max(np.abs(target).max(), TINY)
    coefficients[np.abs(coefficients) < ZERO * largest] = 0.0
    return coefficients / scale if error <= EXACT * largest else None
