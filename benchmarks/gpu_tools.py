"""What the parts of `gpu.py` share: their options, the bundles they build in, timings, memory and references."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from sdopt import metrics as likeness
from sdopt.bench.built import BuiltSide
from sdopt.bench.cases import Case
from sdopt.bench.sides import Inputs, latents_of
from sdopt.bench.sides import picture as picture_of
from sdopt.bench.timing import Call
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array, Float32
from sdopt.engine.cores import usable_cores
from sdopt.engine.device import shared_device
from sdopt.engine.pool import EnginePool
from sdopt.engine.store import FOLDER
from sdopt.errors import BackendError
from sdopt.image.pil import to_pil
from sdopt.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "engines/emoji"
REFERENCES = ROOT / "benchmarks/references"
POLL_SECONDS = 0.02
MISSING = 4  # the exit code of a part whose environment lacks a library
Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a part is told. It builds in `work`; full-size bundles may be in `models`, skeletons in `skeletons`."""

    part: str
    does: str
    case: Case
    work: Path
    models: Path
    skeletons: Path
    output: Path
    rounds: int
    static: bool = True
    components: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()

    @staticmethod
    def read(path: Path) -> Options:
        given = json.loads(path.read_text())
        changes: dict[str, Any] = {name: Path(given[name]) for name in ("work", "models", "skeletons", "output")}
        changes |= {name: tuple(given[name]) for name in ("components", "baselines") if name in given}
        return Options(**{**given, **changes, "case": Case.from_json(given["case"])})

    @property
    def library(self) -> str:
        return self.case.backend.partition(":")[0]

    @property
    def source(self) -> Path:
        """The model's bundle: the emoji's, an exported one, or one that an earlier part filled with random weights.

        Raises: BackendError saying how there would be one.
        """
        if self.case.model == "emoji":
            return EMOJI / "bundle"
        for path in (self.models / self.case.model / "bundle", self.filled):
            if path.is_dir():
                return path
        raise BackendError(
            f"there is no bundle of {self.case.model}: `benchmarks/models.py` makes one in {self.models}, "
            f"`benchmarks/skeleton.py` one with random weights of the skeleton in {self.skeletons}"
        )

    @property
    def filled(self) -> Path:
        return self.work / f"{self.case.model}-filled"

    @property
    def weights(self) -> str:
        """Whether a picture means anything: of full size there are no trained weights to be had offline."""
        return "trained" if self.case.model == "emoji" else "random"

    @property
    def engines(self) -> Path:
        """The bundle in which engines of this way are; those of the first way are in a filled one itself."""
        if self.static and self.case.precision == "fp16" and self.filled.is_dir() and self.source == self.filled:
            return self.filled
        way = "static" if self.static else "dynamic"
        return self.work / f"{self.case.model}-{self.library}-{way}-{self.case.precision}"

    @property
    def profile(self) -> str:
        """The sizes that engines are built for, as `sdopt build --profile` takes them: this one, or up to half more."""
        case = self.case
        if self.static:
            return f"batch={case.batch} height={case.height} width={case.width}"
        edges = {"height": case.height, "width": case.width}
        return f"batch=1:{case.batch}:4 " + " ".join(f"{n}={edge}:{edge}:{edge * 3 // 2}" for n, edge in edges.items())


