"""Which profile, in pictures, pixels and tokens as a user types it, makes an engine that takes a call.

asked   batch=1:1:4 height=512 width=512 tokens=77      what was typed, completed with the bundle's own sizes
own     batch=1:2:8 latent_height=64 latent_width=64    what the engine became: rows are two of a picture here

An engine that has no picture's size in it is a text encoder: its rows are chunks of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping

from sdopt.bundle.specs import Profile

Units = Mapping[str, int]  # dimension of an engine -> how many pixels one of it is


def widened(asked: Profile, own: Profile, dims: Mapping[str, int], units: Units) -> Profile | None:
    """`asked`, so that an engine of it takes lengths of `dims` too; None if no profile does that.

    `own`: what the engine's profile became of `asked`.
    """
    ranges = dict(asked.ranges)
    for name, length in own.outside(dims).items():
        found = _user(asked, own, name, length, units)
        if found is None:
            return None
        word, wanted = found
        low, best, high = ranges.get(word, (wanted, wanted, wanted))
        ranges[word] = (min(low, wanted), best, max(high, wanted))
    return Profile(ranges)


def _user(asked: Profile, own: Profile, name: str, length: int, units: Units) -> tuple[str, int] | None:
    """(the word of a profile, its length) that `length` of an engine's dimension asks for."""
    if name in units:
        return name.removeprefix("latent_"), length * units[name]
    if name in ("height", "width", "tokens"):
        return name, length
    if name == "images":
        return "batch", length
    if name != "batch":
        return None
    low, _, pictures = asked.ranges.get("batch", (1, 1, 1))
    if length < low:
        return "batch", length
    rows = own.ranges["batch"][2] // pictures  # of a picture
    if set(own.ranges) & {*units, "height", "width"}:
        return "batch", -(-length // max(1, rows))
    (chunk, _, _), tokens = own.ranges["tokens"], asked.ranges["tokens"][2]
    rows = max(1, rows // -(-tokens // chunk))
    return "tokens", chunk * -(-length // (pictures * rows))
