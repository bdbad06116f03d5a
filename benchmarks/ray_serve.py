"""`sdopt serve --ray` measured: what Ray costs beside bare processes, how its control plane scales, what kills do.

    python benchmarks/ray_serve.py                                   writes `serve` of benchmarks/results/ray.json
    python benchmarks/ray_serve.py --parts scale --replicas 1,2 --rounds 1 --pictures 4 --size 64 --steps 4 -o out.json

Parts, each on real clusters of this machine:

scale      clusters of 1, 2, ... replicas with one thread each, in turns with as many bare processes, each of which runs
           the same step loop on the same orders without any server: the ceiling of this machine. Both are pinned, one
           core for each. `ratio` is pictures a second, cluster by bare, the median of the rounds; every picture of the
           first round is compared. The HTTP client, the front and Ray's own processes share the cores with the replicas
control    replicas that sleep in place of calls, and answer with 375 kB: what Ray's control plane and the front's place
           for orders allow, up to more replicas than there are cores. No HTTP; `by_one` is pictures a second by N times
           those of one replica
kills      a replica is killed (SIGKILL) in each round while all are at work: pictures that are lost, or differ from
           those of an undisturbed process, and the seconds until as many replicas as before take orders

For thousands of replicas there is only the simulator, `serve_sim.py`, whose figures are predictions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from serve import PROMPTS, Server, pixels_of, serving

from sdopt.bench.machine import machine, versions
from sdopt.bundle.disk import write_whole
from sdopt.cluster import connected
from sdopt.serve.board import Report, board_of
from sdopt.serve.costs import Costs
from sdopt.serve.engines import Checked
from sdopt.serve.loop import StepLoop
from sdopt.serve.models import open_models
from sdopt.serve.orders import FINAL, Accepted, Begun, Event, Failed, Finished, Order, Told
from sdopt.serve.ray import board_name
from sdopt.serve.remote import RayDevice
from sdopt.serve.settings import Settings, bundles
from sdopt.serve.warm import warm
from sdopt.serve.worker import Beat

RESULTS = Path(__file__).parent / "results/ray.json"
REPLICA = re.compile(r"process (\d+)")
CONTENT = 375_000  # bytes of an answer of `control`
PERIOD = 1.0  # seconds that a replica of `control` sleeps


def body_of(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    size = {"height": args.size, "width": args.size}
    return {"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed, "num_inference_steps": args.steps, **size}


def pin(pid: int, core: int) -> None:
    """Let all threads of a process run on one core."""
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(int(task), {core})


# --------------------------------------------------------------------------------------------------------- scale


def bare(pipe: Connection, settings: Settings, core: int) -> None:
    """A process that makes orders by a step loop of its own: a list of them in, their PNG files out."""
    os.sched_setaffinity(0, {core})
    costs, models = Costs(), open_models(settings)
    warm(models, costs, settings.slots)
    done, left, some = dict[str, bytes](), set[str](), threading.Condition()

    def tell(event: Told) -> None:
        if isinstance(event, FINAL):
            with some:
                assert isinstance(event, Finished), event
                done[event.id] = event.content
                left.discard(event.id)
                some.notify()

    loop = StepLoop(models, tell, slots=settings.slots, queue=1 << 20, queue_seconds=1e9, costs=costs)
    loop.start()
    pipe.send("ready")
    while (orders := pipe.recv()) is not None:
        done.clear()
        left |= {order.id for order in orders}
        for order in orders:
            loop.submit(order)
        with some:
            while left:
                some.wait()
        pipe.send(dict(done))


@contextlib.contextmanager
def bare_processes(args: argparse.Namespace, count: int) -> Generator[Callable[[Sequence[int]], dict[int, bytes]]]:
    """As many processes; the call makes the pictures of these seeds, by their seeds."""
    context, pipes, processes = multiprocessing.get_context("spawn"), list[Connection](), list[Any]()
    settings = Settings(bundles([args.bundle] if args.bundle else []), backend=args.backend,
                        precision=args.precision, threads=1, slots=args.slots)  # fmt: skip
    (name,) = settings.bundles
    for number in range(count):
        own, its = context.Pipe()
        core = number % (os.cpu_count() or 1)
        processes.append(context.Process(target=bare, args=(its, settings, core), daemon=True))
        processes[-1].start()
        pipes.append(own)
    for pipe in pipes:
        assert pipe.recv() == "ready"

    def make(seeds: Sequence[int]) -> dict[int, bytes]:
        for number, pipe in enumerate(pipes):
            pipe.send([Order(str(seed), name, body_of(args, seed)) for seed in seeds[number::count]])
        return {int(id): content for pipe in pipes for id, content in pipe.recv().items()}

    try:
        yield make
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()


def replicas_of(server: Server) -> list[int]:
    """The processes of the replicas that take orders."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health/ready") as answer:
        devices = json.loads(answer.read())["devices"]
        return [int(match[1]) for one in devices if (match := REPLICA.search(one["device"]))]
    return []


