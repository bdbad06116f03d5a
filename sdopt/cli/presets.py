"""The presets of a bundle, as `sdopt inspect` shows them."""

from __future__ import annotations

from typing import Any

from sdopt.bundle.decode import encode
from sdopt.bundle.files import Bundle
from sdopt.bundle.presets import preset_names
from sdopt.errors import BundleError
from sdopt.request.presets import checked_preset


def preset_entries(bundle: Bundle) -> list[dict[str, Any]]:
    """The presets of a bundle as JSON; one that is damaged has an "error"."""
    entries: list[dict[str, Any]] = []
    for name in preset_names(bundle):
        try:
            entries.append({"name": name, **encode(checked_preset(bundle, name))})
        except BundleError as error:
            entries.append({"name": name, "error": str(error)})
    return entries


def preset_lines(bundle: Bundle) -> list[str]:
    """The same as a table, and a line without text; nothing if there are none."""
    entries = preset_entries(bundle)
    title = f"{'preset':<16}{'seconds':>7}{'dB':>7}{'SSIM':>7}  engine, keywords"
    return [title, *map(_line, entries), ""] if entries else []


def _line(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"{entry['name']:<16}  {entry['error']}"
    keywords = ", ".join(f"{name}={value!r}" for name, value in entry["keywords"].items())
    measured = f"{entry['seconds']:>7.3g}{entry['psnr_db']:>7.1f}{entry['ssim']:>7.3f}"
    return f"{entry['name']:<16}{measured}  {entry['backend']} in {entry['precision']}, {keywords}"
