"""The arguments of load, decode, preview, encode and load_embedding, each checked as a keyword of a request is."""

from __future__ import annotations

import inspect
from typing import Any

from sdopt.bundle.specs import Float32
from sdopt.errors import UsageError
from sdopt.request.arrays import Tensor
from sdopt.request.keyword import Keyword
from sdopt.request.keywords import KEYWORDS
from sdopt.request.kinds import MAX_PIXELS, MAX_SIZE, Choice, Integer, Texts, Word

MAX_SCALE = 64  # pixels for each latent of a preview
PICTURE_TYPES = ("pil", "np")
LATENTS = Tensor(("images", "channels", "latent height", "latent width"))
ARGUMENTS = {
    "latents": Keyword("", LATENTS, optional=False),
    "scale": Keyword("", Integer(1, MAX_SCALE, "8"), optional=False),
    "output_type": Keyword("", Choice(PICTURE_TYPES, '"np"'), optional=False),
    "prompts": Keyword("", Texts('["a red apple"]'), optional=False),
    "token": Keyword("", Word('"<cat-toy>"')),
    **{name: KEYWORDS[name] for name in ("prompt_style", "clip_skip", "vae", "vae_tile", "vae_slice", "preset")},
}


def argument(name: str, value: Any) -> Any:
    """The value of one argument in plain Python or NumPy. Raises: UsageError that names it."""
    return ARGUMENTS[name].check(name, value)


def latents(value: Any, channels: int, factor: int) -> Float32:
    """Latents [images, channels, h, w] of a model with so many channels, no larger than those of a picture may be.

    `factor`: pixels for each latent. Raises: UsageError.
    """
    array: Float32 = argument("latents", value)
    if array.shape[1] != channels:
        text = f"latents: got float32 {array.shape}; this model has {channels} channels: [images, {channels}, h, w]"
        raise UsageError(text, "latents")
    height, width = (side * factor for side in array.shape[2:])
    if max(height, width) > MAX_SIZE or height * width > MAX_PIXELS:
        text = f"latents: {array.shape} are {width}x{height} pixels; allowed are {MAX_SIZE} a side"
        raise UsageError(f"{text} and {MAX_PIXELS:,} in all", "latents")
    return array


def takes_four(function: object) -> bool:
    """Whether it is a function that can be called with four arguments, as far as that can be known. No class is."""
    if not callable(function) or isinstance(function, type):
        return False
    try:
        inspect.signature(function).bind(None, 0, 0.0, {})
    except TypeError:
        return False
    except ValueError:  # a function in C that does not tell
        return True
    return True
