"""`--canny`, `--tile` and `--inpaint`: the picture of the --control before them is a photo, which is prepared first."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError

if TYPE_CHECKING:
    from sdopt.image.control import Prepared


@dataclass(frozen=True)
class Way:
    """How one picture is prepared.

    `by`: a function of `sdopt.image.control`; `flag`: as it was typed. `sizes`: a tile says the size of the request.
    """

    by: str
    numbers: Mapping[str, float | int]
    flag: str
    sizes: bool = True


class _Prepare(argparse.Action):
    """A flag about the --control that was typed last. `by`: what it names; `names`: those of its numbers."""

    def __init__(self, option_strings: Any, dest: str, by: str, names: tuple[str, ...] = (), **settings: Any) -> None:
        super().__init__(option_strings, "prepare", nargs=len(names), **settings)
        self.by, self.names = by, names

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        flag = option_string or f"--{self.by}"
        if not namespace.control:
            raise argparse.ArgumentError(self, f"it is about the --control before it: --control NAME=FILE {flag}")
        place = len(namespace.control) - 1
        ways: dict[int, Way] = namespace.prepare or {}
        before = ways.get(place)
        if before is not None and before.by != self.by:
            raise argparse.ArgumentError(self, f"--control {namespace.control[place]} has {before.flag}; give one")
        numbers = {**({} if before is None else before.numbers), **dict(zip(self.names, values, strict=True))}
        namespace.prepare = {**ways, place: Way(self.by, numbers, flag)}


def add_flags(add: Any) -> None:
    """Add the flags to a group of options. What they are becomes `prepare`: the way by the place of its --control."""
    add("--canny", action=_Prepare, by="canny", help="the --control before it has a photo: find the edges in it")
    add(
        "--canny-thresholds", action=_Prepare, by="canny", names=("low", "high"), type=float, metavar=("LOW", "HIGH"),
        help="the same with other thresholds; lower ones find more edges (default: 100 200)",
    )  # fmt: skip
    add(
        "--tile", action=_Prepare, by="tile",
        help="the same for ControlNet tile: the photo in multiples of 64 pixels, which is also the size of the "
        "picture, unless --size or --image says it",
    )  # fmt: skip
    add(
        "--tile-resolution", action=_Prepare, by="tile", names=("resolution",), type=int, metavar="PIXELS",
        help="the same, and how long its shorter side is (default: 1024, or that of --size)",
    )  # fmt: skip
    add(
        "--inpaint", action=_Prepare, by="inpaint",
        help="the same for ControlNet inpaint: what --mask paints is masked; with --image that is inpainted too",
    )  # fmt: skip


def prepared(picture: Any, way: Way, typed: Mapping[str, Any]) -> Prepared:
    """A photo as a ControlNet sees it; `typed`: the keywords of other flags.

    Raises: UsageError for numbers that are not allowed, and without a mask; BackendError without OpenCV.
    """
    from sdopt.image import control  # late: only a command with such a flag needs it

    arguments: dict[str, Any] = dict(way.numbers)
    if way.by == "inpaint":
        if "mask_image" not in typed:
            raise UsageError(f"{way.flag} needs --mask MASK: white is what is painted", "mask_image")
        arguments["mask"] = typed["mask_image"]
    if way.by == "tile" and "width" in typed:
        smaller = min(typed["width"], typed["height"])
        arguments.setdefault("resolution", max(smaller, control.MULTIPLE))
    try:
        return control.WAYS[way.by](picture, **arguments)
    except UsageError as error:
        raise UsageError(f"{way.flag}: {error}") from None


def of_record(record: Mapping[str, Any]) -> Way:
    """The way that a PNG carries of one picture."""
    from sdopt.image.control import numbers_of  # late: only such a PNG needs it

    return Way(record["by"], numbers_of(record), f"--{record['by']}", sizes=False)


def beside(typed: Mapping[str, Any], ways: Mapping[int, Way], made: Mapping[str, Any]) -> dict[str, Any]:
    """All keywords: those of other flags, and what --control made, `made`.

    Without --image the mask is that of --inpaint alone. A tile says the size, where nothing else does.
    Raises: UsageError for flags of inpainting where nothing is inpainted.
    """
    keywords = {**typed, **made}
    used = {way.by for way in ways.values()}
    is_sized = any(way.by == "tile" and way.sizes for way in ways.values())
    if "inpaint" in used and "image" not in typed:
        for name in ("mask_blur", "padding_mask_crop"):
            if name in typed:
                raise UsageError(f"{name}: without image= the mask is that of --inpaint alone; leave it out", name)
        keywords.pop("mask_image", None)
    if is_sized and not {"width", "image"} & typed.keys():
        pictures: list[Any] = []
        for own in made["control_image"].values():
            pictures += own if isinstance(own, list) else [own]
        tiles = [one for one in pictures if getattr(one, "record", {}).get("by") == "tile"]
        keywords["width"], keywords["height"] = tiles[0].picture.size
    return keywords
