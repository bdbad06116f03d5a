"""The table of any linear diffusers scheduler, found by running it.

A scheduler that is linear in (sample, model outputs, noise) is known once it has been run on one-hot vectors: the
first sample is e0, the i-th model output e(1+i), and every noise has a vector of its own; each sample that comes back
is then the list of its own coefficients. A second run, on random vectors, must give what those coefficients say: it
tells whether the scheduler is linear at all.

The runs are in float64, on the schedule's numbers as set_timesteps made them, so no step's rounding is in the table.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from sdopt.errors import CheckpointError
from sdopt.samplers import SamplerTable
from sdopt.samplers.prediction import OUTPUT, PREDICTIONS, Level, Pair, X, clean_of, noise_of

Float64 = NDArray[np.float64]
Matrix = Callable[[int], torch.Tensor]  # the i-th vector of a run


@dataclass(frozen=True)
class Observation:
    """What a scheduler did with vectors: row k belongs to call k of the model.

    Shapes: K calls, vectors of D numbers; samples [K + 1, D], inputs [K, D], clean [K, D] (NaN where not told).
    """

    timesteps: Float64
    samples: Float64
    inputs: Float64
    clean: Float64
    draws: NDArray[np.int64]


class _Observed(TorchFunctionMode):
    """Inside, standard normal noise comes from `noise`, and float32 is float64 unless told otherwise."""

    def __init__(self, noise: Callable[[], torch.Tensor], double: bool) -> None:
        super().__init__()
        self._noise = noise
        self._double = double

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.randn, torch.randn_like):
            return self._noise()
        wide = {torch.float32: torch.float64} if self._double else {}
        args = [wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def _default_like(sample: torch.Tensor) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(sample.dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def probe(scheduler: Any, steps: int, *, begin: int = 0) -> SamplerTable:
    """The table of a diffusers scheduler for `steps` steps, without the first `begin` timesteps as in image to image.

    What it keeps is whichever of the model output, the clean sample and the noise needs the shortest history; eta is 0,
    as in diffusers' pipelines. What previews show (`denoised`) is a guess from the prediction type where the scheduler
    does not tell.

    Raises: CheckpointError when the scheduler cannot be run, is not linear, or needs more than its history.
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
    seen = observe(
        scheduler,
        begin,
        one_hot(size, 0),
        lambda i: one_hot(size, 1 + i),
        lambda j: one_hot(size, 1 + calls + j),
        eta=0.0,
    )
    if seen.draws.max() > 1:
        raise CheckpointError(f"{name} draws noise more than once in a step; no table can say that.")
    _refuse_nonlinear(fresh, name, begin, seen, calls)
    told = _pairs(seen)
    flow = hasattr(scheduler, "scale_noise") and not hasattr(scheduler, "add_noise")
    prediction = str(scheduler.config.get("prediction_type", "flow_prediction" if flow else "epsilon"))
    clean = [_clean(prediction, level, known) for level, known in zip(levels, told, strict=True)]
    fits = [_fit(seen, keep, name) for keep in _candidates(prediction, levels, clean, calls)]
    update, keep = min((fit for fit in fits if fit), key=lambda fit: fit[0].shape[1], default=(None, None))
    if update is None or keep is None:
        raise CheckpointError(f"{name} needs a sample or a noise of an earlier step that its history does not tell.")
    return SamplerTable(
        name=name,
        timestep=seen.timesteps,
        sigma=np.array([sigma / alpha if alpha > 0 else np.inf for alpha, sigma in levels]),
        c_in=_scales(seen, name),
        c_skip=keep[:, 0],
        c_out=keep[:, 1],
        update=update,
        denoised=np.array(clean),
        draws=seen.draws.astype(bool),
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        level=np.array([*levels, _end(levels, keep, update, clean)]),
        notes=(f"found by running {name} for {steps} steps; other numbers of steps need a table of their own",),
    )


