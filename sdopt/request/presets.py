"""A preset in a request: it sets the keywords that the caller did not name.

pipe("a red apple", preset="fast", num_inference_steps=20)     # all of fast, but 20 steps
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sdopt.bundle.files import Bundle
from sdopt.bundle.presets import Preset, preset_names, read_preset
from sdopt.errors import BundleError, UsageError
from sdopt.request.keywords import KEYWORDS
from sdopt.request.unused import UnusedError

ALLOWED = (  # what decides speed and fidelity, and not which picture is wanted
    "sampler", "schedule", "num_inference_steps", "timesteps", "sigmas", "mu", "eta", "guidance_scale",
    "guidance_interval", "guidance_rescale", "guidance_batch", "cache_interval", "cache_schedule", "cache_depth",
    "vae", "vae_tile", "vae_slice",
)  # fmt: skip
_STEPS = ("num_inference_steps", "timesteps", "sigmas", "cache_schedule")
TAKE_THE_PLACE = {  # a keyword of the caller -> those of a preset that it takes the place of, beside itself
    **dict.fromkeys(("num_inference_steps", "timesteps", "sigmas"), _STEPS),
    "sampler": ("schedule", "eta", "mu", "timesteps", "sigmas"),
    "cache_interval": ("cache_schedule",),
    "cache_schedule": ("cache_interval",),
}
Made = TypeVar("Made")


def applied(
    bundle: Bundle, given: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Made]
) -> tuple[Made, Preset | None, tuple[str, ...]]:
    """(what `make` makes of the keywords, the preset that they name, remarks about its keywords without effect).

    Raises: UsageError for a name that the bundle has no preset of; BundleError for a damaged one; what `make` raises.
    """
    name = KEYWORDS["preset"].check("preset", given.get("preset"))
    if name is None:
        return make(given), None, ()
    preset, notes = checked_preset(bundle, name), tuple[str, ...]()
    named = {keyword for keyword, value in given.items() if value is not None}
    named |= {other for keyword in named for other in TAKE_THE_PLACE.get(keyword, ())}
    own = {keyword: value for keyword, value in preset.keywords.items() if keyword not in named}
    while True:
        try:
            return make({**given, **own}), preset, notes
        except UsageError as error:
            if error.param not in own:
                raise
            if not isinstance(error, UnusedError):
                text = f"{error} (preset {name!r} sets {error.param}: name another value, or no preset)"
                raise UsageError(text, error.param) from error
            notes = (*notes, f"preset {name!r}: {error}")
            del own[error.param]


def checked_preset(bundle: Bundle, name: str) -> Preset:
    """A preset whose keywords are checked, each alone. Raises: as `applied` does."""
    preset = read_preset(bundle, name)
    for keyword, value in preset.keywords.items():
        if keyword not in ALLOWED:
            raise BundleError(f"{bundle.path}: preset {name} sets {keyword}; allowed are {', '.join(ALLOWED)}")
        try:
            KEYWORDS[keyword].check(keyword, value)
        except UsageError as error:
            raise BundleError(f"{bundle.path}: preset {name}: {error}") from error
    return preset


def keywords_of_presets(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """The keywords of each preset by its name; presets that cannot be read are left out."""
    found: dict[str, dict[str, Any]] = {}
    for name in preset_names(bundle):
        try:
            found[name] = dict(checked_preset(bundle, name).keywords)
        except BundleError:
            continue
    return found
