"""`sdopt serve [BUNDLE ...]`: a bundle behind HTTP."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.cli import terminal
from sdopt.errors import BackendError, install

if TYPE_CHECKING:
    from sdopt.cli.parser import Parser

NUMBERS = {  # option -> (type, metavar, help)
    "slots": (int, "N", "pictures that are under way at once (default: 8)"),
    "queue": (int, "N", "pictures that may wait (default: 64)"),
    "queue_seconds": (float, "SECONDS", "work that may wait (default: 600)"),
    "max_body": (int, "BYTES", "of a request (default: 64 MiB)"),
    "max_pixels": (int, "N", "of a picture (default: 4,194,304)"),
    "max_prompt_bytes": (int, "N", "of each text (default: 8192)"),
    "max_steps": (int, "N", "steps of a picture (default: 150)"),
    "max_images": (int, "N", "pictures of a request (default: 10)"),
    "keep_jobs": (int, "N", "finished jobs that are kept (default: 200)"),
    "keep_bytes": (int, "BYTES", "of finished jobs that are kept (default: 256 MiB)"),
    "keep_seconds": (float, "SECONDS", "a finished job is kept (default: 3600)"),
    "drain_seconds": (float, "SECONDS", "what is under way may take after SIGTERM (default: 60)"),
    "stuck_seconds": (float, "SECONDS", "one call may take before its worker is started again (default: 900)"),
}
PLAIN = (
    "host", "port", "backend", "precision", "memory", "threads", "batching", "api_key_file", "address", "replicas",
    "autoscale", "models_per_replica",
)  # fmt: skip


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "bundle", nargs="*", metavar="BUNDLE",
        help="a bundle, or NAME=BUNDLE; without it the embedded text-to-emoji model",
    )  # fmt: skip
    add = parser.group("model and engine")
    add("--lora", action="append", default=[], metavar="NAME=FILE",
        help="a LoRA that requests may use; BUNDLE/NAME=FILE is for one bundle; may be repeated")  # fmt: skip
    add("--backend", help="ort (or ort:cpu, ort:cuda), openvino, tensorrt, tensorrt-rtx")
    add("--device", action="append", metavar="NAME", help="cpu, cuda:0, ...; a worker for each; may be repeated")
    add("--precision", help="fp32, or bf16 if the processor has it, or one that was built")
    add("--memory", choices=("fast", "low"), help="low frees each component when another one is needed")
    add("--threads", type=int, help="threads of the engine (default: the cores that this process may use)")
    add("--trust-engines", action="store_true", help="load engines that somebody else built; they can run any code")
    add = parser.group("server")
    add("--host", help="the address to listen at (default: 127.0.0.1); others need --api-key-file")
    add("--port", type=int, help="default: 8000")
    add(
        "--batching",
        choices=("steps", "requests"),
        help="requests: a picture joins no others at later steps, to compare",
    )
    add("--api-key-file", metavar="FILE", help="who may call: a key in each line, NAME = KEY")
    add("--cors", action="append", metavar="ORIGIN", help="pages of this origin may call; may be repeated")
    add("--config", type=Path, metavar="FILE.toml", help="all of these by their names; what is typed goes before")
    add = parser.group("many machines")
    add("--ray", action="store_true", help="replicas in a Ray cluster make the pictures")
    add("--address", metavar="HOST:PORT", help="a Ray cluster that runs; auto: on this machine (default: a new one)")
    add("--replicas", type=int, metavar="N", help="how many (default: 1)")
    add("--autoscale", metavar="LEAST:MOST", help="as many as the work needs, such as 1:8")
    add("--models-per-replica", type=int, metavar="N", help="bundles that one replica holds (default: all)")
    group = parser.group("limits")
    for name, (type_, metavar, text) in NUMBERS.items():
        group(f"--{name.replace('_', '-')}", type=type_, metavar=metavar, help=text)
    parser.examples(
        "sdopt serve",
        "sdopt serve sd15 --port 9000",
        "sdopt serve sd15 xl=bundles/sdxl --lora sd15/neon=neon.safetensors",
        "sdopt serve sd15 --host 0.0.0.0 --api-key-file keys.txt",
        "sdopt serve --config serve.toml",
        "sdopt serve sd15 --ray --replicas 2 --threads 4",
    )


def run(args: Any) -> int:
    from sdopt.serve.settings import Settings, bundles, from_toml, named

    try:
        from sdopt.serve.app import serve
    except ImportError as error:
        raise BackendError(f"sdopt serve needs more packages ({error}): {install('server')}") from error

    table: dict[str, Any] = from_toml(args.config) if args.config is not None else {}
    table |= {name: getattr(args, name) for name in (*PLAIN, *NUMBERS) if getattr(args, name) is not None}
    if args.device:
        table["devices"] = tuple(args.device)
    if args.cors:
        table["cors"] = tuple(args.cors)
    if args.trust_engines:
        table["trust_engines"] = True
    if args.ray:
        table["ray"] = True
    if args.bundle or "bundles" not in table:
        table["bundles"] = bundles(args.bundle)
    table["loras"] = {**table.get("loras", {}), **dict(named(text, "lora") for text in args.lora)}
    settings = Settings(**table)
    access = logging.getLogger("sdopt.serve.access")  # a line of JSON for each request, on stderr
    access.addHandler(logging.StreamHandler())
    access.setLevel(logging.INFO)
    access.propagate = False
    address = f"http://{settings.host}:{settings.port}"
    terminal.say(f"loading {', '.join(settings.bundles)}")
    run = serve
    if settings.ray:
        from sdopt.serve.ray import serve_on_ray as run
    return run(settings, lambda: terminal.say(f"{address} serves {', '.join(settings.bundles)}"))