def _end(levels: Sequence[Level], keep: Float64, update: Float64, clean: Sequence[Pair]) -> Level:
    """(alpha, sigma) after the last call, as a perfect denoiser leaves it.

    Such a denoiser gives the output with which `clean` is the clean sample; every kept value follows from it.
    """
    kept = list[Float64]()
    for level, (c_skip, c_out), (of_x, of_output) in zip(levels, keep, clean, strict=True):
        output = (np.array([1.0, 0.0]) - of_x * np.array(level)) / of_output
        kept.append(c_skip * np.array(level) + c_out * output)
    row, history = update[-1], kept[::-1]
    weights, gain = row[1:-1][: len(history)], row[-1]
    alpha, sigma = row[0] * np.array(levels[-1]) + sum(w * m for w, m in zip(weights, history, strict=False))
    return float(alpha), math.hypot(sigma, gain)


def _refuse_nonlinear(scheduler: Any, name: str, begin: int, seen: Observation, calls: int) -> None:
    """Raises: CheckpointError when random vectors do not arrive where the coefficients say."""
    random = torch.Generator().manual_seed(0)
    parts = 3 * torch.randn(1 + 2 * calls, 64, dtype=torch.float64, generator=random)

    def vector(i: int) -> torch.Tensor:
        return parts[i].reshape(1, 64, 1, 1)

    again = observe(scheduler, begin, vector(0), lambda i: vector(1 + i), lambda j: vector(1 + calls + j), eta=0.0)
    expected = seen.samples @ parts.numpy()
    error = np.abs(again.samples - expected).max(axis=1) / np.abs(expected).max(axis=1)
    if not (error < 1e-6).all():
        step = int(np.argmax(~(error < 1e-6))) - 1
        raise CheckpointError(
            f"{name} is not linear: on random vectors, call {step} is off by {error[step + 1]:.1%} of what its "
            "coefficients say. Look for thresholding, clip_sample or a learned variance in scheduler_config.json and "
            "set it to false, or name another sampler."
        )


def _level(scheduler: Any, index: int) -> tuple[float, float]:
    """(alpha, sigma) at a timestep, as the scheduler mixes an image with noise there."""
    fresh = copy.deepcopy(scheduler)
    _widen(fresh)
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


def _clean(prediction: str, level: tuple[float, float], told: Pair | None) -> Pair:
    """The clean sample in terms of [x, output]: as the scheduler told, else as its prediction type says."""
    if told is not None:
        return told
    return clean_of(prediction, *level) if prediction in PREDICTIONS else X - level[1] * OUTPUT


def _candidates(
    prediction: str, levels: Sequence[tuple[float, float]], clean: Sequence[Pair], calls: int
) -> Iterator[Float64]:
    """What a scheduler may keep, in terms of [x, output]: rows of pairs."""
    yield np.tile(OUTPUT, (calls, 1))
    yield np.array(clean)
    if prediction in PREDICTIONS:
        yield np.array([noise_of(prediction, *level) for level in levels])


def _pairs(seen: Observation) -> list[Pair | None]:
    """The clean samples that the scheduler told, in terms of [x, output]."""
    pairs = list[Pair | None]()
    for k, clean in enumerate(seen.clean):
        output = np.eye(seen.samples.shape[1])[1 + k]
        basis = np.stack([seen.samples[k], output])
        pairs.append(_solve(basis, clean) if np.isfinite(clean).all() else None)
    return pairs


def _scales(seen: Observation, name: str) -> Float64:
    """c_in: how the scheduler scales the sample for the model."""
    scales = list[float]()
    for x, given in zip(seen.samples, seen.inputs, strict=False):
        pair = _solve(x[None], given)
        if pair is None:
            raise CheckpointError(f"{name} does more than scale the sample before the model sees it.")
        scales.append(float(pair[0]))
    return np.array(scales)


