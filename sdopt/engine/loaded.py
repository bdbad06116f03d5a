"""A plan on the GPU: TensorRT's engine, the memory of its weights, and lanes for the shapes that it was called with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdopt.bundle.disk import user_folder, write_cached
from sdopt.engine.cuda import OutOfMemoryError
from sdopt.engine.device import Device
from sdopt.engine.lane import Lane
from sdopt.engine.store import Record
from sdopt.engine.trt_api import LoadedPlan, TensorRT
from sdopt.errors import BackendError

MAX_IDLE = 4  # lanes that a plan keeps for shapes that may come again

Dims = tuple[tuple[str, int], ...]


class Loaded:
    """One plan, loaded. Its methods are called with the device's lock held; it is a `sdopt.engine.device.Holder`.

    Raises: OutOfMemoryError where the GPU is full; BackendError with what TensorRT logged.
    """

    def __init__(self, lib: TensorRT, device: Device, plan: Any, record: Record, cache: bool = True) -> None:
        self.name, self.record, self.device, self._lib = record.component, record, device, lib
        self._idle: dict[Dims, list[Lane]] = {}
        self._busy: set[Lane] = set()
        self._closing = False
        self._runtime = lib.runtime()
        before, _ = device.cuda.memory()
        self._plan: LoadedPlan | None = self._load(plan)
        if record.options.get("weight_streaming"):
            lib.stream_weights(self._plan)
        self._bytes = max(0, before - device.cuda.memory()[0])
        device.account(self.name, self._bytes)
        device.register(self)
        try:
            self._check(self._plan)
            self._compiled = Compiled(self._plan, _compiled_path(record, device) if cache else None)
        except BaseException:
            self.close()
            raise

    def _load(self, plan: Any) -> LoadedPlan:
        """The engine of a plan. One that streams its weights takes no memory yet, whatever their size."""
        try:
            return self.device.with_room(lambda: self._lib.load(self._runtime, plan, self.name))
        except OutOfMemoryError as error:
            raise self.device.full(self.name, len(plan), str(error)) from error

    @property
    def busy(self) -> bool:
        """Whether a call or a run is not over yet."""
        return bool(self._busy)

    def _check(self, plan: LoadedPlan) -> None:
        for inputs, specs in ((True, self.record.inputs), (False, self.record.outputs)):
            actual = set(plan.names(inputs))
            if actual != {s.name for s in specs}:
                raise BackendError(
                    f"{self.name}: the engine has {sorted(actual)}, its record says otherwise; build it again: "
                    f"{self.record.rebuild_command}"
                )
        if plan.profiles != len(self.record.profiles):
            raise BackendError(
                f"{self.name}: the engine has {plan.profiles} profiles, its record {len(self.record.profiles)}; build "
                f"it again: {self.record.rebuild_command}"
            )

    def take(self, profile: int, dims: Mapping[str, int]) -> Lane:
        """An idle lane for these lengths, or a new one."""
        key = _key(dims)
        lanes = self._idle.get(key)
        lane = lanes.pop() if lanes else self._new_lane(profile, dims)
        if lanes == []:
            del self._idle[key]
        self._busy.add(lane)
        return lane

    def _new_lane(self, profile: int, dims: Mapping[str, int]) -> Lane:
        assert self._plan is not None
        plan, record = self._plan, self.record
        inputs = {s.name: (s, s.sized(dims), plan.dtype(s.name)) for s in record.inputs}
        outputs = {s.name: (s, plan.dtype(s.name)) for s in record.outputs}
        context = self.device.with_room(lambda: plan.context(self._compiled.config))
        return Lane(self.device, self.name, context, profile, inputs, outputs, record.carry)

    def give_back(self, dims: Mapping[str, int], lane: Lane) -> None:
        """Keep the lane for the next call with these lengths; of too many the one that idled longest goes."""
        self._busy.discard(lane)
        if self._plan is None or self._closing:
            lane.close()
            if not self._busy:
                self.close()
            return
        self._compiled.keep()
        lanes = self._idle.pop(_key(dims), [])
        self._idle[_key(dims)] = [*lanes, lane]  # the latest shape stands last
        if sum(map(len, self._idle.values())) > MAX_IDLE:
            oldest = next(iter(self._idle))
            self._idle[oldest].pop(0).close()
            self._idle = {key: lanes for key, lanes in self._idle.items() if lanes}

    def trim(self) -> None:
        """Close the lanes that are idle."""
        for lanes in self._idle.values():
            for lane in lanes:
                lane.close()
        self._idle.clear()

    def close_when_idle(self) -> None:
        """Close now, or, where a run is not over yet, when it is."""
        self._closing = True
        if self._busy:
            self.trim()
        else:
            self.close()

    def close(self) -> None:
        """Free everything."""
        if self._plan is None:
            return
        self.trim()
        for lane in self._busy:  # of runs that nobody closed
            lane.close()
        self._busy.clear()
        self._compiled = Compiled(None, None)  # before the engine that made it
        self._plan = self._runtime = None
        self.device.account(self.name, -self._bytes)
        self.device.forget(self)


def _key(dims: Mapping[str, int]) -> Dims:
    return tuple(sorted(dims.items()))


class Compiled:
    """What TensorRT-RTX compiles for this GPU when a context is made, kept in a file for the next process.

    Other libraries compile when they build; for them there is no file, and `config` is None.
    """

    def __init__(self, plan: LoadedPlan | None, path: Path | None) -> None:
        self.config: Any = None if plan is None else plan.runtime_config()
        create = getattr(self.config, "create_runtime_cache", None)
        self._cache: Any = None if create is None or path is None else create()
        self._path, self._kept = path, b""
        if self._cache is None or path is None:
            return
        with suppress(OSError):
            self._kept = path.read_bytes()
            self._cache.deserialize(self._kept)  # False, and nothing else, for one of another driver or version
        self.config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what was compiled since; a cache that cannot be written is no reason to lose a picture."""
        if self._cache is None or self._path is None:
            return
        memory = self._cache.serialize()
        blob = b"" if memory is None else bytes(memory)
        if not blob or blob == self._kept:
            return
        self._kept = blob
        with suppress(OSError):
            write_cached(self._path, blob)


def _compiled_path(record: Record, device: Device) -> Path | None:
    """The file; None where this user has no folder for it."""
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{record.key}-{device.cuda.gpu.name}")
    try:
        return user_folder("XDG_CACHE_HOME", ".cache") / "compiled" / f"{name}.cache"
    except BackendError:
        return None
