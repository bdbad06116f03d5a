"""The denoising loop: one for every engine.

    program = compile_program(plan, canvas, guided=...)          # what each call launches
    for step in steps(program, board):                           # on the host, or on a device
        step.sample, step.denoised

On a device, a step's data is fetched when it is asked for, and not at all if it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

from sdopt.bundle.specs import Float32
from sdopt.dataclass import dataclass
from sdopt.denoise.board import Board, Data
from sdopt.denoise.program import Program
from sdopt.errors import SdoptError, UsageError


@dataclass(frozen=True)
class Step:
    """What `denoise` yields after each call of the UNet; `sample` is live: writing into it steers the loop.

    Shapes: sample and denoised [images, channels, latent_height, latent_width] float32.
    Raises: NumericsError where they hold NaN or infinity; UsageError for data on a device that the loop has left
    behind.
    """

    index: int
    of: int
    timestep: float
    sigma: float
    _data: Data

    @cached_property
    def sample(self) -> Float32:
        """The latents after this step."""
        return self._data("next_sample")

    @cached_property
    def denoised(self) -> Float32:
        """What the sampler believes the clean latents to be."""
        return self._data("denoised")

    def steer(self, changed: Any) -> None:
        """Write what a callback returned into the sample.

        Raises: UsageError unless it is {"latents": array} or None.
        """
        if changed is None:
            return
        try:
            given = np.asarray(changed.get("latents", self.sample))
            if given.shape != self.sample.shape or given.dtype.kind not in "fiu":
                raise ValueError(f"latents are {given.dtype} {given.shape}")
            self.sample[...] = given
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f'callback_on_step_end returned {type(changed).__name__}; allowed are None and {{"latents": float32 '
                f"{self.sample.shape}}} ({error})",
                "callback_on_step_end",
            ) from error


def steps(program: Program, board: Board, before: int = 0, of: int | None = None) -> Iterator[Step]:
    """The steps of a program on a board, which is closed when they end or are left.

    Where the program is one pass of several, `before` calls were made, `of` them are made in all.
    """
    try:
        for k in range(len(program.table)):
            board.run(k)
            yield step_of(program, board, k, before, of)
        board.end()
    except BaseException:  # it is the error to tell, whatever else fails after it
        with suppress(SdoptError):
            board.end()
        raise
    finally:
        board.close()


def step_of(program: Program, board: Board, k: int, before: int = 0, of: int | None = None) -> Step:
    """The step that call `k` gave, once it was launched; for `before` and `of` see `steps`."""
    timestep, sigma = program.levels[k]
    return Step(before + k, of or len(program.levels), timestep, sigma, board.step(k))
