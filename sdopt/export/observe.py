"""What a diffusers scheduler does with vectors: one run, with chosen model outputs and chosen noise.

The runs are in float64, on the schedule's numbers as set_timesteps made them, so that no step adds a rounding error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

Float64 = NDArray[np.float64]
Vectors = Callable[[int], torch.Tensor]  # the i-th vector of a run


@dataclass(frozen=True)
class Observation:
    """What a scheduler did with vectors: row k belongs to call k of the model.

    Shapes: K calls, vectors of D numbers; samples [K + 1, D], inputs [K, D], clean [K, D] (NaN where it gives none).
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
    """The samples of one run: `sample` in, the i-th model output `output(i)`, the j-th noise drawn `noise(j)`.

    `begin` is the index of the first timestep, above 0 as in image to image; `step` goes to scheduler.step where it has
    such an argument (eta). Without `double` the scheduler computes as it always does, in the vectors' own precision.
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
    """Make the scheduler's float32 tensors float64, but for its timesteps."""
    for name, value in scheduler.__dict__.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and name != "timesteps":
            setattr(scheduler, name, value.double())


class _Observed(TorchFunctionMode):
    """Inside, standard normal noise comes from `noise`; with `double`, float64 takes the place of float32."""

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
    """Inside, torch makes tensors in the precision of `sample`."""
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
