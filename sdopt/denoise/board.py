"""The board of a request: its named tensors, where the engines compute, and what its launches do with them.

    board["sample"]                the latents now; writing them steers the loop
    board.run(k)                   the launches of call k (see `sdopt.denoise.program`)
    board.step(k)                  what call k gave, by name: "next_sample", "denoised"

On a `HostBoard` tensors are NumPy arrays. On a `DeviceBoard` they stay on the device: an output becomes an input by its
name, of the same engine or of another one, and visits the host when it is asked for, and not otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, cast

import numpy as np

from sdopt.bundle.joined import picture_input
from sdopt.bundle.specs import Array, Float32, Scalar
from sdopt.dataclass import dataclass
from sdopt.denoise.cache import Keep, halves
from sdopt.denoise.conditions import Call, Conditions
from sdopt.denoise.control import Model
from sdopt.denoise.features import lacking
from sdopt.denoise.model import Predict
from sdopt.denoise.program import Advance, Fused, Launch, Program, Restore
from sdopt.denoise.start import Canvas, Draw
from sdopt.engine import Carrying, Engine, Run
from sdopt.engine.finite import refuse_nan
from sdopt.errors import NumericsError, UsageError

Data = Callable[[str], Float32]


class Board(Protocol):
    """What the loop needs of a board."""

    def run(self, k: int) -> None:
        """The launches of call `k`, on the sample as it is now, whoever changed it."""
        ...

    def step(self, k: int) -> Data:
        """What call `k` gave, by name."""
        ...

    def end(self) -> None:
        """The loop ends here: keep what may still be asked for of its last step."""
        ...

    def close(self) -> None: ...


class HostBoard:
    """A board of NumPy arrays."""

    def __init__(
        self, program: Program, engines: Mapping[str, Engine], canvas: Canvas, conditions: Conditions, draw: Draw
    ) -> None:
        self.program, self.canvas, self.conditions, self._draw = program, canvas, conditions, draw
        table, images = program.table, program.images
        self._c_in: list[Scalar] = table.c_in.tolist()
        self._calls = [
            Call(np.full(images, timestep, np.float32), (scale,) * images, conditions, controls, told * images)
            for timestep, scale, controls, told in zip(
                table.timestep, program.scales, program.controls, program.told_scales, strict=True
            )
        ]
        self.sample, self.denoised, self.prediction = canvas.sample, canvas.sample, canvas.sample
        self._history = tuple[Float32, ...]()
        self.deep: Float32 | None = None  # of the latest full call of a feature cache; see `Call`
        self._where = [f"{program.denoiser}, step {k + 1} of {len(table)}" for k in range(len(table))]
        self._engines = engines
        # Functions and not methods of this board, which would keep it and its engine alive in a cycle.
        after: dict[Launch, Callable[[HostBoard, int], None]] = {
            Advance(): HostBoard._advance,
            Restore(): HostBoard._restore,
        }
        self._after = [[after[launch] for launch in launches[1:]] for launches in program.launches]

    def run(self, k: int) -> None:
        (error,) = predict_together([self], [k], self.conditions)
        if error is not None:
            raise error
        self.finish(k)

    def finish(self, k: int) -> None:
        """The launches of call `k` that follow the prediction."""
        for launch in self._after[k]:
            launch(self, k)

    def model(self, k: int, keep: Keep, engines: Mapping[str, Engine] | None = None) -> Model:
        """The UNet as call `k` asks for it, on these engines or on the board's own; for `keep` see `Predict`."""
        return self._predict(k).model(self._engines if engines is None else engines, keep)

    def _predict(self, k: int) -> Predict:
        launch = self.program.launches[k][0]
        assert isinstance(launch, Predict)  # a host board's calls begin so
        return launch

    def model_input(self, k: int) -> Float32:
        """The sample, scaled for the UNet."""
        return self.sample * self._c_in[k]

    def call(self, k: int) -> Call:
        """What the model is told in call `k`."""
        cached = self._predict(k).cached
        return replace(self._calls[k], deep=self.deep) if cached is not None and cached.takes else self._calls[k]

    def predicted(self, k: int, prediction: Float32) -> None:
        """Take the model's prediction of call `k`. Raises: NumericsError where it is not finite."""
        refuse_nan(prediction, self._where[k])
        self.prediction = prediction

    def _advance(self, k: int) -> None:
        table, sample, prediction = self.program.table, self.sample, self.prediction
        self.denoised = table.clean(k, sample, prediction)
        noise = self._draw() if table.draws[k] else None
        self.sample, self._history = table.advance(k, sample, prediction, self._history, noise)

    def _restore(self, k: int) -> None:
        self.sample = self.canvas.restore_unmasked(self.program.table, k, self.sample)

    def step(self, k: int) -> Data:
        return {"next_sample": self.sample, "denoised": self.denoised}.__getitem__

    def end(self) -> None: ...

    def close(self) -> None: ...


