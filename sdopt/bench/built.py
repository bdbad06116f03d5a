"""sdopt on engines that `sdopt build` made: a whole step is one launch, so that is what is timed.

step        a launch until its output is in NumPy: the UNet, guidance and the sampler's row. Beside it `device`: the
            GPU's own time between two CUDA events around the launch
host_step   the host's time for a step of the fused loop, from launch to launch; it waits for nothing
launches    the GPU's time from the end of one launch of the loop to the end of the next, in `LoopTimes`

Parity of a step is that of the UNet's prediction after guidance, which is solved for from the step's `denoised`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from sdopt.bench.cases import Case
from sdopt.bench.sides import Inputs, SdoptSide, embeds_of, options, picture, precision_for
from sdopt.bench.timing import Call, Sample, timed
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Float32, Scalar, TensorSpec
from sdopt.engine import Carrying, Engine, Run, built_components, choose_backend
from sdopt.engine.pool import EnginePool
from sdopt.engine.store import stored
from sdopt.errors import BackendError, UsageError
from sdopt.pipeline import Pipeline
from sdopt.samplers.packed import SCALARS

STEP, STEP_ALONE = "unet_step", "unet_step_alone"
NOTE = (
    "what is timed as `step` is one launch: UNet, guidance and the sampler's row; its parity is that of the prediction "
    "after guidance"
)


def fused_step(bundle: Bundle, case: Case) -> str | None:
    """The built component that makes whole steps of the case's picture; None if there is none."""
    built = built_components(bundle, choose_backend(case.backend)[0], precision_for(case))
    wanted = (STEP,) if case.guided else (STEP_ALONE, STEP)
    return next((name for name in wanted if name in built), None)


def open_side(case: Case, bundle: Path, threads: int) -> SdoptSide:
    """sdopt on the case's backend: with fused steps where they are built."""
    kind = BuiltSide if fused_step(Bundle.open(bundle, verify=False), case) else SdoptSide
    return kind(case, bundle, threads)


@dataclass(frozen=True)
class LoopTimes:
    """Seconds of one run of the fused loop: of the host from launch to launch, of the GPU from launch to launch (None
    where the engine has no GPU), and of the whole, with what comes before the first and after the last launch."""

    host: tuple[float, ...]
    device: tuple[float, ...] | None
    seconds: float


class BuiltSide(SdoptSide):
    """sdopt on the fused engines of the case's backend.

    Raises: BackendError where the engines have another precision than the case, with the command that builds them.
    """

    def __init__(self, case: Case, bundle: Path, threads: int) -> None:
        if case.memory != "fast":
            raise UsageError(f"case {case.name!r}: built engines are measured with memory = 'fast'")
        super().__init__(case, bundle, threads)
        name = fused_step(self.bundle, case)
        assert name is not None
        self.step_name = name
        built = built_components(self.bundle, self.backend, precision_for(case))
        mine = [s for s in reversed(stored(self.bundle, self._library)) if s.ours]
        records = {s.record.component: s.record for s in mine if built.get(s.record.component) == s.precision}
        record = records.get(name)
        if record is not None:
            self.precision = str(record.options["precision"])
            if case.precision != self.precision:
                raise BackendError(
                    f"case {case.name!r} is of {case.precision}, and {name} of {bundle} was built in "
                    f"{self.precision}: sdopt build {bundle} --backend {self._library} --precision {case.precision}"
                )
            self.note = f"{NOTE}; built for {'; '.join(map(str, record.profiles))}"
        engine = self._pipe.engine(name)
        gpu = getattr(engine, "device", None)
        self.note += f"; on {gpu.cuda.gpu.name}" if gpu is not None else ""
        self.engine_bytes = {n: sum(file.bytes for file in r.files.values()) for n, r in records.items()}
        self._noted, self._plain = Noted(engine), self._pipe
        how: dict[str, Any] = {"precision": precision_for(case), "threads": threads}
        self._pipe = Pipeline(EnginePool(self.bundle, case.backend, **how, given={self.step_name: self._noted}))
        self._run: Run | None = None

    @property
    def _library(self) -> str:
        return self._case.backend.partition(":")[0]

    @property
    def pipe(self) -> Pipeline:
        return self._pipe

    def calls(self, inputs: Inputs) -> Mapping[str, Call]:
        case, pipe, clock = self._case, self._pipe, Clock.of(self._noted)
        zeros = self.bundle.manifest.conditioning.zeros_for_empty
        texts = [case.prompt, ""] if case.guided and not zeros else [case.prompt]
        latents = inputs.latents
        calls: dict[str, Call] = {
            "text_encoder": clock.timed(lambda: pipe.encode(texts)),
            "step": self._step(inputs, clock),
            "vae_decoder": clock.timed(lambda: pipe.decode(latents, "np")),
            "picture": timed(lambda: picture(pipe, case, latents)),
        }
        if self._length(inputs) > 1:
            calls["host_step"] = lambda: Sample(float(np.mean(self.loop(inputs, marks=False).host)))
        return calls

    def first_inputs(self, inputs: Inputs) -> Inputs:
        """The UNet's inputs in the first step of the loop, for another side to compute what this one's step does."""
        x, row = self._begun(inputs)
        images = len(inputs.unet["sample"]) // len(x)
        sample = np.concatenate([x * row["c_in"]] * images)
        times = np.full(len(sample), row["timestep"], np.float32)
        return Inputs(inputs.latents, {**inputs.unet, "sample": sample, "timestep": times})

    def guided(self, prediction: Float32, inputs: Inputs) -> Float32:
        """Another side's prediction of the first step, after guidance."""
        _, row = self._begun(inputs)
        if not self._case.guided:
            return prediction
        uncond, cond = np.split(prediction, 2)
        return uncond + row["guidance"] * (cond - uncond)

    def loop(self, inputs: Inputs, marks: bool = True) -> LoopTimes:
        """One run of the fused loop, in which nobody reads a step; with `marks`, CUDA events stand between launches."""
        clock = Clock.of(self._noted)
        events = [clock.event() for _ in range(self._length(inputs))] if marks and clock.gpu else []
        started, moments = time.perf_counter(), list[float]()
        for k, _ in enumerate(self._steps(inputs)):
            moments.append(time.perf_counter())
            if events:
                clock.record(events[k])
        seconds = time.perf_counter() - started
        device = tuple(clock.between(a, b) for a, b in itertools.pairwise(events))
        clock.drop(events)
        return LoopTimes(tuple(np.diff(moments).tolist()), device or None, seconds)

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
        super().close()
        self._plain.close()

    def _steps(self, inputs: Inputs) -> Iterator[Any]:
        """The loop on the embeddings of `inputs` or, where it has none, on the case's prompt."""
        embeds = embeds_of(self._case, inputs)
        prompt = None if embeds else [self._case.prompt] * self._case.batch
        return self._pipe.denoise(prompt, latents=inputs.latents, **options(self._case), **embeds)

    def _length(self, inputs: Inputs) -> int:
        """How many launches the loop has: some samplers call the UNet more often than they are asked to."""
        self._begun(inputs)
        return len(self._noted.tables["row"])

    def _begun(self, inputs: Inputs) -> tuple[Float32, Mapping[str, Scalar]]:
        """(the sample, the numbers of the row) that the loop begins with."""
        steps = cast(Generator[Any], self._steps(inputs))
        next(steps)
        steps.close()
        row: list[float] = self._noted.tables["row"][0][0].tolist()
        return self._noted.arrays["sample"], dict(zip(SCALARS, row, strict=False))

    def _step(self, inputs: Inputs, clock: Clock) -> Call:
        """The loop's first launch, again and again, each time from the same sample."""
        x, row = self._begun(inputs)
        run = self._run = self._noted.engine.begin(self._noted.arrays, self._noted.tables)

        def sample() -> Sample:
            run.put("sample", x)
            started = time.perf_counter()
            with clock.around():
                run.launch(0)
            denoised = cast(Float32, run.fetch("denoised"))
            seconds = time.perf_counter() - started
            return Sample(seconds, (denoised - row["clean_x"] * x) / row["clean_o"], clock.read())

        return sample


