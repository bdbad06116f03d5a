"""The table of any linear diffusers scheduler, found by running it.

A scheduler that is linear in (sample, model outputs, noise) is known once it has been run on one-hot vectors: the first
sample is e0, the i-th model output e(1+i), the j-th noise its own vector; every sample that comes back is then the list of
its own coefficients. A second run on random vectors, which must give what those coefficients say, tells whether the
scheduler is linear at all.

The run is in float64, with the schedule's numbers as set_timesteps made them, so no rounding of steps is in the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from sdopt.errors import CheckpointError
from sdopt.samplers import SamplerTable

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


class _Double(TorchFunctionMode):
    """Inside, float32 is float64, and standard normal noise comes from `noise`."""

    def __init__(self, noise: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._noise = noise

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.randn, torch.randn_like):
            return self._noise()
        wide = {torch.float32: torch.float64}
        args = [wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def _double_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def observe(
    scheduler: Any, begin: int, sample: torch.Tensor, output: Matrix, noise: Matrix, *, double: bool = True, **step: Any
) -> Observation:
    """The samples of one run: `sample` in, the i-th model output `output(i)`, the j-th noise drawn `noise(j)`.

    `begin` is the index of the first timestep, above 0 as in image to image; `step` goes to scheduler.step where it has
    such an argument (eta).
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
    with _double_default(), _Double(draw):
        for i, t in enumerate(timesteps):
            before = drawn
            inputs.append(scheduler.scale_model_input(samples[-1], t))
            result = scheduler.step(output(i), t, samples[-1], **step)
            samples.append(result.prev_sample)
            told = getattr(result, "pred_original_sample", None)
            clean.append(torch.full_like(sample, torch.nan) if told is None else told)
            draws.append(drawn - before)
    return Observation(
        np.array([float(t) for t in timesteps]), _rows(samples), _rows(inputs), _rows(clean), np.array(draws)
    )


def one_hot(size: int, i: int) -> torch.Tensor:
    """The i-th unit vector, shaped like a latent."""
    vector = torch.zeros(1, size, 1, 1, dtype=torch.float64)
    vector[0, i] = 1
    return vector


def _widen(scheduler: Any) -> None:
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and name != "timesteps":
            setattr(scheduler, name, value.double())


def _rows(tensors: Sequence[torch.Tensor]) -> Float64:
    return np.stack([t.double().reshape(-1).numpy() for t in tensors])