def wait_for_replicas(server: Server, count: int) -> list[int]:
    end = time.monotonic() + 300
    while len(found := replicas_of(server)) < count:
        assert time.monotonic() < end, f"{len(found)} of {count} replicas take orders"
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def cluster(args: argparse.Namespace, count: int) -> Generator[Server]:
    """A server on Ray whose replicas are pinned, one core for each."""
    options = ("--ray", "--replicas", count, "--slots", args.slots, "--queue", 10_000, "--queue-seconds", 1e6)
    with serving(args, *options) as server:
        for number, pid in enumerate(wait_for_replicas(server, count)):
            pin(pid, number % (os.cpu_count() or 1))
        yield server


def ask(server: Server, args: argparse.Namespace, seeds: Sequence[int], clients: int) -> dict[int, Any]:
    """The answers to requests with these seeds, by their seeds."""
    with ThreadPoolExecutor(clients) as threads:
        answers = threads.map(lambda seed: server.post(body_of(args, seed)), seeds)
        return dict(zip(seeds, answers, strict=True))


def digest_of(answer: tuple[int, Any]) -> str:
    status, content = answer
    return hashlib.sha256(pixels_of(content).tobytes()).hexdigest() if status == 200 else f"status {status}"


def digest_of_png(content: bytes) -> str:
    import base64  # beside the only one that makes an answer of a file

    return digest_of((200, {"data": [{"b64_json": base64.b64encode(content).decode()}]}))


