"""Export: a diffusers checkpoint into a Bundle. The only side of sdopt that imports torch.

source      opens and checks the checkpoint
components  what is traced, family by family
trace       torch to ONNX
parity      the gate that every graph has to pass
schedule    the checkpoint's scheduler, as its pipeline reads it
probe       any linear diffusers scheduler into its sampler table
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdopt import __version__
from sdopt.bundle import new_folder, refuse_existing, write_manifest
from sdopt.errors import CheckpointError
from sdopt.export import components, parity, preview, schedule, trace
from sdopt.export.source import Checkpoint, open_checkpoint, read_json

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
    force: bool = False,
    report: Report = print,
) -> Path:
    """The folder of the bundle made from `source`; it appears whole, or not at all.

    One component is in memory at a time; `report` is given a line for each.
    Raises: CheckpointError, ParityError, BundleError (target exists, disk full), UsageError.
    """
    target = Path(target)
    refuse_existing(target, force)
    with (
        open_checkpoint(
            os.fspath(source), revision=revision, variant=variant, offline=offline, config=config
        ) as checkpoint,
        new_folder(target, force=force, needed_bytes=checkpoint.nbytes) as folder,
    ):
        manifest = describe(checkpoint)
        manifest.update(schedule.manifest_entries(checkpoint, folder, manifest["defaults"], report))
        report(HEADER)
        for build in components.FAMILIES[checkpoint.family]:
            name, entry = _component(build(checkpoint), folder, opset, floor_db if verify else None, report)
            manifest["components"][name] = entry
        for encoder in manifest["conditioning"]["encoders"]:
            manifest["tokenizers"][encoder["tokenizer"]] = _tokenizer(checkpoint, folder, encoder)
        fitted = preview.fit(folder, manifest)
        manifest.update({} if fitted is None else {"preview": fitted})
        manifest["verified"] = verify
        write_manifest(folder, manifest)
    return target


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest of a checkpoint, before its components are traced."""
    vae, unet = checkpoint.config("vae"), checkpoint.config("unet")
    factor = components.vae_factor(vae)
    edge = unet["sample_size"] * factor
    own = checkpoint.folder / "generation_config.json"
    generation = read_json(own) if own.is_file() else {}
    defaults = {
        "height": generation.get("height", edge),
        "width": generation.get("width", edge),
        "num_inference_steps": generation.get("num_inference_steps", 50),
        "guidance_scale": generation.get("guidance_scale", {"sd": 7.5, "sdxl": 5.0}[checkpoint.family]),
    }
    return {
        "family": checkpoint.family,
        "source": {key: value for key, value in checkpoint.provenance.items() if value is not None},
        "versions": {
            "sdopt": __version__,
            **{p: importlib.metadata.version(p) for p in ("torch", "diffusers", "transformers")},
        },
        "latents": {
            "channels": vae["latent_channels"],
            "factor": factor,
            "scaling_factor": vae.get("scaling_factor", 0.18215),
            "shift_factor": vae.get("shift_factor") or 0.0,
        },
        "defaults": defaults,
        "conditioning": components.conditioning(checkpoint),
        "float16_unsafe": ["vae_decoder", "vae_encoder"]
        if vae.get("force_upcast") and checkpoint.family == "sdxl"
        else [],
        "tokenizers": {},
        "components": {},
    }


def _component(
    part: components.Part, folder: Path, opset: int, floor_db: float | None, report: Report
) -> tuple[str, dict[str, Any]]:
    started = time.perf_counter()
    graph = folder / f"{part.name}.onnx"
    stored = trace.save(trace.trace(part, opset), graph)
    results = parity.measure(part, graph) if floor_db is not None else []
    size = sum(p.stat().st_size for p in folder.glob(f"{graph.name}*")) / 1e6
    worst = min((r.psnr_db for r in results), default=None)
    error = max((r.max_error for r in results), default=0.0)
    shown = "unverified" if worst is None else f"{worst:>10.1f}{error:>11.1e}"
    report(f"{part.name:<14}{time.perf_counter() - started:>9.1f}{size:>9.1f}  {stored:<8}{shown}")
    if floor_db is not None:
        parity.gate(part, results, floor_db)
    return part.name, {
        "graph": graph.name,
        "opset": opset,
        "weights": stored,
        "inputs": [s.to_json() for s in part.inputs],
        "outputs": [s.to_json() for s in part.outputs],
        "parity": [r.to_json() for r in results],
    }


def _tokenizer(checkpoint: Checkpoint, folder: Path, encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Write NAME/tokenizer.json, made from vocab.json and merges.txt where a checkpoint has only those."""
    name = encoder["tokenizer"]
    tokenizer = checkpoint.tokenizer(name)
    path = folder / name / "tokenizer.json"
    path.parent.mkdir()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    path.write_text(json.dumps({**backend, "truncation": None, "padding": None}, ensure_ascii=False), encoding="utf-8")
    config = checkpoint.config(encoder["component"])
    length = min(tokenizer.model_max_length, config["max_position_embeddings"])
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if None in ids.values():
        raise CheckpointError(f"{checkpoint.folder / name}: it names no {' or '.join(ids)}: {ids}")
    return {"file": f"{name}/tokenizer.json", "max_length": length, "vocab_size": config["vocab_size"], **ids}
