"""The denoising loop: one for every engine.

    program = compile_program(plan, canvas, guided=...)          # what each call launches
    for step in steps(program, board):                           # on the host, or on a device
        step.sample, step.denoised

On a device, a step's data is fetched when it is asked for, and not at all if it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sdopt.bundle.specs import Float32
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
            self.sample[...] = changed.get("latents", self.sample)
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f'callback_on_step_end returned {type(changed).__name__}; allowed are None and {{"latents": float32 '
                f"{self.sample.shape}}} ({error})",
                "callback_on_step_end",
            ) from error


def steps(program: Program, board: Board) -> Iterator[Step]:
    """The steps of a program on a board, which is closed when they end or are left."""
    try:
        for k in range(len(program.table)):
            yield step(program, board, k)
        board.end()
    except BaseException:  # it is the error to tell, whatever else fails after it
        with suppress(SdoptError):
            board.end()
        raise
    finally:
        board.close()


def step(program: Program, board: Board, k: int) -> Step:
    """Call `k` of a program."""
    board.run(k)
    return step_of(program, board, k)


def step_of(program: Program, board: Board, k: int) -> Step:
    """The step that call `k` gave, once it was launched."""
    timestep, sigma = program.levels[k]
    return Step(k, len(program.levels), timestep, sigma, board.step(k))
