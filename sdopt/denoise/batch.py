"""Requests under way together: each call of the UNet takes the images of all whose next launch is the same.

    batch = Batch()
    batch.join(job_of(pipe.prepare(plan)))  # at any time; a job is one request, at whatever step it is
    for jobs in batch.groups().values():    # those that can share their next call
        for job, step in batch.advance(jobs, engines):
            ...

Samplers, numbers of steps, guidance scales and seeds may differ, and so may the sizes: what agrees shares a call.
Image i of any batch equals that image alone, bit for bit where the engine computes each row alike. Jobs whose steps an
engine makes whole share its launches in the same way (`sdopt.denoise.shared_run`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from sdopt.denoise.board import Board, HostBoard, Prepared, predict_together
from sdopt.denoise.conditions import Conditions
from sdopt.denoise.loop import Step, step_of
from sdopt.denoise.model import Predict
from sdopt.denoise.program import Launch, Program, engines_of
from sdopt.denoise.shared_run import SharedBoard, SharedRun
from sdopt.engine import Engine
from sdopt.errors import NumericsError

MAX_STACKED = 16  # groups whose conditions stay stacked


@dataclass(eq=False)
class Job:
    """One request on its way: `k` is its next call of the UNet.

    `weights`: the key of the weights that it needs, where those of the bundle are changed; jobs with others share none.
    """

    board: Board
    program: Program
    weights: str = ""
    k: int = 0

    @property
    def done(self) -> bool:
        """Whether it has made its last call."""
        return self.k >= len(self.program.table)

    @property
    def launch(self) -> Launch:
        """The first launch of its next call: the UNet, or an engine that makes the whole step."""
        return self.program.launches[self.k][0]

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines of its next call, the UNet's first."""
        return engines_of(self.launch)

    @property
    def key(self) -> Hashable:
        """What another job must have in common to share its next call: weights, launch, all shapes but the batch's.

        A job on a board of its own shares none.
        """
        if isinstance(self.board, HostBoard):
            conditions = self.board.conditions
            control = self.launch.control if isinstance(self.launch, Predict) else None
            seen = {name: conditions.pictures[name] for name in (control.nets if control is not None else ())}
            shapes = tuple((name, array.shape[1:]) for name, array in (*conditions.cond.items(), *seen.items()))
            return self.weights, self.launch, self.board.sample.shape[1:], shapes
        if isinstance(self.board, SharedBoard):
            shapes = tuple((name, array.shape[1:]) for name, array in self.board.tensors.items())
            return self.weights, self.launch, tuple(self.board.tables), shapes
        return id(self)

    def finish(self) -> Step:
        """The step of a call whose prediction is there: what is left of its launches."""
        k, board = self.k, self.board
        if isinstance(board, (HostBoard, SharedBoard)):
            board.finish(k)
        self.k += 1
        return step_of(self.program, board, k)


def job_of(ready: Prepared, weights: str = "") -> Job:
    """The job of a request that is ready, whose engines are given with each call."""
    if ready.program.fused:
        board = SharedBoard(ready.program, ready.canvas, ready.conditions, ready.draw)
        return Job(board, ready.program, weights)
    return Job(ready.board({}), ready.program, weights)


@dataclass(eq=False)
class Batch:
    """The jobs that are under way."""

    jobs: list[Job] = field(default_factory=list[Job])
    _stacked: dict[tuple[int, ...], Conditions] = field(default_factory=dict[tuple[int, ...], Conditions])
    _runs: dict[Hashable, SharedRun] = field(default_factory=dict[Hashable, SharedRun])

    def join(self, job: Job) -> None:
        """From the next step on, `job` is under way."""
        self.jobs.append(job)

    def leave(self, job: Job) -> None:
        """Forget a job: it is done, or nobody wants it any more."""
        self.jobs.remove(job)
        own = id(job)
        self._stacked = {key: stacked for key, stacked in self._stacked.items() if own not in key}

    def groups(self) -> dict[Hashable, list[Job]]:
        """The jobs that can share their next call, in the order in which they joined."""
        groups = defaultdict[Hashable, list[Job]](list)
        for job in self.jobs:
            groups[job.key].append(job)
        return dict(groups)

    def step(self) -> list[tuple[Job, Step]]:
        """Move every job by one call of the UNet; those that have made their last one leave.

        Raises: NumericsError for the first job whose prediction is not finite.
        """
        moved: list[tuple[Job, Step]] = []
        for jobs in self.groups().values():
            for job, step in self.advance(jobs):
                if isinstance(step, NumericsError):
                    raise step
                moved.append((job, step))
        return moved

    def advance(
        self, jobs: Sequence[Job], engines: Mapping[str, Engine] | None = None
    ) -> list[tuple[Job, Step | NumericsError]]:
        """Move these jobs, of one group, by one call of the UNet; those that have made their last one leave.

        `engines`: those to call, by component; without them each board's own. A job whose prediction is not finite
        leaves with that error, and the others go on. Where the call itself fails, no job has moved.
        """
        host = [job.board for job in jobs if isinstance(job.board, HostBoard)]
        shared = [job.board for job in jobs if isinstance(job.board, SharedBoard)]
        calls = [job.k for job in jobs]
        if len(host) == len(jobs):
            errors = predict_together(host, calls, self._conditions(jobs, host), engines)
        elif len(shared) == len(jobs):
            assert engines is not None  # a shared board has no engine of its own
            run = self._runs.setdefault(jobs[0].key, SharedRun())
            run.advance(shared, calls, engines[shared[0].component(calls[0])])
            errors = [None] * len(jobs)
        else:
            errors = [_moved_alone(job) for job in jobs]
        moved = [(job, error or _finished(job)) for job, error in zip(jobs, errors, strict=True)]
        for job, step in moved:
            if job.done or isinstance(step, NumericsError):
                self.leave(job)
        return moved

    def _conditions(self, jobs: Sequence[Job], boards: Sequence[HostBoard]) -> Conditions:
        """The conditions of these jobs, stacked once for as long as they move together."""
        key = tuple(map(id, jobs))
        if key not in self._stacked:
            while len(self._stacked) >= MAX_STACKED:
                self._stacked.pop(next(iter(self._stacked)))
            self._stacked[key] = Conditions.stacked([board.conditions for board in boards])
        return self._stacked[key]

    def close(self) -> None:
        """End the runs on devices; the jobs keep what they carry."""
        for run in self._runs.values():
            run.gather()
        self._runs.clear()


def _finished(job: Job) -> Step | NumericsError:
    """The step of a job whose call was launched."""
    try:
        return job.finish()
    except NumericsError as error:
        return error


def _moved_alone(job: Job) -> NumericsError | None:
    """The next call of a job on a device."""
    try:
        job.board.run(job.k)
    except NumericsError as error:
        return error
    return None
