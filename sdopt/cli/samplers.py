"""`sdopt samplers`: a list of the samplers, the table of one, or a plot of noise levels."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdopt.cli.parser import Parser

if TYPE_CHECKING:
    from sdopt.samplers import Sampler, SamplerTable

# The scheduler config of Stable Diffusion 1.5, which is used when no --config is given.
DEFAULT_CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
MAX_CONFIG_BYTES = 1 << 20
PLOTTED = ("euler", "DPM++ 2M Karras", "ddim", "heun")  # when no sampler is named


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help='samplers to plot, such as euler "DPM++ 2M Karras"; default: four'
    )
    add = parser.group("what is shown")
    add("--print", dest="show", metavar="NAME", help="print one sampler's table")
    add("--plot", type=Path, metavar="FILE.svg", help="plot the noise level of every call in this file")
    add("--json", action="store_true", help="print JSON, with every digit")
    add = parser.group("which table")
    add("--steps", type=int, default=20, metavar="N", help="default: 20")
    add("--schedule", help="karras, exponential, beta, lu, sgm_uniform, trailing, leading, linspace or normal")
    add("--strength", type=float, help="below 1: where image to image begins")
    add("--eta", type=float, help="the noise of ddim and tcd, 0 to 1")
    add("--config", type=Path, metavar="FILE", help="a scheduler_config.json; default: Stable Diffusion 1.5's")
    parser.examples(
        "sdopt samplers",
        "sdopt samplers --print euler --steps 10 --schedule karras",
        'sdopt samplers euler "DPM++ 2M Karras" --plot noise.svg',
    )


def run(args: argparse.Namespace) -> int:
    from sdopt.cli import outputs
    from sdopt.errors import UsageError
    from sdopt.samplers import SAMPLERS

    _refuse_unused(args)
    if args.show:
        table = _table(args, args.show)
        print(json.dumps(table.to_json()) if args.json else "\n".join(_table_lines(table)))
    elif args.plot:
        names = args.names or PLOTTED
        if args.plot.suffix.lower() != ".svg":
            svg = args.plot.with_suffix(".svg") if args.plot.name else "noise.svg"
            raise UsageError(f"--plot {args.plot}: plots are written as SVG; name it {svg}")
        outputs.check_file(args.plot, "--plot", example="noise.svg")
        _plot(args.plot, [(name, _table(args, name)) for name in names], args.steps)
        print(json.dumps({"path": str(args.plot)}) if args.json else args.plot)
    else:
        entries = [_entry(sampler, args.steps) for sampler in SAMPLERS.values()]
        print(json.dumps(entries) if args.json else "\n".join(_list_lines(entries, args.steps)))
    return 0


def _refuse_unused(args: argparse.Namespace) -> None:
    """Raises: UsageError for options and names that what is shown does not take: a list, a table or a plot."""
    from sdopt.errors import UsageError

    if args.steps < 1:
        raise UsageError(f"--steps {args.steps}; allowed are whole numbers from 1, e.g. --steps 20", "steps")
    if args.show and args.plot:
        raise UsageError("--print and --plot: give one of them")
    if args.names and not args.plot:
        names = shlex.join(args.names)
        how = "leave it out" if args.show else f"--print {names} prints its table" if len(args.names) == 1 else ""
        raise UsageError(f"{names}: samplers are named for --plot FILE.svg{'; ' + how if how else ''}")
    given = [f"--{name}" for name in ("schedule", "strength", "eta", "config") if getattr(args, name) is not None]
    if given and not args.show and not args.plot:
        raise UsageError(
            f"{', '.join(given)}: the list of samplers does not depend on it; give a sampler's name with --print, or "
            "--plot FILE.svg"
        )


def _config(path: Path | None) -> dict[str, Any]:
    """The scheduler config in a file, or the default one.

    Raises: UsageError if the file cannot be read or is not a JSON object.
    """
    from sdopt.bundle.disk import parse_json, read_plain
    from sdopt.errors import UsageError

    if path is None:
        return dict(DEFAULT_CONFIG)
    try:
        entry: Any = parse_json(read_plain(path, MAX_CONFIG_BYTES))
        if not isinstance(entry, dict):
            raise ValueError("it is no object")
        return cast("dict[str, Any]", entry)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path}: not a scheduler_config.json: {error}") from error


def _table(args: argparse.Namespace, name: str) -> SamplerTable:
    from sdopt.samplers import find_sampler, sampler_table

    sampler, _ = find_sampler(name)
    config = _config(args.config)
    if args.config is None and sampler.family != "diffusion":  # the default config is one of a diffusion model
        config = {"_class_name": "FlowMatchEulerDiscreteScheduler" if sampler.family == "flow" else sampler.diffusers}
    strength = 1.0 if args.strength is None else args.strength
    return sampler_table(config, args.steps, sampler=name, schedule=args.schedule, strength=strength, eta=args.eta)


def _entry(sampler: Sampler, steps: int) -> dict[str, Any]:
    noise = "yes" if sampler.stochastic else "no"
    return {
        "name": sampler.name,
        "title": sampler.title,
        "order": sampler.order,
        "calls": sampler.calls(steps),
        "noise": "eta" if sampler.takes_eta else noise,
        "paper": sampler.paper,
        "diffusers": sampler.diffusers,
    }


def _list_lines(entries: Sequence[dict[str, Any]], steps: int) -> list[str]:
    heads = {key: key for key in entries[0]} | {"calls": f"calls/{steps}"}
    rows = [[str(row[key]) for key in heads] for row in (heads, *entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _table_lines(table: SamplerTable) -> list[str]:
    """The table as text: one line for each call of the denoiser."""
    history = ["m_k", *(f"m_k-{i}" for i in range(1, table.order))]
    heads = ["call", "timestep", "sigma", "c_in", "keep x", "keep out", "x", *history, "noise"]
    noise = "adds noise" if table.stochastic else "no noise"
    image_factor, noise_factor = table.start
    lines = [
        f"{table.name}: {len(table)} calls, order {table.order}, {noise}",
        f"first sample {table.init_noise_sigma:.7g} * noise; "
        f"image to image {image_factor:.7g} * image + {noise_factor:.7g} * noise",
        *(f"note: {note}" for note in table.notes),
        "",
        "".join(f"{head:>12}" for head in heads),
    ]
    for k, update in enumerate(table.update.tolist()):
        values = [table.timestep[k], table.sigma[k], table.c_in[k], table.c_skip[k], table.c_out[k], *update]
        noise_gain = update[-1]
        draws_unused_noise = table.draws[k] and not noise_gain
        remark = "  (drawn)" if draws_unused_noise else ""
        lines.append(f"{k:>12}" + "".join(f"{value:>12.6g}" for value in values) + remark)
    return lines


def _plot(path: Path, tables: Sequence[tuple[str, SamplerTable]], steps: int) -> None:
    """Write the plot of sigma against calls. Infinite and zero levels are left out.

    Raises: UsageError if no level is left.
    """
    from sdopt.bench.svg import Curve, lines
    from sdopt.bundle.disk import write_named
    from sdopt.errors import UsageError

    curves: list[Curve] = []
    for colour, (name, table) in enumerate(tables):
        points = [(float(call), sigma) for call, sigma in enumerate(table.sigma.tolist()) if 0 < sigma < math.inf]
        if points:
            curves.append(Curve(name, points, colour))
    if not curves:
        raise UsageError(f"--plot {path}: none of these samplers has a finite noise level; give more --steps")
    title = f"noise level sigma, {steps} steps"
    write_named(path, lines(title, "call of the denoiser", "sigma", curves, decades=True))
