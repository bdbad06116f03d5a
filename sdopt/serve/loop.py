"""The step loop: one thread owns the engines and moves every order by one call of the UNet at a time.

    tick:  drop the cancelled -> fill the slots -> choose a group -> one call -> decode at most one picture

Orders are planned by the threads that bring them, so that a wrong keyword is refused at once. Pictures are encoded by a
thread of their own. Whatever fails, fails for the orders that it concerns, and the loop goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, cast

from sdopt.bundle.specs import Float32
from sdopt.denoise.batch import Batch, Job, job_of
from sdopt.denoise.board import HostBoard
from sdopt.denoise.loop import Step
from sdopt.denoise.upscale import second_pass
from sdopt.engine.cuda_errors import LostContextError
from sdopt.errors import SdoptError, UsageError
from sdopt.image.files import MAX_SIDE, encoded
from sdopt.logs import logger
from sdopt.request.kinds import MAX_SIZE
from sdopt.serve.costs import Costs
from sdopt.serve.item import SWITCH, Item, cancelled, cost_of, decode_of, failed, is_wanted, kind_of
from sdopt.serve.models import Model
from sdopt.serve.orders import Accepted, Begun, Failed, Finished, Moved, Order, Told
from sdopt.serve.schedule import Standing, Ticket, Turns, Waiting, first

log = logger(__name__)
LIMITED = 300.0  # seconds in which fewer images go together after more did not fit into memory


class StepLoop:
    """The orders of one device. `tell` gets every event, from several threads; it must not block."""

    def __init__(
        self,
        models: dict[str, Model],
        tell: Callable[[Told], None],
        *,
        slots: int = 8,
        joins: bool = True,
        queue: int = 64,
        queue_seconds: float = 600.0,
        costs: Costs | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.models, self.slots, self._tell, self._clock = models, slots, tell, clock
        self.costs = Costs() if costs is None else costs
        self._joins = joins  # an order may join others that are at later steps
        self._most, self._most_seconds = queue, queue_seconds
        self._waiting, self._turns = Waiting(), Turns()
        self._suspects: list[Item] = []  # they wait until nothing else is under way
        self._items: dict[str, Item] = {}
        self._batches: dict[str, Batch] = {name: Batch() for name in models}
        self._active: dict[int, Item] = {}  # by the id of their job
        self._to_decode: list[Item] = []
        self._weights: dict[str, str] = dict.fromkeys(models, "")  # those that were used last
        self._limit: dict[Hashable, tuple[int, float]] = {}  # images a call, and until when: more did not fit
        self._changed = threading.Condition()
        self._stopping, self._thread = False, cast("threading.Thread | None", None)
        self._encoder = ThreadPoolExecutor(1, "sdopt-encode")
        self.calls = 0
        self.images = 0  # moved by these calls
        self.busy_since: float | None = None
        self.lost: LostContextError | None = None  # the device is lost to this process

    # ------------------------------------------------------------------------------------------------ any thread

    def check(self, order: Order) -> Item | Failed:
        """An order with its plan, or why it can never be made. Nothing is queued."""
        try:
            return self._item(order)
        except SdoptError as error:
            told, model = failed(order.id, error), self.models.get(order.bundle)
            if model is not None:  # clients know bundles by their names
                told = replace(told, message=told.message.replace(str(model.pipe.bundle.path), model.name))
            return told
        except Exception as error:
            return self._fault(order.id, error)

    def submit(self, order: Order) -> None:
        """Plan an order and put it into the queue, or tell why not."""
        item = self.check(order)
        if isinstance(item, Failed):
            self._tell(item)
            return
        with self._changed:
            refused = self._refused(item)
            if refused is None:
                ahead, seconds = len(self._items), self._backlog() + item.cost
                self._items[order.id] = item
                if order.is_suspect:
                    self._suspects.append(item)
                else:
                    self._waiting.push(Ticket(order.id, order.caller, item.cost, item.arrived))
                last = item.plan.passes[-1]
                self._tell(Accepted(order.id, seconds, ahead, item.plan.calls, last.width, last.height))
                self._changed.notify_all()
        if refused is not None:
            self._tell(refused)

    def cancel(self, id: str) -> None:
        """Nobody wants this order any more. It stops before its next call of the UNet."""
        with self._changed:
            item = self._items.get(id)
            if item is None:
                return
            if self._waiting.remove(id) or item in self._suspects:
                self._suspects = [one for one in self._suspects if one is not item]
                del self._items[id]
                self._tell(cancelled(id))
                return
            item.cancelled = True

    def status(self) -> dict[str, Any]:
        """Numbers of this moment, as JSON."""
        with self._changed:
            busy = self.busy_since
            return {
                "waiting": len(self._waiting) + len(self._suspects),
                "active": len(self._items) - len(self._waiting) - len(self._suspects),
                "backlog_seconds": self._backlog(),
                "calls": self.calls,
                "images": self.images,
                "busy_seconds": 0.0 if busy is None else self._clock() - busy,
            }

    def start(self) -> None:
        """Run the loop in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="sdopt-steps", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool = True) -> None:
        """End the loop: when all its orders are done, or before its next call."""
        with self._changed:
            self._stopping = True
            if not drain:
                waiting = {one.order.id for one in self._suspects}
                self._suspects = []
                for id in [id for id in self._items if id in waiting or self._waiting.remove(id)]:
                    del self._items[id]
                    self._tell(Failed(id, "stopping", "the server is stopping; send it again"))
                for item in self._items.values():
                    item.cancelled = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._encoder.shutdown()

    # ------------------------------------------------------------------------------------------------ the loop's own

    def run(self) -> None:
        """Tick until `stop`, or until the device is lost."""
        while self.lost is None:
            with self._changed:
                while not self._items and not self._stopping:
                    self._changed.wait()
                if not self._items:
                    return
            self.tick()

    def tick(self) -> None:
        """One turn: at most one call of the UNet and one decoded picture."""
        self.busy_since = self._clock()
        try:
            self._turn()
        finally:
            self.busy_since = None

    def _turn(self) -> None:
        self._drop()
        self._fill()
        groups = {(name, key): jobs for name, batch in self._batches.items() for key, jobs in batch.groups().items()}
        if groups:
            self._call(groups)
        if self._to_decode:
            self._decode(self._to_decode.pop(0))

    def _item(self, order: Order) -> Item:
        if order.bundle not in self.models:
            raise UsageError(f"model = {order.bundle!r}; there are {', '.join(self.models)}", "model")
        model = self.models[order.bundle]
        plan = model.plan(order)
        if len(plan.seeds) != 1:
            raise UsageError(f"an order is one picture, and this plan has {len(plan.seeds)}", "prompt")
        last = plan.passes[-1]
        if max(last.width, last.height) > MAX_SIDE.get(order.encoding.format, MAX_SIZE):
            most = MAX_SIDE[order.encoding.format]
            text = f"{last.width}x{last.height} pixels; {order.encoding.format} holds {most} a side: take png"
            raise UsageError(text, "output_format")
        if order.previews and model.pipe.bundle.manifest.preview is None:
            raise UsageError("partial_images: this model has no previews; leave it out", "partial_images")
        return Item(order, model, plan, cost_of(model.name, plan, self.costs, self.slots), self._clock())

    def _backlog(self) -> float:
        """The seconds of all that is not done."""
        return sum(item.cost * (1 - item.done / item.plan.calls) for item in self._items.values())

    def _refused(self, item: Item) -> Failed | None:
        order = item.order
        if self._stopping:
            return Failed(order.id, "stopping", "the server is stopping; send it again", retry_after=5.0)
        backlog, waits = self._backlog(), len(self._waiting)
        after = min(120.0, max(0.25, backlog / max(1, len(self._items)) if self._items else 0.25))
        if len(self._items) >= self.slots + self._most:
            return Failed(order.id, "full", f"{waits} requests wait already; try again later", None, after)
        if self._items and backlog + item.cost > self._most_seconds:
            text = f"the requests before this one need {backlog:.0f} s, and {self._most_seconds:.0f} are allowed"
            return Failed(order.id, "full", f"{text}; try again later", None, after)
        if order.seconds is not None and not self._items and item.cost > order.seconds:
            text = f"deadline = {order.seconds:g} s: alone this takes {item.cost:.2f} s; ask for fewer steps"
            return Failed(order.id, "usage", text, "deadline")
        if order.seconds is not None and backlog + item.cost > order.seconds:
            text = f"this would be done in {backlog + item.cost:.1f} s, and must be in {order.seconds:.1f} s"
            return Failed(order.id, "late", f"{text}; try again later, or ask for fewer steps", None, after)
        return None

    def _drop(self) -> None:
        """Forget the active orders that nobody wants."""
        with self._changed:
            dropped = [item for item in self._items.values() if item.cancelled]
        for item in dropped:
            self._forget(item)
            self._tell(cancelled(item.order.id))

    def _forget(self, item: Item) -> None:
        if item.job is not None:
            batch = self._batches[item.model.name]
            if item.job in batch.jobs:
                batch.leave(item.job)
            self._active.pop(id(item.job), None)
        self._close(item)
        if item in self._to_decode:
            self._to_decode.remove(item)
        with self._changed:
            self._items.pop(item.order.id, None)

    def _close(self, item: Item) -> None:
        """Give back what the item's board holds."""
        if item.job is not None:
            item.job.board.close()
            item.job = None

    def _fill(self) -> None:
        """Give slots to orders that wait."""
        if self._active and not self._joins:
            return
        while True:
            with self._changed:
                busy = len(self._items) - len(self._waiting) - len(self._suspects) - len(self._to_decode)
                if busy >= self.slots or any(one.order.is_suspect for one in self._active.values()):
                    return
                if self._suspects:
                    if busy:
                        return
                    self._encoder.submit(int).result()  # finished pictures are told before this one ends the process
                    item = self._suspects.pop(0)
                elif len(self._waiting):
                    item = self._items[self._waiting.pop(self._clock()).id]
                else:
                    return
            item.started = self._clock()
            self._tell(Begun(item.order.id))
            item.left = list(item.plan.passes)
            self._guard(item, self._begin)

    def _begin(self, item: Item) -> None:
        """Begin the next pass of an item."""
        plan = item.left.pop(0)
        if item.latest is not None:
            plan = second_pass(plan, item.latest)
        item.now = plan
        pipe, weights = item.model.pipe, "" if plan.adapters is None else plan.adapters.digest
        began = self._clock()
        ready = pipe.prepare(plan)
        item.job = job_of(ready, weights)
        self._active[id(item.job)] = item
        self._batches[item.model.name].join(item.job)
        log.debug("%s begins after %.3f s of preparation", item.order.id, self._clock() - began)

    def _guard(self, item: Item, work: Callable[[Item], None]) -> None:
        """Do something for one item; where it fails, the item fails."""
        try:
            work(item)
        except Exception as error:
            self._failed([item], error)

    def _failed(self, items: Sequence[Item], error: Exception) -> None:
        if isinstance(error, LostContextError):
            self.lost = error  # a new process makes these orders again
            return
        for item in items:
            self._forget(item)
            if isinstance(error, SdoptError):
                self._tell(failed(item.order.id, error))
            else:
                self._tell(self._fault(item.order.id, error))

    def _fault(self, id: str, error: Exception) -> Failed:
        log.error("order %s: a fault of sdopt", id, exc_info=error)
        return Failed(id, "failed", f"a fault of sdopt: {type(error).__name__}: {error}; please report it")

    def _call(self, groups: dict[tuple[str, Hashable], list[Job]]) -> None:
        """One call of the UNet for the group that is owed most."""
        switches: dict[Hashable, float] = {key: self._switch(key[0], jobs[0]) for key, jobs in groups.items()}
        key = cast("tuple[str, Hashable]", self._turns.choose(switches))
        name, jobs = key[0], groups[key]
        items = self._chosen(name, jobs)
        chosen = [cast(Job, item.job) for item in items]
        kind, pixels = kind_of(name, chosen[0]), items[0].pixels
        began = self._clock()
        try:
            with ExitStack() as stack:
                using = partial(items[0].model.pipe.pool.using, overlay=items[0].plan.adapters)
                if chosen[0].weights != self._weights[name]:
                    self._batches[name].close()  # else the engines with other weights stay open beside these
                engines = {component: stack.enter_context(using(component)) for component in chosen[0].engines}
                ready = self._clock()
                moved = self._batches[name].advance(chosen, engines)
        except Exception as error:
            if len(chosen) > 1 and isinstance(error, SdoptError) and not isinstance(error, LostContextError):
                # fewer at once may fit into memory, or into the engine; an order that fails alone fails alone
                self._limit[kind, pixels] = len(chosen) // 2, self._clock() + LIMITED
                log.warning("%d images at once fail; now at most %d: %s", len(chosen), len(chosen) // 2, error)
            else:
                self._failed(items, error)
            return
        seconds = self._clock() - ready
        self._learn(name, chosen[0], kind, pixels, len(chosen), ready - began, seconds)
        self._turns.paid(key, self._clock() - began, {key: len(jobs) for key, jobs in groups.items()})
        self.calls += 1
        self.images += len(chosen)
        for item, (_, step) in zip(items, moved, strict=True):
            if isinstance(step, Step):
                self._guard(item, partial(self._moved, step=step))
            else:
                self._failed([item], step)

    def _chosen(self, name: str, jobs: list[Job]) -> list[Item]:
        """Those of a group that go into the next call."""
        items = [self._active[id(job)] for job in jobs]
        alone = next((item for item in items if item.order.alone), None)
        kind, pixels = kind_of(name, jobs[0]), items[0].pixels
        fits, until = self._limit.get((kind, pixels), (self.slots, 0.0))
        most = min(self.costs.cap(kind, pixels, self.slots), fits if self._clock() < until else self.slots)
        call = self.costs.call(kind, pixels)
        standings = [Standing(i.order.id, call * (i.plan.calls - i.done), i.cost, i.started) for i in items]
        ids = first(standings, most, self._clock())
        chosen = [item for item in items if item.order.id in ids]
        if alone is None:
            return chosen
        shared = [item for item in chosen if not item.order.alone]
        return shared if shared and self.calls % 2 else [alone]  # in turns

    def _switch(self, name: str, job: Job) -> float:
        """The seconds until a job's weights are loaded."""
        return 0.0 if job.weights == self._weights[name] else self.costs.call((name, SWITCH), 1)

    def _learn(
        self, name: str, job: Job, kind: Hashable, pixels: int, images: int, loading: float, seconds: float
    ) -> None:
        self.costs.record(kind, pixels, images, seconds)
        if job.weights != self._weights[name]:
            self.costs.record((name, SWITCH), 1, 1, loading)
            self._weights[name] = job.weights

    def _moved(self, item: Item, step: Step) -> None:
        """An item has made a call: tell it, and begin what comes next."""
        item.done += 1
        order, job = item.order, cast(Job, item.job)
        if is_wanted(order.previews, item.done, item.plan.calls):
            small = item.model.pipe.preview(step.denoised, scale=item.model.pipe.bundle.manifest.latents.factor)[0]
            self._encoder.submit(self._preview, order, item.done - 1, item.plan.calls, small)
        else:
            self._tell(Moved(order.id, item.done - 1, item.plan.calls))
        if not job.done:
            return
        if not isinstance(job.board, HostBoard):
            job.board.end()
        item.latest = step.sample
        self._active.pop(id(job), None)
        self._close(item)
        if item.left:
            self._begin(item)
        else:
            self._to_decode.append(item)

    def _preview(self, order: Order, index: int, of: int, image: Any) -> None:
        self._tell(Moved(order.id, index, of, encoded(image, order.encoding.format, None, order.encoding.quality)))

    def _decode(self, item: Item) -> None:
        def work(item: Item) -> None:
            began = self._clock()
            image = item.model.pipe.finish(item.plan, cast(Float32, item.latest))[0]
            self.costs.record(decode_of(item.model.name, item.plan), item.pixels, 1, self._clock() - began)
            parameters = item.model.pipe.parameters(item.plan, 0)
            self._forget(item)
            self._encoder.submit(self._finish, item, image, parameters, self._clock())

        self._guard(item, work)

    def _finish(self, item: Item, image: Any, parameters: dict[str, Any], now: float) -> None:
        """Encode a picture, in the encoder's thread."""
        order = item.order
        try:
            own = parameters if order.encoding.metadata else None
            content = encoded(image, order.encoding.format, own, order.encoding.quality)
            self._tell(Finished(order.id, content, parameters, item.started - item.arrived, now - item.started))
        except Exception as error:
            self._tell(self._fault(order.id, error))
