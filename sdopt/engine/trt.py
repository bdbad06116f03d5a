"""TensorRT and TensorRT-RTX: engines that `sdopt build` made, run from NumPy arrays by name.

    host      staging (pinned) --upload--+                    +--download--> staging
    GPU                                  v                    |
              inputs | rows --> [ one CUDA graph: the engine, then carried outputs back to their inputs ] --> outputs

A component may have been built more than once, for other sizes: the plan is loaded whose profile fits a call best
(`sdopt.engine.loaded`). A plan keeps an execution context with its buffers and its graph
(`sdopt.engine.bound_context`) for every set of shapes that it was called with, so that a shape that was seen before
costs nothing. Scratch memory is the device's arena, which all engines share. Between `launch`es the host waits for
nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from sdopt.bundle.files import ModelFolder
from sdopt.bundle.specs import Array, Profile, check_begin, check_inputs
from sdopt.engine import EngineOptions, Run
from sdopt.engine.bound_context import BoundContext
from sdopt.engine.cuda_errors import LostContextError, OutOfMemoryError
from sdopt.engine.device import Device, shared_device
from sdopt.engine.loaded import Loaded
from sdopt.engine.refit import OPTION, REFIT, NewWeights, refittable
from sdopt.engine.store import PLAN, Record, Stored, Unsigned, usable
from sdopt.engine.trt_api import TensorRT, environment, imported
from sdopt.engine.widen import widened
from sdopt.errors import BackendError, UsageError

Plan = Stored | Unsigned


def open_component(bundle: ModelFolder, name: str, how: EngineOptions) -> TrtEngine:
    """The engine of component `name` that `sdopt build` made for this GPU; `how.device` is its index, "0" if None.

    Raises: BackendError for what is missing here: library, driver, GPU or engine.
    """
    gpu = shared_device(device_index(how.backend, how.device))  # before TensorRT: its runtime ends a driverless process
    lib = TensorRT(how.backend)
    plans = usable(
        bundle, name, how.backend, lambda record: environment(lib, gpu.cuda.gpu, record.options), how.trust,
        precision=how.built, option=OPTION if how.overlay is not None else "",
        weights=how.overlay.key(name) if how.overlay is not None else "",
    )  # fmt: skip
    factor, weights = bundle.factor, None
    if how.overlay is not None and not plans[0].weights:  # one that was built with it needs nothing
        plans, weights = refittable(plans), NewWeights(bundle, name, how.overlay)
    return TrtEngine(lib, gpu, plans, {"latent_height": factor, "latent_width": factor}, how.cache, weights)


def device_index(backend: str, device: str | None) -> int:
    """The GPU that "tensorrt:1" names, 0 for "tensorrt".

    Raises: UsageError for another word than a number.
    """
    if device is not None and not device.isdecimal():
        raise UsageError(
            f"backend '{backend}:{device}' is not known; there are {backend}, {backend}:0, {backend}:1, ..."
        )
    return int(device or 0)


def describe(backend: str) -> dict[str, Any]:
    """Version, precisions and the GPU, or what is missing for one, for `sdopt doctor`."""
    description: dict[str, Any] = {"precisions": ["fp16", "bf16", "fp32"]}
    version = "installed"
    try:
        version = str(getattr(imported(backend), "__version__", version))
        description["devices"] = [shared_device().cuda.gpu.name]
        return {"version": version, **description}
    except BackendError as error:
        builds = "; `sdopt build` works without: only running needs it" if backend == "tensorrt-rtx" else ""
        return {"version": version, **description, "devices": [], "lacks": f"{error}{builds}"}


class TrtEngine:
    """One component behind the Engine contract, with runs that carry their tensors on the GPU.

    `plans`: what was built of it, the newest first; at least one. They are loaded when a call needs them, the newest at
    once, so that its faults are reported here. `weights`: what their weights become.
    """

    def __init__(
        self,
        lib: TensorRT,
        device: Device,
        plans: Sequence[Plan],
        units: Mapping[str, int] | None = None,
        cache: bool = True,
        weights: NewWeights | None = None,
    ) -> None:
        newest = plans[0].record
        self.name, self.inputs, self.outputs, self.carry = (
            newest.component, newest.inputs, newest.outputs, newest.carry,
        )  # fmt: skip
        signature = (newest.inputs, newest.outputs, newest.carry)
        self._plans = [p for p in plans if (p.record.inputs, p.record.outputs, p.record.carry) == signature]
        self.device, self._lib, self._units, self._cache = device, lib, dict(units or {}), cache
        self._weights = weights
        self._loaded: dict[str, Loaded] = {}  # by the record's key, the one that was used last at the end
        self.precision: str = newest.options.get("precision", "")  # of the plan that was used last
        self._closed = False
        self._finalizer = weakref.finalize(self, _discard, device, self._loaded)
        with device.queueing():
            self._load(self._plans[0])

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The ranges of all plans together, those of the newest plan first."""
        return tuple(profile for plan in self._plans for profile in plan.record.profiles)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        dims = check_inputs(self.name, self.inputs, arrays)
        loaded, context = self._take(dims)
        try:
            with self.device.queueing():
                for name, array in arrays.items():
                    context.put(name, array)
                context.launch()
                context.start_fetch(tuple(s.name for s in self.outputs))
            self.device.wait(context.done)
            return {s.name: context.fetched(s.name) for s in self.outputs}
        finally:
            self.give_back(loaded, dims, context)

    def begin(self, arrays: Mapping[str, Array], tables: Mapping[str, Array]) -> TrtRun:
        """A run whose inputs are `arrays`, rows of `tables`, and zeros.

        Raises: UsageError for an unknown name, a wrong dtype or a wrong shape; before anything runs.
        """
        dims = check_begin(self.name, self.inputs, arrays, tables)
        loaded, context = self._take(dims)
        try:
            with self.device.queueing():
                context.clear()
                for name, array in arrays.items():
                    context.put(name, array)
                context.put_tables(tables, max(map(len, tables.values()), default=1))
            return TrtRun(self, loaded, dims, context, tuple(map(len, tables.values())))
        except BaseException:
            self.give_back(loaded, dims, context)
            raise

    def close(self) -> None:
        """Free the engine, its contexts and their memory. A run that is not over yet keeps its own until it is."""
        self._closed = True
        with suppress(LostContextError), self.device.queueing():  # with its context the memory is gone already
            for loaded in self._loaded.values():
                loaded.close_when_idle()
        self._loaded.clear()

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, dims: Mapping[str, int]) -> tuple[Loaded, BoundContext]:
        """The plan that fits these lengths, and a context of it."""
        plan, profile = self._fitting(dims)
        self.precision = plan.record.options.get("precision", "")
        with self.device.queueing():
            if self._closed:
                raise UsageError(f"{self.name}: this engine is closed; open it again with open_engine")
            loaded = self._load(plan)
            return loaded, loaded.take(profile, dims)

    def _fitting(self, dims: Mapping[str, int]) -> tuple[Plan, int]:
        """The plan and the index of its profile for these lengths: in the newest plan's precision where that is
        possible, then with the nearest best lengths, then the newest.

        Raises: UsageError naming the nearest profile and the command that builds one.
        """
        precision = self._plans[0].record.options.get("precision")

        def rank(choice: tuple[Plan, int]) -> tuple[bool, bool, float]:
            record, profile = choice[0].record, choice[0].record.profiles[choice[1]]
            return bool(profile.outside(dims)), record.options.get("precision") != precision, profile.distance(dims)

        choices = [(plan, i) for plan in self._plans for i in range(len(plan.record.profiles))]
        plan, index = min(choices, key=rank)
        profile = plan.record.profiles[index]
        outside = profile.outside(dims)
        if outside:
            given = ", ".join(f"{name} = {length}" for name, length in outside.items())
            raise UsageError(
                f"{self.name}: got {given}; the nearest profile of this engine is {profile}. "
                f"{self._rebuild(plan.record, index, [dims])} use --backend ort"
            )
        return plan, index

    def _rebuild(self, record: Record, index: int, calls: Sequence[Mapping[str, int]]) -> str:
        """The sentence, up to its "or", that says how to build an engine that takes these calls too."""
        own = record.profiles[index]
        asked = Profile.parse(record.asked[index]) if index < len(record.asked) else Profile({})
        for dims in calls:
            wide = widened(asked, own, dims, self._units)
            if wide is None:
                return "No profile takes it:"
            asked = wide
        return f"Build one that takes it: {record.building([asked])}, or"

    def _load(self, plan: Plan) -> Loaded:
        """A plan that is loaded; where the GPU is full, other plans of this engine that are idle go first."""
        key = plan.record.key
        loaded = self._loaded.pop(key, None)
        if loaded is None:
            try:
                loaded = self._open(plan)
            except OutOfMemoryError:
                idle = [k for k, other in self._loaded.items() if not other.busy]
                if not idle:
                    raise
                for other in idle:
                    self._loaded.pop(other).close()
                loaded = self._open(plan)
        self._loaded[key] = loaded
        return loaded

    def _open(self, plan: Plan) -> Loaded:
        data: Any = np.memmap(plan.checked(PLAN), np.uint8, "r")
        weights, change = self._weights, None
        if weights is not None:
            change = partial(weights.put_into, record=plan.record, file=plan.checked(REFIT))
        return Loaded(self._lib, self.device, data, plan.record, self._cache, change)

    def give_back(self, loaded: Loaded, dims: Mapping[str, int], context: BoundContext) -> None:
        """A call or a run that took this context is over."""
        with suppress(LostContextError), self.device.queueing():
            loaded.give_back(dims, context)


