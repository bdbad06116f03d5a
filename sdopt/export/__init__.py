"""Export: a diffusers checkpoint into a Bundle. The only side of sdopt that imports torch.

source           opens and checks a checkpoint, wherever it is
checkpoint       a checkpoint on disk: configurations, models, tokenizers
families         all that sets one family of models apart, one module each
blocks           what families are made of: text encoders, UNet, VAE
part             one component, ready to be traced
component        one component, written: traced, proven, measured
trace            torch to ONNX
guidance_prefix  what both halves of guidance share, computed once
weights          the checkpoint's names in the graph, proven by numbers
parity           the gate that every graph has to pass
presets          the defaults of a bundle
schedule         the checkpoint's scheduler, as its pipeline reads it
probe, observe   any linear diffusers scheduler into its sampler table
preview          the map from latents to colours
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from dataclasses import replace
from pathlib import Path

from sdopt import __version__
from sdopt.bundle.files import new_folder, refuse_existing, write_manifest
from sdopt.bundle.format import Manifest
from sdopt.engine import choose_backend
from sdopt.export import component, families, parity, presets, preview, schedule
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.component import Report
from sdopt.export.source import open_checkpoint


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
    report: Report = print,
) -> Path:
    """Make a bundle of `source` in the folder `target`, which appears complete or not at all. Returns that folder.

    One component is in memory at a time, and `report` is given a line for each. `steps` and `guidance` become the
    bundle's defaults in place of those that `presets` knows.
    Raises: CheckpointError, ParityError, BundleError (target exists, disk full), UsageError, BackendError (without
    ONNX Runtime, which runs the graphs for the parity gate and for the fit of previews).
    """
    target = Path(target)
    refuse_existing(target, force)
    choose_backend("ort")
    # now, because an interrupt in the middle of this import does not arrive as a KeyboardInterrupt
    importlib.import_module("sdopt.engine.ort")
    opened = open_checkpoint(os.fspath(source), revision=revision, variant=variant, offline=offline, config=config)
    with opened as checkpoint, new_folder(target, force=force, needed_bytes=checkpoint.nbytes) as folder:
        manifest = describe(checkpoint, steps, guidance)
        if manifest.requires_safety_checker:
            report("the safety checker is not exported: pictures are not filtered; that is left to the product")
        entries = schedule.manifest_entries(checkpoint, folder, manifest.defaults, report)
        report(component.HEADER)
        floor = floor_db if verify else None
        components = {
            name: component.write_component(build, checkpoint, folder, opset, floor, report)
            for name, build in families.of(checkpoint).builds(checkpoint).items()
        }
        tokenizers = {
            encoder.tokenizer: component.write_tokenizer(checkpoint, folder, encoder)
            for encoder in manifest.conditioning.encoders
        }
        manifest = replace(manifest, **entries, components=components, tokenizers=tokenizers, verified=verify)
        write_manifest(folder, replace(manifest, preview=preview.fit(folder, manifest)))
    return target


def describe(checkpoint: Checkpoint, steps: int | None = None, guidance: float | None = None) -> Manifest:
    """The manifest of a checkpoint, before its scheduler is read and its components are traced."""
    family = families.of(checkpoint)
    latents = family.latents(checkpoint)
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return Manifest(
        family=family.name,
        source={key: str(value) for key, value in checkpoint.provenance.items() if value is not None},
        versions={"sdopt": __version__, **libraries},
        latents=latents,
        defaults=presets.defaults(checkpoint, family, latents.factor, steps, guidance),
        conditioning=family.conditioning(checkpoint),
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
