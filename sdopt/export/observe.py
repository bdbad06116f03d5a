"""Run a diffusers scheduler on chosen model outputs and chosen noise, and observe what it does with them.

Runs are in float64, with the schedule's numbers as set_timesteps computed them, so steps add no rounding errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from sdopt.dataclass import dataclass

Float64 = NDArray[np.float64]
Vectors = Callable[[int], torch.Tensor]  # the i-th vector of a run


@dataclass(frozen=True)
class Observation:
    """What a scheduler did in one run. Row k belongs to call k of the model.

    Shapes for K calls and vectors of D numbers: samples [K + 1, D], inputs [K, D], clean [K, D]. A clean sample that
    the scheduler does not give is NaN. `draws`: how many times each call drew noise.
    """

    timesteps: Float64
    samples: Float64
    inputs: Float64
    clean: Float64
    draws: NDArray[np.int64]


def observe(
    scheduler: Any,
    begin: int,
    sample: torch.Tensor,
    output: Vectors,
    noise: Vectors,
    *,
    double: bool = True,
    **step: Any,
) -> Observation:
    """Run the scheduler from `sample`, with `output(i)` as the i-th model output and `noise(j)` as the j-th noise.

    `begin` is the index of the first timestep; in image to image it is above 0. `step` has arguments for
    scheduler.step, such as eta; those that it does not take are left out. Without `double` the scheduler computes as
    usual, in the precision of the vectors.
    """
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if double:
        widen(scheduler)
    accepted = inspect.signature(scheduler.step).parameters
    step = {name: value for name, value in step.items() if value is not None and name in accepted}
    drawn = 0

    def draw() -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return noise(drawn - 1)

    samples, inputs, clean, draws = [sample], list[torch.Tensor](), list[torch.Tensor](), list[int]()
    timesteps = list(scheduler.timesteps[begin:])
    scale: Callable[[Any, Any], Any] = getattr(scheduler, "scale_model_input", _unscaled)  # flow schedulers have none
    with _default_dtype_of(sample), _Observed(draw, double):
        for i, t in enumerate(timesteps):
            before = drawn
            inputs.append(scale(samples[-1], t))
            result = scheduler.step(output(i), t, samples[-1], **step)
            samples.append(result.prev_sample)
            predicted = getattr(result, "pred_original_sample", getattr(result, "denoised", None))
            clean.append(torch.full_like(sample, torch.nan) if predicted is None else predicted)
            draws.append(drawn - before)
    return Observation(
        timesteps=np.array([float(t) for t in timesteps]),
        samples=_rows(samples),
        inputs=_rows(inputs),
        clean=_rows(clean),
        draws=np.array(draws),
    )


def one_hot(size: int, i: int) -> torch.Tensor:
    """The i-th unit vector, shaped like a latent."""
    vector = torch.zeros(1, size, 1, 1, dtype=torch.float64)
    vector[0, i] = 1
    return vector


def widen(scheduler: Any) -> None:
    """Make the scheduler's float32 tensors float64, except its timesteps."""
    for name, value in scheduler.__dict__.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and name != "timesteps":
            setattr(scheduler, name, value.double())


class _Observed(TorchFunctionMode):
    """A context in which torch's normal noise comes from `noise`. With `double`, float64 replaces float32."""

    def __init__(self, noise: Callable[[], torch.Tensor], double: bool) -> None:
        super().__init__()
        self._noise = noise
        self._dtypes = {torch.float32: torch.float64} if double else {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.randn, torch.randn_like):
            return self._noise()
        named = {name: self._widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._widened, args), **named)

    def _widened(self, argument: Any) -> Any:
        return self._dtypes.get(argument, argument) if isinstance(argument, torch.dtype) else argument


@contextmanager
def _default_dtype_of(sample: torch.Tensor) -> Generator[None]:
    """A context in which torch makes tensors in the precision of `sample`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(sample.dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unscaled(sample: Any, t: Any) -> Any:
    return sample


def _rows(tensors: Sequence[torch.Tensor]) -> Float64:
    return np.stack([t.double().reshape(-1).numpy() for t in tensors])
