"""A plan on the GPU: TensorRT's engine, the memory of its weights, and one execution context for each set of shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdopt.bundle.disk import MAX_CACHED_BYTES, read_cached, user_folder, write_cached
from sdopt.engine.bound_context import BoundContext
from sdopt.engine.cuda_errors import OutOfMemoryError
from sdopt.engine.device import Device
from sdopt.engine.store import Record
from sdopt.engine.trt_api import LoadedPlan, TensorRT
from sdopt.errors import BackendError

MAX_COMPILED = 100  # files of compiled kernels in this user's folder: one for each engine and GPU
MAX_IDLE = 4  # contexts that a plan keeps for shapes that may come again

Dims = tuple[tuple[str, int], ...]
Change = Callable[[LoadedPlan], None]


class Loaded:
    """One plan, loaded. Its methods need the device's lock; it is a `sdopt.engine.device.Holder`.

    `change`: gives the engine other weights, before anything runs.

    Raises: OutOfMemoryError where the GPU is full; BackendError with what TensorRT logged.
    """

    def __init__(
        self,
        lib: TensorRT,
        device: Device,
        plan: Any,
        record: Record,
        cache: bool = True,
        change: Change | None = None,
    ) -> None:
        self.name, self.record, self.device, self._lib = record.component, record, device, lib
        self._idle: dict[Dims, list[BoundContext]] = {}
        self._busy: set[BoundContext] = set()
        self._closing = False
        self._runtime = lib.runtime()
        before, _ = device.cuda.memory()
        self._plan: LoadedPlan | None = self._load(plan, change)
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

    def _load(self, plan: Any, change: Change | None) -> LoadedPlan:
        """The engine of a plan. An engine that streams its weights takes no memory for them yet."""

        def load() -> LoadedPlan:
            loaded = self._lib.load(self._runtime, plan, self.name)
            if change is not None:
                change(loaded)
            return loaded

        try:
            return self.device.with_room(load)
        except OutOfMemoryError as error:
            raise self.device.full(self.name, len(plan), str(error)) from error

    @property
    def busy(self) -> bool:
        """Whether a call or a run still uses this plan."""
        return bool(self._busy)

    def _check(self, plan: LoadedPlan) -> None:
        """Raises: BackendError unless the engine has the tensors and the profiles of its record."""
        for inputs, specs in ((True, self.record.inputs), (False, self.record.outputs)):
            actual = set(plan.names(inputs))
            if actual != {spec.name for spec in specs}:
                raise BackendError(
                    f"{self.name}: the engine has {sorted(actual)}, its record says otherwise; build it again: "
                    f"{self.record.rebuild_command}"
                )
        if plan.profiles != len(self.record.profiles):
            raise BackendError(
                f"{self.name}: the engine has {plan.profiles} profiles, its record {len(self.record.profiles)}; build "
                f"it again: {self.record.rebuild_command}"
            )

    def take(self, profile: int, dims: Mapping[str, int]) -> BoundContext:
        """An idle context for these lengths, or a new one."""
        key = _key(dims)
        idle = self._idle.get(key)
        context = idle.pop() if idle else self._new_context(profile, dims)
        if idle == []:
            del self._idle[key]
        self._busy.add(context)
        return context

    def _new_context(self, profile: int, dims: Mapping[str, int]) -> BoundContext:
        assert self._plan is not None
        plan, record = self._plan, self.record
        inputs = {spec.name: (spec, spec.sized(dims), plan.dtype(spec.name)) for spec in record.inputs}
        outputs = {spec.name: (spec, plan.dtype(spec.name)) for spec in record.outputs}
        context = self.device.with_room(lambda: plan.context(self._compiled.config))
        return BoundContext(self.device, self.name, context, profile, inputs, outputs, record.carry)

    def give_back(self, dims: Mapping[str, int], context: BoundContext) -> None:
        """Keep the context for the next call with these lengths. Beyond MAX_IDLE the longest idle one is closed."""
        self._busy.discard(context)
        if self._plan is None or self._closing:
            context.close()
            if not self._busy:
                self.close()
            return
        self._compiled.keep()
        contexts = self._idle.pop(_key(dims), [])
        self._idle[_key(dims)] = [*contexts, context]  # the latest shape is last
        if sum(map(len, self._idle.values())) > MAX_IDLE:
            oldest = next(iter(self._idle))
            self._idle[oldest].pop(0).close()
            self._idle = {key: contexts for key, contexts in self._idle.items() if contexts}

    def trim(self) -> None:
        """Close the idle contexts."""
        for contexts in self._idle.values():
            for context in contexts:
                context.close()
        self._idle.clear()

    def close_when_idle(self) -> None:
        """Close now, or when the last call or run is over."""
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
        for context in self._busy:  # of runs that were never closed
            context.close()
        self._busy.clear()
        self._compiled = Compiled(None, None)  # it must go before the engine that made it
        self._plan = self._runtime = None
        self.device.account(self.name, -self._bytes)
        self.device.forget(self)


def _key(dims: Mapping[str, int]) -> Dims:
    return tuple(sorted(dims.items()))


class Compiled:
    """The kernels that TensorRT-RTX compiles for this GPU when a context is made, kept in a file for the next process.

    TensorRT compiles when it builds: it needs no file.
    """

    def __init__(self, plan: LoadedPlan | None, path: Path | None) -> None:
        self.config: Any = None if plan is None else plan.runtime_config()
        create = getattr(self.config, "create_runtime_cache", None)
        self._cache: Any = None if create is None or path is None else create()
        self._path, self._kept = path, b""
        if self._cache is None or path is None:
            return
        with suppress(OSError):
            self._kept = read_cached(path, MAX_CACHED_BYTES)
            self._cache.deserialize(self._kept)  # a file of another driver or version is ignored
        self.config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what was compiled since. A cache that cannot be written is no reason to lose a picture."""
        if self._cache is None or self._path is None:
            return
        memory = self._cache.serialize()
        blob = b"" if memory is None else bytes(memory)
        if not blob or blob == self._kept:
            return
        self._kept = blob
        with suppress(OSError):
            write_cached(self._path, blob, MAX_COMPILED)


def _compiled_path(record: Record, device: Device) -> Path | None:
    """The file of compiled kernels; None if this user has no folder for it."""
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{record.key}-{device.cuda.gpu.name}")
    try:
        return user_folder("XDG_CACHE_HOME", ".cache") / "compiled" / f"{name}.cache"
    except BackendError:
        return None
