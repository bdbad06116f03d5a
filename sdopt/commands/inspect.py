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
    from sdopt.bundle import Bundle, embedded

    bundle = Bundle.open(args.bundle or embedded())
    if args.json:
        sizes = {name: bundle.nbytes(name) for name in bundle.components}
        print(json.dumps({"path": str(bundle.path), "digest": bundle.digest, "bytes": sizes, **bundle.manifest}))
    else:
        print("\n".join(_lines(bundle)))
    return 0


def _lines(bundle: Any) -> list[str]:
    manifest = bundle.manifest
    defaults, latents = manifest["defaults"], manifest["latents"]
    lines = [
        f"{bundle.path}  ({manifest['family']}, format {manifest['format_version']}, digest {bundle.digest})",
        f"source     {_pairs(manifest.get('source', {}))}",
        f"versions   {_pairs(manifest.get('versions', {}))}",
        f"scheduler  {manifest['scheduler'].get('_class_name')}, {manifest['scheduler'].get('prediction_type')}",
        f"defaults   {defaults['width']}x{defaults['height']}, {defaults['num_inference_steps']} steps, "
        f"guidance {defaults['guidance_scale']}",
        f"latents    {latents['channels']} channels, 1/{latents['factor']} of the size, "
        f"scaling {latents['scaling_factor']}",
        f"tokens     {', '.join(str(entry['max_length']) for entry in manifest['tokenizers'].values())}",
        "",
        f"{'component':<14}{'MB':>9}{'parity dB':>11}  inputs -> outputs",
    ]
    for name in bundle.components:
        component = bundle.component(name)
        parity = min((entry["psnr_db"] for entry in component.parity), default=None)
        shown = "unverified" if parity is None else f"{parity:.1f}"
        signature = f"{'; '.join(map(str, component.inputs))} -> {'; '.join(map(str, component.outputs))}"
        lines.append(f"{name:<14}{bundle.nbytes(name) / 1e6:>9.1f}{shown:>11}  {signature}")
    return lines


def _pairs(entry: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry.items() if value is not None) or "unknown"
