"""The server on many machines: the front of `sdopt serve`, whose workers are replicas of Ray Serve.

    sdopt serve sd15 --ray --replicas 4                              the front is this process
    serve run sdopt.serve.ray:app bundle=sd15 replicas=4             the front is a deployment behind Ray's HTTP proxies

There is one front. It costs some milliseconds of one core a picture, and it keeps the queue and the jobs; the engines
are what more machines are for. Bundles are divided into groups where a replica may not hold all of them
(`models_per_replica`), and each group has replicas of its own, which the front knows by the names of their bundles.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from sdopt.bundle.files import embedded
from sdopt.cluster import connected, ray_module, silence_usage
from sdopt.errors import UsageError, choices
from sdopt.logs import logger
from sdopt.serve.app import make_app, serve
from sdopt.serve.engines import Engines
from sdopt.serve.remote import RayDevice
from sdopt.serve.settings import Settings, bundles, from_toml, typed

log = logger(__name__)
HEALTH_SECONDS = 5.0  # between two questions of Ray Serve; a replica that fails three times is started again
BUSY = 0.75  # orders for each slot above which autoscaling starts replicas
HEALTH_TIMEOUT = 10.0  # seconds until an answer; none is a failure too
LONGEST_END = 10.0  # seconds until replicas that should end are left to themselves
UPSCALE_SECONDS = 10.0  # for which there must be so many
CONNECTIONS = 4096  # requests at once at a front behind Ray's proxies
FRONT = "front"


def groups(settings: Settings) -> list[Settings]:
    """The settings of each group of replicas, as they are on every machine: paths are absolute where they are known."""
    names, most = list(settings.bundles), settings.models_per_replica or len(settings.bundles)
    found: list[Settings] = []
    for begin in range(0, len(names), most):
        own = {name: _everywhere(settings.bundles[name]) for name in names[begin : begin + most]}
        loras = {
            key: _everywhere(file)
            for key, file in settings.loras.items()
            if key.rpartition("/")[0] in ("", *own)
        }  # fmt: skip
        found.append(replace(settings, bundles=own, loras=loras, api_key_file=_everywhere(settings.api_key_file)))
    return found


def _everywhere(path: str) -> str:
    """A path that a process with another working folder understands; empty for the embedded bundle."""
    if path == str(embedded()):
        return ""
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def has_gpu(settings: Settings) -> bool:
    """Whether a replica needs a GPU."""
    backend, _, device = settings.backend.partition(":")
    return backend.startswith("tensorrt") or device.startswith("cuda")


def sized(settings: Settings, ray: Any) -> Settings:
    """The settings with the threads of a replica: those given, or its part of the cluster's processors.

    Raises: UsageError where no machine of the cluster can hold one replica.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = int(max((node.get("CPU", 0.0) for node in nodes), default=0.0))
    gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
    if has_gpu(settings):
        if not gpus:
            raise UsageError(
                f"backend = {settings.backend}: no machine of the Ray cluster has a GPU; give --backend ort",
                "backend",
            )
        return settings
    share = sum(node.get("CPU", 0.0) for node in nodes) / (settings.bounds[1] * len(groups(settings)))
    threads = settings.threads or max(1, min(int(share), largest))
    if threads > largest:
        raise UsageError(
            f"threads = {threads}: the largest machine of the Ray cluster has {largest} processors for its replicas",
            "threads",
        )
    return replace(settings, threads=threads)


def deployment(settings: Settings, number: int, board: str) -> Any:
    """The replicas of one group as an application of Ray Serve. `settings`: of the group, with its threads."""
    ray_serve = ray_module("ray.serve")
    least, most = settings.bounds
    many: dict[str, Any] = {"num_replicas": least}
    if settings.autoscale:
        many = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": max(1.0, BUSY * settings.slots),
                "upscale_delay_s": UPSCALE_SECONDS,
            }
        }
    actor = {"num_cpus": 1, "num_gpus": 1} if has_gpu(settings) else {"num_cpus": settings.threads}
    made = ray_serve.deployment(Engines).options(
        name=f"engines-{number}",
        max_ongoing_requests=settings.slots + 2,
        max_queued_requests=most * (settings.slots + settings.queue),
        ray_actor_options=actor,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        **many,
    )
    return made.bind(settings, board)


def board_name(settings: Settings) -> str:
    """Equal for equal settings, so that a front that was started again finds the replicas of the one before."""
    return f"sdopt-board-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}"


# ------------------------------------------------------------------------------------------------ sdopt serve --ray


