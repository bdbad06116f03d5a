"""Recipes: which engines are built from a bundle, and for which sizes.

A profile gives sizes in pixels for all engines; each engine takes from it the ranges of its own dimensions:

profile  batch=1:1:4 height=512:512:768 width=512 tokens=77      as a user types it
unet     batch=1:1:4 latent_height=64:64:96 latent_width=64 tokens=77
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from sdopt.bundle.decode import Json, Rule, decode, integer, within
from sdopt.bundle.disk import parse_toml
from sdopt.bundle.files import Bundle
from sdopt.bundle.precision import precision_word
from sdopt.bundle.specs import Name, Profile, Range, TensorSpec
from sdopt.errors import UsageError, choices

HOMES = (Path(__file__).parent.parent / "recipe.toml", Path(__file__).parents[2] / "engines/recipe.toml")
NAMES = ("batch", "height", "width", "tokens")
MAX_BATCH = 64  # pictures in one call of sdopt (`sdopt.request.kinds`)
LEARNT_TOKENS = 128  # rows of textual inversions that a text encoder's engine takes at once


def _word(*words: str) -> Rule:
    return Rule(f"{', '.join(words)}, or leave it out", lambda value: value in ("", *words))


@dataclass(frozen=True)
class EngineSpec:
    """One engine of a recipe; `engines/recipe.toml` says what the fields mean."""

    name: Name
    graph: Name
    fuse: Annotated[str, _word("guided", "alone")] = ""
    when: Annotated[str, _word("guided", "unguided", "asked")] = ""
    rows: Annotated[int, integer(1, 2)] = 1
    tokens: Annotated[str, _word("chunk")] = ""
    precision: Annotated[str, _word("fp16", "bf16", "fp32")] = ""
    attention: bool = False
    islands: tuple[str, ...] = ()


@dataclass(frozen=True)
class _File:
    """A recipe's file: one table for each engine, under the engine's name."""

    profile: Profile
    engine: Mapping[Name, Mapping[str, Json]]


@dataclass(frozen=True)
class Recipe:
    """The engines, and the profile to use if none is given."""

    profile: Profile
    parts: Mapping[str, EngineSpec]

    def chosen(self, bundle: Bundle, names: Sequence[str] | None) -> list[EngineSpec]:
        """The engines with these names or, without names, those that this bundle uses.

        Raises: UsageError for a name that the recipe or the bundle does not have.
        """
        possible = {name: part for name, part in self.parts.items() if part.graph in bundle.components}
        unknown = [name for name in names or () if name not in possible]
        if unknown:
            raise UsageError(f"component {unknown[0]!r}: this bundle becomes {choices(unknown[0], possible)}")
        distilled = bundle.manifest.conditioning.guidance_embedding  # its UNet has no unconditional half
        guided = bundle.manifest.defaults.guidance_scale > 1 and not distilled
        if names:
            return [part for name, part in possible.items() if name in names]
        when = ("", "guided" if guided else "unguided")
        return [part for part in possible.values() if part.when in when]


def read_recipe(path: Path | None = None) -> Recipe:
    """The recipe in `path`; sdopt's own if None.

    Raises: UsageError for a file that is no recipe.
    """
    path = path or next((home for home in HOMES if home.is_file()), HOMES[0])
    try:
        file: _File = decode(_File, parse_toml(path.read_text(encoding="utf-8")))
        parts = {name: _part(name, entry) for name, entry in file.engine.items()}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a recipe: {error}; see engines/recipe.toml of sdopt") from error
    return Recipe(file.profile, parts)


def _part(name: str, entry: Mapping[str, Any]) -> EngineSpec:
    given = {**entry, "name": name}
    if isinstance(given.get("precision"), str):
        given["precision"] = precision_word(given["precision"])
    return decode(EngineSpec, given, within("engine", name))


def user_profiles(bundle: Bundle, recipe: Recipe, texts: Sequence[str], static: bool) -> tuple[Profile, ...]:
    """The profiles in `texts`, completed with the bundle's own sizes. `static` reduces each to its best lengths.

    Raises: UsageError for an unknown dimension, too large a batch, or pixels that the model cannot divide.
    """
    defaults = bundle.manifest.defaults
    tokens = max(entry.max_length for entry in bundle.manifest.tokenizers.values())
    own: dict[str, Range] = {
        "batch": (1, 1, 1),
        "tokens": (tokens, tokens, tokens),
        "height": (defaults.height, defaults.height, defaults.height),
        "width": (defaults.width, defaults.width, defaults.width),
    }
    factor = bundle.manifest.latents.factor
    profiles: list[Profile] = []
    given_profiles = [Profile.parse(text) for text in dict.fromkeys(texts)] or [recipe.profile]
    for given in given_profiles:
        unknown = [name for name in given.ranges if name not in NAMES]
        if unknown:
            raise UsageError(f"profile {str(given)!r}: {unknown[0]} is unknown; there are {', '.join(NAMES)}")
        ranges = {**own, **given.ranges}
        odd = [name for name in ("height", "width") if any(length % factor for length in ranges[name])]
        if ranges["batch"][2] > MAX_BATCH:
            raise UsageError(f"profile {str(given)!r}: batch is up to {MAX_BATCH} pictures, which is what a call takes")
        if odd:
            raise UsageError(f"profile {str(given)!r}: {odd[0]} must be in multiples of {factor} pixels")
        if static:
            ranges = {name: (best, best, best) for name, (_, best, _) in ranges.items()}
        profiles.append(Profile(ranges))
    return tuple({str(profile): profile for profile in profiles}.values())


def part_profile(bundle: Bundle, part: EngineSpec, inputs: Sequence[TensorSpec], profile: Profile) -> Profile:
    """The ranges of the named dimensions of one engine's inputs."""
    factor = bundle.manifest.latents.factor
    batch, tokens = profile.ranges["batch"], profile.ranges["tokens"]
    chunk = max(entry.max_length for entry in bundle.manifest.tokenizers.values())
    if part.tokens == "chunk":  # each chunk of a long prompt is a row
        chunks = math.ceil(tokens[2] / chunk)
        batch, tokens = (batch[0], batch[1], batch[2] * chunks), (chunk, chunk, chunk)
    pixels = {name: profile.ranges[name] for name in ("height", "width")}
    latents: dict[str, Range] = {}
    for name, (low, best, high) in pixels.items():
        latents[f"latent_{name}"] = (low // factor, best // factor, high // factor)
    ranges: dict[str, Range] = {
        "batch": (batch[0], batch[1] * part.rows, batch[2] * part.rows),
        "images": batch,
        "tokens": tokens,
        "extra_tokens": (1, 1, LEARNT_TOKENS),
        **pixels,
        **latents,
    }
    names = {dimension for spec in inputs for dimension in spec.shape if isinstance(dimension, str)}
    if part.fuse:  # the graph itself makes two rows of a picture
        names.discard("images")
    return Profile({name: lengths for name, lengths in ranges.items() if name in names})
