"""`sdopt generate PROMPT -o PATH`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.errors import BundleError, UsageError

if TYPE_CHECKING:
    from sdopt.bundle.specs import Float32
    from sdopt.pipeline import Pipeline
    from sdopt.request.options import Options
    from sdopt.request.plan import Plan


# what a replayed PNG brings along, and the value that means it was not given
REPLACED: dict[str, Any] = {
    **dict.fromkeys(("prompt", "image", "mask", "strength", "guidance_interval", "negative", "steps", "guidance")),
    **dict.fromkeys(("seed", "sampler", "schedule", "eta", "guidance_rescale", "clip_skip", "vae_tile", "size")),
    **dict.fromkeys(("mask_blur", "padding_mask_crop")),
    "vae_slice": False,
    "rng": "cpu",
    "prompt_style": "plain",
    "number": 1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    add("-o", "--output", type=Path, required=True, metavar="PATH", help="the PNG to write; -n 3 writes PATH-0, -1, -2")
    add("-m", "--model", type=Path, metavar="BUNDLE", help="the bundle; without it the embedded text-to-emoji model")
    add("--image", type=Path, metavar="FILE", help="a PNG, JPEG or WebP picture to begin from")
    add("--mask", type=Path, metavar="FILE", help="with --image: white where the picture is painted anew")
    add("--mask-blur", type=float, metavar="PIXELS", help="blur the mask by a Gaussian of this radius (default: 0)")
    add("--padding-mask-crop", type=int, metavar="PIXELS", help="paint only the mask's region, this much wider, large")
    add("--strength", type=float, help="how much of --image is replaced, 0 to 1 (default: the bundle's)")
    add("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"), help="guide only this part, e.g. 0.1 0.8")
    add("--negative", default=None, metavar="PROMPT", help="what to steer away from")
    add("--steps", type=int, help="calls that the sampler is asked for (default: the bundle's)")
    add("--guidance", type=float, help="guidance scale; 1 turns it off (default: the bundle's)")
    add("--guidance-batch", type=int, default=2, choices=(1, 2), help="1 halves the memory of guidance")
    add("--seed", type=int, help="0 to 2**64 - 1; image i of -n takes seed + i (default: drawn, and reported)")
    add("--sampler", help="the checkpoint's own unless named; `sdopt samplers` lists them")
    add("--schedule", help="of the sampler: karras, exponential, beta, leading, trailing, linspace, ...")
    add("--eta", type=float, help="0 to 1, the noise of ddim and tcd (default: 0)")
    add("--guidance-rescale", type=float, metavar="SHARE", help="0 to 1 (default: 0)")
    add("--rng", default="cpu", help="whose noise: cpu (torch's), cuda:a100 and other GPUs, numpy (default: cpu)")
    add("--prompt-style", default="plain", help="plain, or a1111: (word:1.3), [word], prompts of any length")
    add("--clip-skip", type=int, help="how many of the text encoder's last layers to leave out (default: 0)")
    add("--embedding", action="append", default=[], metavar="FILE[=TOKEN]", help="a textual inversion; may be repeated")
    add("--vae-tile", type=int, metavar="LATENTS", help="decode in tiles, in the memory of one tile")
    add("--vae-slice", action="store_true", help="decode -n pictures one by one, in the memory of one")
    add("--preview-every", type=int, metavar="K", help="also write PATH-step-007.png and so on, every K steps")
    add("--size", type=size, metavar="WxH", help="pixels, e.g. 512x768 (default: the bundle's)")
    add("-n", "--number", type=int, default=1, metavar="N", help="how many pictures (default: 1)")
    add("--paranoid", action="store_true", help="hash every file anew, also those that have not changed")
    add("--trust-engines", action="store_true", help="load engines that somebody else built; they are code")
    add(
        "--backend",
        default="auto",
        help="ort (or ort:cpu, ort:cuda), openvino, tensorrt, tensorrt-rtx (default: `sdopt doctor` says)",
    )
    add(
        "--precision",
        default="auto",
        help="float32, bf16 where the processor has it, or one that was built (default: float32, or what was built)",
    )
    add("--no-cache", action="store_true", help="keep nothing for the next start (see `sdopt doctor`)")
    add("--threads", type=int, help="threads of the engine (default: what this process may use)")
    add("--replay", type=Path, metavar="PNG", help="make the picture in PNG again, from the parameters it carries")
    add("--no-metadata", action="store_true", help="do not write the parameters into the PNG")
    add("--json", action="store_true", help="print the result as JSON")


def size(text: str) -> tuple[int, int]:
    """(width, height) of "512x768"."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, e.g. 512x768") from None
    return width, height


