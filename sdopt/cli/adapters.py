"""The adapters of a bundle, as `sdopt inspect` shows them."""

from __future__ import annotations

from typing import Any

from sdopt.bundle.adapter import ADAPTERS, adapter_names, open_adapter
from sdopt.bundle.files import Bundle
from sdopt.errors import SdoptError


def adapter_entries(bundle: Bundle) -> list[dict[str, Any]]:
    """The adapters of a bundle as JSON; one that is damaged has an "error"."""
    entries: list[dict[str, Any]] = []
    for name in adapter_names(bundle):
        try:
            adapter = open_adapter(bundle, name)
        except SdoptError as error:
            entries.append({"name": name, "error": str(error)})
            continue
        manifest = adapter.manifest
        results = [result.psnr_db for component in manifest.components.values() for result in component.parity]
        entry = {
            "name": name,
            "kind": manifest.kind,
            "digest": adapter.digest,
            "source": dict(manifest.source),
            "bytes": sum(file.bytes for file in manifest.files.values()),
            "parity_db": min(results, default=None),
            "modes": list(manifest.control.modes) if manifest.control is not None else [],
        }
        entries.append(entry)
    return entries


def adapter_lines(bundle: Bundle) -> list[str]:
    """The same as a table, and a line without text; nothing if there are none."""
    entries = adapter_entries(bundle)
    if not entries:
        return []
    place = f"in {bundle.path / ADAPTERS}: delete a folder to remove it"
    return [f"{'adapter':<16}{'MB':>7}{'parity dB':>11}  {place}", *map(_line, entries), ""]


def _line(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"{entry['name']:<16}  {entry['error']}"
    parity = "unverified" if entry["parity_db"] is None else f"{entry['parity_db']:.1f}"
    source = ", ".join(f"{key} {value}" for key, value in entry["source"].items())
    modes = "; modes " + ", ".join(f"{i} {name}" for i, name in enumerate(entry["modes"])) if entry["modes"] else ""
    return f"{entry['name']:<16}{entry['bytes'] / 1e6:>7.1f}{parity:>11}  {entry['kind']}, {source}{modes}"