def prepared(o: Options) -> Path:
    """The bundle for a part's engines, copied where it is not the source itself.

    It cannot be of links: what reads weights refuses files that have several names.
    """
    if o.engines.is_dir():
        return o.engines
    temporary = o.engines.with_name(f".{o.engines.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(o.source, temporary, ignore=shutil.ignore_patterns(FOLDER))
    temporary.rename(o.engines)
    return o.engines


class Watch:
    """The most memory that is in use on the GPU beyond what was in the beginning: asked until it is stopped."""

    def __init__(self) -> None:
        self._cuda = shared_device().cuda
        self.device = self._cuda.gpu.name
        self._free, self._done = [self._now()], threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _now(self) -> int:
        with self._cuda.current():
            return self._cuda.memory()[0]

    def _ask(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self._free.append(self._now())

    def stop(self) -> None:
        """Ask no more, so that what is timed next is not disturbed."""
        if not self._done.is_set():
            self._free.append(self._now())
            self._done.set()
            self._thread.join()

    @property
    def peak(self) -> int:
        return max(0, self._free[0] - min(self._free))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()


@dataclass
class Measured:
    """An opened side, what was found of it so far, and its memory, which is watched until the first timing."""

    side: BuiltSide
    watch: Watch
    found: Result = field(default_factory=dict[str, Any])

    def time(self, calls: Mapping[str, Call], rounds: int) -> None:
        self.found["seconds"] = timings(calls, rounds, self.watch.stop)

    def loops(self, given: Inputs, rounds: int) -> None:
        """The fused loop: the host's seconds a step without events, then the GPU's from launch to launch with them."""
        self.side.loop(given, marks=False)
        self.watch.stop()
        plain = [self.side.loop(given, marks=False) for _ in range(rounds)]
        marked = [self.side.loop(given) for _ in range(min(rounds, 3))]
        self.found["loop"] = {
            "host_step": [seconds for times in plain for seconds in times.host],
            "device_step": [seconds for times in marked for seconds in times.device or ()],
            "seconds": [times.seconds for times in plain],
        }


@contextmanager
def measured(o: Options) -> Generator[Measured]:
    """The fused engines of a part, open."""
    with Watch() as watch:
        started = time.perf_counter()
        side = BuiltSide(o.case, o.engines, usable_cores())
        m = Measured(side, watch, {"device": watch.device, "load_seconds": time.perf_counter() - started})
        m.found |= {"weights": o.weights, "precision": side.precision, "note": side.note}
        try:
            yield m
        finally:
            side.close()
            m.found["peak_device_bytes"] = watch.peak


def timings(calls: Mapping[str, Call], rounds: int, ready: Callable[[], None] = lambda: None) -> Result:
    """Seconds of every call and of its parts; the first two of each, which warm up and capture, are `NAME.first`."""
    seconds: dict[str, list[float]] = {}
    for name, call in calls.items():
        seconds[f"{name}.first"] = [call().seconds for _ in range(2)]
    ready()
    for name, call in calls.items():
        for sample in (call() for _ in range(rounds)):
            for key, value in ((name, sample.seconds), *((f"{name}.{p}", v) for p, v in sample.parts.items())):
                seconds.setdefault(key, []).append(value)
    return seconds


def random_inputs(bundle: Bundle, case: Case) -> Inputs:
    """Latents and the UNet's inputs from a generator, so that the UNet alone is needed."""
    rng, latents = np.random.default_rng(1), latents_of(case, bundle)
    rows = case.batch * (2 if case.guided else 1)
    tokens = max(entry.max_length for entry in bundle.manifest.tokenizers.values())
    size = [case.height, case.width]
    arrays: dict[str, Float32] = {
        "sample": np.concatenate([latents] * (rows // case.batch)),
        "timestep": np.full(rows, 500, np.float32),
        "time_ids": np.tile(np.array([*size, 0, 0, *size], np.float32), (rows, 1)),
    }
    specs = bundle.component("unet").inputs
    for spec in specs:
        if spec.name not in arrays:
            lengths = {d: tokens if d == "tokens" else rows for d in spec.shape if isinstance(d, str)}
            arrays[spec.name] = rng.standard_normal(spec.sized(lengths), np.float32)
    return Inputs(latents, {spec.name: arrays[spec.name] for spec in specs})


def against_reference(o: Options, made: Array | None) -> Result:
    """The likeness of a picture to the one that ONNX Runtime computes in float32: stored, or made now."""
    path = REFERENCES / f"{o.case.model}-{o.case.width}x{o.case.height}-{o.case.steps}.npz"
    if made is None:
        return {"picture_db": None, "reference": "none: no picture was made"}
    if path.is_file():
        held = np.load(path)
        if str(held["of"]) == what(o.case, o.source):
            return {"picture_db": likeness.psnr(held["picture"].astype(np.float64), made, 1.0), "reference": path.name}
    if importlib.util.find_spec("onnxruntime") is None:
        return {"picture_db": None, "reference": "none: onnxruntime is not installed, and no picture is stored"}
    return {"picture_db": likeness.psnr(reference(o.case, o.source), made, 1.0), "reference": "ort:cpu"}


def reference(case: Case, bundle: Path) -> Array:
    """The case's picture by ONNX Runtime on the processor, in float32."""
    with Pipeline(EnginePool(Bundle.open(bundle), "ort:cpu")) as pipe:
        return picture_of(pipe, case, latents_of(case, pipe.bundle))


def store_reference(case: Case, bundle: Path) -> Path:
    """Keep the picture for machines without ONNX Runtime; float16 is nearer to it than 70 dB."""
    path = REFERENCES / f"{case.model}-{case.width}x{case.height}-{case.steps}.npz"
    path.parent.mkdir(exist_ok=True)
    made = reference(case, bundle).astype(np.float16)
    np.savez_compressed(path, picture=made, of=what(case, bundle))
    return path


def what(case: Case, bundle: Path) -> str:
    """What decides a picture, as text: the bundle's files and the request."""
    request = [case.width, case.height, case.steps, case.guidance, case.batch, case.prompt]
    return json.dumps([Bundle.open(bundle, verify=False).digest, *request])


def save(path: Path, images: Array) -> None:
    """The first of pictures in 0..1, as PNG."""
    to_pil(np.moveaxis(np.asarray(images, np.float32) * 2 - 1, -1, 1))[0].save(path)


class MissingError(BackendError):
    """This environment lacks what a part is made of; nothing is wrong with the part."""


def need(*modules: str) -> None:
    """Raises: MissingError where a module is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingError(f"{sys.executable} has no {', '.join(missing)}, which this part needs")
