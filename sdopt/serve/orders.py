"""What the front and a worker say to each other: an order is one picture; events tell what becomes of it.

All of it is plain data that can be pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EVERY_STEP = -1
Weight = float | Mapping[str, float]  # of a LoRA; or one for each component, "unet" and the text encoders
Reason = Literal["usage", "full", "late", "cancelled", "failed", "stopping"]


@dataclass(frozen=True)
class Encoding:
    """How pictures are sent: Pillow's word for the format, `quality` of JPEG and WebP, 0 to 100 (None: 95)."""

    format: Literal["PNG", "JPEG", "WEBP"] = "PNG"
    quality: int | None = None
    metadata: bool = True


PLAIN = Encoding()


@dataclass(frozen=True)
class Order:
    """One picture that somebody wants.

    `options`: the keywords of one image, the prompt and the seed among them. `loras`: the weight of each by name.
    `previews`: how many pictures on the way, or `EVERY_STEP`. `seconds`: it is of no use later; None without an end.
    `alone`: no other order may share its calls of the UNet.
    """

    id: str
    bundle: str
    options: Mapping[str, Any]
    loras: Mapping[str, Weight] = field(default_factory=dict[str, Weight])
    caller: str = ""
    encoding: Encoding = PLAIN
    previews: int = 0
    seconds: float | None = None
    alone: bool = False
    is_suspect: bool = False  # a worker died while it had it under way: nothing else is under way beside it


@dataclass(frozen=True)
class Begun:
    """It has a slot now, and whatever happens to the worker may be its doing. Only the front's device hears it."""

    id: str


@dataclass(frozen=True)
class Accepted:
    """It is in the queue. `seconds`: until it is done, as far as is known; `ahead`: orders before it."""

    id: str
    seconds: float
    ahead: int
    calls: int
    width: int
    height: int


@dataclass(frozen=True)
class Moved:
    """Call `index` of `of` is done; `preview`: an encoded picture of what the sampler believes, if it was wanted."""

    id: str
    index: int
    of: int
    preview: bytes | None = None


@dataclass(frozen=True)
class Finished:
    """The encoded picture, and what makes it again. `queued`, `computed`: seconds."""

    id: str
    content: bytes
    parameters: Mapping[str, Any]
    queued: float
    computed: float


@dataclass(frozen=True)
class Failed:
    """No picture comes. `param`: the keyword that is wrong; `retry_after`: seconds after which it may work."""

    id: str
    reason: Reason
    message: str
    param: str | None = None
    retry_after: float | None = None


Event = Accepted | Moved | Finished | Failed
Told = Begun | Event
FINAL = (Finished, Failed)