def scale(args: argparse.Namespace) -> dict[str, Any]:
    """Clusters in turns with bare processes."""
    rows: list[dict[str, Any]] = []
    for count in args.replicas:
        clients = count * (args.slots + 1)
        with cluster(args, count) as server, bare_processes(args, count) as make:
            seconds: dict[str, list[float]] = {"cluster": [], "bare": []}
            different = lost = 0
            for number in range(args.rounds + 1):  # the first one compares, and warms up
                seeds = range(number * args.pictures, (number + 1) * args.pictures)
                began = time.perf_counter()
                answers = ask(server, args, seeds, clients)
                between = time.perf_counter()
                pictures = make(seeds)
                ended = time.perf_counter()
                lost += sum(status != 200 for status, _ in answers.values())
                if not number:
                    different = sum(digest_of(answers[seed]) != digest_of_png(pictures[seed]) for seed in seeds)
                else:
                    seconds["cluster"].append(between - began)
                    seconds["bare"].append(ended - between)
        ratio = median(b / c for b, c in zip(seconds["bare"], seconds["cluster"], strict=True))
        rows.append({
            "replicas": count, "ratio": round(ratio, 3), "lost": lost, "different": different,
            **{f"{side}_per_s": round(args.pictures / median(own), 3) for side, own in seconds.items()},
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return {"pictures_of_a_round": args.pictures, "rounds": args.rounds, "slots": args.slots, "rows": rows}


# -------------------------------------------------------------------------------------------------------- control


class Sleeping:
    """What `sdopt.serve.engines.Engines` is for the front, without engines: one order at a time, a second for each."""

    def __init__(self, board: str, models: dict[str, Any]) -> None:
        import ray  # in a replica

        self.name, self._turn, self._content = f"sleeping process {os.getpid()}", asyncio.Lock(), os.urandom(CONTENT)
        status = dict.fromkeys(("waiting", "active", "calls", "images"), 0)
        beat = Beat({**status, "backlog_seconds": 0.0, "busy_seconds": 0.0}, 0, {})

        def tell() -> None:
            while True:
                if (there := board_of(ray, board)) is not None:
                    ray.get(there.tell.remote(self.name, Report(models, beat)))
                time.sleep(1.0)

        threading.Thread(target=tell, daemon=True).start()

    async def make(self, order: Order) -> AsyncGenerator[tuple[str, list[Told]]]:
        yield self.name, [Accepted(order.id, PERIOD, 0, 1, 64, 64)]
        async with self._turn:
            yield self.name, [Begun(order.id)]
            await asyncio.sleep(PERIOD)
        yield self.name, [Finished(order.id, self._content, {}, 0.0, PERIOD)]

    async def check(self, order: Order) -> Checked:
        return Checked(PERIOD, 1, 64, 64)


def control(args: argparse.Namespace) -> dict[str, Any]:
    """Replicas that sleep."""
    from ray import serve as ray_serve

    rows: list[dict[str, Any]] = []
    with connected(cpus=4):
        ray_serve.start(proxy_location="Disabled")
        for count in args.sleeping:
            settings = Settings({"asleep": "."}, ray=True, replicas=count, slots=1, queue=10_000, queue_seconds=1e6)
            board = board_name(settings)
            made = ray_serve.deployment(Sleeping).options(
                name="sleeping", num_replicas=count, max_ongoing_requests=3, max_queued_requests=10_000,
                ray_actor_options={"num_cpus": 0},
            )  # fmt: skip
            ray_serve.run(made.bind(board, {"asleep": {}}), name="sleeping", route_prefix=None)
            handle = ray_serve.get_deployment_handle("sleeping", "sleeping")
            device = RayDevice(settings, board=board, opens=lambda handle=handle: handle, least=count)
            rate = asyncio.run(rate_of(device, count, args.periods))
            ray_serve.delete("sleeping")
            rows.append({"replicas": count, "per_s": round(rate, 3)})
            one = rows[0]["per_s"] / rows[0]["replicas"]
            rows[-1]["by_one"] = round(rate / (count * one), 3)
            print(json.dumps(rows[-1]), flush=True)
    return {"seconds_of_an_order": PERIOD, "bytes_of_an_answer": CONTENT, "rows": rows}


async def rate_of(device: RayDevice, count: int, periods: int) -> float:
    """Orders a second, when each replica always has one."""
    await device.start()
    assert device.is_ready, device.problem
    ended = asyncio.Semaphore(0)

    def listen(event: Event) -> None:
        assert not isinstance(event, Failed), event
        if isinstance(event, FINAL):
            ended.release()

    for round_ in ("warm", "measured"):
        began = time.perf_counter()
        for number in range(count * (periods if round_ == "measured" else 2)):
            device.submit(Order(f"{round_}-{number}", "asleep", {}), listen)
        for _ in range(count * (periods if round_ == "measured" else 2)):
            await ended.acquire()
    seconds = time.perf_counter() - began
    await device.stop()
    return count * periods / seconds


# ---------------------------------------------------------------------------------------------------------- kills


def kills(args: argparse.Namespace) -> dict[str, Any]:
    """A replica is killed in each round."""
    count, lost, different, replaced = 2, 0, 0, list[float]()
    total = args.kills * args.pictures
    with bare_processes(args, 1) as make:
        expected = {seed: digest_of_png(content) for seed, content in make(range(total)).items()}
    with cluster(args, count) as server, ThreadPoolExecutor(args.pictures) as threads:
        for number in range(args.kills):
            seeds = range(number * args.pictures, (number + 1) * args.pictures)
            victim = wait_for_replicas(server, count)[number % count]
            steps = server.number("sdopt_steps_total")
            waiting = [threads.submit(server.post, body_of(args, seed)) for seed in seeds]
            while server.number("sdopt_steps_total") == steps and not all(one.done() for one in waiting):
                time.sleep(0.01)
            os.kill(victim, signal.SIGKILL)
            began = time.perf_counter()
            answers = [one.result() for one in waiting]
            lost += sum(status != 200 for status, _ in answers)
            got = [digest_of(answer) for answer in answers]
            different += sum(a != expected[s] for s, a in zip(seeds, got, strict=True) if not a.startswith("status"))
            while victim in (found := replicas_of(server)) or len(found) < count:
                time.sleep(0.1)
            replaced.append(time.perf_counter() - began)
        restarts, made = server.number("sdopt_worker_restarts"), server.number("sdopt_pictures_total")
    return {
        "kills": args.kills, "pictures": total, "lost": lost, "different": different,
        "made_twice": round(made) - (total - lost), "deaths_that_the_front_counted": round(restarts),
        "replaced_after_s": round(median(replaced), 1),
    }  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"scale": scale, "control": control, "kills": kills}


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", help="without it the embedded model")
    parser.add_argument("--backend", default="ort")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--replicas", type=numbers, default=[1, 2], help="of `scale` (default: 1,2)")
    parser.add_argument("--rounds", type=int, default=7, help="of `scale`, beside the first one")
    parser.add_argument("--pictures", type=int, default=24, help="of a round")
    parser.add_argument("--sleeping", type=numbers, default=[1, 2, 4, 8, 16], help="replicas of `control`")
    parser.add_argument("--periods", type=int, default=20, help="orders of each replica of `control`")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.threads = 1
    result: dict[str, Any] = {
        "bundle": args.bundle or "the embedded model",
        "backend": f"{args.backend} in {args.precision}",
        "size": f"{args.size}x{args.size}",
        "steps": args.steps,
        "threads_of_a_replica": 1,
    }
    for name in args.parts.split(","):
        result[name] = PARTS[name](args)
        print(json.dumps({name: result[name]}, indent=1), flush=True)
    result |= {"machine": machine(), "versions": versions()}
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    write_whole(args.output, json.dumps({**known, "serve": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