class Noted:
    """A fused engine that keeps the arrays and tables with which its loop began."""

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine, Carrying):
            raise BackendError("this engine makes no whole steps; build it with `sdopt build`")
        self.engine, self._plain = engine, cast(Engine, engine)
        self.inputs: tuple[TensorSpec, ...] = engine.inputs
        self.outputs: tuple[TensorSpec, ...] = self._plain.outputs
        self.carry: Mapping[str, str] = engine.carry
        self.arrays: Mapping[str, Array] = {}
        self.tables: Mapping[str, Array] = {}

    def begin(self, arrays: Mapping[str, Array], tables: Mapping[str, Array]) -> Run:
        self.arrays, self.tables = dict(arrays), dict(tables)
        return self.engine.begin(arrays, tables)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        return self._plain(**arrays)

    def close(self) -> None:
        self._plain.close()

    def __enter__(self) -> Noted:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Clock:
    """The time of the GPU that an engine computes on, by CUDA events on its stream; without a GPU it tells nothing."""

    def __init__(self, device: Any) -> None:
        self.gpu: Any = device
        self._ends = [self.event(), self.event()] if device is not None else []

    @staticmethod
    def of(noted: Noted) -> Clock:
        return Clock(getattr(noted.engine, "device", None))

    def event(self) -> int:
        with self.gpu.queueing():
            return int(self.gpu.cuda.timing_event())

    def record(self, event: int) -> None:
        with self.gpu.queueing():
            self.gpu.cuda.record(event, self.gpu.stream)

    def between(self, begin: int, end: int) -> float:
        """Seconds from one event to another, both of which the GPU has passed or is waited for."""
        self.gpu.wait(end)
        return float(self.gpu.cuda.elapsed(begin, end))

    def drop(self, events: list[int]) -> None:
        for event in events:
            self.gpu.cuda.drop_event(event)

    @contextmanager
    def around(self) -> Generator[None]:
        """Events before and after what is queued inside; `read` tells their distance once it was waited for."""
        if self._ends:
            self.record(self._ends[0])
        yield
        if self._ends:
            self.record(self._ends[1])

    def read(self) -> dict[str, float]:
        return {"device": self.between(*self._ends)} if self._ends else {}

    def timed(self, call: Callable[[], Array]) -> Call:
        """`call` as a timed one, with its part `device`: copies to and from the GPU are in it."""

        def sample() -> Sample:
            started = time.perf_counter()
            with self.around():
                output = call()
            seconds = time.perf_counter() - started
            return Sample(seconds, output, self.read())

        return sample