def _discard(device: Device, loaded: dict[str, Loaded]) -> None:
    """What happens to the plans of an engine that nobody closed."""
    for plan in loaded.values():
        device.discard(plan)


class TrtRun:
    """Calls of a TensorRT engine in turn; see `sdopt.engine.Run`."""

    def __init__(
        self, engine: TrtEngine, loaded: Loaded, dims: Mapping[str, int], context: BoundContext, rows: tuple[int, ...]
    ) -> None:
        self._rows = rows  # of each table
        self._name, self._device, self._context = engine.name, engine.device, context
        self._give_back: Callable[[], None] | None = partial(engine.give_back, loaded, dims, context)

    def launch(self, k: int, **arrays: Array) -> None:
        if not 0 <= k < min(self._rows, default=1) and (self._rows or arrays):
            raise UsageError(
                f"{self._name}: there is no call {k}; the tables of this run have {min(self._rows, default=1)} rows"
            )
        with self._queueing():
            for name, array in arrays.items():
                self._context.stream_in(k, name, array)
            self._context.launch(k)

    def fetch(self, name: str) -> Array:
        with self._queueing():
            self._context.start_fetch((name,))
        self._device.wait(self._context.done)
        return self._context.fetched(name)

    def put(self, name: str, array: Array) -> None:
        self._context.settle()
        with self._queueing():
            self._context.put(name, array)

    def feed(self, output: str, to: Run, name: str) -> None:
        if not isinstance(to, TrtRun) or to._device is not self._device:
            raise UsageError(f"{self._name}: {output!r} cannot be given to a run on another device")
        with self._queueing():
            self._context.feed(output, to._context, name)

    def _queueing(self) -> AbstractContextManager[None]:
        if self._give_back is None or self._context.closed:
            raise UsageError(f"{self._name}: this run is over; begin another")
        return self._device.queueing()

    def close(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            self._context.feeds = ()
            give_back()
