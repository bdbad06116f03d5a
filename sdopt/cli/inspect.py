"""`sdopt inspect BUNDLE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="default: the embedded model")
    parser.add_argument("--json", action="store_true", help="print the manifest and the sizes as JSON")


def run(args: argparse.Namespace) -> int:
    from sdopt.bundle.files import Bundle, embedded
    from sdopt.bundle.format import to_json
    from sdopt.cli.capabilities import capabilities

    bundle = Bundle.open(args.bundle or embedded())
    able = capabilities(bundle)
    if args.json:
        sizes = {name: bundle.nbytes(name) for name in bundle.components}
        derived = {"path": str(bundle.path), "digest": bundle.digest, "bytes": sizes, "capabilities": able}
        print(json.dumps({**derived, **to_json(bundle.manifest)}))
    else:
        print("\n".join(_lines(bundle, able)))
    return 0


def _lines(bundle: Any, able: dict[str, Any]) -> list[str]:
    manifest = bundle.manifest
    defaults, latents = manifest.defaults, manifest.latents
    lines = [
        f"{bundle.path}  ({manifest.family}, format {manifest.format_version}, digest {bundle.digest})",
        f"source     {_pairs(manifest.source)}",
        f"versions   {_pairs(manifest.versions)}",
        f"scheduler  {manifest.scheduler['_class_name']}, {manifest.prediction_type}",
        f"defaults   {defaults.width}x{defaults.height}, {defaults.num_inference_steps} steps, "
        f"guidance {defaults.guidance_scale}",
        f"latents    {latents.channels} channels, 1/{latents.factor} of the size, scaling {latents.scaling_factor}",
        f"tokens     {', '.join(str(entry.max_length) for entry in manifest.tokenizers.values())}",
        "",
        f"tasks      {', '.join(able['tasks'])}" + (f" ({able['inpaint']})" if able["inpaint"] else ""),
        f"samplers   {able['samplers']}",
        f"limits     sizes in multiples of {able['size_multiple']} up to {able['max_size']} pixels; "
        f"{able['max_images']} pictures a call; {able['tokens_per_chunk']} tokens a chunk; clip_skip up to "
        f"{able['max_clip_skip']}",
        f"previews   {_fitted(able['preview'])}",
        f"embeddings {_widths(able['embeddings'])}",
        f"fp16       unsafe in {', '.join(able['float16_unsafe']) or 'nothing'}",
        "",
        f"{'component':<14}{'MB':>9}{'parity dB':>11}  inputs -> outputs",
    ]
    for name in bundle.components:
        component = bundle.component(name)
        parity = min((entry.psnr_db for entry in component.parity), default=None)
        shown = "unverified" if parity is None else f"{parity:.1f}"
        signature = f"{'; '.join(map(str, component.inputs))} -> {'; '.join(map(str, component.outputs))}"
        lines.append(f"{name:<14}{bundle.nbytes(name) / 1e6:>9.1f}{shown:>11}  {signature}")
    return lines


def _fitted(entry: dict[str, Any] | None) -> str:
    return f"R2 {entry['r2']}, {entry['psnr_db']} dB" if entry else "none: export it again to have them"


def _widths(entry: dict[str, int]) -> str:
    return ", ".join(f"{name} [n, {width}]" for name, width in entry.items()) or "none: export it again to use them"


def _pairs(entry: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry.items() if value is not None) or "unknown"
