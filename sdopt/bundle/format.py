"""The manifest of a bundle as data, format version 4; README.md beside this file says what each field means.

`sdopt.bundle.manifest` turns JSON into these classes, once, and back.
"""

# no `from __future__ import annotations`: `decode` reads annotations, and as text each would be compiled first

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated

from sdopt.bundle.decode import (
    Json,
    Rule,
    between,
    integer,
    matching,
    one_of,
)
from sdopt.bundle.specs import Name, TensorSpec
from sdopt.dataclass import dataclass

FORMAT_VERSION = 4
OLDEST_VERSION = 2  # that is read: it has no `weights_of`, and 3 no `denoiser`
MAX_EDGE = 1 << 14  # pixels
MAX_STEPS = 1000
FAMILIES = ("sd", "sdxl", "sd3", "flux")
UNET, TRANSFORMER = DENOISERS = ("unet", "transformer")  # the components that predict
TIME_IDS = ("original_size", "crops_coords_top_left", "target_size", "aesthetic_score")
STRENGTH_CUTS = ("steps", "steps_up", "schedule")
JOINS = ("features", "tokens", "none")
MAX_SEQUENCE = 512  # tokens of T5


def _stays_inside(name: str) -> bool:
    """Whether a name is a relative POSIX path that cannot leave the folder, and that a file system takes."""
    parts = PurePosixPath(name).parts
    leaves = not parts or name.startswith("/") or ".." in parts or any(c in name for c in "\\:")
    return not leaves and len(name) <= 1024 and all(len(part.encode()) <= 255 for part in parts)


def _filled(what: str) -> Rule:
    return Rule(f"a list of one {what} or more", lambda value: len(value) > 0)


FilePath = Annotated[str, Rule("a relative POSIX path that does not leave the bundle", _stays_inside)]
Sha256 = Annotated[str, matching("[0-9a-f]{64}", "64 hexadecimal digits")]
Count = Annotated[int, integer(0, 1 << 31)]
TokenId = Annotated[int, integer(0, (1 << 24) - 1)]
Positive = Annotated[int, integer(1, 1 << 20)]
Edge = Annotated[int, integer(1, MAX_EDGE)]
Fraction = Annotated[float, between(0, 1)]
Factor = Annotated[float, Rule("a finite number above 0", lambda value: value > 0)]


@dataclass(frozen=True)
class File:
    """One file of the folder."""

    bytes: Annotated[int, integer(0, 1 << 60)]
    sha256: Sha256


@dataclass(frozen=True)
class Parity:
    """One output of one run: how far the graph is from PyTorch."""

    sizes: Mapping[Name, Positive]
    output: Name
    psnr_db: float
    max_error: Annotated[float, Rule("a number from 0", lambda value: value >= 0)]


@dataclass(frozen=True)
class LibraryGraph:
    """A second graph of a component, in the operators that one engine library is fast at."""

    graph: FilePath
    parity: tuple[Parity, ...]


@dataclass(frozen=True)
class ComponentEntry:
    """One model: its graph, the dtype of its weights on disk, what it takes and gives.

    `weights_of`: the component whose file of weights its graphs read; null for its own, which is `<graph>.data`.
    """

    graph: FilePath
    opset: Positive
    weights: Name
    inputs: Annotated[tuple[TensorSpec, ...], _filled("tensor")]
    outputs: Annotated[tuple[TensorSpec, ...], _filled("tensor")]
    parity: tuple[Parity, ...]
    graphs: Mapping[Name, LibraryGraph]
    weights_of: Name | None = None


@dataclass(frozen=True)
class Latents:
    """How the VAE's latents become the denoiser's: (latents - shift_factor) * scaling_factor; by channel or not.

    `patch`: how many latents one token of the denoiser spans on a side; 1 for a UNet. `most`: how many latents a side
    it has places for; 0 where any number will do.
    """

    channels: Annotated[int, integer(1, 1024)]
    factor: Annotated[int, integer(1, 1024)]
    scaling_factor: Factor | tuple[Factor, ...]
    shift_factor: float | tuple[float, ...]
    patch: Annotated[int, integer(1, 64)] = 1
    most: Annotated[int, integer(0, MAX_EDGE)] = 0

    @property
    def pixels(self) -> int:
        """Height and width of a picture are multiples of so many pixels: those of one token of the denoiser."""
        return self.factor * self.patch


