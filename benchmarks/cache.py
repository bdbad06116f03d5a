"""Which reuse of features pays at equal time: feature caches, their relatives, and fewer steps, on the embedded model.

    python benchmarks/cache.py                       writes benchmarks/results/cache.json
    python benchmarks/cache.py -o build-out/cache.json --pictures 2

A lever is worth its place where it is nearer to the picture of many steps than fewer steps of any sampler in the same
time. `db`: mean PSNR of the pictures to those of DDIM with MANY steps; `own_db`: to those of the same sampler and steps
without the lever, which says how much the lever itself changes. `cost`: seconds of all calls of the UNet, in full
guided calls, from the least times of an interleaved run. All in float32 on ONNX Runtime.

    fewer steps   nothing is reused
    cache         shallow calls take deep features of the latest full one (Ma et al. 2023, arXiv:2312.00858)
    schedule      the same, with full calls dense around a centre (section 3.4 there)
    taylor        the same as `cache`, with features extrapolated from two full calls (Liu et al. 2025,
                  arXiv:2503.06923, first order)
    uncond        guidance every few calls: the unconditional half of the latest guided call is used again
    difference    the same with the difference of both halves
    encoder       the decoder runs in every call, on features of an earlier encoder (Li et al. 2023, arXiv:2312.09608)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import sdopt
from sdopt import graph
from sdopt.bench.machine import machine, versions
from sdopt.build.shallow import joins, take_deep
from sdopt.build.simulate import session
from sdopt.bundle.disk import write_whole
from sdopt.bundle.specs import Array, Float32
from sdopt.graph.ort_ops import ort_ops
from sdopt.metrics import psnr

RESULTS = Path(__file__).parent / "results/cache.json"
PROMPTS = ("a red apple", "a cat on a blue background", "a rocket on a black background", "a smiling face")
SAMPLERS = ("ddim", "dpmpp_2m", "unipc")
CACHED_SAMPLERS = SAMPLERS[:2]
MANY = 300  # steps of the picture that all others are compared with
STEPS = (4, 5, 6, 7, 8, 10, 12, 15, 20)
CACHED_STEPS = (10, 20)
INTERVALS = (2, 3, 5)
DEPTHS = (1, 2, 3)
POWER = 1.4  # of the distances in a schedule that is not uniform
BUDGETS = (4, 6, 8, 10, 12, 15, 20)
ROUNDS = 40

Outputs = Mapping[str, Array]
Strategy = Callable[[int, Float32, Float32], Float32]  # call, sample, timestep -> prediction


class Net:
    """The UNet in all its parts, as sessions of ONNX Runtime; `spent` counts calls by part."""

    def __init__(self, bundle: sdopt.Bundle, folder: Path) -> None:
        source = bundle.component("unet").graph
        self.parts: dict[str, Any] = {"full": _session(graph.load(source), folder / "full.onnx")}
        everything, decoder = graph.load(source), graph.load(source)
        for model, takes in ((everything, False), (decoder, True)):
            _open_joins(model, takes)
        self.parts["everything"] = _session(everything, folder / "everything.onnx")
        self.parts["decoder"] = _session(decoder, folder / "decoder.onnx")
        for depth in DEPTHS:
            model = graph.load(source)
            take_deep(model, depth)
            self.parts[f"shallow_{depth}"] = _session(model, folder / f"shallow_{depth}.onnx")
        self.spent: dict[str, int] = {}
        self.cond: Mapping[str, Float32] = {}
        self.both: Mapping[str, Float32] = {}
        self.scale = 1.0

    def run(self, part: str, kind: str, **arrays: Array) -> Outputs:
        """The outputs of a part; `kind`: what it counts as."""
        self.spent[kind] = self.spent.get(kind, 0) + 1
        opened = self.parts[part]
        names = [one.name for one in opened.get_outputs()]
        own = {one.name: arrays[one.name] for one in opened.get_inputs()}
        return dict(zip(names, opened.run(names, own), strict=True))

    def full(self, sample: Float32, timestep: Float32) -> Outputs:
        return self.run("everything", "full", sample=sample, timestep=timestep, **self.both)

    def guided(self, prediction: Array) -> Float32:
        uncond, cond = np.split(prediction, 2)
        return uncond + np.float32(self.scale) * (cond - uncond)


def _session(model: ir.Model, path: Path) -> Any:
    ort_ops(model)
    graph.save(model, path)
    return session(path, optimize=True, threads=1)


def _open_joins(model: ir.Model, takes: bool) -> None:
    """Let a UNet give what it joins, as `skip_k` and `deep_k` by depth, or take all skips and what the middle gives."""
    nodes = joins(model)
    for depth, node in enumerate(reversed(nodes), 1):
        for name, value in zip((f"deep_{depth}", f"skip_{depth}"), node.inputs, strict=True):
            assert value is not None
            if not takes:
                value.name = name
                model.graph.outputs.append(value)
            elif name.startswith("skip") or depth == len(nodes):
                given = ir.Value(name=name, type=value.type, shape=ir.Shape([None] * 4))
                graph.redirect(value, given)
                model.graph.inputs.append(given)
    graph.drop_unused(model)
    model.graph.inputs[:] = [one for one in model.graph.inputs if one.uses()]


# ------------------------------------------------------------------------------------------------ the levers


def plain(net: Net) -> Strategy:
    return lambda k, x, t: net.guided(net.full(x, t)["noise_pred"])


def cached(net: Net, full: set[int], depth: int, extrapolates: bool = False) -> Strategy:
    known: list[tuple[int, Array]] = []

    def strategy(k: int, x: Float32, t: Float32) -> Float32:
        if k in full:
            made = net.full(x, t)
            known[:] = [*known[-1:], (k, made[f"deep_{depth}"])]
            return net.guided(made["noise_pred"])
        (last, deep), before = known[-1], known[0]
        if extrapolates and len(known) == 2:
            deep = deep + np.float32((k - last) / (last - before[0])) * (deep - before[1])
        given = {"sample": x, "timestep": t, "deep": deep, **net.both}
        return net.guided(net.run(f"shallow_{depth}", f"shallow_{depth}", **given)["noise_pred"])

    return strategy


def encoder(net: Net, full: set[int]) -> Strategy:
    known: dict[str, Array] = {}

    def strategy(k: int, x: Float32, t: Float32) -> Float32:
        if k in full:
            known.update(net.full(x, t))
            return net.guided(known["noise_pred"])
        given = {**known, "sample": x, "timestep": t, **net.both}
        return net.guided(net.run("decoder", "decoder", **given)["noise_pred"])

    return strategy


def half(net: Net, full: set[int], difference: bool) -> Strategy:
    known: list[Array] = []

    def strategy(k: int, x: Float32, t: Float32) -> Float32:
        if k in full:
            prediction = net.full(x, t)["noise_pred"]
            known[:] = np.split(prediction, 2)
            return net.guided(prediction)
        cond = net.run("full", "half", sample=x, timestep=t, **net.cond)["noise_pred"]
        uncond = cond - (known[1] - known[0]) if difference else known[0]
        return net.guided(np.concatenate([uncond, cond]))

    return strategy


def centred(calls: int, count: int, centre: float, power: float) -> set[int]:
    """So many of the calls, dense around a centre: at equal distances of the signed root of their distance from it.

    Ref: Ma et al. 2023, arXiv:2312.00858, section 3.4 and appendix; their code's `sample_from_quad_center`.
    """
    ends = -(centre ** (1 / power)), (calls - centre) ** (1 / power)
    roots = np.linspace(*ends, count + 1)[:-1]
    return {0, *(round(float(centre + np.sign(root) * abs(root) ** power)) for root in roots)}


def levers(net: Net, steps: int) -> Iterator[tuple[str, dict[str, Any], Strategy]]:
    """Every lever with so many steps: its name, its options, and what makes its calls."""
    for interval in INTERVALS:
        full = set(range(0, steps, interval))
        for depth in DEPTHS:
            own = {"interval": interval, "depth": depth}
            yield "cache", own, cached(net, full, depth)
            yield "taylor", own, cached(net, full, depth, extrapolates=True)
        for depth in (1, 3):
            for centre in (0.0, 0.3):  # parts of the way
                dense = centred(steps, len(full), centre * steps, POWER)
                own = {"calls": sorted(dense), "depth": depth, "centre": centre}
                yield "schedule", own, cached(net, dense, depth)
        yield "encoder", {"interval": interval}, encoder(net, full)
        yield "uncond", {"interval": interval}, half(net, full, difference=False)
        yield "difference", {"interval": interval}, half(net, full, difference=True)


# ------------------------------------------------------------------------------------------------ measuring


def pictures(pipe: sdopt.Pipeline, net: Net, sampler: str, steps: int, strategy: Strategy, seeds: int) -> Array:
    """The pictures [n, height, width, 3] of all prompts and seeds."""
    prompts = [prompt for prompt in PROMPTS for _ in range(seeds)]
    plan = pipe.plan(prompts, seed=list(range(len(prompts))), sampler=sampler, num_inference_steps=steps)
    ready = pipe.prepare(plan)
    net.cond, net.both, net.scale = ready.conditions.cond, ready.conditions.both, plan.guidance[0]
    table, sample, history = plan.table, ready.canvas.sample, ()
    for k in range(len(table)):
        timestep = np.full(len(sample), table.timestep[k], np.float32)
        prediction = strategy(k, sample * np.float32(table.c_in[k]), timestep)
        sample, history = table.advance(k, sample, prediction, history)
    return pipe.decode(sample, "np")


def costs(net: Net, pipe: sdopt.Pipeline) -> dict[str, float]:
    """The time of a call of each part for one picture, in full guided calls; the parts take turns."""
    ready = pipe.prepare(pipe.plan(PROMPTS[0], seed=0, num_inference_steps=2))
    given: dict[str, Array] = {"sample": ready.canvas.sample, "timestep": np.full(1, 500, np.float32)}
    both, cond = {**given, **ready.conditions.both}, {**given, **ready.conditions.cond}
    made = net.run("everything", "full", **both)
    calls: dict[str, Callable[[], Any]] = {
        "full": lambda: net.run("full", "full", **both),
        "half": lambda: net.run("full", "half", **cond),
        "decoder": lambda: net.run("decoder", "decoder", **both, **made),
    }
    for depth in DEPTHS:
        name = f"shallow_{depth}"
        calls[name] = lambda name=name, deep=made[f"deep_{depth}"]: net.run(name, name, **both, deep=deep)
    seconds = {name: float("inf") for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return {name: round(least / seconds["full"], 4) for name, least in seconds.items()}


def mean_db(expected: Array, made: Array) -> float:
    """The mean over the pictures of their PSNR."""
    return round(float(np.mean([psnr(one, other, 1.0) for one, other in zip(expected, made, strict=True)])), 2)


def rows(pipe: sdopt.Pipeline, net: Net, seeds: int, prices: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Every lever and number of steps, with its cost and its fidelity."""
    many = pictures(pipe, net, "ddim", MANY, plain(net), seeds)
    for sampler in SAMPLERS:
        own: dict[int, Array] = {}
        for steps in STEPS:
            own[steps] = pictures(pipe, net, sampler, steps, plain(net), seeds)
            row = {"lever": "fewer steps", "sampler": sampler, "steps": steps, "cost": steps}
            yield {**row, "db": mean_db(many, own[steps])}
        for steps in CACHED_STEPS if sampler in CACHED_SAMPLERS else ():
            for lever, options, strategy in levers(net, steps):
                net.spent = {}
                made = pictures(pipe, net, sampler, steps, strategy, seeds)
                cost = sum(prices[part] * count for part, count in net.spent.items())
                row = {"lever": lever, "sampler": sampler, "steps": steps, **options, "cost": round(cost, 2)}
                yield {**row, "db": mean_db(many, made), "own_db": mean_db(own[steps], made)}


