"""Several requests in one run of a fused step, each at a call of its own: rows, samples and history are of the batch.

    run = SharedRun("unet_step")
    run.advance(boards, calls, engine)       # one launch: every board's image moves by its own row

While the same boards move together, their tensors stay on the device, and a launch uploads their rows alone. When
one joins or leaves, what is carried is fetched once and a new run begins with it; no call of the engine is spent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from sdopt.bundle.joined import DEEP
from sdopt.bundle.specs import Array, Float32, TensorSpec
from sdopt.denoise.board import Data, tensors_of
from sdopt.denoise.conditions import Conditions
from sdopt.denoise.program import Fused, Program, Restore
from sdopt.denoise.start import Canvas, Draw
from sdopt.engine import Carrying, Engine, Run
from sdopt.engine.finite import refuse_nan
from sdopt.errors import UsageError


class SharedBoard:
    """The tensors of one request whose steps an engine makes whole, in turns in runs that it shares."""

    def __init__(self, program: Program, canvas: Canvas, conditions: Conditions, draw: Draw) -> None:
        self.program, self._canvas, self._draw = program, canvas, draw
        self.tensors, self.tables = tensors_of(canvas, conditions), program.tables()
        self.carried: dict[str, Array] = {}  # inputs of the next call that earlier ones made, where no run has them
        self.run_of: SharedRun | None = None
        self._latest: dict[str, Float32] = {}

    def component(self, k: int) -> str:
        """The engine that makes call `k`."""
        launch = self.program.launches[k][0]
        assert isinstance(launch, Fused)  # a shared board's calls begin so
        return launch.component

    def noise(self, k: int) -> Float32 | None:
        """What call `k` draws, if it does."""
        return self._draw() if self.program.table.draws[k] else None

    def run(self, k: int) -> None:
        raise UsageError(f"call {k}: a shared board moves with its batch")

    def finish(self, k: int) -> None:
        """What follows the launch of call `k`."""
        self._latest = {}
        if Restore() in self.program.launches[k]:
            sample = self._canvas.restore_unmasked(self.program.table, k, self._read(k, "next_sample"))
            self._latest["next_sample"] = sample
            self._leave()
            self.carried["sample"] = sample

    def step(self, k: int) -> Data:
        return lambda name: self._read(k, name)

    def end(self) -> None:
        """Fetch the last sample, which outlives the run."""
        self._read(len(self.program.table) - 1, "next_sample")

    def close(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self.run_of is not None:
            self.run_of.gather()

    def _read(self, k: int, name: str) -> Float32:
        if name not in self._latest:
            if self.run_of is None:
                raise UsageError(f"call {k + 1}: {name} was on the device until the batch changed; read it before")
            array = self.run_of.fetch(self, name)
            refuse_nan(array, f"unet, step {k + 1} of {len(self.program.table)}")
            self._latest[name] = array
        return self._latest[name]


class SharedRun:
    """The run of one component, and the boards that are in it now."""

    def __init__(self) -> None:
        self._boards: tuple[SharedBoard, ...] = ()
        self._engine: Carrying | None = None
        self._run: Run | None = None
        self._was_launched = False
        self._fetched: dict[str, Array] = {}

    def advance(self, boards: Sequence[SharedBoard], calls: Sequence[int], engine: Engine) -> None:
        """Launch the next call of these boards.

        Raises: UsageError where the engine takes no batch of so many images; then no board has moved.
        """
        carrying = cast(Carrying, engine)
        if tuple(boards) != self._boards or carrying is not self._engine or self._run is None:
            self._begin(tuple(boards), carrying)
        run, inputs = cast(Run, self._run), {spec.name for spec in engine.inputs}
        pairs = list(zip(boards, calls, strict=True))
        for name in boards[0].tables:
            if name in inputs:
                run.put(name, np.concatenate([board.tables[name][k] for board, k in pairs]))
        drawn = [board.noise(k) for board, k in pairs]
        if any(noise is not None for noise in drawn):
            sizes = [board.tensors["sample"] for board in boards]
            filled = [np.zeros_like(s) if n is None else n for n, s in zip(drawn, sizes, strict=True)]
            run.put("noise", np.concatenate(filled).astype(np.float32))
        self._fetched = {}
        run.launch(0)
        self._was_launched = True

    def fetch(self, board: SharedBoard, name: str) -> Float32:
        """An output of the latest launch, for one board. It belongs to the caller."""
        if name not in self._fetched:
            self._fetched[name] = cast(Run, self._run).fetch(name)
        axis = _axes(cast(Carrying, self._engine).outputs)[name]
        return cast(Float32, _part(self._fetched[name], axis, self._rows()[board]))

    def gather(self) -> None:
        """End the run: each board takes what the run carries for it."""
        engine, run = self._engine, self._run
        if run is None or engine is None:
            return
        try:
            if self._was_launched:
                axes = _axes(engine.outputs)
                given = {**engine.carry, **({DEEP: DEEP} if DEEP in axes else {})}
                carried = {(name, axes[output]): run.fetch(output) for output, name in given.items()}
                for board, rows in self._rows().items():
                    board.carried |= {name: _part(array, axis, rows) for (name, axis), array in carried.items()}
        finally:
            run.close()
            for board in self._boards:
                board.run_of = None
            self._boards, self._run, self._engine, self._was_launched, self._fetched = (), None, None, False, {}

    def _begin(self, boards: tuple[SharedBoard, ...], engine: Carrying) -> None:
        self.gather()
        for board in boards:
            if board.run_of is not None:
                board.run_of.gather()
        stacked = {name: _stacked(name, axis, boards) for name, axis in _axes(engine.inputs).items()}
        self._run = engine.begin({name: array for name, array in stacked.items() if array is not None}, {})
        self._boards, self._engine = boards, engine
        for board in boards:
            board.run_of = self

    def _rows(self) -> Mapping[SharedBoard, slice]:
        """Where the images of each board are in the batch."""
        rows, start = dict[SharedBoard, slice](), 0
        for board in self._boards:
            rows[board] = slice(start, start + board.program.images)
            start += board.program.images
        return rows


def _axes(specs: Sequence[TensorSpec]) -> dict[str, int]:
    """The axis of each tensor along which images stand beside each other."""
    return {s.name: next(i for i, length in enumerate(s.shape) if length in ("batch", "images")) for s in specs}


def _part(array: Array, axis: int, rows: slice) -> Array:
    """The images of one board, as an array of its own."""
    own: Array = np.array(array[(slice(None),) * axis + (rows,)])
    return own


def _stacked(name: str, axis: int, boards: Sequence[SharedBoard]) -> Array | None:
    """An input of all boards; zeros for those that have none yet, and None if nobody has it."""
    own = [board.carried.get(name, board.tensors.get(name)) for board in boards]
    first = next((array for array in own if array is not None), None)
    if first is None:
        return None
    shapes = [(*first.shape[:axis], board.program.images, *first.shape[axis + 1 :]) for board in boards]
    arrays = [np.zeros(s, np.float32) if a is None else a for a, s in zip(own, shapes, strict=True)]
    return np.ascontiguousarray(np.concatenate(arrays, axis), np.float32)
