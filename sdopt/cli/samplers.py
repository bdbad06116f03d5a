"""`sdopt samplers`: the list, one table, or a plot of noise levels."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdopt.samplers import Sampler, SamplerTable

# Stable Diffusion 1.5's, when no --config is given.
CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sdopt samplers`."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help='samplers to plot, such as euler "DPM++ 2M Karras"; default: four')
    add("--print", dest="show", metavar="NAME", help="print one sampler's table")
    add("--plot", type=Path, metavar="FILE.svg", help="draw the noise level of every call into it")
    add("--steps", type=int, default=20, metavar="N", help="default: 20")
    add("--schedule", help="karras, exponential, beta, lu, sgm_uniform, trailing, leading, linspace or normal")
    add("--strength", type=float, default=1.0, help="below 1: where image to image begins")
    add("--eta", type=float, help="the noise of ddim and tcd, 0 to 1")
    add("--config", type=Path, metavar="FILE", help="a scheduler_config.json; default: Stable Diffusion 1.5's")
    add("--json", action="store_true", help="print JSON, with every digit")


def run(args: argparse.Namespace) -> int:
    """Run `sdopt samplers`; the exit code."""
    from sdopt.samplers import SAMPLERS

    if args.show:
        table = _table(args, args.show)
        print(json.dumps(table.to_json()) if args.json else "\n".join(_rows(table)))
    elif args.plot:
        names = args.names or ["euler", "DPM++ 2M Karras", "ddim", "heun"]
        _plot(args.plot, [(name, _table(args, name)) for name in names], args.steps)
        print(json.dumps({"path": str(args.plot)}) if args.json else args.plot)
    else:
        entries = [_entry(sampler, args.steps) for sampler in SAMPLERS.values()]
        print(json.dumps(entries) if args.json else "\n".join(_list(entries, args.steps)))
    return 0


def _config(path: Path | None) -> dict[str, Any]:
    """The scheduler config to work on.

    Raises: UsageError when the file cannot be read or is no JSON object.
    """
    from sdopt.errors import UsageError

    if path is None:
        return dict(CONFIG)
    try:
        return dict[str, Any](json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--config {path}: not a scheduler_config.json: {error}") from error


def _table(args: argparse.Namespace, name: str) -> SamplerTable:
    from sdopt.samplers import find_sampler, sampler_table

    sampler, _ = find_sampler(name)
    config = _config(args.config)
    if args.config is None and sampler.family != "diffusion":  # Stable Diffusion's config says nothing about it
        config = {"_class_name": sampler.diffusers}
    return sampler_table(config, args.steps, sampler=name, schedule=args.schedule, strength=args.strength, eta=args.eta)


def _entry(sampler: Sampler, steps: int) -> dict[str, Any]:
    return {
        "name": sampler.name,
        "title": sampler.title,
        "order": sampler.order,
        "calls": sampler.calls(steps),
        "noise": "eta" if sampler.takes_eta else "yes" if sampler.stochastic else "no",
        "paper": sampler.paper,
        "diffusers": sampler.diffusers,
    }


def _list(entries: Sequence[dict[str, Any]], steps: int) -> list[str]:
    heads = {key: key for key in entries[0]} | {"calls": f"calls/{steps}"}
    widths = {key: max(len(str(row[key])) for row in [heads, *entries]) for key in heads}
    return ["  ".join(str(row[key]).ljust(widths[key]) for key in heads).rstrip() for row in [heads, *entries]]


def _rows(table: SamplerTable) -> list[str]:
    """The table as text: one line per call of the denoiser."""
    history = ["m_k", *(f"m_k-{i}" for i in range(1, table.order))]
    heads = ["call", "timestep", "sigma", "c_in", "keep x", "keep out", "x", *history, "noise"]
    lines = [
        f"{table.name}: {len(table)} calls, order {table.order}, {'adds noise' if table.stochastic else 'no noise'}",
        f"first sample {table.init_noise_sigma:.7g} * noise; image to image {table.start[0]:.7g} * image + "
        f"{table.start[1]:.7g} * noise",
        *(f"note: {note}" for note in table.notes),
        "",
        "".join(f"{head:>12}" for head in heads),
    ]
    for k, update in enumerate(table.update.tolist()):
        values = [table.timestep[k], table.sigma[k], table.c_in[k], table.c_skip[k], table.c_out[k], *update]
        drawn = "" if not table.draws[k] or update[-1] else "  (drawn)"
        lines.append(f"{k:>12}" + "".join(f"{value:>12.6g}" for value in values) + drawn)
    return lines


def _plot(path: Path, tables: Sequence[tuple[str, SamplerTable]], steps: int) -> None:
    """Write the plot of sigma against calls; infinite and zero levels are left out.

    Raises: UsageError for a suffix other than .svg, or where no level is left.
    """
    from sdopt.bench.svg import Curve, lines
    from sdopt.bundle.disk import write_whole
    from sdopt.errors import UsageError

    if path.suffix.lower() != ".svg":
        raise UsageError(f"--plot {path}: plots are written as SVG; name it {path.with_suffix('.svg')}")
    curves: list[Curve] = []
    for i, (name, table) in enumerate(tables):
        levels = [(float(call), level) for call, level in enumerate(table.sigma.tolist()) if 0 < level < math.inf]
        if levels:
            curves.append(Curve(name, levels, i))
    if not curves:
        raise UsageError(f"--plot {path}: none of these samplers has a finite noise level; give more --steps")
    title = f"noise level sigma, {steps} steps"
    write_whole(path, lines(title, "call of the denoiser", "sigma", curves, decades=True))