@dataclass(eq=False)
class Fleet:
    """The replicas of one server, started by its own process. `ray`: the module, connected to the cluster."""

    settings: Settings
    ray: Any
    _handles: list[Any] = field(default_factory=list[Any])
    _names: list[str] = field(default_factory=list[str])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def devices(self) -> list[RayDevice]:
        """What the front sends orders to, one for each group of bundles."""
        return [
            RayDevice(
                one, board=board_name(one), opens=partial(self._open, number), closes=self.close, least=one.bounds[0]
            )
            for number, one in enumerate(groups(self.settings))
        ]

    def _open(self, number: int) -> Any:
        """The handle of one group; the first time, all replicas are started.

        Raises: UsageError where the cluster cannot hold them.
        """
        with self._lock:
            if not self._handles:
                self._start()
            return self._handles[number]

    def _start(self) -> None:
        ray_serve = ray_module("ray.serve")
        settings = sized(self.settings, self.ray)
        wanted = settings.bounds[0] * len(groups(settings)) * (0 if has_gpu(settings) else settings.threads or 1)
        there = int(self.ray.cluster_resources().get("CPU", 0))
        if wanted > there:
            raise UsageError(
                f"replicas: they need {wanted} processors, {settings.threads} each, and the Ray cluster has {there}; "
                "give fewer --replicas or --threads",
                "replicas",
            )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ray_serve.start(proxy_location="Disabled")
        targets: list[Any] = []
        for number, (own, one) in enumerate(zip(groups(self.settings), groups(settings), strict=True)):
            self._names.append(f"sdopt-{board_name(own)[-12:]}-{number}")
            target = deployment(one, number, board_name(own))
            targets.append(ray_serve.RunTarget(target, name=self._names[-1], route_prefix=None))
        ray_serve.run_many(targets, wait_for_applications_running=False)
        self._handles = [
            ray_serve.get_deployment_handle(f"engines-{number}", name) for number, name in enumerate(self._names)
        ]

    def close(self) -> None:
        """End the replicas. One that hangs is left to Ray after a while, which kills it."""
        with self._lock:
            names, self._names, self._handles = self._names, [], []
        ending = threading.Thread(target=_delete, args=(names,), name="sdopt-end", daemon=True)
        ending.start()
        ending.join(LONGEST_END)


def _delete(names: list[str]) -> None:
    """End applications of Ray Serve, which waits until their replicas are gone."""
    ray_serve = ray_module("ray.serve")
    for name in names:
        try:
            ray_serve.delete(name)
        except Exception as error:  # Ray has many kinds; the cluster may have gone before
            log.warning("the replicas of %s were not ended: %s", name, error)


def serve_on_ray(settings: Settings, ready: Callable[[], None]) -> int:
    """As `sdopt.serve.app.serve`, with replicas in a Ray cluster."""
    with connected(settings.address) as ray:
        return serve(settings, ready, Fleet(settings, ray).devices())


# ------------------------------------------------------------------------------- serve run sdopt.serve.ray:app


class Front:
    """The front as a deployment: the ASGI application of `sdopt serve` behind Ray's HTTP proxies."""

    def __init__(self, settings: Settings, *handles: Any) -> None:
        self._settings, self._handles = settings, handles

    def __serve_build_asgi_app__(self) -> Any:  # Ray Serve's name for it
        devices = [
            RayDevice(one, board=board_name(one), opens=partial(_same, handle), least=one.bounds[0])
            for one, handle in zip(groups(self._settings), self._handles, strict=True)
        ]
        return make_app(self._settings, devices)


def _same(handle: Any) -> Any:
    return handle


def app(args: Mapping[str, Any]) -> Any:
    """The application for `serve run` and Ray Serve's config files; `args`: settings by their names, and `bundle`.

    Raises: UsageError for an unknown or wrong setting, BackendError where ray is not installed.
    """
    silence_usage()
    ray, ray_serve = ray_module(), ray_module("ray.serve")
    settings = from_args(args)
    if ray.is_initialized():
        settings = sized(settings, ray)
    front = ray_serve.deployment(ray_serve.ingress()(Front)).options(
        name=FRONT,
        num_replicas=1,
        max_ongoing_requests=CONNECTIONS,
        max_queued_requests=CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    own = groups(settings)
    return front.bind(settings, *(deployment(one, number, board_name(one)) for number, one in enumerate(own)))


def from_args(args: Mapping[str, Any]) -> Settings:
    """Settings from the arguments of an application, whose values are texts where a command line gave them."""
    table: dict[str, Any] = {"ray": True}
    given = dict(args)
    if "config" in given:
        table |= from_toml(Path(str(given.pop("config"))))
    if "bundle" in given:
        texts = given.pop("bundle")
        table["bundles"] = bundles(cast("list[str]", texts) if isinstance(texts, list) else str(texts).split(","))
    known = {one.name: one for one in fields(Settings)}
    for name, value in given.items():
        if name not in known or name in ("address", "host", "port"):
            allowed = [one for one in known if one not in ("address", "host", "port")]
            raise UsageError(f"unknown setting {name}; there are bundle, config, {choices(name, allowed)}", name)
        table[name] = typed("sdopt.serve.ray:app", name, value, str(known[name].type), from_text=True)
    table.setdefault("bundles", bundles([]))
    return Settings(**table)
