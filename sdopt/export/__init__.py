"""Export a diffusers checkpoint as a bundle. This package imports torch; the runtime does not.

source           open and check a checkpoint, wherever it is
single_file      a model in one file becomes a folder
accounting       every weight comes from the file, and every tensor of the file is used
checkpoint       a checkpoint on disk: configurations, models, tokenizers
families         everything in which families of models differ, one module for each
blocks           the parts that families have in common: text encoders, UNet, VAE
part             one component, ready to be traced
component        trace one component, write it, prove its weights and measure its parity
tokenizer        write a tokenizer, and prove that it reads prompts as diffusers does
trace            from torch to ONNX
guidance_prefix  compute only once what both halves of guidance share
weights          store weights under the checkpoint's names, and prove that they are equal
parity           the gate that every graph has to pass
presets          the defaults of a bundle
schedule         the checkpoint's scheduler, as its pipeline reads it
offline          no connection to the hub while it is not wanted
probe, observe   the sampler table of any linear diffusers scheduler
preview          the map from latents to colours
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import tempfile
import types
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, cast

from sdopt import __version__
from sdopt.bundle.format import ComponentEntry, Manifest
from sdopt.bundle.unfinished import remove_dead_scratch
from sdopt.bundle.write import check_target, new_folder, require_space, write_manifest
from sdopt.engine import choose_backend
from sdopt.engine.address_space import require_for_export
from sdopt.engine.failures import foreign_in_words, of_caller
from sdopt.errors import CheckpointError, UsageError, refuse_no_path, refuse_no_switch, refuse_other, shown
from sdopt.export import component, families, parity, presets, preview, schedule, tokenizer, trace
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.component import Progress, Report
from sdopt.export.families.contract import Build, Family
from sdopt.export.offline import offline as no_connection
from sdopt.export.single_file.published import PUBLISHED
from sdopt.export.source import open_checkpoint
from sdopt.logs import logger

log = logger(__name__)

LESS_MEMORY = (
    "An export needs about three times the largest component in float32, usually the UNet: close other programs, or "
    "export on a machine with more memory; the bundle runs in less"
)


FLOORS = f"are decibels from 0 on, e.g. {parity.FLOOR_DB:g}"
WORDS = {
    "revision": "a branch, tag or commit of a hub id",
    "variant": 'a variant of the weights, e.g. "fp16"',
    "config": 'a diffusers folder, an id on the hub, or a name such as "sd1"',
}


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    config: str | None = None,
    opset: int = 23,
    verify: bool = True,
    floor_db: float = parity.FLOOR_DB,
    steps: int | None = None,
    guidance: float | None = None,
    force: bool = False,
    report: Report = log.info,
    progress: Progress | None = None,
) -> Path:
    """Make a bundle of `source` in the folder `target`, which appears complete or not at all. Returns that folder.

    One component is in memory at a time. `report` is called with a line for each, which otherwise goes to the log.
    `progress` is called as progress(phase, done, of) when a phase begins. `steps` and `guidance` become the bundle's
    defaults instead of those that `presets` finds.
    With `offline`, huggingface_hub connects to nothing in this process until the export ends.
    Raises: CheckpointError, ParityError, BundleError (target exists, or is being written; disk full), UsageError,
    BackendError (memory full; or without ONNX Runtime, which runs the graphs for the parity gate and for the fit of
    previews).
    """
    _refuse_others(source=source, target=target, revision=revision, variant=variant, config=config, report=report)
    refuse_no_switch(offline=offline, verify=verify, force=force)
    target, source = Path(target), os.fspath(source)
    check_target(target, force)
    trace.check_opset(opset)
    refuse_other("floor_db", floor_db, Real, FLOORS)
    if not floor_db >= 0:  # NaN is none either
        raise UsageError(f"floor_db = {floor_db}; allowed {FLOORS}", "floor_db")
    presets.check(steps, guidance)
    if progress is not None and not callable(progress):
        raise UsageError(f"progress = {shown(progress)}; allowed is a function of (phase, done, of)", "progress")
    report = of_caller(report)
    choose_backend("ort")
    remove_dead_scratch()
    # imported now, because an interrupt in the middle of this import does not arrive as a KeyboardInterrupt
    importlib.import_module("sdopt.engine.ort")
    opened = open_checkpoint(source, revision=revision, variant=variant, offline=offline, config=config)
    with (
        foreign_in_words(f"{source} is not exported", CheckpointError, LESS_MEMORY),
        no_connection(offline),
        new_folder(target, force=force, needed_bytes=_require_scratch(source)) as folder,
        opened as checkpoint,
    ):
        require_space(folder.parent, checkpoint.nbytes)
        require_for_export(checkpoint.nbytes)
        family = families.of(checkpoint)
        manifest = describe(checkpoint, steps, guidance)
        phase = component.Phases(progress, len(family.builds(checkpoint)))
        phase("reading the weights")
        builds = _denoiser_first(family, checkpoint)
        if "configurations" in checkpoint.provenance:
            report(_configurations(checkpoint))
        if manifest.requires_safety_checker:
            report("the safety checker is not exported: pictures are not filtered; that is left to the product")
        entries = schedule.manifest_entries(checkpoint, folder, manifest.defaults, report)
        tokenizers = tokenizer.write_tokenizers(checkpoint, folder, manifest.conditioning.encoders)
        report(component.HEADER)
        floor = floor_db if verify else None
        components: dict[str, ComponentEntry] = {}
        for build in builds.values():
            components |= component.write_component(build, checkpoint, folder, opset, floor, report, phase)
        phase("fitting previews")
        order = [*family.components, *components]
        components = {name: components[name] for name in dict.fromkeys(order) if name in components}
        manifest = replace(manifest, **entries, components=components, tokenizers=tokenizers, verified=verify)
        write_manifest(folder, replace(manifest, preview=preview.fit(folder, manifest)))
    return target


def _refuse_others(*, source: object, target: object, report: object, **words: object) -> None:
    """Raises: UsageError unless `source` and `target` are paths, `report` is a function, and `words` are texts or None.

    A message names the argument and its value.
    """
    refuse_no_path("source", source)
    refuse_no_path("target", target)
    try:
        Path(os.fspath(cast("str", source))).expanduser().is_dir()
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"{source}: {error.strerror}; give a path that this system can have") from error
    if not callable(report):
        raise UsageError(f"report = {shown(report)}; allowed is a function of one line", "report")
    for name, value in words.items():
        if value is not None:
            refuse_other(name, value, str, f"are texts, and None; {WORDS[name]}")


def _require_scratch(source: str) -> int:
    """The least bytes of a bundle of `source`, if it is one file, which is unpacked in a temporary folder first.

    Raises: BundleError if that has no room for it.
    """
    path = Path(source).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return 0
    nbytes = path.stat().st_size
    require_space(Path(tempfile.gettempdir()), nbytes)
    return nbytes


def _denoiser_first(family: Family, checkpoint: Checkpoint) -> dict[str, Build]:
    """What makes each component, in the order of their export. The weights of all of them have been checked.

    The denoiser, which is the largest by far, is loaded only once: it is ready, and exported first.
    Raises: CheckpointError for weights that `Checkpoint.load` refuses.
    """
    builds = family.builds(checkpoint)
    denoiser = next(name for name in builds if family.components[name].model == family.denoiser)
    checkpoint.require_weights(model for model in family.models if model != family.denoiser)
    part = builds.pop(denoiser)(checkpoint)
    return {denoiser: lambda checkpoint: part, **builds}


def _configurations(checkpoint: Checkpoint) -> str:
    """The line that says whose configurations a single file was read with."""
    name = checkpoint.provenance["configurations"]
    return (
        f"{checkpoint.provenance['file']} holds no configurations: it is read with those of {PUBLISHED[name].title} "
        f"({name}); --config names others"
    )


def describe(checkpoint: Checkpoint, steps: int | None = None, guidance: float | None = None) -> Manifest:
    """The manifest of a checkpoint, before its scheduler is read and its components are traced.

    Raises: CheckpointError for a configuration that is not exported.
    """
    family = families.of(checkpoint)
    family.require_supported(checkpoint)
    latents = family.latents(checkpoint)
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return Manifest(
        family=family.name,
        source={key: str(value) for key, value in checkpoint.provenance.items() if value is not None},
        versions={"sdopt": __version__, **libraries},
        latents=latents,
        defaults=presets.defaults(checkpoint, family, latents.factor, steps, guidance),
        conditioning=family.conditioning(checkpoint),
        denoiser=family.denoiser,
        even_sigmas=family.even_sigmas,
        float16_unsafe=family.float16_unsafe(checkpoint),
        float16_attention_unsafe=family.float16_attention_unsafe(checkpoint),
        requires_safety_checker=family.has_safety_checker and checkpoint.index().get("requires_safety_checker", True),
        tokenizers={},
        components={},
        scheduler={},
        prediction_type="",
        verified=False,
        files={},
    )


class _Callable(types.ModuleType):
    """This package, which can be called as its function: `sdopt.export(...)` beside `sdopt.load(...)`."""

    def __call__(self, source: str | os.PathLike[str], target: str | os.PathLike[str], **options: Any) -> Path:
        """As `export` of this package, with the same keywords."""
        return export(source, target, **options)


sys.modules[__name__].__class__ = _Callable
