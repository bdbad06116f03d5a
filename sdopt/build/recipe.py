"""Recipes: which engines are built from a bundle, and for which sizes.

A profile gives sizes in pixels for all engines; each engine takes from it the ranges of its own dimensions:

profile  batch=1:1:4 height=512:512:768 width=512 tokens=77      as a user types it
unet     batch=1:1:4 latent_height=64:64:96 latent_width=64 tokens=77
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

from sdopt.build.steering import autoencoders, beside, pictures_range, steered_graph, steering_of, steering_ranges
from sdopt.bundle.adapter import CONTROLLED, IMAGE_PROMPTED, adapter_of
from sdopt.bundle.decode import Json, Rule, decode, integer, within
from sdopt.bundle.disk import parse_toml, read_given
from sdopt.bundle.files import Bundle
from sdopt.bundle.joined import DEEP, PLAIN, SHALLOW, Steering, cached_engine, depth_of, divisor_of, engine_of
from sdopt.bundle.precision import precision_word
from sdopt.bundle.specs import Name, Profile, Range, TensorSpec
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices

HOMES = (Path(__file__).parent.parent / "recipe.toml", Path(__file__).parents[2] / "engines/recipe.toml")
MAX_BYTES = 16 << 20
NAMES = ("batch", "height", "width", "tokens")
OF_ADAPTERS = ("pictures", "adapters")  # of IP-Adapters; a profile that does not name them takes what is usual
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
    cache: Annotated[str, _word(DEEP, SHALLOW)] = ""

    @property
    def depth(self) -> int:
        """Of a feature cache: how many of the last layers its shallow engine has."""
        return depth_of(self.name)[1]

    @property
    def steering(self) -> Steering:
        """The adapters that it runs, and those of which it takes what they give."""
        return Steering.of(self.name) if self.fuse else PLAIN

    @property
    def model(self) -> str:
        """The component of the checkpoint that its graph was traced from: what the manifest says of it is true here."""
        return "unet" if self.graph in (CONTROLLED, IMAGE_PROMPTED) else self.graph


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

    def chosen(self, bundle: Bundle, names: Sequence[str] | None, adapters: Sequence[str] = ()) -> list[EngineSpec]:
        """The engines with these names or, without names, those that this bundle uses.

        `adapters`: those of the bundle that steer every engine of a step, and what runs of them beside the loop. The
        name of an engine may say what steers it: "unet_step.canny+ip_adapter".
        Raises: UsageError for a name that the recipe or the bundle does not have, and for adapters without a step.
        """
        given = steering_of(bundle, adapters)
        wanted = [(part, given if part.fuse else PLAIN) for part in self._used(bundle)]
        if names:
            own = self._named(bundle, names)
            wanted = [(part, Steering.of(name) or (given if part.fuse else PLAIN)) for name, part in own]
            both = [name for name in names if adapters and Steering.of(name)]
            if both:
                raise UsageError(f"--adapter and --component {both[0]}, which names its adapters: give one of the two")
        parts = [joined(bundle, part, steering) for part, steering in wanted]
        coders = autoencoders(bundle, adapters)
        if names and coders:
            both = " ".join(f"--component {one}" for one in beside(bundle, coders))
            text = f"{coders[0]} steers no engine; give {both} in its place, in a build of its own or in this one"
            raise UsageError(f"--adapter {coders[0]} beside {', '.join(names)}: {text}")
        if len(coders) < len(adapters) and not any(part.steering for part in parts):
            raise UsageError(f"--adapter: none of {', '.join(part.name for part in parts)} is steered by an adapter")
        if not names:
            parts += [EngineSpec(name, name) for name in beside(bundle, adapters)]
        return [*{part.name: part for part in parts}.values()]

    def _named(self, bundle: Bundle, names: Sequence[str]) -> list[tuple[str, EngineSpec]]:
        """Each name with its engine without steering, in the order of the recipe; then those of adapters."""
        own = [name for name in names if adapter_of(name) is not None]
        possible = {name: part for name, part in self.parts.items() if part.graph in bundle.components}
        unknown = [name for name in names if name not in own and _listed_as(name) not in possible]
        if unknown:
            raise UsageError(f"component {unknown[0]!r}: this bundle becomes {choices(unknown[0], possible)}")
        for name in own:
            adapter, _ = cast("tuple[str, str]", adapter_of(name))
            there = beside(bundle, [adapter])
            if name not in there:
                known = f"there are {choices(name, there)}" if there else f"{adapter} runs inside of a step"
                raise UsageError(f"component {name!r}: {known}; give --adapter {adapter}")
        listed = [(name, part) for plain, part in possible.items() for name in names if _listed_as(name) == plain]
        for name, part in listed:
            if part.cache and not depth_of(name)[1]:
                raise UsageError(f"component {name!r}: its name has the depth of the feature cache, e.g. {name}_1")
        listed = [(name, replace(part, name=name) if part.cache else part) for name, part in listed]
        return [*listed, *((name, EngineSpec(name, name)) for name in own)]

    def cached(self, bundle: Bundle, depth: int, steps: bool) -> list[str]:
        """The two engines of a feature cache of this depth; `steps`: they make whole steps.

        Raises: UsageError for a depth below 1.
        """
        if depth < 1:
            raise UsageError(f"--cache-depth {depth}; allowed is 1 or more: that many of the UNet's last layers")
        fused = next((part.name for part in self._used(bundle) if part.fuse and part.graph == "unet"), "unet_step")
        return [cached_engine(fused if steps else "unet", kind, depth) for kind in (DEEP, SHALLOW)]

    def _used(self, bundle: Bundle) -> list[EngineSpec]:
        """The engines that a bundle uses."""
        distilled = bundle.manifest.conditioning.guidance_embedding  # its UNet has no unconditional half
        guided = bundle.manifest.defaults.guidance_scale > 1 and not distilled
        when = ("", "guided" if guided else "unguided")
        return [part for part in self.parts.values() if part.graph in bundle.components and part.when in when]


def _listed_as(name: str) -> str:
    """The name of an engine in a recipe: "unet_step" of "unet_step.canny", "unet_deep" of "unet_deep_2"."""
    own, depth = depth_of(name)
    return own if depth else engine_of(name)


def joined(bundle: Bundle, part: EngineSpec, steering: Steering) -> EngineSpec:
    """The engine of a step that these adapters steer; without any, `part` itself.

    Raises: UsageError for an engine that is no step, and for adapters that it does not take; BundleError for a damaged
    one.
    """
    if not steering:
        return part
    if part.cache:
        text = "a feature cache does not run beside adapters, which steer the layers that it leaves out"
        raise UsageError(f"component {part.name!r} and adapters: {text}; leave out one of the two")
    if not part.fuse:
        raise UsageError(f"component {steering.named(part.name)!r}: only an engine of a step is steered by adapters")
    return replace(part, name=steering.named(part.name), graph=steered_graph(bundle, steering))


def read_recipe(path: Path | None = None) -> Recipe:
    """The recipe in `path`; sdopt's own if None.

    Raises: UsageError for a file that is no recipe.
    """
    path = path or next((home for home in HOMES if home.is_file()), HOMES[0])
    try:
        file: _File = decode(_File, parse_toml(read_given(path, MAX_BYTES).decode()))
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
    defaults, tokens = bundle.manifest.defaults, sum(_text_lengths(bundle))
    own: dict[str, Range] = {
        "batch": (1, 1, 1),
        "tokens": (tokens, tokens, tokens),
        "height": (defaults.height, defaults.height, defaults.height),
        "width": (defaults.width, defaults.width, defaults.width),
    }
    factor = bundle.manifest.latents.pixels
    profiles: list[Profile] = []
    given_profiles = [Profile.parse(text) for text in dict.fromkeys(texts)] or [recipe.profile]
    for given in given_profiles:
        unknown = [name for name in given.ranges if name not in (*NAMES, *OF_ADAPTERS)]
        if unknown:
            there = ", ".join((*NAMES, *OF_ADAPTERS))
            raise UsageError(f"profile {str(given)!r}: {unknown[0]} is unknown; there are {there}")
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


def _text_lengths(bundle: Bundle) -> tuple[int, int]:
    """How many tokens of a short prompt the denoiser takes: those of a chunk of CLIP, and those of T5's sequence."""
    entry, tokenizers = bundle.manifest.conditioning, bundle.manifest.tokenizers
    beside = [tokenizers[encoder.tokenizer].max_length for encoder in entry.encoders if encoder.join == "features"]
    return max(beside, default=0), bundle.manifest.sequence


