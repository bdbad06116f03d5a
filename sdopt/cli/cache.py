"""`sdopt cache`: what this user's cache holds for quicker starts, and `--clear` to remove it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdopt.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    add = parser.group("what is done")
    add("--clear", action="store_true", help="remove it; the next start of each bundle is slower")
    parser.group("output")("--json", action="store_true", help="print the entries as JSON")
    parser.examples("sdopt cache", "sdopt cache --clear")


def run(args: Any) -> int:
    from sdopt.cli.terminal import note, one_line
    from sdopt.engine import cache

    root = cache.root()
    entries = [_entry(path) for path in sorted(root.iterdir())] if root.is_dir() else []
    busy: list[str] = []
    if args.clear:
        busy = [str(entry["name"]) for entry in entries if not cache.remove(root / str(entry["name"]))]
        for name in busy:
            note(f"{one_line(name)} stays: another process is writing it")
        entries = [entry for entry in entries if entry["name"] not in busy]
    nbytes = sum(int(entry["bytes"]) for entry in entries)
    if args.json:
        print(json.dumps({"path": str(root), "bytes": nbytes, "cleared": bool(args.clear), "entries": entries}))
    elif args.clear:
        print(f"removed {len(entries)} entries, {nbytes / 1e6:.1f} MB, from {root}")
    else:
        for entry in entries:
            print(f"{entry['bytes'] / 1e6:>9.1f} MB  {entry['used']}  {one_line(str(entry['name']))}")
        print(f"{nbytes / 1e6:>9.1f} MB  in {root}; `sdopt cache --clear` removes it")
    return 0


def _entry(path: Path) -> dict[str, Any]:
    """The name, the size and the last day of use of one entry. Links are not followed."""
    status = path.lstat()
    is_folder = path.is_dir() and not path.is_symlink()
    files = [file.lstat() for file in path.rglob("*") if file.is_file()] if is_folder else [status]
    used = time.strftime("%Y-%m-%d", time.localtime(status.st_mtime))
    return {"name": path.name, "bytes": sum(file.st_size for file in files), "used": used}
