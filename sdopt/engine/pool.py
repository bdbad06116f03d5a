"""The open engines of one bundle: which are open, on which backend, in which precision, under which memory policy.

    pool = EnginePool(bundle, "auto", memory="low")
    with pool.using("unet") as unet:          # opened if it is not; nobody closes it while it is used
        noise = unet(**arrays)["noise_pred"]

A pipeline, a server and the benchmark are given a pool. It is safe for threads: two threads that need the same
component share one engine, and a call keeps the engines it began with. `release`, `close` and the policy "low" retire
engines. A retired engine is closed when its last user is done, or at once if nobody uses it. The next user gets a new
engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, RLock
from types import TracebackType

from sdopt.bundle.files import Bundle
from sdopt.engine import BACKENDS, Engine, built_components, choose_backend, open_engine, told_precision
from sdopt.errors import UsageError, choices

MEMORY = ("fast", "low")

Open = Callable[[str], Engine]  # the engine of a component


@dataclass(eq=False)
class _Entry:
    """An open engine and how many use it now."""

    engine: Engine
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
        if memory not in MEMORY:
            raise UsageError(f"memory = {memory!r}; allowed are {choices(memory, MEMORY)}")
        self.bundle, self.memory = bundle, memory
        self.backend, self._own = choose_backend(backend, precision, bundle)
        self._requested_precision = precision
        self.threads, self.trust, self.cache = threads, trust, cache
        self._given = dict(given or {})
        self._built = built_components(bundle, self.backend, precision)
        self._entries: dict[str, _Entry] = {}
        self._lock = RLock()  # of the entries; held for moments only
        self._opening: defaultdict[str, Lock] = defaultdict(Lock)  # of each component: one thread opens it

    @property
    def runs_only_built(self) -> bool:
        """Whether the backend runs only engines of `sdopt build`."""
        return not BACKENDS[self.backend.partition(":")[0]].precisions

    @property
    def built(self) -> tuple[str, ...]:
        """The components that run from engines of `sdopt build`, or from given ones."""
        return (*self._built, *self._given)

    @property
    def precision(self) -> str:
        """The precision of the engines that make pictures, e.g. "fp32" or "fp16 (vae_decoder bf16)"."""
        able = BACKENDS[self.backend.partition(":")[0]].precisions
        # A backend may have built engines in a precision that it cannot compute in: the other components are in fp32.
        own = self._own if self.runs_only_built or self._own in able else "fp32"
        return told_precision(self.bundle, self._built, own)

    @property
    def opened(self) -> tuple[str, ...]:
        """The components whose engines are open."""
        with self._lock:
            return tuple(self._entries)

    @contextmanager
    def using(self, component: str) -> Generator[Engine]:
        """The engine of a component, which stays open at least until the block ends."""
        if component in self._given:
            yield self._given[component]
            return
        entry = self._take(component)
        try:
            yield entry.engine
        finally:
            self._give_back(entry)

    def open(self, component: str) -> Engine:
        """The engine of a component, opened if it is not; it is the pool's to close."""
        with self.using(component) as engine:
            return engine

    def release(self, component: str) -> None:
        """Free the memory of a component that is no longer needed; it opens again when asked for."""
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

    def _take(self, component: str) -> _Entry:
        with self._lock:
            opening = self._opening[component]
        with opening:
            with self._lock:
                entry = self._entries.get(component)
                if entry is not None:
                    entry.users += 1
                    return entry
            if self.memory == "low":
                self.close()
            engine = open_engine(
                self.bundle,
                component,
                self.backend,
                threads=self.threads,
                precision="auto" if self._requested_precision == "auto" else self._own,
                trust=self.trust,
                cache=self.cache,
            )
            loaded_precision = getattr(engine, "precision", "")
            if loaded_precision and component in self._built:
                self._built[component] = loaded_precision
            entry = _Entry(engine, users=1)
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
