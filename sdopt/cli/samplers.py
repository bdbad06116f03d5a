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
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")
WIDTH, HEIGHT, MARGIN = 800, 480, 56
Point = tuple[float, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sdopt samplers`."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help='samplers to plot, such as euler "DPM++ 2M Karras"; default: four')
    add("--print", dest="show", metavar="NAME", help="print one sampler's table")
    add("--plot", type=Path, metavar="FILE", help="draw the noise level of every call into FILE (.svg or .png)")
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
        _draw(args.plot, [(name, _table(args, name)) for name in names], args.steps)
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


# ------------------------------------------------------------------------------------------------------- plots


def _draw(path: Path, tables: Sequence[tuple[str, SamplerTable]], steps: int) -> None:
    """Write the plot of sigma against calls.

    Raises: UsageError for a suffix other than .svg and .png.
    """
    from sdopt.errors import UsageError

    if path.suffix.lower() not in (".svg", ".png"):
        raise UsageError(f"--plot {path}: the name must end in .svg or .png.")
    lines, texts = _shapes(tables, steps)
    if path.suffix.lower() == ".svg":
        path.write_text(_svg(lines, texts))
    else:
        _png(path, lines, texts)


Line = tuple[Sequence[Point], str, int]  # points, colour, width
Text = tuple[Point, str, str, str]  # where, words, colour, anchor


def _shapes(tables: Sequence[tuple[str, SamplerTable]], steps: int) -> tuple[list[Line], list[Text]]:
    """Lines and words in pixels, y downwards; sigma on a logarithmic axis, infinite and zero levels left out."""
    shown = [[(k, s) for k, s in enumerate(table.sigma.tolist()) if 0 < s < math.inf] for _, table in tables]
    logs = [math.log10(s) for points in shown for _, s in points] or [0.0]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    calls = max(max(len(table) for _, table in tables) - 1, 1)

    def at(call: float, log: float) -> Point:
        x = MARGIN + call / calls * (WIDTH - 2 * MARGIN)
        return x, MARGIN + (high - log) / (high - low) * (HEIGHT - 2 * MARGIN)

    lines: list[Line] = [((at(0, log), at(calls, log)), "#dddddd", 1) for log in range(low, high + 1)]
    texts: list[Text] = [
        ((MARGIN - 8, at(0, log)[1] + 4), f"{10.0**log:g}", "#444444", "end") for log in range(low, high + 1)
    ]
    texts += [((at(c, low)[0], HEIGHT - MARGIN + 18), str(c), "#444444", "middle") for c in _ticks(calls)]
    texts.append(((WIDTH / 2, HEIGHT - 12), "call of the denoiser", "#444444", "middle"))
    texts.append(((MARGIN, 24), f"noise level sigma, {steps} steps", "#444444", "start"))
    for i, (points, (name, _)) in enumerate(zip(shown, tables, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        lines.append(([at(k, math.log10(s)) for k, s in points], colour, 2))
        texts.append(((WIDTH - MARGIN, MARGIN + 16 * (i + 1)), name, colour, "end"))
    return lines, texts


def _ticks(last: int) -> list[int]:
    stride = max(1, round(last / 10))
    return list(range(0, last + 1, stride))


def _svg(lines: Sequence[Line], texts: Sequence[Text]) -> str:
    from xml.sax.saxutils import escape

    body = [
        f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="'
        + " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        + '"/>'
        for points, colour, width in lines
    ]
    body += [
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'
        for (x, y), words, colour, anchor in texts
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _png(path: Path, lines: Sequence[Line], texts: Sequence[Text]) -> None:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), "#ffffff")
    draw = ImageDraw.Draw(image)
    for points, colour, width in lines:
        draw.line(list(points), fill=colour, width=width)
    for (x, y), words, colour, anchor in texts:
        shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * draw.textlength(words)
        draw.text((x - shift, y - 11), words, fill=colour)
    image.save(path)
