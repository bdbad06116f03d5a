"""Export: a diffusers checkpoint into a Bundle. The only side of sdopt that imports torch.

source      opens and checks the checkpoint
families    what sets a model apart, as data
components  what is traced, family by family
trace       torch to ONNX
weights     the checkpoint's names in the graph, proven by numbers
parity      the gate that every graph has to pass
presets     the defaults of a bundle
schedule    the checkpoint's scheduler, as its pipeline reads it
probe       any linear diffusers scheduler into its sampler table
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sdopt import __version__
from sdopt.bundle.files import new_folder, refuse_existing, write_manifest
from sdopt.bundle.format import ComponentEntry, Encoder, LibraryGraph, Manifest, TokenizerEntry
from sdopt.engine import choose_backend
from sdopt.errors import CheckpointError
from sdopt.export import components, families, parity, presets, preview, schedule, trace, weights
from sdopt.export.source import Checkpoint, open_checkpoint
from sdopt.graph.ort_ops import write_ort_graph

HEADER = f"{'component':<14}{'seconds':>9}{'MB':>9}  {'weights':<8}{'parity dB':>10}{'max error':>11}"
Report = Callable[[str], None]


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
    """The folder of the bundle made from `source`; it appears whole, or not at all.

    One component is in memory at a time; `report` is given a line for each. `steps` and `guidance` are the bundle's
    defaults in place of those that `presets` finds.
    Raises: CheckpointError, ParityError, BundleError (target exists, disk full), UsageError, BackendError (without
    ONNX Runtime, which runs the graphs for the parity gate and for the fit of previews).
    """
    target = Path(target)
    refuse_existing(target, force)
    choose_backend("ort")
    importlib.import_module("sdopt.engine.ort")  # now: an interrupt in the middle of its import is no KeyboardInterrupt
    with (
        open_checkpoint(
            os.fspath(source), revision=revision, variant=variant, offline=offline, config=config
        ) as checkpoint,
        new_folder(target, force=force, needed_bytes=checkpoint.nbytes) as folder,
    ):
        manifest = describe(checkpoint, steps, guidance)
        if manifest.requires_safety_checker:
            report("the safety checker is not exported: pictures are not filtered; that is left to the product")
        entries = schedule.manifest_entries(checkpoint, folder, manifest.defaults, report)
        report(HEADER)
        parts = {
            name: _component(build, checkpoint, folder, opset, floor_db if verify else None, report)
            for name, build in components.builds(checkpoint).items()
        }
        encoders = manifest.conditioning.encoders
        tokenizers = {encoder.tokenizer: _tokenizer(checkpoint, folder, encoder) for encoder in encoders}
        manifest = replace(manifest, **entries, components=parts, tokenizers=tokenizers, verified=verify)
        write_manifest(folder, replace(manifest, preview=preview.fit(folder, manifest)))
    return target


def describe(checkpoint: Checkpoint, steps: int | None = None, guidance: float | None = None) -> Manifest:
    """The manifest of a checkpoint, before its scheduler is read and its components are traced."""
    latents = families.latents(checkpoint)
    asks = "StableDiffusionXL" not in checkpoint.pipeline and checkpoint.index().get("requires_safety_checker", True)
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return Manifest(
        family=checkpoint.family,
        source={key: str(value) for key, value in checkpoint.provenance.items() if value is not None},
        versions={"sdopt": __version__, **libraries},
        latents=latents,
        defaults=presets.defaults(checkpoint, latents.factor, steps, guidance),
        conditioning=families.conditioning(checkpoint),
        float16_unsafe=families.float16_unsafe(checkpoint),
        float16_attention_unsafe=families.float16_attention_unsafe(checkpoint),
        requires_safety_checker=asks,
        tokenizers={},
        components={},
        scheduler={},
        prediction_type="",
        verified=False,
        files={},
    )


def _component(
    build: components.Build,
    checkpoint: Checkpoint,
    folder: Path,
    opset: int,
    floor_db: float | None,
    report: Report,
) -> ComponentEntry:
    """Write one component, and its entry in the manifest.

    The model is run first and let go before its graph is opened, so its weights are in memory once.
    """
    started = time.perf_counter()
    part = build(checkpoint)
    references = parity.references(part) if floor_db is not None else []
    graph = folder / f"{part.name}.onnx"
    stored = trace.save(trace.trace(part, opset), graph)
    weights.prove(part, graph)
    part = part.released()
    results = parity.measure(part, graph, references) if floor_db is not None else []
    own = write_ort_graph(graph)
    theirs = parity.measure(part, own, references) if own is not None and floor_db is not None else []
    size = sum(p.stat().st_size for p in folder.glob(f"{part.name}.*")) / 1e6
    worst = min((r.psnr_db for r in (*results, *theirs)), default=None)
    error = max((r.max_error for r in (*results, *theirs)), default=0.0)
    shown = "unverified" if worst is None else f"{worst:>10.1f}{error:>11.1e}"
    report(f"{part.name:<14}{time.perf_counter() - started:>9.1f}{size:>9.1f}  {stored:<8}{shown}")
    if floor_db is not None:
        parity.gate(part, [*results, *theirs], floor_db)
    graphs = {} if own is None else {"ort": LibraryGraph(own.name, tuple(theirs))}
    return ComponentEntry(graph.name, opset, stored, part.inputs, part.outputs, tuple(results), graphs)


def _tokenizer(checkpoint: Checkpoint, folder: Path, encoder: Encoder) -> TokenizerEntry:
    """Write NAME/tokenizer.json, made from vocab.json and merges.txt where a checkpoint has only those."""
    name = encoder.tokenizer
    tokenizer = checkpoint.tokenizer(name)
    path = folder / name / "tokenizer.json"
    path.parent.mkdir()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    path.write_text(json.dumps({**backend, "truncation": None, "padding": None}, ensure_ascii=False), encoding="utf-8")
    config = checkpoint.config(encoder.component)
    length = min(tokenizer.model_max_length, config["max_position_embeddings"])
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if None in ids.values():
        raise CheckpointError(f"{checkpoint.folder / name}: it names no {' or '.join(ids)}: {ids}")
    return TokenizerEntry(f"{name}/tokenizer.json", length, vocab_size=config["vocab_size"], **ids)
