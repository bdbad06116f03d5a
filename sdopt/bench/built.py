"""sdopt on engines that `sdopt build` made. A whole step is one launch there, so whole steps are timed.

step        one launch until its output is in NumPy: the UNet, guidance and the sampler's row. Its part `device` is the
            GPU's own time between two CUDA events around the launch.
host_step   the host's time for one step of the fused loop, from launch to launch, without waiting for the GPU
launches    the GPU's time from the end of one launch of the loop to the end of the next, in `LoopTimes`

The parity of a step is that of the UNet's prediction after guidance, which is computed back from `denoised`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from sdopt.bench.cases import Case
from sdopt.bench.sides import Inputs, SdoptSide, embeds_of, options, picture, precision_for
from sdopt.bench.timing import Call, Sample, timed
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Float32, Scalar, TensorSpec
from sdopt.dataclass import dataclass
from sdopt.engine import Carrying, Engine, Run, built_components, choose_backend
from sdopt.engine.pool import EnginePool
from sdopt.engine.store import Record, stored
from sdopt.errors import BackendError, UsageError
from sdopt.pipeline import Pipeline
from sdopt.samplers.packed import SCALARS

STEP, STEP_ALONE = "unet_step", "unet_step_alone"
NOTE = (
    "what is timed as `step` is one launch: UNet, guidance and the sampler's row; its parity is that of the prediction "
    "after guidance"
)


def fused_step(bundle: Bundle, case: Case) -> str | None:
    """The built component that computes whole steps of the case; None if there is none."""
    built = built_components(bundle, choose_backend(case.backend)[0], precision_for(case))
    wanted = (STEP,) if case.guided else (STEP_ALONE, STEP)
    return next((name for name in wanted if name in built), None)


def open_side(case: Case, bundle: Path, threads: int) -> SdoptSide:
    """sdopt on the case's backend, with fused steps if they are built."""
    kind = BuiltSide if fused_step(Bundle.open(bundle, verify=False), case) else SdoptSide
    return kind(case, bundle, threads)


@dataclass(frozen=True)
class LoopTimes:
    """The seconds of one run of the fused loop."""

    host: tuple[float, ...]  # from launch to launch, on the host
    device: tuple[float, ...] | None  # from launch to launch, on the GPU; None if the engine has no GPU
    seconds: float  # of the whole run, with all that comes before the first and after the last launch