def with_gains(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `gain`: dB above fewer steps of any sampler in the same time, and `own_gain`: of the same one.

    Between two numbers of steps, fewer steps are taken to lie on the line between them.
    """

    def without(sampler: str | None, cost: float) -> float:
        steps = [row for row in found if row["lever"] == "fewer steps" and sampler in (None, row["sampler"])]
        best = {row["cost"]: max(one["db"] for one in steps if one["cost"] <= row["cost"]) for row in steps}
        known = sorted(best.items())
        return float(np.interp(cost, [one for one, _ in known], [db for _, db in known]))

    rows = list[dict[str, Any]]()
    for row in found:
        if row["lever"] != "fewer steps" and row["cost"] >= min(STEPS):
            gains = {"gain": None, "own_gain": row["sampler"]}
            row = {**row, **{name: round(row["db"] - without(of, row["cost"]), 2) for name, of in gains.items()}}
        rows.append(row)
    return rows


def verdicts(found: list[dict[str, Any]]) -> dict[str, Any]:
    """For each lever: its best within each budget beside that of fewer steps, with the default sampler and with any."""
    verdict: dict[str, Any] = {}
    for among, samplers in (("ddim", SAMPLERS[:1]), ("any sampler", SAMPLERS)):
        own = [row for row in found if row["sampler"] in samplers]
        for lever in dict.fromkeys(row["lever"] for row in own):
            best: dict[int, float] = {}
            for budget in BUDGETS:
                within = [row["db"] for row in own if row["lever"] == lever and row["cost"] <= budget]
                if within:
                    best[budget] = max(within)
            verdict.setdefault(among, {})[lever] = best
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=int, default=2, help="seeds of each prompt")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sdopt.load(backend="ort", threads=1) as pipe:
        net = Net(pipe.bundle, Path(folder))
        prices = costs(net, pipe)
        print(prices, flush=True)
        found: list[dict[str, Any]] = []
        for row in rows(pipe, net, args.pictures, prices):
            found.append(row)
            print(row, flush=True)
    found, verdict = with_gains(found), verdicts(found)
    how = {"machine": machine(), "versions": versions(), "prompts": PROMPTS, "seeds": args.pictures, "many": MANY}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.output, json.dumps({**how, "costs": prices, "verdicts": verdict, "rows": found}, indent=1) + "\n")
    for among, of_levers in verdict.items():
        print(f"\n{among:<14}" + "".join(f"{budget:>8}" for budget in BUDGETS))
        for lever, best in of_levers.items():
            print(f"{lever:<14}" + "".join(f"{best.get(budget, float('nan')):8.2f}" for budget in BUDGETS))
    print(args.output)


if __name__ == "__main__":
    main()
