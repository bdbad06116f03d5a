"""Numbers for Prometheus, at `/metrics`. All names begin with `sdopt_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from sdopt.serve.orders import Accepted, Event, Failed, Finished, Moved

if TYPE_CHECKING:
    from sdopt.serve.desk import Desk

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)


class Metrics:
    """The counters of one front."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter("sdopt_requests", "HTTP requests", ("route", "method", "status"), **own)
        self.pictures = Counter("sdopt_pictures", "pictures by outcome", ("model", "outcome"), **own)
        self.steps = Counter("sdopt_steps", "calls of the sampler", ("model",), **own)
        self.queued = Histogram("sdopt_queue_seconds", "from acceptance to a slot", ("model",), buckets=SECONDS, **own)
        self.computed = Histogram(
            "sdopt_picture_seconds", "from a slot to the picture", ("model",), buckets=SECONDS, **own
        )
        self._of_status = {
            "waiting": Gauge("sdopt_waiting", "orders that have no slot", ("device",), **own),
            "active": Gauge("sdopt_active", "orders that have a slot", ("device",), **own),
            "backlog_seconds": Gauge("sdopt_backlog_seconds", "estimated work that is not done", ("device",), **own),
            "calls": Gauge("sdopt_unet_calls", "calls of the UNet since the worker began", ("device",), **own),
            "images": Gauge("sdopt_unet_images", "images in these calls", ("device",), **own),
        }
        self._ready = Gauge("sdopt_ready", "1 where the worker takes orders", ("device",), **own)
        self._restarts = Gauge("sdopt_worker_restarts", "workers that died", ("device",), **own)
        self._memory = Gauge("sdopt_worker_memory_bytes", "memory of the worker", ("device",), **own)
        self._cost = Gauge(
            "sdopt_call_seconds", "measured seconds of a call", ("device", "kind", "pixels", "images"), **own
        )

    def event(self, model: str, event: Event) -> None:
        """Count what happened to an order."""
        if isinstance(event, Moved):
            self.steps.labels(model).inc()
        elif isinstance(event, Finished):
            self.pictures.labels(model, "completed").inc()
            self.queued.labels(model).observe(event.queued)
            self.computed.labels(model).observe(event.computed)
        elif isinstance(event, Failed):
            self.pictures.labels(model, event.reason).inc()
        else:
            assert isinstance(event, Accepted)

    def text(self, devices: Sequence[Desk]) -> bytes:
        """All of it in Prometheus' text format, with what the workers last said of themselves."""
        for gauge in (*self._of_status.values(), self._ready, self._restarts, self._memory, self._cost):
            gauge.clear()  # a worker that has gone is not there any more
        members = [member for device in devices for member in device.members]
        for number, member in enumerate(members):
            name = f"{number} {member.name}".rstrip()  # two workers may share a device
            self._ready.labels(name).set(member.state == "ready")
            self._restarts.labels(name).set(member.restarts)
            beat = member.beat
            if beat is None:
                continue
            for word, gauge in self._of_status.items():
                gauge.labels(name).set(beat.status[word])
            self._memory.labels(name).set(beat.memory)
            for kind, sizes in beat.costs.items():
                for pixels, curve in sizes.items():
                    for images, seconds in curve.items():
                        self._cost.labels(name, kind, str(pixels), str(images)).set(seconds)
        if any(device.waiting for device in devices):
            self._of_status["waiting"].labels("front").set(sum(device.waiting for device in devices))
        return generate_latest(self.registry)
