"""A simulator of `sdopt serve` in virtual time: what waits, who is next, what a call costs. Nothing is computed.

    python benchmarks/serve_sim.py                                    the published curves below
    python benchmarks/serve_sim.py --curve 1:0.0137,2:0.0232,4:0.0428 --decode 0.02 --steps 8,20,50 --load 0.9
    python benchmarks/serve_sim.py --devices 1,8,64,1000

It takes c(b), the seconds of a call of the UNet with b images, and requests that arrive as a Poisson process with a
fixed seed, and decides with the code of the server (`sdopt.serve.schedule`, `sdopt.serve.costs`). Each line of its
output begins with its name, because no figure of it was measured. `benchmarks/serve.py` compares it with a real server.

Policies: `one by one` has one slot; `requests` begins a batch when the one before is done; `steps` is the server's.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from sdopt.serve.costs import Costs
from sdopt.serve.schedule import Standing, Ticket, Waiting, first

NAME = "serve_sim"
CURVES: dict[str, tuple[dict[int, float], str]] = {
    "qwen-image 512x512, H200": (
        {1: 0.167, 2: 0.183, 4: 0.240, 8: 0.425},
        "https://github.com/sgl-project/sglang/pull/22183",
    ),
    "qwen-image 1024x1024, H200": ({1: 0.243, 2: 0.474}, "https://github.com/sgl-project/sglang/pull/22183"),
}
PIXELS = 1  # all requests have one size here
POLICIES = ("one by one", "requests", "steps")


@dataclass(frozen=True)
class Arrival:
    """A request for one picture: `at` seconds, `steps` calls of the UNet."""

    at: float
    steps: int
    caller: str = ""


@dataclass
class Under:
    """A request on its way."""

    number: int
    arrival: Arrival
    started: float
    left: int


@dataclass
class Device:
    """One worker, in virtual time."""

    costs: Costs
    decode: float
    slots: int
    joins: bool
    waiting: Waiting = field(default_factory=Waiting)
    under: dict[str, Under] = field(default_factory=dict[str, Under])
    to_decode: list[Under] = field(default_factory=list[Under])
    arrived: dict[str, tuple[int, Arrival]] = field(default_factory=dict[str, tuple[int, Arrival]])
    free_at: float = 0.0
    calls: int = 0
    images: int = 0

    @property
    def backlog(self) -> float:
        """Seconds of work, as the front sees them."""
        alone = self.costs.call("unet", PIXELS)
        under = sum(one.left for one in self.under.values()) * alone
        return self.waiting.cost + under + len(self.to_decode) * self.decode

    def push(self, number: int, arrival: Arrival) -> None:
        """A request has come."""
        cost = arrival.steps * self.costs.call("unet", PIXELS) + self.decode
        self.arrived[str(number)] = (number, arrival)
        self.waiting.push(Ticket(str(number), arrival.caller, cost, arrival.at))

    def tick(self, now: float) -> tuple[float, list[int]]:
        """One turn of the server's loop: when it ends, and whose pictures are done then."""
        if self.joins or not self.under:
            while len(self.under) < self.slots and len(self.waiting):
                ticket = self.waiting.pop(now)
                number, arrival = self.arrived.pop(ticket.id)
                self.under[ticket.id] = Under(number, arrival, now, arrival.steps)
        spent, done = 0.0, list[int]()
        if self.under:
            call = self.costs.call("unet", PIXELS)
            cap = self.costs.cap("unet", PIXELS, self.slots)
            standings = [
                Standing(id, call * one.left, call * one.arrival.steps + self.decode, one.started)
                for id, one in self.under.items()
            ]
            chosen = first(standings, cap, now)
            spent += self.costs.call("unet", PIXELS, len(chosen))
            self.calls, self.images = self.calls + 1, self.images + len(chosen)
            for id in chosen:
                self.under[id].left -= 1
                if not self.under[id].left:
                    self.to_decode.append(self.under.pop(id))
        if self.to_decode:
            spent += self.decode
            done.append(self.to_decode.pop(0).number)
        return now + spent, done

    @property
    def is_idle(self) -> bool:
        return not (self.under or self.to_decode or len(self.waiting))


