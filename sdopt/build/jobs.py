"""`sdopt build`: build engines for this machine from a bundle's graphs, and keep them in the bundle's `engines/`.

An engine's folder is named by a digest of everything that changes the engine, and appears by one rename; see `job`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt.build.int8 import SEVEN_BITS
from sdopt.build.job import Job, Report
from sdopt.build.options import (
    IN_8_BITS,
    INT8_WEIGHTS,
    QUANTIZED,
    BuildOptions,
    exceptions,
    part_options,
    refuse_overlay,
)
from sdopt.build.recipe import Recipe, read_recipe, user_profiles
from sdopt.build.target import OPENVINO, Target, refuse_part, refuse_precision
from sdopt.build.trt_build import Progress, check_options
from sdopt.bundle.files import Bundle
from sdopt.bundle.weights import Overlay
from sdopt.engine.failures import foreign_in_words, of_caller
from sdopt.engine.store import COMMAND, check_key
from sdopt.errors import BackendError, UsageError, install
from sdopt.logs import logger

if TYPE_CHECKING:
    from sdopt.build.calibrations import Calibrations

log = logger(__name__)
LESS_MEMORY = "A build needs about three times its graph: close other programs, or build on a machine with more memory"
NO_VNNI = (
    "this processor adds products of int8 in 16 bits (it has no VNNI): weights get 7 bits, and int8 may be no faster "
    "than fp32 here; compare them with sdopt tune"
)


def build(
    bundle: Bundle,
    backend: str,
    *,
    components: Sequence[str] | None = None,
    adapters: Sequence[str] = (),
    cache_depth: int | None = None,
    profiles: Sequence[str] = (),
    static: bool = False,
    options: BuildOptions | None = None,
    recipe: Recipe | None = None,
    overlay: Overlay | None = None,
    command: str = "",
    report: Report = log.info,
    progress: Progress | None = None,
) -> list[Path]:
    """Build the engines of `bundle` that do not exist yet, and return the folders of all.

    One engine takes all the profiles. With `static`, each profile has an engine of its own. `adapters`: those of the
    bundle that steer the engines of a step: ControlNets run inside, and what T2I-Adapters and IP-Adapters give is an
    input. Such an engine is taken where exactly these ControlNets and kinds are in use. `cache_depth`: build the two
    engines of a feature cache, and nothing else. `overlay`: LoRAs that are built
    into the engines, which are taken where exactly these are in use.
    Raises: UsageError for a wrong option; BackendError if the library or the GPU is missing, or the build fails.
    """
    target = Target.here(backend)
    recipe = recipe or read_recipe()
    options = (options or BuildOptions()).resolved(target.precision)
    refuse_precision(target.backend, options.precision)
    ranges = user_profiles(bundle, recipe, profiles, static)
    groups = [(profile,) for profile in ranges] if static else [ranges]
    command = command or f"{COMMAND} --backend {backend}"
    if target.lib is not None:
        check_options(target.lib, asdict(options))
    if cache_depth is not None:
        if components:
            raise UsageError("--cache-depth and --component: each says what is built; give one of the two")
        components = recipe.cached(bundle, cache_depth, steps=target.lib is not None)
    elif options.precision == INT8_WEIGHTS:
        components = components or _large_encoders(bundle)
    elif target.is_cpu and (options.precision in QUANTIZED or target.backend == OPENVINO) and not components:
        components = [name for name in IN_8_BITS if name in bundle.components]
    parts = recipe.chosen(bundle, components, adapters)
    if overlay is not None:
        refuse_overlay(overlay, [part.name for part in parts], options, target.lib is None)
    check_key()
    report, progress = of_caller(report), progress and of_caller(progress)
    folders: list[Path] = []
    calibrations = _calibrations(bundle, target, options.precision, report) if options.precision in QUANTIZED else None
    for part in parts:
        refuse_part(target.backend, part, options.precision)
        own = part_options(options, part, bundle, target.has_bf16, overlay, "fp32" if target.is_cpu else "fp16")
        lines = exceptions(own, options.precision, part, bundle)
        for group in groups:
            job = Job(bundle, part, target, own, group, command, tuple(lines), overlay, calibrations)
            with foreign_in_words(f"{part.name} is not built", BackendError, LESS_MEMORY):
                folders.append(job.run(report, progress))
    return folders


def _large_encoders(bundle: Bundle) -> list[str]:
    """The text encoders that give tokens of their own, as T5 does. Raises: UsageError for a bundle without one."""
    names = [one.component for one in bundle.manifest.conditioning.encoders if one.join == "tokens"]
    if not names:
        there = ", ".join(bundle.components)
        text = f"precision {INT8_WEIGHTS!r}: this bundle has no T5; name what is built with --component: {there}"
        raise UsageError(text, "precision")
    return names


def _calibrations(bundle: Bundle, target: Target, precision: str, report: Report) -> Calibrations:
    """What finds the scales of int8. Raises: BackendError where ONNX Runtime is missing, which makes the pictures."""
    try:
        from sdopt.build.calibrations import Calibrations  # late: only int8 needs ONNX Runtime here
    except ImportError as error:
        raise BackendError(
            f"{precision} finds its scales in pictures that ONNX Runtime makes ({error}): {install('build,cpu')}"
        ) from error
    arithmetic = target.arithmetic(precision)
    if arithmetic.largest_weight == SEVEN_BITS:
        report(NO_VNNI)
    if target.backend != OPENVINO:
        return Calibrations(bundle, arithmetic)
    from sdopt.engine import openvino

    return Calibrations(bundle, arithmetic, partial(openvino.open_int8, factor=bundle.factor))