def run(args: argparse.Namespace) -> int:
    from sdopt import __version__, pipeline
    from sdopt.image import pil as images
    from sdopt.request.plan import make_plan

    started = time.perf_counter()
    prompt, options, replayed = _request(args)
    paths = images.numbered(args.output, args.number)
    _check_output(paths[0])
    if args.preview_every is not None and args.preview_every < 1:
        raise UsageError(f"--preview-every {args.preview_every}; allowed is 1 or more")
    backend, precision = _as_made(args, replayed or {})
    with pipeline.load(
        args.model,
        backend,
        precision=precision,
        memory="low",  # each component is used once, so that letting go of it costs nothing
        threads=args.threads,
        paranoid=args.paranoid,
        trust_engines=args.trust_engines,
        cache=not args.no_cache,
    ) as pipe:
        for text in args.embedding:
            pipe.load_embedding(*_file_and_token(text))
        plan = make_plan(pipe.bundle, prompt, options)
        if replayed is not None:
            _same_model(args.replay, replayed, pipe.bundle)
            _same_embeddings(args.replay, replayed, pipe.parameters(plan, 0))
        decoded = pipe.finish(plan, _denoise(pipe, plan, paths, args.preview_every))
        model = {"model": pipe.bundle.manifest.name or pipe.bundle.path.name, "bundle": pipe.bundle.digest}
        records: list[dict[str, Any]] = []
        for i, (image, path) in enumerate(zip(decoded, paths, strict=True)):
            how = {"version": __version__, "backend": pipe.backend, "precision": pipe.precision}
            parameters = {**pipe.parameters(plan, i), **model, **how}
            images.save_png(image, path, None if args.no_metadata else parameters)
            records.append({"path": str(path), **parameters})
    seconds = time.perf_counter() - started
    if args.json:
        print(
            json.dumps(
                {"images": records, "backend": pipe.backend, "precision": pipe.precision, "seconds": round(seconds, 3)}
            )
        )
    else:
        print(*paths, sep="\n")
        print(f"seed {', '.join(map(str, plan.seeds))}; {seconds:.2f} s", file=sys.stderr)
    return 0


def _request(args: argparse.Namespace) -> tuple[str, Options, dict[str, Any] | None]:
    """The prompt and keywords that the command line or the PNG of --replay asks for, and what that PNG tells."""
    if args.replay is None:
        if args.prompt is None:
            raise UsageError('no PROMPT given: `sdopt generate "a red apple" -o apple.png`')
        from sdopt.image.pil import open_image

        width, height = args.size or (None, None)
        return (
            args.prompt,
            {
                "negative_prompt": args.negative,
                "num_inference_steps": args.steps,
                "guidance_scale": args.guidance,
                "guidance_batch": args.guidance_batch,
                "height": height,
                "width": width,
                "num_images_per_prompt": args.number,
                "seed": args.seed,
                "rng": args.rng,
                "sampler": args.sampler,
                "schedule": args.schedule,
                "eta": args.eta,
                "guidance_rescale": args.guidance_rescale or 0.0,
                "prompt_style": args.prompt_style,
                "clip_skip": args.clip_skip,
                "vae_tile": args.vae_tile,
                "vae_slice": args.vae_slice,
                "mask_blur": args.mask_blur,
                "padding_mask_crop": args.padding_mask_crop,
                "guidance_interval": args.guidance_interval,
                "image": None if args.image is None else open_image(args.image),
                "mask_image": None if args.mask is None else open_image(args.mask),
                "strength": args.strength,
            },
            None,
        )
    from sdopt.image.pil import read_parameters
    from sdopt.request.options import Options

    given = [name for name in vars(args) if name in REPLACED and getattr(args, name) != REPLACED[name]]
    if given:
        raise UsageError(f"--replay takes everything from the PNG; leave out {', '.join(given)}")
    found = read_parameters(args.replay)
    if "strength" in found:
        raise UsageError(
            f"{args.replay} was made from another picture, which it does not carry; use --image and its parameters"
        )
    options: Any = {key: found[key] for key in found if key in Options.__annotations__}
    return found.get("prompt", ""), options, found


