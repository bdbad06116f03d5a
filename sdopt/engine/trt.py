"""TensorRT and TensorRT-RTX: engines that `sdopt build` made, run from NumPy arrays by name.

    host      staging (pinned) --upload--+                    +--download--> staging
    GPU                                  v                    |
              inputs | rows --> [ one CUDA graph: the engine, then carried outputs back to their inputs ] --> outputs

An engine keeps a lane (`sdopt.engine.lane`) for every set of shapes that it was called with, so that a shape that was
seen before costs nothing. Scratch memory is the device's arena, which all engines share. Between `launch`es the host
waits for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np

from sdopt.bundle import Bundle
from sdopt.engine import How
from sdopt.engine.cuda import LostContextError
from sdopt.engine.device import Device, shared_device
from sdopt.engine.lane import Lane
from sdopt.engine.plans import PLAN, Record, find
from sdopt.engine.trt_api import LoadedPlan, TensorRT, environment
from sdopt.errors import BackendError, UsageError
from sdopt.specs import Array, check_begin, check_inputs

MAX_IDLE = 4  # lanes that an engine keeps for shapes that may come again

Dims = tuple[tuple[str, int], ...]


def open_component(bundle: Bundle, name: str, how: How) -> TrtEngine:
    """The engine of component `name` that `sdopt build` made for this GPU; `how.device` is its index, "0" if None.

    Raises: BackendError for what is missing here: library, driver, GPU or engine.
    """
    backend, device = how.backend, how.device
    if device is not None and not device.isdecimal():
        raise UsageError(
            f"backend '{backend}:{device}' is not known; there are {backend}, {backend}:0, {backend}:1, ..."
        )
    gpu = shared_device(int(device or 0))  # before TensorRT: its runtime would end a process without a driver
    lib = TensorRT(backend)
    stored = find(bundle, name, backend, lambda record: environment(lib, gpu.cuda.gpu, record.options), how.trust)
    plan: Any = np.memmap(stored.checked(PLAN), np.uint8, "r")
    factor: int = bundle.manifest["latents"]["factor"]
    return TrtEngine(lib, gpu, plan, stored.record, {"latent_height": factor, "latent_width": factor})


def describe(backend: str) -> dict[str, Any]:
    """Version, precisions and the GPU, or what is missing for one, for `sdopt doctor`."""
    told: dict[str, Any] = {"precisions": ["float32", "float16", "bfloat16"]}
    try:
        told["devices"] = [shared_device().cuda.gpu.name]
        return {"version": TensorRT(backend).version, **told}
    except BackendError as error:
        return {"version": "installed", **told, "devices": [], "lacks": str(error)}


class TrtEngine:
    """One TensorRT engine behind the Engine contract, with runs that carry their tensors on the GPU."""

    def __init__(
        self, lib: TensorRT, device: Device, plan: Any, record: Record, units: Mapping[str, int] | None = None
    ) -> None:
        self.name, self.inputs, self.outputs = record.component, record.inputs, record.outputs
        self.carry = record.carry
        self.device, self._lib, self._command, self._units = device, lib, record.command, dict(units or {})
        self._idle: dict[Dims, list[Lane]] = {}
        self._plan: LoadedPlan | None = None
        with device.queueing():
            free, _ = device.cuda.memory()
            if free < len(plan):
                raise device.full(self.name, len(plan))
            self._runtime = lib.runtime(device.cuda)
            loaded = lib.load(self._runtime, plan, self.name)
            if record.options.get("weight_streaming"):
                lib.stream_weights(loaded)
            self._bytes = max(0, free - device.cuda.memory()[0])
            device.account(self.name, self._bytes)
        for inputs, specs in ((True, self.inputs), (False, self.outputs)):
            found = set(loaded.names(inputs))
            if found != {s.name for s in specs}:
                raise BackendError(
                    f"{self.name}: the engine has {sorted(found)}, its record says otherwise; build again"
                )
        self._plan, self.profiles = loaded, loaded.profiles(self.inputs)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        dims = check_inputs(self.name, self.inputs, arrays)
        lane = self._take(dims)
        try:
            lane.settle()
            with self.device.queueing():
                for name, array in arrays.items():
                    lane.put(name, array)
                lane.launch()
                lane.start_fetch(tuple(s.name for s in self.outputs))
            self.device.wait(lane.done)
            return {s.name: lane.fetched(s.name) for s in self.outputs}
        finally:
            self._give_back(dims, lane)

    def begin(self, arrays: Mapping[str, Array], tables: Mapping[str, Array]) -> TrtRun:
        """A run whose inputs are `arrays`, rows of `tables`, and zeros.

        Raises: UsageError for an unknown name, a wrong dtype or a wrong shape; before anything runs.
        """
        dims = check_begin(self.name, self.inputs, arrays, tables)
        lane = self._take(dims)
        try:
            lane.settle()
            with self.device.queueing():
                lane.clear()
                for name, array in arrays.items():
                    lane.put(name, array)
                lane.put_tables(tables, max(map(len, tables.values()), default=1))
            return TrtRun(self, dims, lane)
        except BaseException:
            self._give_back(dims, lane)
            raise

    def close(self) -> None:
        """Free the engine, its lanes and their memory."""
        if self._plan is None:
            return
        with suppress(LostContextError), self.device.queueing():  # with its context the memory is gone already
            for lane in (lane for lanes in self._idle.values() for lane in lanes):
                lane.close()
        self._idle.clear()
        self._plan = self._runtime = None
        self.device.account(self.name, -self._bytes)

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, dims: Mapping[str, int]) -> Lane:
        """An idle lane for these lengths, or a new one."""
        if self._plan is None:
            raise UsageError(f"{self.name}: this engine is closed; open it again with open_engine")
        with self.device.queueing():
            idle = self._idle.get(_key(dims))
            return idle.pop() if idle else self._new_lane(self._plan, dims)

    def _new_lane(self, plan: LoadedPlan, dims: Mapping[str, int]) -> Lane:
        profile = self._profile(dims)
        inputs = {s.name: (s, s.sized(dims), plan.dtype(s.name)) for s in self.inputs}
        outputs = {s.name: (s, plan.dtype(s.name)) for s in self.outputs}
        return Lane(self.device, self.name, plan.context(), profile, inputs, outputs, self.carry)

    def _profile(self, dims: Mapping[str, int]) -> int:
        """The index of the profile that takes these lengths, of several the one whose best are nearest.

        Raises: UsageError naming the nearest profile and the command that builds one.
        """
        nearest = min(range(len(self.profiles)), key=lambda i: self.profiles[i].distance(dims))
        profile = self.profiles[nearest]
        outside = profile.outside(dims)
        if outside:
            given = ", ".join(f"{name} = {length}" for name, length in outside.items())
            wanted = {n: d for n, d in dims.items() if n in profile.ranges}
            raise UsageError(
                f"{self.name}: got {given}; the nearest profile of this engine is {profile}. "
                f"Build one that takes it: {self._rebuild(profile.widened(wanted).ranges)}, or use --backend ort"
            )
        return nearest

    def _rebuild(self, ranges: Mapping[str, tuple[int, int, int]]) -> str:
        """The command that built this engine, with a profile of these ranges in the user's units: pixels."""
        words: list[str] = []
        for name, lengths in ranges.items():
            unit = self._units.get(name, 1)
            words.append(f"{name.removeprefix('latent_')}={':'.join(str(n * unit) for n in lengths)}")
        return f'{self._command} --profile "{" ".join(words)}"'

    def _give_back(self, dims: Mapping[str, int], lane: Lane) -> None:
        """Keep the lane for the next call with these lengths; of too many the one that idled longest goes."""
        with self.device.queueing():
            if self._plan is None:
                lane.close()
                return
            lanes = self._idle.pop(_key(dims), [])
            self._idle[_key(dims)] = [*lanes, lane]  # the latest shape stands last
            if sum(map(len, self._idle.values())) > MAX_IDLE:
                oldest = next(iter(self._idle))
                self._idle[oldest].pop(0).close()
                self._idle = {key: lanes for key, lanes in self._idle.items() if lanes}


def _key(dims: Mapping[str, int]) -> Dims:
    return tuple(sorted(dims.items()))


class TrtRun:
    """Calls of a TensorRT engine in turn; see `sdopt.engine.Run`."""

    def __init__(self, engine: TrtEngine, dims: Mapping[str, int], lane: Lane) -> None:
        self._engine, self._dims, self._lane, self._device = engine, dims, lane, engine.device
        self._closed = False

    def launch(self, k: int, **arrays: Array) -> None:
        with self._device.queueing():
            for name, array in arrays.items():
                self._lane.stream_in(k, name, array)
            self._lane.launch(k)

    def fetch(self, name: str) -> Array:
        with self._device.queueing():
            self._lane.start_fetch((name,))
        self._device.wait(self._lane.done)
        return self._lane.fetched(name)

    def put(self, name: str, array: Array) -> None:
        self._lane.settle()
        with self._device.queueing():
            self._lane.put(name, array)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine._give_back(self._dims, self._lane)  # pyright: ignore[reportPrivateUsage]
