"""The open engines of one bundle: which are open, on which backend, in which precision, under which memory policy.

    pool = EnginePool(bundle, "auto", memory="low")
    with pool.using("unet") as unet:          # opened if it is not; nobody closes it while it is used
        noise = unet(**arrays)["noise_pred"]

A pipeline, a server and the benchmark are given a pool. It is safe for threads: two threads that need the same
component share one engine, and a call keeps the engines it began with. `release`, `close` and the policy "low" retire
engines. A retired engine is closed when its last user is done, or at once if nobody uses it. The next user gets a new
engine. A forked child opens its own engines, and so does a process that a pool is sent to (pickled).
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from threading import Lock, RLock
from time import perf_counter
from types import TracebackType
from typing import Any

from sdopt.bundle.adapter import Adapter, adapter_of, open_adapter
from sdopt.bundle.files import Bundle, ModelFolder
from sdopt.bundle.joined import depth_of
from sdopt.bundle.weights import Overlay
from sdopt.engine import (
    BACKENDS,
    Engine,
    built_components,
    checked_threads,
    choose_backend,
    open_engine,
    told_precision,
    unbuilt_precision,
)
from sdopt.engine.process import inherit
from sdopt.errors import BackendError, UsageError, choices, refuse_no_switch, refuse_other, shown
from sdopt.logs import logger

log = logger(__name__)
MEMORY = ("fast", "low")

Open = Callable[[str], Engine]  # the engine of a component


@dataclass(eq=False)
class _Entry:
    """An open engine and how many use it now."""

    engine: Engine
    weights: str = ""  # the key of its overlay; empty for the bundle's own weights
    users: int = 0
    retired: bool = False


class EnginePool:
    """The engines of `bundle`, each opened when first needed.

    `memory`: "fast" keeps every engine that was opened; "low" retires the others when another one is opened.
    For `backend`, `precision`, `threads`, `trust` and `cache` see `sdopt.engine.open_engine`. `given`: engines by
    component, which the pool uses instead of opening its own; the caller closes them.
    Raises: UsageError for an unknown word; BackendError if the library is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str = "auto",
        *,
        precision: str = "auto",
        memory: str = "fast",
        threads: int | None = None,
        trust: bool = False,
        cache: bool = True,
        given: Mapping[str, Engine] | None = None,
    ) -> None:
        refuse_other("bundle", bundle, Bundle, "are opened bundles: sdopt.Bundle.open(path)")
        if not isinstance(memory, str) or memory not in MEMORY:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"memory = {shown(memory)}; allowed are {choices(memory, MEMORY)}", "memory")
        refuse_no_switch(trust=trust, cache=cache)
        self.bundle, self.memory = bundle, memory
        self.backend, self._own = choose_backend(backend, precision, bundle)
        # Where "auto" takes the backend, pictures are exact, whatever was built since.
        self._requested_precision = self._own if backend == "auto" else precision
        self.threads, self.trust, self.cache = checked_threads(threads), trust, cache
        self._given = dict(given or {})
        self._built = built_components(bundle, self.backend, self._requested_precision, trust)
        self._adapters: dict[str, Adapter] = {}  # those that were opened
        self._built_with: dict[str, str] = {}  # those that were opened with an overlay and exist only with one
        self.forget_parent()
        inherit(self)

    def forget_parent(self) -> None:
        """Begin without an open engine: in a new pool, and in a forked child, where locks may be held by nobody."""
        self._entries: dict[str, _Entry] = {}
        self._lock = RLock()  # of the entries; held for moments only
        # One thread opens a component. In little memory one thread opens any, so that no two stay open.
        one = Lock()
        self._opening: defaultdict[str, Lock] = defaultdict(Lock if self.memory == "fast" else lambda: one)

    def __reduce__(self) -> tuple[Any, ...]:
        """What it was made with; engines are opened anew by whoever unpickles it.

        Raises: UsageError with given engines, which belong to this process.
        """
        if self._given:
            raise UsageError(f"a pool with given engines ({', '.join(self._given)}) cannot be pickled or copied")
        how = {"precision": self._requested_precision, "memory": self.memory, "threads": self.threads}
        make = partial(EnginePool, **how, trust=self.trust, cache=self.cache)
        return make, (self.bundle, self.backend)

    @property
    def runs_only_built(self) -> bool:
        """Whether the backend runs only engines of `sdopt build`."""
        return not BACKENDS[self.backend.partition(":")[0]].precisions

    @property
    def built(self) -> tuple[str, ...]:
        """The components that run from engines of `sdopt build`, or from given ones."""
        return (*self._built, *self._given)

    def built_for(self, overlay: Overlay | None) -> tuple[str, ...]:
        """The same with those engines that were built with this overlay."""
        if overlay is None:
            return self.built
        own = built_components(self.bundle, self.backend, self._requested_precision, self.trust, overlay)
        return (*dict.fromkeys((*self._built, *own)), *self._given)

    @property
    def precision(self) -> str:
        """The precision of the engines that make pictures, e.g. "fp32" or "fp16 (vae_decoder bf16)"."""
        return self.precision_of()

    def precision_of(self, cache_depth: int = 0) -> str:
        """The same of pictures that are made with a feature cache of this depth, or without one."""
        return told_precision(self.bundle, {**self._built_with, **self._built}, self._unbuilt, cache_depth)

    @cached_property
    def _unbuilt(self) -> str:
        """The precision of components of which nothing is built. The library is asked once, as that takes 10 ms."""
        return unbuilt_precision(self.backend, self._own)

    @property
    def wanted_precision(self) -> str:
        """The precision that the caller named, or that "auto" means here; single components may have another one."""
        return self._own

    @property
    def opened(self) -> tuple[str, ...]:
        """The components whose engines are open."""
        with self._lock:
            return tuple(self._entries)

    @contextmanager
    def using(self, component: str, overlay: Overlay | None = None) -> Generator[Engine]:
        """The engine of a component, which stays open at least until the block ends.

        With an overlay it has other weights. One engine of each component stays open, that which was needed last.
        Raises: UsageError for a given engine whose weights the overlay would change.
        """
        refuse_other("component", component, str, "are texts: " + ", ".join(self.bundle.components))
        if component in self._given:
            if overlay is not None and overlay.key(component):
                raise UsageError(f"the engine of {component} was given to this pool, with weights of its own")
            yield self._given[component]
            return
        entry = self._take(component, overlay)
        try:
            yield entry.engine
        finally:
            self._give_back(entry)

    def open(self, component: str) -> Engine:
        """The engine of a component, opened if it is not; it is the pool's to close."""
        with self.using(component) as engine:
            return engine

    def release(self, component: str) -> None:
        """Free the memory of a component that is no longer needed; it opens again when asked for.

        Raises: UsageError for a name that is no component.
        """
        known = (*self.bundle.components, *self.built, *self.opened)
        refuse_other("component", component, str, "are texts: " + ", ".join(known))
        if component not in known:
            raise UsageError(f"component = {component!r}; there are {choices(component, known)}", "component")
        with self._lock:
            entry = self._entries.pop(component, None)
        self._retire([entry] if entry is not None else [])

    def close(self) -> None:
        """Release every component."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        self._retire(entries)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def refuse_unbuilt(self, components: Sequence[str]) -> None:
        """Raises: BackendError if several of these must be built and are not; one command builds them all.

        One alone is told by opening it. The engines of a feature cache must be built on every backend.
        """
        self._refuse_no_cache(components)
        if not self.runs_only_built or not self.built or all(name in self.built for name in components):
            return
        there = built_components(self.bundle, self.backend, trust=self.trust)
        missing = [name for name in components if name not in there and name not in self._given]
        if len(missing) > 1:
            words = " ".join(f"--component {name}" for name in missing)
            raise BackendError(
                f"{self.bundle.path} has no {self.backend} engines of {', '.join(missing)}. Build them: "
                f"sdopt build {shlex.quote(str(self.bundle.path))} --backend {self.backend} {words}"
            )

    def _refuse_no_cache(self, components: Sequence[str]) -> None:
        """Raises: BackendError if some of these are engines of a feature cache that is not built."""
        missing = {name: depth_of(name)[1] for name in components if depth_of(name)[1] and name not in self.built}
        if not missing:
            return
        there = {*self._given, *built_components(self.bundle, self.backend, self._requested_precision, self.trust)}
        if missing.keys() <= there:
            return
        depths = {depth_of(name)[1] for name in there}
        others = ", ".join(str(depth) for depth in sorted(depths - {0}))
        known = f"; there are those of depth {others}: give cache_depth={max(depths)}" if others else ""
        depth = max(missing.values())
        precision = "" if self._requested_precision in ("auto", "fp32") else f" --precision {self._requested_precision}"
        command = f"sdopt build {shlex.quote(str(self.bundle.path))} --backend {self.backend} --cache-depth {depth}"
        raise BackendError(
            f"{self.bundle.path} has no {self.backend} engines of a feature cache of depth {depth}{known}. Build them: "
            f"{command}{precision}"
        )

    def adapter(self, name: str) -> Adapter:
        """An adapter of the bundle, opened if it is not. Raises: UsageError, BundleError; see `open_adapter`."""
        if name not in self._adapters:
            self._adapters[name] = open_adapter(self.bundle, name)
        return self._adapters[name]

    def _located(self, component: str) -> tuple[ModelFolder, str]:
        """The folder that has a component, and the component's name there; see `adapter_component`.

        What `sdopt build` made of an adapter is among the engines of the bundle.
        """
        own = adapter_of(component)
        if own is None or self.runs_only_built or component in self._built:
            return self.bundle, component
        return self.adapter(own[0]), own[1]

    def _take(self, component: str, overlay: Overlay | None) -> _Entry:
        weights = overlay.key(component) if overlay is not None else ""
        with self._lock:
            opening = self._opening[component]
        with opening:
            with self._lock:
                entry = self._entries.get(component)
                if entry is not None and entry.weights == weights:
                    entry.users += 1
                    return entry
            if self.memory == "low":
                self.close()
            elif entry is not None:
                self.release(component)  # before the other one is opened, so that both need not fit
            started = perf_counter()
            folder, name = self._located(component)
            precision = "auto" if self._requested_precision == "auto" else self._own
            if precision != "auto" and folder is not self.bundle:  # an adapter of which nothing is built
                precision = unbuilt_precision(self.backend, precision)
            engine = open_engine(
                folder,
                name,
                self.backend,
                threads=self.threads,
                precision=precision,
                trust=self.trust,
                cache=self.cache,
                overlay=overlay,
            )
            loaded_precision = getattr(engine, "precision", "")
            if loaded_precision:
                built = self._built if component in self._built else self._built_with
                built[component] = loaded_precision
            log.debug("%s is open on %s, after %.2f s", component, self.backend, perf_counter() - started)
            entry = _Entry(engine, weights, users=1)
            with self._lock:
                self._entries[component] = entry
            return entry

    def _give_back(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            closes = entry.retired and not entry.users
        if closes:
            entry.engine.close()

    def _retire(self, entries: list[_Entry]) -> None:
        with self._lock:
            for entry in entries:
                entry.retired = True
            idle = [entry for entry in entries if not entry.users]
        for entry in idle:
            entry.engine.close()
