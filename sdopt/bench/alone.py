"""The timings of a bundle alone: without PyTorch, and so without a parity. They are printed, and no record is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sdopt.bench.cases import Case
from sdopt.bench.sides import latents_of, options, picture, precision_for
from sdopt.bench.stats import summary
from sdopt.bench.tables import TITLES, markdown
from sdopt.bench.timing import Series, interleaved, timed
from sdopt.bundle.specs import Array
from sdopt.pipeline import load

STEP = "loop, one step with the UNet"


def time_alone(
    case: Case, bundle: Path, threads: int, rounds: int, warmup: int, report: Callable[[str], None]
) -> tuple[str, str, dict[str, Series]]:
    """(backend, precision, the timings of each component) of a bundle that makes a case's picture."""
    report(f"{case.name}: {case.width}x{case.height}, {case.steps} steps, guidance {case.guidance}")
    with load(bundle, case.backend, precision=precision_for(case), memory=case.memory, threads=threads) as pipe:
        latents = latents_of(case, pipe.bundle)

        def loop() -> Array:
            return pipe([case.prompt] * case.batch, latents=latents, output_type="latent", **options(case)).images

        calls = {
            "text_encoder": timed(lambda: pipe.encode([case.prompt])),
            "step": timed(loop, per=case.steps),
            "vae_decoder": timed(lambda: pipe.decode(latents, "np")),
            "picture": timed(lambda: picture(pipe, case, latents)),
        }
        timings: dict[str, Series] = {}
        for name, call in calls.items():
            report(f"  {name}")
            timings |= interleaved({name: call}, rounds, warmup)
        return pipe.backend, pipe.precision, timings


def table(case: Case, backend: str, precision: str, timings: Mapping[str, Series]) -> str:
    """The timings as a table in Markdown, in milliseconds."""
    titles = {**TITLES, "step": STEP}
    rows = [["ms", "median", "p10", "p90"]]
    for name, series in timings.items():
        taken = summary(series.seconds)
        rows.append([titles[name], *(f"{1000 * value:.1f}" for value in (taken.median, taken.p10, taken.p90))])
    images = "1 image" if case.batch == 1 else f"{case.batch} images"
    size = f"{case.width}x{case.height}, {case.steps} steps, guidance {case.guidance:g}, {images}"
    return f"**{case.name}, {size}, {backend} in {precision}**\n\n{markdown(rows)}"