class BuiltSide(SdoptSide):
    """sdopt on the fused engines of the case's backend.

    Raises: BackendError if the engines have another precision than the case, with the command that builds them.
    """

    def __init__(self, case: Case, bundle: Path, threads: int) -> None:
        if case.memory != "fast":
            raise UsageError(f"case {case.name!r}: built engines are measured with memory = 'fast'")
        super().__init__(case, bundle, threads)
        name = fused_step(self.bundle, case)
        assert name is not None
        self.step_name = name
        built = built_components(self.bundle, self.backend, precision_for(case))
        records: dict[str, Record] = {}  # of the engines that are used; a newer one replaces an older one
        for engine_stored in reversed(stored(self.bundle, self._library)):
            component = engine_stored.record.component
            if engine_stored.ours and built.get(component) == engine_stored.precision:
                records[component] = engine_stored.record
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
        self.engine_bytes = {
            component: sum(file.bytes for file in entry.files.values()) for component, entry in records.items()
        }
        self._recorder, self._plain_pipe = StartRecorder(engine), self._pipe
        settings: dict[str, Any] = {"precision": precision_for(case), "threads": threads}
        self._pipe = Pipeline(EnginePool(self.bundle, case.backend, **settings, given={self.step_name: self._recorder}))
        self._run: Run | None = None

    @property
    def _library(self) -> str:
        return self._case.backend.partition(":")[0]

    @property
    def pipe(self) -> Pipeline:
        return self._pipe

    def calls(self, inputs: Inputs) -> Mapping[str, Call]:
        case, pipe, clock = self._case, self._pipe, Clock.of(self._recorder)
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
        """The UNet's inputs in the first step of the loop, so that another side can compute the same step."""
        x, row = self._start(inputs)
        images = len(inputs.unet["sample"]) // len(x)
        sample = np.concatenate([x * row["c_in"]] * images)
        times = np.full(len(sample), row["timestep"], np.float32)
        return Inputs(inputs.latents, {**inputs.unet, "sample": sample, "timestep": times})

    def guided(self, prediction: Float32, inputs: Inputs) -> Float32:
        """Another side's prediction of the first step, after guidance."""
        _, row = self._start(inputs)
        if not self._case.guided:
            return prediction
        uncond, cond = np.split(prediction, 2)
        return uncond + row["guidance"] * (cond - uncond)

    def loop(self, inputs: Inputs, marks: bool = True) -> LoopTimes:
        """One run of the fused loop, in which no step is read. With `marks`, a CUDA event follows each launch."""
        clock = Clock.of(self._recorder)
        events = [clock.event() for _ in range(self._length(inputs))] if marks and clock.gpu else []
        started, launched_at = time.perf_counter(), list[float]()
        for k, _ in enumerate(self._steps(inputs)):
            launched_at.append(time.perf_counter())
            if events:
                clock.record(events[k])
        seconds = time.perf_counter() - started
        device = tuple(clock.between(a, b) for a, b in itertools.pairwise(events))
        clock.drop(events)
        return LoopTimes(tuple(np.diff(launched_at).tolist()), device or None, seconds)

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
        super().close()
        self._plain_pipe.close()

    def _steps(self, inputs: Inputs) -> Iterator[Any]:
        """The loop, on the embeddings of `inputs` or, if it has none, on the case's prompt."""
        embeds = embeds_of(self._case, inputs)
        prompt = None if embeds else [self._case.prompt] * self._case.batch
        return self._pipe.denoise(prompt, latents=inputs.latents, **options(self._case), **embeds)

    def _length(self, inputs: Inputs) -> int:
        """How many launches the loop has. Some samplers call the UNet more than once for each step of the case."""
        self._start(inputs)
        return len(self._recorder.tables["row"])

    def _start(self, inputs: Inputs) -> tuple[Float32, Mapping[str, Scalar]]:
        """(the sample, the numbers of the first row) that the loop starts with."""
        steps = cast(Generator[Any], self._steps(inputs))
        next(steps)
        steps.close()
        first_row: list[float] = self._recorder.tables["row"][0][0].tolist()
        return self._recorder.arrays["sample"], dict(zip(SCALARS, first_row, strict=False))

    def _step(self, inputs: Inputs, clock: Clock) -> Call:
        """A timed call that repeats the loop's first launch, each time from the same sample."""
        x, row = self._start(inputs)
        run = self._run = self._recorder.engine.begin(self._recorder.arrays, self._recorder.tables)

        def sample() -> Sample:
            run.put("sample", x)
            started = time.perf_counter()
            with clock.around():
                run.launch(0)
            denoised = cast(Float32, run.fetch("denoised"))
            seconds = time.perf_counter() - started
            return Sample(seconds, (denoised - row["clean_x"] * x) / row["clean_o"], clock.read())

        return sample


class StartRecorder:
    """A fused engine that remembers the arrays and tables that its last loop started with."""

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

    def __enter__(self) -> StartRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Clock:
    """Times on the GPU that an engine computes on, by CUDA events on its stream. Without a GPU it measures nothing."""

    def __init__(self, device: Any) -> None:
        self.gpu: Any = device
        self._ends = [self.event(), self.event()] if device is not None else []

    @staticmethod
    def of(recorder: StartRecorder) -> Clock:
        return Clock(getattr(recorder.engine, "device", None))

    def event(self) -> int:
        with self.gpu.queueing():
            return int(self.gpu.cuda.timing_event())

    def record(self, event: int) -> None:
        with self.gpu.queueing():
            self.gpu.cuda.record(event, self.gpu.stream)

    def between(self, begin: int, end: int) -> float:
        """The seconds from one event to another. It waits until the GPU has reached `end`."""
        self.gpu.wait(end)
        return float(self.gpu.cuda.elapsed(begin, end))

    def drop(self, events: list[int]) -> None:
        for event in events:
            self.gpu.cuda.drop_event(event)

    @contextmanager
    def around(self) -> Generator[None]:
        """A context with an event before and one after what is queued in it. `read` gives the time between them."""
        if self._ends:
            self.record(self._ends[0])
        yield
        if self._ends:
            self.record(self._ends[1])

    def read(self) -> dict[str, float]:
        return {"device": self.between(*self._ends)} if self._ends else {}

    def timed(self, call: Callable[[], Array]) -> Call:
        """`call` as a timed call. Its part `device` includes copies to and from the GPU."""

        def sample() -> Sample:
            started = time.perf_counter()
            with self.around():
                output = call()
            seconds = time.perf_counter() - started
            return Sample(seconds, output, self.read())

        return sample
