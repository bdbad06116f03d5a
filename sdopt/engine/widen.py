"""The profile to build, in pictures, pixels and tokens as a user types it, for an engine that takes a given call.

requested   batch=1:1:4 height=512 width=512 tokens=77    what the user typed, completed with the bundle's own sizes
built       batch=1:2:8 latent_height=64 latent_width=64  the engine's profile: its batch counts rows, two for a picture

An engine without the size of a picture is a text encoder. Its rows are chunks of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping

from sdopt.bundle.joined import PICTURES, divisor_of
from sdopt.bundle.specs import Profile

USUAL = {"pictures": PICTURES, "adapters": (1, 1, 1)}  # what a profile that does not name it takes
Units = Mapping[str, int]  # dimension of an engine -> pixels in each of its elements


def widened(requested: Profile, built: Profile, dims: Mapping[str, int], units: Units) -> Profile | None:
    """`requested`, widened so that its engine takes the lengths `dims` too; None if no profile does that.

    `built` is the engine's profile that was made from `requested`.
    """
    ranges = dict(requested.ranges)
    for name, length in built.outside(dims).items():
        typed = _as_typed(requested, built, name, length, units)
        if typed is None:
            return None
        word, needed = typed
        low, best, high = ranges.get(word, USUAL.get(word, (needed, needed, needed)))
        ranges[word] = (min(low, needed), best, max(high, needed))
    return Profile(ranges)


def _as_typed(requested: Profile, built: Profile, name: str, length: int, units: Units) -> tuple[str, int] | None:
    """(word of a user's profile, its length) for `length` of an engine's dimension `name`; None if there is none."""
    if name in units:
        return name.removeprefix("latent_"), length * units[name]
    if name in ("height", "width", "tokens", "adapters"):
        return name, length
    of_latents, by = divisor_of(name)
    if by > 1:
        return of_latents.removeprefix("latent_"), length * by * units[of_latents]
    if name in ("image_tokens", "pictures"):  # so many of each picture
        most = requested.ranges.get("pictures", PICTURES)[2]
        return "pictures", _divided_up(length, built.ranges[name][2] // most)
    if name == "images":
        return "batch", length
    if name != "batch":
        return None
    low, _, pictures = requested.ranges.get("batch", (1, 1, 1))
    if length < low:
        return "batch", length
    rows_per_picture = built.ranges["batch"][2] // pictures
    has_picture_size = bool(set(built.ranges) & {*units, "height", "width"})
    if has_picture_size:
        return "batch", _divided_up(length, max(1, rows_per_picture))
    chunk, most_tokens = built.ranges["tokens"][0], requested.ranges["tokens"][2]
    rows_per_chunk = max(1, rows_per_picture // _divided_up(most_tokens, chunk))
    return "tokens", chunk * _divided_up(length, pictures * rows_per_chunk)


def _divided_up(length: int, size: int) -> int:
    """`length` / `size`, rounded up."""
    return -(-length // size)
