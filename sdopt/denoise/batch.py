"""Requests under way together: each call of the UNet takes the images of all whose next launch is the same.

    batch = Batch()
    batch.join(job)                      # at any time; a job is one request, at whatever step it is
    for job, step in batch.step():       # every job moves by one call
        ...

Samplers, numbers of steps, guidance scales and seeds may differ, and so may the sizes: what agrees shares a call.
Image i of any batch equals that image alone, bit for bit where the engine computes each row alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

from sdopt.denoise.board import HostBoard, predict_together
from sdopt.denoise.loop import Step, step_of
from sdopt.denoise.model import Conditions, Predict


@dataclass(eq=False)
class Job:
    """One request on its way: `k` is its next call of the UNet."""

    board: HostBoard
    k: int = 0

    @property
    def done(self) -> bool:
        """Whether it has made its last call."""
        return self.k >= len(self.board.program.table)

    @property
    def launch(self) -> Predict:
        """How its next call asks the UNet."""
        first = self.board.program.launches[self.k][0]
        assert isinstance(first, Predict)  # a host board's calls begin so
        return first

    @property
    def key(self) -> Hashable:
        """What another job must have in common to share its next call: the launch, and all shapes but the batch's."""
        shapes = tuple((name, array.shape[1:]) for name, array in self.board.conditions.cond.items())
        return self.launch, self.board.sample.shape[1:], shapes


@dataclass(eq=False)
class Batch:
    """The jobs that are under way, on the engine of the first one's board."""

    jobs: list[Job] = field(default_factory=list[Job])
    _stacked: dict[tuple[int, ...], Conditions] = field(default_factory=dict[tuple[int, ...], Conditions])

    def join(self, job: Job) -> None:
        """From the next step on, `job` is under way."""
        self.jobs.append(job)

    def leave(self, job: Job) -> None:
        """Forget a job: it is done, or nobody wants it any more."""
        self.jobs.remove(job)
        self._stacked.clear()

    def step(self) -> list[tuple[Job, Step]]:
        """Move every job by one call of the UNet; those that have made their last one leave.

        Raises: NumericsError for the first job whose prediction is not finite.
        """
        groups = defaultdict[Hashable, list[Job]](list)
        for job in self.jobs:
            groups[job.key].append(job)
        for jobs in groups.values():
            self._predict(jobs)
        moved = [(job, self._finish(job)) for job in self.jobs]
        for job, _ in moved:
            if job.done:
                self.leave(job)
        return moved

    def _predict(self, jobs: list[Job]) -> None:
        boards, calls = [job.board for job in jobs], [job.k for job in jobs]
        key = tuple(map(id, jobs))
        if key not in self._stacked:
            self._stacked[key] = Conditions.stacked([board.conditions for board in boards])
        predict_together(boards, calls, self._stacked[key])

    def _finish(self, job: Job) -> Step:
        """The launches of the job's call that follow the UNet's."""
        board, k = job.board, job.k
        board.finish(k)
        job.k += 1
        return step_of(board.program, board, k)
