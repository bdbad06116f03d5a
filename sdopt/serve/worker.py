"""A worker: a process that has one device, runs a step loop on it, and talks to the front through a pipe.

It ends when the front closes the pipe, and when its device is lost; the front then starts another one.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from sdopt.errors import SdoptError
from sdopt.logs import logger
from sdopt.serve.costs import Costs
from sdopt.serve.loop import StepLoop
from sdopt.serve.models import Model, open_models
from sdopt.serve.orders import Order
from sdopt.serve.settings import Settings
from sdopt.serve.warm import warm

log = logger(__name__)
BEAT = 1.0  # seconds between two reports of how the worker is
LOST = 3  # exit code: the device is lost to this process
Opens = Callable[[Settings], dict[str, Model]]


@dataclass(frozen=True)
class Ready:
    """The worker takes orders. `models`: what clients may know of each, by name."""

    models: dict[str, Any]


@dataclass(frozen=True)
class Unable:
    """The worker cannot begin: a bundle that is damaged, a backend that is not installed."""

    error: SdoptError


@dataclass(frozen=True)
class Beat:
    """How the worker is: the status of its loop, its memory in bytes, and the measured costs."""

    status: dict[str, Any]
    memory: int
    costs: dict[str, Any]


@dataclass(frozen=True)
class Cancel:
    """From the front: nobody wants this order any more."""

    id: str


@dataclass(frozen=True)
class Stop:
    """From the front: end before the next call of the UNet."""


def work(
    pipe: Connection, settings: Settings, level: int = logging.WARNING, opens: Opens = open_models, warms: bool = True
) -> None:
    """The life of a worker. `opens`: opens the bundles that it makes pictures of; `warms`: measures them first."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal sends to the whole group: the front decides
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s worker %(process)d %(name)s: %(message)s")
    logging.getLogger("sdopt").setLevel(level)
    lock = threading.Lock()

    def tell(message: Any) -> None:
        with lock:
            try:
                pipe.send(message)
            except OSError:  # the front is gone
                os._exit(1)

    try:
        models = opens(settings)
        costs = Costs()
        if warms:
            warm(models, costs, settings.slots)
    except SdoptError as error:
        tell(Unable(error))
        return
    loop = StepLoop(
        models,
        tell,
        slots=settings.slots,
        joins=settings.batching == "steps",
        queue=settings.queue,
        queue_seconds=settings.queue_seconds,
        costs=costs,
    )
    loop.start()
    tell(Ready({name: model.describe() for name, model in models.items()}))
    threading.Thread(target=_beat, args=(loop, tell), name="sdopt-beat", daemon=True).start()
    _listen(pipe, loop)
    for model in models.values():
        model.pipe.close()


def _listen(pipe: Connection, loop: StepLoop) -> None:
    while True:
        try:
            message: Any = pipe.recv()
        except (EOFError, OSError):
            os._exit(1)  # the front is gone, and nobody waits for a picture
        if isinstance(message, Order):
            loop.submit(message)
        elif isinstance(message, Cancel):
            loop.cancel(message.id)
        elif isinstance(message, Stop):
            loop.stop(drain=False)
            return


def _beat(loop: StepLoop, tell: Any) -> None:
    while True:
        if loop.lost is not None:
            log.error("%s", loop.lost)
            os._exit(LOST)
        tell(Beat(loop.status(), memory_of_process(), loop.costs.curves()))
        threading.Event().wait(BEAT)


def memory_of_process() -> int:
    """The bytes of memory that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
