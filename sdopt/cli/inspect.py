"""`sdopt inspect BUNDLE`, or the file of a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdopt.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "bundle",
        type=Path,
        nargs="?",
        metavar="BUNDLE",
        help="a bundle or the .safetensors of a LoRA; default: the embedded model",
    )
    parser.group("output")("--json", action="store_true", help="print the manifest, the sizes and the engines as JSON")
    parser.examples("sdopt inspect", "sdopt inspect sd15 --json", "sdopt inspect style.safetensors")


def run(args: Any) -> int:
    from sdopt.adapters.lora.file import located
    from sdopt.bundle.files import Bundle, embedded
    from sdopt.bundle.manifest import to_json
    from sdopt.cli.adapters import adapter_entries, adapter_lines
    from sdopt.cli.capabilities import capabilities
    from sdopt.cli.engines import auto_choice, engine_entries
    from sdopt.cli.engines import lines as engine_lines
    from sdopt.cli.presets import preset_entries, preset_lines
    from sdopt.cli.terminal import one_line

    lora = located(args.bundle) if args.bundle is not None else None
    if lora is not None and (lora.is_file() or lora.suffix == ".safetensors"):
        return _inspect_lora(lora, args.json)
    bundle = Bundle.open(args.bundle or embedded())
    engines = engine_entries(bundle)
    abilities = capabilities(bundle)
    if args.json:
        sizes = {name: bundle.nbytes(name) for name in bundle.components}
        derived = {"path": str(bundle.path), "digest": bundle.digest, "bytes": sizes, "capabilities": abilities}
        built = {"engines": engines, "auto": auto_choice(bundle), "adapters": adapter_entries(bundle)}
        built["presets"] = preset_entries(bundle)
        print(json.dumps({**derived, **built, **to_json(bundle.manifest)}))
    else:
        lines = [*_manifest_lines(bundle), "", *_capability_lines(abilities), "", *_component_lines(bundle), ""]
        lines += [*adapter_lines(bundle), *preset_lines(bundle)]
        print("\n".join(map(one_line, [*lines, *engine_lines(bundle, engines)])))
    return 0


def _inspect_lora(path: Path, as_json: bool) -> int:
    from sdopt.adapters.lora.describe import describe
    from sdopt.adapters.lora.file import read_lora
    from sdopt.cli.terminal import one_line

    told = describe(read_lora(path))
    if as_json:
        print(json.dumps(told))
        return 0
    unknown, few = told["unknown_keys"], told["few_steps"]
    rows = {
        "made for": told["made_for"] or "not told by the file",
        "modules": f"{told['modules']}: {_counts(told['algorithms'])}",
        "ranks": _counts(told["ranks"]),
        "alphas": _counts(told["alphas"]),
        "words": ", ".join(told["words"]),
        "embeddings": ", ".join(told["embeddings"]),
        "few steps": f"{told['few_steps_kind']}: {_pairs(few)}" if few else "",
        "unknown": f"{len(unknown)} tensors, e.g. {unknown[0]}" if unknown else "",
        "hashes": f"SHA-256 {told['sha256'][:10]}, AUTOMATIC1111 {told['a1111_hash']}",
    }
    lines = [f"{path}  (LoRA)", *(f"{name:<10} {text}" for name, text in rows.items() if text)]
    print("\n".join(map(one_line, lines)))
    return 0


def _counts(counts: dict[str, int]) -> str:
    """What there is, each with its number where there is more than one kind."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{what} ({count})" for what, count in counts.items())


def _manifest_lines(bundle: Any) -> list[str]:
    manifest = bundle.manifest
    defaults, latents = manifest.defaults, manifest.latents
    return [
        f"{bundle.path}  ({manifest.family}, format {manifest.format_version}, digest {bundle.digest})",
        f"source     {_pairs(manifest.source)}",
        f"versions   {_pairs(manifest.versions)}",
        f"scheduler  {manifest.scheduler['_class_name']}, {manifest.prediction_type}",
        f"defaults   {defaults.width}x{defaults.height}, {defaults.num_inference_steps} steps, "
        f"guidance {defaults.guidance_scale}",
        f"latents    {latents.channels} channels, 1/{latents.factor} of the size, scaling {latents.scaling_factor}",
        f"tokens     {', '.join(str(entry.max_length) for entry in manifest.tokenizers.values())}",
    ]


def _capability_lines(abilities: dict[str, Any]) -> list[str]:
    inpaint = f" ({abilities['inpaint']})" if abilities["inpaint"] else ""
    return [
        f"tasks      {', '.join(abilities['tasks'])}{inpaint}",
        f"samplers   {abilities['samplers']}",
        f"limits     sizes in multiples of {abilities['size_multiple']} up to {abilities['max_size']} pixels; "
        f"{abilities['max_images']} pictures a call; {abilities['tokens_per_chunk']} tokens a chunk; clip_skip up to "
        f"{abilities['max_clip_skip']}",
        f"previews   {_preview_fit(abilities['preview'])}",
        f"embeddings {_embedding_shapes(abilities['embeddings'])}",
        f"fp16       unsafe in {', '.join(abilities['float16_unsafe']) or 'nothing'}",
    ]


def _component_lines(bundle: Any) -> list[str]:
    manifest = bundle.manifest
    latents, roles = manifest.latents, _roles(manifest)
    lines = [f"{'component':<16}{'role':<15}{'MB':>7}{'parity dB':>11}  inputs -> outputs"]
    noise = f"noise float32 [images, {latents.channels}, latent_height, latent_width]"
    lines.append(f"{'':<16}{'noise':<15}{'':>18}  {noise}")
    for name in bundle.components:
        component = bundle.component(name)
        lowest_db = min((entry.psnr_db for entry in component.parity), default=None)
        parity = "unverified" if lowest_db is None else f"{lowest_db:.1f}"
        signature = f"{'; '.join(map(str, component.inputs))} -> {'; '.join(map(str, component.outputs))}"
        size = f"{bundle.nbytes(name) / 1e6:>7.1f}"
        lines.append(f"{name:<16}{roles.get(name, ''):<15}{size}{parity:>11}  {signature}")
    return lines


def _roles(manifest: Any) -> dict[str, str]:
    """What each component does on the way from a text to a picture."""
    from sdopt.bundle.adapter import DECODER, ENCODER

    encoders = {encoder.component: "text encoder" for encoder in manifest.conditioning.encoders}
    return {**encoders, ENCODER: "image encoder", manifest.denoiser: "denoiser", DECODER: "decoder"}


def _preview_fit(preview: dict[str, Any] | None) -> str:
    return f"R2 {preview['r2']}, {preview['psnr_db']} dB" if preview else "none: export it again to have them"


def _embedding_shapes(widths: dict[str, int]) -> str:
    return ", ".join(f"{name} [n, {width}]" for name, width in widths.items()) or "none"


def _pairs(entry: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry.items() if value is not None) or "unknown"
