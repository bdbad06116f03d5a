"""`sdopt engines BUNDLE`: the engines that `sdopt build` made, which of them `auto` takes, and `--remove KEY`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from sdopt.bundle.files import Bundle
    from sdopt.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="default: the embedded model")
    parser.group("what is done")(
        "--remove", action="append", default=[], metavar="KEY",
        help='remove the engine with this key, as the list names it, or "all"; may be repeated',
    )  # fmt: skip
    parser.group("output")("--json", action="store_true", help="print the engines as JSON")
    parser.examples("sdopt engines sd15", "sdopt engines sd15 --remove unet_step-25a160eea4f8")


def run(args: Any) -> int:
    from sdopt.bundle.files import Bundle, embedded

    bundle = Bundle.open(args.bundle or embedded())
    entries = engine_entries(bundle)
    if args.remove:
        removed = _removed(bundle, entries, args.remove)
        entries = engine_entries(bundle)
        print(json.dumps({"removed": removed, "engines": entries}) if args.json else "\n".join(removed))
        return 0
    if args.json:
        print(json.dumps({"engines": entries, "auto": auto_choice(bundle)}))
    else:
        print("\n".join(lines(bundle, entries)))
    return 0


def engine_entries(bundle: Bundle) -> list[dict[str, Any]]:
    """The engines of a bundle, the newest of each backend first: key, component, precision, size, who built it."""
    from sdopt.engine import BACKENDS
    from sdopt.engine.store import stored

    return [
        {
            "key": engine.folder.name,
            "component": engine.record.component,
            "backend": backend,
            "provider": engine.record.environment.get("provider", ""),
            "precision": engine.precision,
            "bytes": sum(file.bytes for file in engine.record.files.values()),
            "ours": engine.ours,
            "refit": _refit(engine.record.options.get("refit")),
            "loras": _loras(engine.record.options.get("loras")),
            "profiles": list(engine.record.asked),
        }
        for backend in BACKENDS
        for engine in stored(bundle, backend)
    ]


def auto_choice(bundle: Bundle) -> dict[str, str]:
    """What runs if a command names neither backend nor precision; empty if no backend computes in fp32 here."""
    from sdopt.engine.pool import EnginePool
    from sdopt.errors import BackendError

    try:
        with EnginePool(bundle) as pool:
            return {"backend": pool.backend, "precision": pool.precision}
    except BackendError:
        return {}


def lines(bundle: Bundle, entries: list[dict[str, Any]]) -> list[str]:
    """The engines as a table, and what runs without --backend and --precision."""
    from sdopt.cli.terminal import one_line

    rows = [_row(entry) for entry in entries]
    heads = ("key", "backend", "precision", "MB", "")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (heads, *rows)] if rows else ["no engines"]
    auto = auto_choice(bundle)
    chosen = f"{auto['backend']} in {auto['precision']}" if auto else "nothing: name --backend"
    return [*map(one_line, table), f"without --backend and --precision: {chosen}"]


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    provider = f" ({entry['provider']})" if entry["provider"] else ""
    owner = "" if entry["ours"] else "built by somebody else: runs only with --trust-engines"
    refit = {"": "", "all": "refit", "lora": "refit: lora"}[entry["refit"]]
    loras = ", ".join(str(lora.get("name")) for lora in entry["loras"])
    remarks = "; ".join(filter(None, (refit, loras and f"with {loras}", owner)))
    precision = entry["precision"] or "unknown"
    return entry["key"], f"{entry['backend']}{provider}", precision, f"{entry['bytes'] / 1e6:.1f}", remarks


def _loras(option: Any) -> list[dict[str, Any]]:
    """The LoRAs that are built into an engine: name, digest and weights of each."""
    given = cast("list[Any]", option) if isinstance(option, list) else []
    return [cast("dict[str, Any]", lora) for lora in given if isinstance(lora, dict)]


def _refit(option: Any) -> str:
    """Which weights of an engine can be changed: "lora", "all", or "" for none."""
    return option if option == "lora" else "all" if option else ""


def _removed(bundle: Bundle, entries: list[dict[str, Any]], keys: list[str]) -> list[str]:
    """Remove engines. Returns their folders.

    Raises: UsageError for a key that no engine has, and BackendError for an engine that another process builds now,
    before any is removed.
    """
    from sdopt.bundle.unfinished import delete
    from sdopt.cli.terminal import note
    from sdopt.engine.store import engines_folder
    from sdopt.errors import UsageError, choices

    known = [entry["key"] for entry in entries]
    unknown = [key for key in keys if key not in known and key != "all"]
    if unknown:
        there_are = f"there are {choices(unknown[0], known)}" if known else "nothing is built"
        raise UsageError(f"--remove {unknown[0]}: {bundle.path} has no engine with this key; {there_are}")
    wanted = known if "all" in keys else list(dict.fromkeys(keys))
    folders = [engines_folder(bundle) / key for key in wanted]
    try:
        from sdopt.build.lock import remove_engines  # late: most commands need no lock of a build
    except ImportError:  # this installation cannot build
        for folder in folders:
            delete(folder)
    else:
        remove_engines(folders, note)
    return [str(folder) for folder in folders]