def predict_together(
    boards: Sequence[HostBoard],
    calls: Sequence[int],
    conditions: Conditions,
    engines: Mapping[str, Engine] | None = None,
) -> list[NumericsError | None]:
    """One call of the model for several requests, each at a call of its own; `conditions` are theirs, stacked.

    Every image is a row of the batch, so that what it gets is what it would get alone. `engines`: those to call, by
    component; without them those of the first board. An error stands at the place of a request whose prediction is
    not finite.
    """
    pairs = list(zip(boards, calls, strict=True))
    kept: list[Float32] = []
    model = boards[0].model(calls[0], kept.append, engines)
    call = Call.stacked([board.call(k) for board, k in pairs], conditions)
    predictions = model(np.concatenate([board.model_input(k) for board, k in pairs]), call)
    ends = np.cumsum([board.program.images for board in boards])[:-1]
    if kept:
        for board, deep in zip(boards, np.split(halves(kept, len(predictions)), ends, axis=1), strict=True):
            board.deep = np.array(deep)
    errors: list[NumericsError | None] = []
    for (board, k), prediction in zip(pairs, np.split(predictions, ends), strict=True):
        try:
            board.predicted(k, prediction)
            errors.append(None)
        except NumericsError as error:
            errors.append(error)
    return errors


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request that is ready for its loop; `draw` gives the noise of its calls, so that it makes one board."""

    program: Program
    canvas: Canvas
    conditions: Conditions
    draw: Draw

    def board(self, engines: Mapping[str, Engine]) -> HostBoard | DeviceBoard:
        """The board on which the program runs with these engines, by component."""
        if self.program.fused:
            return DeviceBoard(self.program, engines, self.canvas, self.conditions, self.draw)
        return HostBoard(self.program, engines, self.canvas, self.conditions, self.draw)


class DeviceBoard:
    """A board on a device, where each engine that is launched has a run.

    An output of one engine that has the name of another one's input is given on to it there, without the host.
    """

    def __init__(
        self, program: Program, engines: Mapping[str, Engine], canvas: Canvas, conditions: Conditions, draw: Draw
    ) -> None:
        self.program, self._canvas, self._draw = program, canvas, draw
        self._runs = dict[str, Run]()
        tensors = tensors_of(canvas, conditions)
        tables = program.tables()
        carrying = {name: cast(Carrying, engine) for name, engine in engines.items()}
        try:
            for name, engine in carrying.items():
                inputs = {spec.name for spec in engine.inputs}
                own = {n: np.ascontiguousarray(a, np.float32) for n, a in tensors.items() if n in inputs}
                own |= lacking(engine.inputs, own)
                rows = {n: table for n, table in tables.items() if n in inputs}
                self._runs[name] = engine.begin(own, rows)
            self._inputs = {name: {spec.name for spec in engine.inputs} for name, engine in carrying.items()}
            self._feed(carrying)
        except BaseException:
            self.close()
            raise
        self._step: _Kept | None = None
        # Functions and not methods of this board, which would keep it and its engines alive in a cycle.
        fused = {Fused(name): partial(DeviceBoard._launch, name=name) for name in self._runs}
        launches: dict[Launch, Callable[[DeviceBoard, int], None]] = {**fused, Restore(): DeviceBoard._restore}
        self._launches = [[launches[launch] for launch in of_call] for of_call in program.launches]

    def _feed(self, engines: Mapping[str, Carrying]) -> None:
        """Outputs of one engine become the inputs of others that have their name, or the name they are carried as."""
        for name, engine in engines.items():
            for output in engine.outputs:
                given = engine.carry.get(output.name, output.name)
                for other, inputs in self._inputs.items():
                    if other != name and given in inputs:
                        self._runs[name].feed(output.name, self._runs[other], given)

    def run(self, k: int) -> None:
        if self._step is not None:
            self._steer(self._step)
        for launch in self._launches[k]:
            launch(self, k)

    def _launch(self, k: int, name: str) -> None:
        """Call `k` of an engine that makes a whole step."""
        run, table = self._runs[name], self.program.table
        noise = {"noise": self._draw()} if table.draws[k] else {}
        if self._step is not None:  # nobody can tell what the device holds of it, should the launch fail
            self._step.gone = True
        run.launch(k, **noise)
        self._step = _Kept(run, k, len(table))

    def _restore(self, k: int) -> None:
        step = self._now()
        step.change(self._canvas.restore_unmasked(self.program.table, k, step.array("next_sample")))
        self._steer(step)

    def step(self, k: int) -> Data:
        return self._now().array

    def end(self) -> None:
        if self._step is not None:
            self._step.keep()

    def close(self) -> None:
        for run in self._runs.values():
            run.close()

    def _now(self) -> _Kept:
        assert self._step is not None  # the first launch of a call makes it
        return self._step

    def _steer(self, step: _Kept) -> None:
        """Send the sample back if somebody changed it."""
        sample = step.changed()
        if sample is None:
            return
        for name, run in self._runs.items():
            if "sample" in self._inputs[name]:
                run.put("sample", sample)


class _Kept:
    """What was fetched of a step that is on the device, for as long as it is the latest."""

    def __init__(self, run: Run, k: int, of: int) -> None:
        self._run, self._k, self._of = run, k, of
        self.gone = False
        self._fetched: dict[str, Float32] = {}  # as it is on the device
        self._given: dict[str, Float32] = {}  # as the caller has it, who may write into the sample

    def array(self, name: str) -> Float32:
        if name in self._given:
            return self._given[name]
        fetched = self._fetch(name)
        refuse_nan(fetched, f"unet, step {self._k + 1} of {self._of}")
        self._given[name] = np.array(fetched)
        return self._given[name]

    def change(self, sample: Float32) -> None:
        """Write into the sample, which the caller may have already."""
        self.array("next_sample")[...] = sample

    def changed(self) -> Float32 | None:
        """The sample, if it is not what the device has."""
        sample = self._given.get("next_sample")
        if sample is None or self.gone or np.array_equal(sample, self._fetched["next_sample"]):
            return None
        self._fetched["next_sample"] = sample.copy()
        return sample

    def keep(self) -> None:
        """Fetch all that may be asked for later."""
        if not self.gone:
            for name in ("next_sample", "denoised"):
                self._fetch(name)

    def _fetch(self, name: str) -> Float32:
        if name in self._fetched:
            return self._fetched[name]
        if self.gone:
            raise UsageError(
                f"step {self._k + 1} of {self._of}: its data was on the GPU until the next step; "
                "read step.sample or step.denoised while it is the latest"
            )
        self._fetched[name] = cast(Float32, self._run.fetch(name))
        return self._fetched[name]


def tensors_of(canvas: Canvas, conditions: Conditions) -> dict[str, Array]:
    """What a board begins with, by name."""
    negative = conditions.cond if conditions.negative is None else conditions.negative
    extra: dict[str, Array] = {} if conditions.extra is None else {"extra": conditions.extra}
    negatives = {f"negative_{name}": array for name, array in negative.items()}
    pictures = {picture_input(name): array for name, array in conditions.pictures.items()}
    return {"sample": canvas.sample, **conditions.cond, **negatives, **extra, **pictures, **conditions.features}