def _chunks(bundle: Bundle, component: str, tokens: int) -> tuple[int, int]:
    """How many tokens a text encoder takes at once, and how many chunks a prompt of so many tokens has there."""
    own, (chunk, sequence) = (
        {one.component: one for one in bundle.manifest.conditioning.encoders},
        _text_lengths(bundle),
    )
    encoder = own.get(component)
    if encoder is None or encoder.join == "features":
        return chunk, math.ceil((tokens - sequence) / chunk)
    length = sequence if encoder.join == "tokens" else bundle.manifest.tokenizers[encoder.tokenizer].max_length
    return length, 1


def part_profile(bundle: Bundle, part: EngineSpec, inputs: Sequence[TensorSpec], profile: Profile) -> Profile:
    """The ranges of the named dimensions of one engine's inputs."""
    factor = bundle.manifest.latents.factor
    batch, tokens = profile.ranges["batch"], profile.ranges["tokens"]
    if part.tokens == "chunk":  # each chunk of a long prompt is a row
        chunk, chunks = _chunks(bundle, part.graph, tokens[2])
        batch, tokens = (batch[0], batch[1], batch[2] * chunks), (chunk, chunk, chunk)
    pixels = {name: profile.ranges[name] for name in ("height", "width")}
    steering = steering_ranges(bundle, part.steering, profile)
    latents: dict[str, Range] = {}
    for name, (low, best, high) in pixels.items():
        latents[f"latent_{name}"] = (low // factor, best // factor, high // factor)
    ranges: dict[str, Range] = {
        "batch": (batch[0], batch[1] * part.rows, batch[2] * part.rows),
        "images": batch,
        "tokens": tokens,
        "extra_tokens": (1, 1, LEARNT_TOKENS),
        "pictures": pictures_range(profile),
        **steering,
        **pixels,
        **latents,
    }
    names = {dimension for spec in inputs for dimension in spec.shape if isinstance(dimension, str)} | {*steering}
    for name in names - ranges.keys():
        own, by = divisor_of(name)
        low, best, high = latents.get(own, (1, 1, 1))
        ranges[name] = (-(-low // by), -(-best // by), -(-high // by))
    if part.fuse:  # the graph itself makes two rows of a picture
        names.discard("images")
    return Profile({name: lengths for name, lengths in ranges.items() if name in names})