@dataclass(frozen=True)
class Defaults:
    """What a picture is made with unless the caller says otherwise."""

    height: Edge
    width: Edge
    num_inference_steps: Annotated[int, integer(1, MAX_STEPS)]
    guidance_scale: float
    strength: Fraction
    inpaint_strength: Fraction
    strength_cuts: Annotated[str, one_of(*STRENGTH_CUTS)]


@dataclass(frozen=True)
class Encoder:
    """One text encoder: `skip` of its layers are left out of what `output` gives.

    `join`: where its states stand: beside the "features" of the encoders before it, after their "tokens", or nowhere:
    with "none" its pooled text alone is used.
    """

    component: Name
    tokenizer: Name
    output: Annotated[str, one_of("last_hidden_state", "hidden_states")]
    skip: Annotated[int, integer(0, 100)]
    join: Annotated[str, one_of(*JOINS)] = "features"


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser takes beside the sample and the timestep.

    `pooled`: the encoders whose `text_embeds` it takes, side by side. `sequence`: how many tokens the encoder that
    joins "tokens" reads by default; where there is none, so many rows of zeros stand in its place. `true_guidance`:
    `true_cfg_scale` makes the halves of guidance, and `guidance_scale` is an input or nothing.
    """

    encoders: Annotated[tuple[Encoder, ...], _filled("encoder")]
    pooled: Name | Annotated[tuple[Name, ...], _filled("encoder")] | None
    time_ids: tuple[Annotated[str, one_of(*TIME_IDS)], ...]
    zeros_for_empty: bool
    guidance_embedding: Annotated[int, integer(0, 1 << 20)]
    sequence: Annotated[int, integer(0, MAX_SEQUENCE)] = 0
    true_guidance: bool = False

    @property
    def pooling(self) -> tuple[str, ...]:
        """The encoders whose pooled text the denoiser takes."""
        return () if self.pooled is None else (self.pooled,) if isinstance(self.pooled, str) else self.pooled

    @property
    def has_halves(self) -> bool:
        """Whether a request may be guided by a negative half: a model that takes the scale alone has none."""
        return self.true_guidance or not self.guidance_embedding


@dataclass(frozen=True)
class TokenizerEntry:
    """One tokenizer; ids from `vocab_size` on are rows of extra embeddings. T5's begins a text with no token."""

    file: FilePath
    max_length: Annotated[int, integer(3, 1 << 16)]
    bos_token_id: TokenId | None
    eos_token_id: TokenId
    pad_token_id: TokenId
    vocab_size: Annotated[int, integer(1, 1 << 24)] | None = None


@dataclass(frozen=True)
class Preview:
    """The affine map from latents to colours, and how well it does."""

    matrix: tuple[tuple[float, float, float], ...]
    psnr_db: float
    r2: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of it. `files` is filled in when the manifest is written."""

    format_version: Annotated[int, integer(OLDEST_VERSION, FORMAT_VERSION)] = FORMAT_VERSION
    name: str | None = None
    family: Annotated[str, one_of(*FAMILIES)]
    source: Mapping[Name, str]
    versions: Mapping[Name, str]
    latents: Latents
    defaults: Defaults
    conditioning: Conditioning
    float16_unsafe: tuple[Name, ...]
    float16_attention_unsafe: tuple[Name, ...]
    requires_safety_checker: bool
    tokenizers: Mapping[Name, TokenizerEntry]
    components: Mapping[Name, ComponentEntry]
    denoiser: Annotated[str, one_of(*DENOISERS)] = UNET
    even_sigmas: bool = False
    scheduler: Mapping[Name, Json]
    prediction_type: Name
    sampler_tables: FilePath | None = None
    preview: Preview | None = None
    verified: bool
    random_weights: Count | None = None
    files: Mapping[FilePath, File]

    @property
    def sequence(self) -> int:
        """How many tokens follow those of the encoders side by side, by default: T5's, or zeros in their place."""
        encoders = [encoder for encoder in self.conditioning.encoders if encoder.join == "tokens"]
        lengths = [self.tokenizers[encoder.tokenizer].max_length for encoder in encoders]
        return min([self.conditioning.sequence, *lengths])


def data_file(components: Mapping[str, ComponentEntry], name: str) -> str:
    """The file with the weights of a component."""
    entry = components[name]
    return f"{(entry if entry.weights_of is None else components[entry.weights_of]).graph}.data"