@dataclass(frozen=True)
class Outcome:
    """What came of a trace. `latencies`: seconds of each request, in the order of their arrival."""

    latencies: tuple[float, ...]
    seconds: float
    images_per_call: float
    steps: tuple[int, ...]

    def described(self) -> dict[str, Any]:
        """The figures of a table."""
        shortest = min(self.steps)
        short = [latency for latency, steps in zip(self.latencies, self.steps, strict=True) if steps == shortest]
        figures = {
            "mean_s": mean(self.latencies),
            **{f"p{p}_s": percentile(self.latencies, p) for p in (50, 95, 99)},
            f"p95_of_{shortest}_steps_s": percentile(short, 95),
            "pictures_per_s": len(self.latencies) / self.seconds,
            "images_per_call": self.images_per_call,
        }
        return {name: round(value, 3) for name, value in figures.items()}


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(percent) // 100) - 1))]


def poisson(rate: float, count: int, steps: Sequence[int], seed: int = 0, callers: int = 1) -> list[Arrival]:
    """Requests at random times, `rate` a second, each with one of these numbers of steps."""
    rng, now, trace = random.Random(seed), 0.0, list[Arrival]()
    for _ in range(count):
        now += rng.expovariate(rate)
        trace.append(Arrival(now, rng.choice(steps), f"caller-{rng.randrange(callers)}"))
    return trace


def simulate(
    trace: Sequence[Arrival],
    curve: Mapping[int, float],
    decode: float,
    policy: str = "steps",
    slots: int = 8,
    devices: int = 1,
) -> Outcome:
    """What becomes of a trace on so many devices with one curve: {images of a call: seconds}."""
    costs = Costs()
    for images, seconds in curve.items():
        costs.record("unet", PIXELS, images, seconds)
    slots = 1 if policy == "one by one" else slots
    workers = [Device(costs, decode, slots, policy != "requests") for _ in range(devices)]
    ends = [0.0] * len(trace)
    busy: list[tuple[float, int]] = []  # when a device ends its turn
    done_then: dict[int, list[int]] = {}

    def turn(index: int, now: float) -> None:
        worker = workers[index]
        if worker.is_idle:
            worker.free_at = now
            return
        end, done_then[index] = worker.tick(now)
        worker.free_at = float("inf")
        heapq.heappush(busy, (end, index))

    last = 0.0
    for number, arrival in [*enumerate(trace), (-1, Arrival(float("inf"), 0))]:
        while busy and busy[0][0] <= arrival.at:
            now, index = heapq.heappop(busy)
            for one in done_then.pop(index):
                ends[one], last = now, max(last, now)
            turn(index, now)
        if number < 0:
            break
        index = min(range(devices), key=lambda i: (workers[i].backlog, i))
        workers[index].push(number, arrival)
        if workers[index].free_at <= arrival.at:
            turn(index, arrival.at)
    calls, images = sum(worker.calls for worker in workers), sum(worker.images for worker in workers)
    latencies = tuple(end - arrival.at for end, arrival in zip(ends, trace, strict=True))
    return Outcome(latencies, last - trace[0].at, images / calls, tuple(arrival.steps for arrival in trace))


def capacity(curve: Mapping[int, float], decode: float, steps: Sequence[int]) -> float:
    """Pictures a second of one device that makes them one by one."""
    return 1 / (mean(steps) * curve[1] + decode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--curve", help="seconds of a call by its images, e.g. 1:0.10,2:0.12,4:0.2 (default: published ones)"
    )
    parser.add_argument("--decode", type=float, help="seconds of decoding a picture (default: a call with one image)")
    parser.add_argument("--steps", default="8,20,50", help="of the requests (default: 8,20,50)")
    parser.add_argument("--load", type=float, default=0.9, help="of what one by one can do (default: 0.9)")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--devices", default="1")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--price", type=float, help="of one device and hour: also print what a picture costs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    steps = [int(text) for text in args.steps.split(",")]
    curves = CURVES
    if args.curve:
        curves = {"given": ({int(k): float(v) for k, v in (p.split(":") for p in args.curve.split(","))}, "--curve")}
    results: list[dict[str, Any]] = []
    for name, (curve, source) in curves.items():
        decode = curve[1] if args.decode is None else args.decode
        for devices in (int(text) for text in args.devices.split(",")):
            rate = args.load * devices * capacity(curve, decode, steps)
            trace = poisson(rate, args.requests, steps, args.seed)
            for policy in POLICIES:
                outcome = simulate(trace, curve, decode, policy, args.slots, devices)
                figures = outcome.described()
                if args.price is not None:
                    figures["price_of_a_picture"] = round(args.price * devices * outcome.seconds / 3600 / len(trace), 6)
                results.append({"curve": name, "source": source, "devices": devices, "policy": policy, **figures})
                words = ", ".join(f"{key} {value}" for key, value in figures.items())
                print(f"{NAME}: {name}, {devices} devices, {policy}: {words}")
    if args.output is not None:
        args.output.write_text(json.dumps({"by": NAME, "load": args.load, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
