"""`sdopt generate PROMPT -o PATH`: make pictures from a prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdopt.bundle.precision import precision_word
from sdopt.cli import controls, replay, terminal
from sdopt.cli.loras import CommandLoras, require_same
from sdopt.cli.prompts import check_text, read_prompts
from sdopt.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdopt.bundle.specs import Float32
    from sdopt.cli.parser import Parser
    from sdopt.pipeline import Pipeline
    from sdopt.request.plan import Plan


def add_arguments(parser: Parser) -> None:
    from sdopt.cli.flags import add_flags

    add = parser.add_argument_group("files").add_argument
    add(
        "-o", "--output", type=Path, required=True, metavar="PATH",
        help="the picture to write: .png, .jpg or .webp; several are PATH-0, -1, -2; a file that exists is replaced",
    )  # fmt: skip
    add("--no-clobber", action="store_true", help="end with an error, before the work, if a file exists")
    add("--prompt-file", metavar="FILE", help="a prompt in each line, in UTF-8; - is stdin, as it is for PROMPT")
    add("--preview-every", type=int, metavar="K", help="also write PATH-step-007.png and so on, every K steps")
    add("--replay", type=Path, metavar="PNG", help="make the picture in PNG again, from the parameters in it")
    add("--no-metadata", action="store_true", help="do not write the parameters into the picture")
    add("--json", action="store_true", help="print the result as JSON")
    add = parser.add_argument_group("model and engine").add_argument
    add("-m", "--model", type=Path, metavar="BUNDLE", help="the bundle; without it the embedded text-to-emoji model")
    add("--embedding", action="append", default=[], metavar="FILE[=TOKEN]", help="a textual inversion; may be repeated")
    add(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]",
        help="a LoRA and its weight, by default 1; FILE:0.5:0.8 is the text encoders' and the UNet's; "
        "neon is the embedded model's own; may be repeated",
    )  # fmt: skip
    add(
        "--lora-dir", type=Path, metavar="DIR", help="with --prompt-style a1111: where the files of <lora:name:0.8> are"
    )
    add(
        "--backend",
        default="auto",
        help="ort (or ort:cpu, ort:cuda), openvino, tensorrt, tensorrt-rtx (default: `sdopt doctor` says)",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...: --backend ort --device cuda is --backend ort:cuda")
    add(
        "--precision",
        default="auto",
        type=precision_word,
        help="fp32, bf16 if the processor has it, or one that was built (default: fp32; where --backend is named, "
        "what was built)",
    )
    add("--threads", type=int, help="threads of the engine (default: the cores that this process may use)")
    add("--no-cache", action="store_true", help="store nothing for the next start (see `sdopt cache`)")
    add("--paranoid", action="store_true", help="hash every file again, even those that have not changed")
    add("--trust-engines", action="store_true", help="load engines that somebody else built; they can run any code")
    add_flags(parser)
    parser.examples(
        'sdopt generate "a red apple" -o apple.png',
        'sdopt generate "a red apple" --seed 1,5,9 -o apple.webp     (apple-0.webp, -1, -2)',
        'sdopt generate "a red apple" "a green pear" -n 2 -m sd15 -o fruit.jpg',
        "sdopt generate --prompt-file prompts.txt -m sd15 -o batch.png",
        'sdopt generate "a night sky" --image day.png --strength 0.6 -m sd15 -o night.png',
        'sdopt generate "a red apple" --lora neon -o neon.png',
        'sdopt generate "a red apple" -m sd15 --control canny=edges.png:0.8 -o controlled.png',
        'sdopt generate "a red apple" -m sd15 --control canny=photo.jpg --canny -o controlled.png',
        'sdopt generate "a red apple" -m sdxl --control union/depth=depth.png:0.8 -o controlled.png',
        'sdopt generate "a portrait" -m sd15 --ip-adapter face=anna.jpg:0.6 -o anna.png',
        'sdopt generate "a red apple" --preset fast -o apple.png     (after `sdopt tune`)',
        "sdopt generate --replay apple.png -o again.png",
    )


def run(args: Any) -> int:
    from sdopt import pipeline
    from sdopt.cli import outputs
    from sdopt.image import pil as images
    from sdopt.image.files import refuse_lost, save_each

    started = time.perf_counter()
    options, carried = _request(args)
    prompts = options.pop("prompt")
    number = _number(options, prompts)
    is_stdout = args.output == Path("-")  # which no number is added to
    paths = images.numbered(args.output, 1 if is_stdout else len(prompts) * number)
    outputs.check_pictures(paths, args.no_clobber)
    check_threads(args.threads)
    if args.preview_every is not None and args.preview_every < 1:
        raise UsageError(f"--preview-every {args.preview_every}; allowed is 1 or more")
    backend, precision = replay.backend_of(args, carried or {})
    backend, precision = with_device(args.device, backend, precision)
    with terminal.busy("loading"):
        pipe = pipeline.load(
            args.model,
            backend,
            precision=precision,
            # for one prompt each component is used once, so closing it afterwards costs nothing
            memory="low" if len(prompts) == 1 else "fast",
            threads=args.threads,
            paranoid=args.paranoid,
            trust_engines=args.trust_engines,
            cache=not args.no_cache,
            preset=options.get("preset"),
        )
    with pipe:
        for text in args.embedding:
            pipe.load_embedding(*file_and_token(text))
        options |= _scales(args, pipe, options)
        loras = CommandLoras(pipe, args.lora, args.lora_dir)
        plans = _plans(pipe, prompts, options, loras, is_replay=carried is not None)
        if carried is not None:
            replay.require_same_model(args.replay, carried, pipe.bundle)
            replay.require_same_embeddings(args.replay, carried, pipe.parameters(plans[0], 0))
            require_same(args.replay, carried, pipe.parameters(plans[0], 0))
            replay.require_same_pictures(args.replay, carried, pipe.parameters(plans[0], 0))
            replay.require_same_autoencoder(args.replay, carried, pipe.parameters(plans[0], 0))
        last = plans[0].passes[-1]
        outputs.check_space(paths, last.width, last.height)
        engines = {"backend": pipe.backend, "precision": pipe.precision}
        if precision == "auto" and pipe.preset is None and pipe.precision not in ("fp32", "auto"):
            terminal.note(f"this runs in {pipe.precision}, from what `sdopt build` made; --precision fp32 is exact")
        entries: list[dict[str, Any]] = []
        lost: list[str] = []
        left = iter(paths)
        for plan in plans:
            own_paths = [next(left) for _ in plan.seeds]
            decoded = _pictures(pipe, plan, own_paths, args.preview_every)
            written: list[Any] = []
            for i, (image, path) in enumerate(zip(decoded, own_paths, strict=True)):
                parameters = pipe.parameters(plan, i)
                written.append((image, path, None if args.no_metadata else parameters))
                entries.append({"path": str(path), **parameters})
            lost += save_each(written)
        refuse_lost(lost, len(paths))
    seconds = time.perf_counter() - started
    if args.json:
        print(json.dumps({"images": entries, **engines, "seconds": round(seconds, 3)}))
    else:
        print(*paths, sep="\n")
        seeds = [seed for plan in plans for seed in plan.seeds]
        terminal.say(f"seed {', '.join(map(str, seeds))}; {seconds:.2f} s")
    return 0


def _plans(
    pipe: Pipeline, prompts: list[str], options: dict[str, Any], loras: CommandLoras, *, is_replay: bool
) -> list[Plan]:
    """The plan of each prompt, with the LoRAs that are in use for it."""
    loras.suggest(options)
    reads_tags = options.get("prompt_style") == "a1111"
    if is_replay:
        return [replay.plan(pipe, loras.use(prompt, reads_tags), dict(options)) for prompt in prompts]
    return [pipe.plan(loras.use(prompt, reads_tags), **cast("Any", options)) for prompt in prompts]


def _number(options: dict[str, Any], prompts: list[str]) -> int:
    """How many pictures each prompt gets. Every option is checked here, before anything is loaded.

    Several seeds without -n are one picture each.
    """
    from sdopt.request.keywords import checked
    from sdopt.request.kinds import MAX_IMAGES

    given = options.get("seed")
    if isinstance(given, list) and "num_images_per_prompt" not in options:
        count = options["num_images_per_prompt"] = len(cast("list[int]", given))
        if count > MAX_IMAGES:
            raise UsageError(f"--seed: {count} seeds are {count} pictures; allowed are {MAX_IMAGES} in a call", "seed")
    for prompt in prompts:
        checked({"prompt": prompt, **options})
    return int(checked(options)["num_images_per_prompt"])


def check_threads(threads: int | None) -> None:
    """Raises: UsageError for a number of threads that no engine takes."""
    from sdopt.engine import MAX_THREADS

    if threads is not None and not 1 <= threads <= MAX_THREADS:
        allowed = f"allowed are 1 to {MAX_THREADS}; without --threads all that this process may use"
        raise UsageError(f"--threads {threads}; {allowed}", "threads")


def with_device(device: str | None, backend: str, precision: str) -> tuple[str, str]:
    """The backend and precision, with the device that --device names.

    Raises: UsageError if the backend names a device itself.
    """
    from sdopt.engine import choose_backend

    if device is None:
        return backend, precision
    if ":" in backend:
        raise UsageError(f"--device {device} and --backend {backend}: the backend names a device itself; leave one out")
    if backend == "auto":
        backend, precision = choose_backend(backend, precision)
    return f"{backend}:{device}", precision


def _request(args: Any) -> tuple[Any, dict[str, Any] | None]:
    """(the keywords of the request, the parameters that the PNG of --replay carries; None without --replay)"""
    from sdopt.image.pil import read_parameters
    from sdopt.request.keywords import replayed

    prompts = read_prompts(args.prompt, args.prompt_file)
    if args.replay is None:
        typed = _typed(args)
        if not prompts:
            raise UsageError('no PROMPT given: `sdopt generate "a red apple" -o apple.png`', "prompt")
        return {**typed, "prompt": prompts}, None
    if args.prompt_file is not None:
        raise UsageError("--replay takes everything from the PNG; leave out --prompt-file")
    replay.refuse_decided(args)
    carried = read_parameters(args.replay)
    own = replayed(carried, str(args.replay), given=replay.KINDS)
    typed = _typed(args, replay.ways(args, carried))
    options = replay.in_order({"prompt": "", **own, **typed}, carried)
    return {**options, "prompt": [options["prompt"]]}, carried


def _typed(args: Any, ways: Any = None) -> dict[str, Any]:
    """The keywords whose flags were typed. `ways`: see `flags.given`."""
    from sdopt.cli import flags

    typed = flags.given(args, ways)
    for name in ("negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3"):
        if name in typed:
            check_text(flags.flag_names({name: None})[0], typed[name])
    return typed


def _scales(args: Any, pipe: Pipeline, options: dict[str, Any]) -> dict[str, Any]:
    """The scales that stand behind the files of pictures of adapters."""
    given = {keyword: getattr(args, seen.flag.lstrip("-").replace("-", "_")) for keyword, seen in controls.SEEN.items()}
    made: dict[str, Any] = {}
    for keyword, texts in given.items():
        made |= controls.scales(keyword, texts or [], options, pipe)
    return made


def file_and_token(text: str) -> tuple[str, str | None]:
    """("cat.safetensors", "<cat>") of "cat.safetensors=<cat>". The token is None if the text has none."""
    if Path(text).is_file() or "=" not in text:
        return text, None
    path, _, token = text.rpartition("=")
    return path, token


def _pictures(pipe: Pipeline, plan: Plan, paths: Sequence[Path], every: int | None) -> Sequence[Image]:
    """The pictures of a plan, with a progress bar on a terminal.

    If `every` is given, previews are written each time that many steps are done.
    """
    step = None
    with terminal.bar("loading", total=plan.calls) as bar:
        for step in pipe.steps(plan):
            bar.update(label="denoising")
            if every and (step.index + 1) % every == 0:
                _write_previews(pipe, step.denoised, step.index + 1, paths)
    assert step is not None  # a plan has at least one step
    with terminal.busy("decoding"):
        return pipe.finish(plan, step.sample)  # the sample is read once, after the last step: it may lie on a GPU


def _write_previews(pipe: Pipeline, latents: Float32, number: int, paths: Sequence[Path]) -> None:
    """Write the previews of step `number` beside the files of the pictures; a line says which cannot be written."""
    from sdopt.cli.outputs import PREVIEW
    from sdopt.image.files import save_each

    pictures = pipe.preview(latents, pipe.bundle.manifest.latents.factor)
    own = [path.with_name(f"{path.stem}{PREVIEW.format(number)}{path.suffix}") for path in paths]
    for line in save_each((picture, path, None) for picture, path in zip(pictures, own, strict=True)):
        terminal.note(line)