def _fit(seen: Observation, keep: Float64, name: str) -> tuple[Float64, Float64] | None:
    """(update, keep) with the shortest history that explains every step, or None when no history does."""
    unit, calls = np.eye(seen.samples.shape[1]), len(keep)
    if not np.isfinite(keep).all():
        return None
    kept = [keep[k, 0] * seen.samples[k] + keep[k, 1] * unit[1 + k] for k in range(calls)]
    rows, drawn = list[Float64](), 0
    for k in range(calls):
        noise = unit[1 + calls + drawn] if seen.draws[k] else np.zeros_like(unit[0])
        drawn += int(seen.draws[k])
        row = _shortest(seen.samples[k], kept[: k + 1][::-1], noise, seen.samples[k + 1])
        if row is None:
            return None
        rows.append(row)
    width = max(len(row) for row in rows)
    update = np.array([[*row[:-1], *[0.0] * (width - len(row)), row[-1]] for row in rows])
    return update, keep


def _shortest(x: Float64, history: Sequence[Float64], noise: Float64, after: Float64) -> Float64 | None:
    """[x, kept..., noise] coefficients of the next sample, with as little history as explains it."""
    for used in range(1, len(history) + 1):
        row = _solve(np.stack([x, *history[:used], noise]), after)
        if row is not None:
            return row
    return None


def _solve(basis: Float64, target: Float64) -> Float64 | None:
    """The coefficients of `target` in the rows of `basis`, or None when it is not in their span."""
    lengths = np.linalg.norm(basis, axis=1)
    scale = np.where(lengths > 0, lengths, 1.0)
    rows: Float64 = basis / scale[:, None]
    coefficients = np.asarray(np.linalg.lstsq(np.transpose(rows), target, rcond=1e-14)[0], dtype=np.float64)
    error = np.abs(coefficients @ rows - target).max()
    coefficients[np.abs(coefficients) < 1e-15 * max(np.abs(target).max(), 1e-300)] = 0.0
    return coefficients / scale if error <= 1e-10 * max(np.abs(target).max(), 1e-300) else None


def observe(
    scheduler: Any, begin: int, sample: torch.Tensor, output: Matrix, noise: Matrix, *, double: bool = True, **step: Any
) -> Observation:
    """The samples of one run: `sample` in, the i-th model output `output(i)`, the j-th noise drawn `noise(j)`.

    `begin` is the index of the first timestep, above 0 as in image to image; `step` goes to scheduler.step where it has
    such an argument (eta). Without `double` the scheduler computes as it always does, in the vectors' own precision.
    """
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if double:
        _widen(scheduler)
    step = {k: v for k, v in step.items() if v is not None and k in inspect.signature(scheduler.step).parameters}
    drawn = 0

    def draw() -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return noise(drawn - 1)

    samples, inputs, clean, draws = [sample], list[torch.Tensor](), list[torch.Tensor](), list[int]()
    timesteps = list(scheduler.timesteps[begin:])
    scale: Callable[[Any, Any], Any] = getattr(scheduler, "scale_model_input", _as_it_is)  # flow schedulers have none
    with _default_like(sample), _Observed(draw, double):
        for i, t in enumerate(timesteps):
            before = drawn
            inputs.append(scale(samples[-1], t))
            result = scheduler.step(output(i), t, samples[-1], **step)
            samples.append(result.prev_sample)
            told = getattr(result, "pred_original_sample", getattr(result, "denoised", None))
            clean.append(torch.full_like(sample, torch.nan) if told is None else told)
            draws.append(drawn - before)
    return Observation(
        np.array([float(t) for t in timesteps]), _rows(samples), _rows(inputs), _rows(clean), np.array(draws)
    )


def _as_it_is(sample: Any, t: Any) -> Any:
    return sample


def one_hot(size: int, i: int) -> torch.Tensor:
    """The i-th unit vector, shaped like a latent."""
    vector = torch.zeros(1, size, 1, 1, dtype=torch.float64)
    vector[0, i] = 1
    return vector


def _widen(scheduler: Any) -> None:
    for name, value in scheduler.__dict__.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and name != "timesteps":
            setattr(scheduler, name, value.double())


def _rows(tensors: Sequence[torch.Tensor]) -> Float64:
    return np.stack([t.double().reshape(-1).numpy() for t in tensors])
