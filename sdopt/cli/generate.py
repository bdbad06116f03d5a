"""`sdopt generate PROMPT -o PATH`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.bundle.precision import precision_word, with_precision_words
from sdopt.errors import BundleError, UsageError

if TYPE_CHECKING:
    from sdopt.bundle.specs import Float32
    from sdopt.pipeline import Pipeline
    from sdopt.request.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sdopt.cli.flags import add_flags

    add_flags(parser)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="PATH", help="the PNG to write; -n 3 writes PATH-0, -1, -2")
    add("-m", "--model", type=Path, metavar="BUNDLE", help="the bundle; without it the embedded text-to-emoji model")
    add("--embedding", action="append", default=[], metavar="FILE[=TOKEN]", help="a textual inversion; may be repeated")
    add("--preview-every", type=int, metavar="K", help="also write PATH-step-007.png and so on, every K steps")
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
        type=precision_word,
        help="fp32, bf16 where the processor has it, or one that was built (default: fp32, or what was built)",
    )
    add("--no-cache", action="store_true", help="keep nothing for the next start (see `sdopt doctor`)")
    add("--threads", type=int, help="threads of the engine (default: what this process may use)")
    add("--replay", type=Path, metavar="PNG", help="make the picture in PNG again, from the parameters it carries")
    add("--no-metadata", action="store_true", help="do not write the parameters into the PNG")
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from sdopt import __version__, pipeline
    from sdopt.image import pil as images
    from sdopt.request.keywords import checked
    from sdopt.request.plan import make_plan

    started = time.perf_counter()
    options, record = _request(args)
    prompt = options.pop("prompt")
    paths = images.numbered(args.output, checked(options)["num_images_per_prompt"])
    _check_output(paths[0])
    if args.preview_every is not None and args.preview_every < 1:
        raise UsageError(f"--preview-every {args.preview_every}; allowed is 1 or more")
    backend, precision = _as_made(args, record or {})
    with pipeline.load(
        args.model,
        backend,
        precision=precision,
        memory="low",  # each component is used once, so closing it afterwards costs nothing
        threads=args.threads,
        paranoid=args.paranoid,
        trust_engines=args.trust_engines,
        cache=not args.no_cache,
    ) as pipe:
        for text in args.embedding:
            pipe.load_embedding(*_file_and_token(text))
        plan = make_plan(pipe.bundle, prompt, options)
        if record is not None:
            _same_model(args.replay, record, pipe.bundle)
            _same_embeddings(args.replay, record, pipe.parameters(plan, 0))
        decoded = pipe.finish(plan, _denoise(pipe, plan, paths, args.preview_every))
        engines = {"backend": pipe.backend, "precision": pipe.precision}
        provenance = {
            "model": pipe.bundle.manifest.name or pipe.bundle.path.name,
            "bundle": pipe.bundle.digest,
            "version": __version__,
            **engines,
        }
        records: list[dict[str, Any]] = []
        for i, (image, path) in enumerate(zip(decoded, paths, strict=True)):
            parameters = {**pipe.parameters(plan, i), **provenance}
            images.save_png(image, path, None if args.no_metadata else parameters)
            records.append({"path": str(path), **parameters})
    seconds = time.perf_counter() - started
    if args.json:
        print(json.dumps({"images": records, **engines, "seconds": round(seconds, 3)}))
    else:
        print(*paths, sep="\n")
        print(f"seed {', '.join(map(str, plan.seeds))}; {seconds:.2f} s", file=sys.stderr)
    return 0


def _request(args: argparse.Namespace) -> tuple[Any, dict[str, Any] | None]:
    """(the keywords from the command line or from the PNG of --replay, the parameters in that PNG)"""
    from sdopt.cli import flags
    from sdopt.image.pil import read_parameters
    from sdopt.request.keywords import KEYWORDS, replayed

    given = flags.given(args)
    if args.replay is None:
        if "prompt" not in given:
            raise UsageError('no PROMPT given: `sdopt generate "a red apple" -o apple.png`', "prompt")
        return given, None
    refused = flags.flag_names({name: value for name, value in given.items() if not KEYWORDS[name].how})
    if refused:
        raise UsageError(f"--replay takes everything from the PNG; leave out {', '.join(refused)}")
    record = read_parameters(args.replay)
    if "strength" in record:
        raise UsageError(
            f"{args.replay} was made from another picture, which it does not carry; use --image and its parameters"
        )
    return {"prompt": "", **replayed(record), **given}, record


def _as_made(args: argparse.Namespace, record: dict[str, Any]) -> tuple[str, str]:
    """The backend and precision of the replayed picture, unless the command names others. Say so if they differ."""
    from sdopt.engine import installed_backends

    made_by = str(record.get("backend", "auto"))
    made_in = with_precision_words(str(record.get("precision", "auto")))
    main_precision = made_in.partition(" ")[0]  # "fp16" of "fp16 (vae_decoder bf16)"
    backend, precision = args.backend, args.precision
    if backend == "auto" and made_by.partition(":")[0] in installed_backends():
        backend = made_by
    if precision == "auto" and backend == made_by:
        precision = main_precision
    if "backend" in record and (backend, precision) != (made_by, main_precision):
        print(f"sdopt: {args.replay} was made by {made_by} in {made_in}; this picture may differ", file=sys.stderr)
    return backend, precision


def _check_output(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UsageError(f"-o {path}: pictures are written as PNG; name it {path.with_suffix('.png')}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {path.parent}; make it first")


def _same_model(png: Path, record: dict[str, Any], bundle: Any) -> None:
    model, digest = record.get("model"), record.get("bundle")
    if digest != bundle.digest:
        raise BundleError(f"{png} was made by the bundle {model} ({digest}); name it with -m")


def _file_and_token(text: str) -> tuple[str, str | None]:
    """("cat.safetensors", "<cat>") of "cat.safetensors=<cat>". The token is None if the text has none."""
    if Path(text).is_file() or "=" not in text:
        return text, None
    path, _, token = text.rpartition("=")
    return path, token


def _same_embeddings(png: Path, record: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Raises: UsageError unless the embeddings that the PNG was made with are loaded under their tokens."""
    wanted, used = record.get("embeddings", {}), parameters.get("embeddings", {})
    for token, digest in {**used, **wanted}.items():
        if used.get(token) != wanted.get(token):
            raise UsageError(
                f"{png} was made with {', '.join(wanted) or 'no embeddings'}; give the same with --embedding "
                f"FILE={token} ({digest})"
            )


def _denoise(pipe: Pipeline, plan: Plan, paths: Sequence[Path], every: int | None) -> Float32:
    """The latents of a plan. Shows a progress bar on a terminal; writes previews every `every` steps if it is given."""
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
    """Write the previews of one step beside the files of the pictures."""
    from sdopt.image.pil import save_png

    pictures = pipe.preview(latents, pipe.bundle.manifest.latents.factor)
    for picture, path in zip(pictures, paths, strict=True):
        save_png(picture, path.with_name(f"{path.stem}-step-{number:03}{path.suffix}"))