def _as_made(args: argparse.Namespace, found: dict[str, Any]) -> tuple[str, str]:
    """The backend and precision of --replay, unless others are named; that they differ is told."""
    from sdopt.engine import installed_backends

    made, precision = str(found.get("backend", "auto")), str(found.get("precision", "auto")).partition(" ")[0]
    backend = made if args.backend == "auto" and made.partition(":")[0] in installed_backends() else args.backend
    if args.precision != "auto" or backend != made:
        precision = args.precision
    if "backend" in found and (backend, precision) != (made, str(found["precision"]).partition(" ")[0]):
        print(
            f"sdopt: {args.replay} was made by {made} in {found['precision']}; this picture may differ", file=sys.stderr
        )
    return backend, precision


def _check_output(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UsageError(f"-o {path}: pictures are written as PNG; name it {path.with_suffix('.png')}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {path.parent}; make it first")


def _same_model(png: Path, found: dict[str, Any], bundle: Any) -> None:
    if found.get("bundle") != bundle.digest:
        raise BundleError(f"{png} was made by the bundle {found.get('model')} ({found.get('bundle')}); name it with -m")


def _file_and_token(text: str) -> tuple[str, str | None]:
    """("cat.safetensors", "<cat>") of "cat.safetensors=<cat>"; without a token None."""
    if Path(text).is_file() or "=" not in text:
        return text, None
    path, _, token = text.rpartition("=")
    return path, token


def _same_embeddings(png: Path, found: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Raises UsageError unless the embeddings that the PNG was made with are loaded under their tokens."""
    wanted, used = (entry.get("embeddings", {}) for entry in (found, parameters))
    for token, digest in {**used, **wanted}.items():
        if used.get(token) != wanted.get(token):
            raise UsageError(
                f"{png} was made with {', '.join(wanted) or 'no embeddings'}; give the same with --embedding "
                f"FILE={token} ({digest})"
            )


def _denoise(pipe: Pipeline, plan: Plan, paths: Sequence[Path], every: int | None) -> Float32:
    """The latents of a plan, with a progress bar where a person is watching, and previews if they are asked for."""
    for note in plan.table.notes:
        print(f"sdopt: {note}", file=sys.stderr)
    steps, step = pipe.steps(plan), None
    if sys.stderr.isatty():
        from tqdm import tqdm

        steps = tqdm(steps, total=len(plan.table.timestep), unit="it", leave=False)
    for step in steps:
        if every and (step.index + 1) % every == 0:
            _show(pipe, step.denoised, step.index + 1, paths)
    assert step is not None  # a plan has at least one step
    return step.sample  # only the last one leaves the device


def _show(pipe: Pipeline, latents: Float32, number: int, paths: Sequence[Path]) -> None:
    """Write the previews of one step beside the pictures that are to come."""
    from sdopt.image.pil import save_png

    pictures = pipe.preview(latents, pipe.bundle.manifest.latents.factor)
    for picture, path in zip(pictures, paths, strict=True):
        save_png(picture, path.with_name(f"{path.stem}-step-{number:03}{path.suffix}"))
