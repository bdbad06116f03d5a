"""The manifest of a bundle as data, format version 4; README.md beside this file says what each field means.

`decode_manifest` turns JSON into these classes, once, and checks that the fields agree; `to_json` is the way back.
"""

# no `from __future__ import annotations`: `decode` reads annotations, and as text each would be compiled first

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, cast

from sdopt.bundle.decode import (
    DecodeError,
    Json,
    Rule,
    between,
    decode,
    encode,
    integer,
    matching,
    one_of,
    refusal,
    within,
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
INFINITY = "-inf"  # how diffusers writes it into a scheduler_config.json


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


# those settings of a scheduler_config.json that a sampler reads; others are kept, and may be any JSON
_Word = Annotated[str, Rule("a word of at most 100 characters", lambda value: len(value) <= 100)]
_Timesteps = Annotated[int, integer(1, 1 << 20)]
_Beta = Annotated[float, Rule("a number above 0 and below 1", lambda value: 0 < value < 1)]
_Above0 = Annotated[float, Rule("a finite number above 0", lambda value: value > 0)]
_Sigma = Annotated[float | None, Rule("null or a finite number above 0", lambda value: value is None or value > 0)]
_Betas = Annotated[tuple[_Beta, ...] | None, Rule("null or a list of numbers", lambda value: value is None or value)]
_BOOLEANS = (
    "clip_sample", "euler_at_final", "invert_sigmas", "lower_order_final", "predict_x0", "rescale_betas_zero_snr",
    "set_alpha_to_one", "skip_prk_steps", "stochastic_sampling", "thresholding", "use_beta_sigmas",
    "use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas", "use_lu_lambdas",
)  # fmt: skip
_WORDS = (
    "algorithm_type", "beta_schedule", "final_sigmas_type", "interpolation_type", "prediction_type",
    "sigma_schedule", "solver_type", "time_shift_type", "timestep_spacing", "timestep_type",
)  # fmt: skip
SETTINGS: Mapping[str, Any] = {
    **dict.fromkeys(_BOOLEANS, bool),
    "_class_name": Name,
    **dict.fromkeys(_WORDS, _Word),
    **dict.fromkeys(("num_train_timesteps", "original_inference_steps"), _Timesteps),
    **dict.fromkeys(("beta_start", "beta_end"), _Beta),
    **dict.fromkeys(("rho", "sigma_data", "timestep_scaling", "flow_shift", "shift"), _Above0),
    **dict.fromkeys(("sigma_min", "sigma_max"), _Sigma),
    "trained_betas": _Betas,
    "steps_offset": Annotated[int, integer(0, 1000)],
    "solver_order": Annotated[int, integer(1, 4)],
    "lambda_min_clipped": float | Annotated[str, one_of(INFINITY)],
    "variance_type": Annotated[str | None, Rule("null or a name", lambda value: True)],
    "shift_terminal": float | None,
    "disable_corrector": tuple[Count, ...],
    "_use_default_values": tuple[str, ...],
}


def decode_manifest(entry: Any) -> Manifest:
    """The manifest that `entry` is, as json.loads gives it.

    Raises: DecodeError that names the first field that is wrong, and what is allowed.
    """
    manifest: Manifest = decode(Manifest, entry)
    for error in _contradictions(manifest):
        raise error
    return manifest


def check_scheduler(scheduler: Mapping[str, Any]) -> None:
    """Raises: DecodeError that names the first setting of a manifest's `scheduler` that is wrong."""
    for error in _of_the_scheduler(scheduler):
        raise error


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as json.dumps takes it; what `decode_manifest` refuses is not written.

    Raises: DecodeError as `decode_manifest` does.
    """
    entry: dict[str, Any] = encode(manifest)
    decode_manifest(entry)
    return entry


def _contradictions(manifest: Manifest) -> Iterator[DecodeError]:
    """Fields that are right alone, but do not fit the other fields."""
    yield from _of_the_scheduler(manifest.scheduler)
    yield from _of_files(manifest)
    yield from _of_latents(manifest)
    yield from _of_conditioning(manifest)
    yield from _of_tokenizers(manifest)


def refuse_setting(key: str, value: Any) -> None:
    """Raises: DecodeError for a setting of a scheduler_config.json that no sampler reads so."""
    if key in SETTINGS:
        decode(SETTINGS[key], value, within("scheduler", key))


def _of_the_scheduler(scheduler: Mapping[str, Any]) -> Iterator[DecodeError]:
    if "_class_name" not in scheduler:
        yield DecodeError("scheduler._class_name is missing; allowed is the name of a scheduler of diffusers")
    for key, value in scheduler.items():
        try:
            refuse_setting(key, value)
        except DecodeError as error:
            yield error


def _of_files(manifest: Manifest) -> Iterator[DecodeError]:
    used: dict[str, str | None] = {"sampler_tables": manifest.sampler_tables}
    for name, tokenizer in manifest.tokenizers.items():
        used[f"{within('tokenizers', name)}.file"] = tokenizer.file
    yield from unlisted(used, manifest.files)
    yield from of_components(manifest.components, manifest.files)


def of_components(components: Mapping[str, ComponentEntry], files: Mapping[str, File]) -> Iterator[DecodeError]:
    """Components whose files are not listed, or whose weights are those of no other component."""
    used: dict[str, str | None] = {}
    for name, component in components.items():
        where = within("components", name)
        used[f"{where}.graph"] = component.graph
        for library, own in component.graphs.items():
            used[f"{within(f'{where}.graphs', library)}.graph"] = own.graph
        owner = component.weights_of
        if owner is not None and (owner not in components or components[owner].weights_of is not None):
            owners = [other for other, entry in components.items() if entry.weights_of is None]
            yield refusal(f"{where}.weights_of", owner, f"null, or one of components: {', '.join(owners)}")
    yield from unlisted(used, files)


def unlisted(used: Mapping[str, str | None], files: Mapping[str, File]) -> Iterator[DecodeError]:
    """Those of the `used` files, by the field that names them, that the manifest does not list."""
    for where, file in used.items():
        if file is not None and file not in files:
            yield refusal(where, file, "a name that is listed under 'files'")


def data_file(components: Mapping[str, ComponentEntry], name: str) -> str:
    """The file with the weights of a component."""
    entry = components[name]
    return f"{(entry if entry.weights_of is None else components[entry.weights_of]).graph}.data"


def _of_latents(manifest: Manifest) -> Iterator[DecodeError]:
    latents, defaults = manifest.latents, manifest.defaults
    for name in ("scaling_factor", "shift_factor"):
        value = getattr(latents, name)
        if isinstance(value, tuple) and len(cast("tuple[float, ...]", value)) != latents.channels:
            yield refusal(
                f"latents.{name}", value, f"one number, or a list of {latents.channels}, one for each channel"
            )
    for name in ("height", "width"):
        if getattr(defaults, name) % latents.pixels:
            allowed = f"a multiple of latents.factor, {latents.factor}"
            if latents.patch > 1:
                allowed = f"a multiple of latents.factor times latents.patch, {latents.pixels}"
            yield refusal(f"defaults.{name}", getattr(defaults, name), allowed)
    if manifest.preview is not None and len(manifest.preview.matrix) != latents.channels + 1:
        shape = [len(manifest.preview.matrix), 3]
        yield DecodeError(
            f"preview.matrix is {shape}; allowed is {[latents.channels + 1, 3]}: a row more than channels"
        )
    where = within("components", manifest.denoiser)
    if manifest.denoiser not in manifest.components:
        yield DecodeError(f"{where} is missing; allowed is the component that predicts the noise")
        return
    denoiser = manifest.components[manifest.denoiser]
    for kind, spec, least in (("inputs", denoiser.inputs[0], latents.channels), ("outputs", denoiser.outputs[0], 0)):
        channels = spec.shape[1] if len(spec.shape) == 4 else None
        fits = isinstance(channels, int) and (channels >= least if least else channels == latents.channels)
        if not fits:
            allowed = f"4 dimensions, the second {'at least ' if least else ''}latents.channels, {latents.channels}"
            yield refusal(f"{where}.{kind}[0].shape", list(spec.shape), allowed)


def _of_conditioning(manifest: Manifest) -> Iterator[DecodeError]:
    conditioning, components = manifest.conditioning, manifest.components
    for i, encoder in enumerate(conditioning.encoders):
        where = f"conditioning.encoders[{i}]"
        if encoder.component not in components:
            yield refusal(f"{where}.component", encoder.component, f"one of components: {', '.join(components)}")
        elif encoder.join != "none" and encoder.output not in _outputs(components[encoder.component]):
            yield refusal(f"{where}.output", encoder.output, f"an output of {encoder.component}")
        if encoder.tokenizer not in manifest.tokenizers:
            allowed = f"one of tokenizers: {', '.join(manifest.tokenizers)}"
            yield refusal(f"{where}.tokenizer", encoder.tokenizer, allowed)
    beside = [encoder.tokenizer for encoder in conditioning.encoders if encoder.join == "features"]
    known = [name for name in beside if name in manifest.tokenizers]
    for name in known:
        length, first = (manifest.tokenizers[n].max_length for n in (name, known[0]))
        if length != first:
            yield refusal(f"{within('tokenizers', name)}.max_length", length, f"{first}, as that of {known[0]}")
    joins = {encoder.join for encoder in conditioning.encoders}
    if "tokens" in joins and not conditioning.sequence:
        yield refusal("conditioning.sequence", 0, "1 or more, where an encoder joins tokens")
    if joins == {"none"} and not conditioning.sequence:
        yield refusal("conditioning.encoders[0].join", "none", "features or tokens: the denoiser takes a text")
    names = [encoder.component for encoder in conditioning.encoders]
    for name in conditioning.pooling:
        if name not in names:
            yield refusal("conditioning.pooled", name, f"null, or one of the encoders: {', '.join(names)}")
        elif name in components and "text_embeds" not in _outputs(components[name]):
            yield refusal("conditioning.pooled", name, "an encoder that gives text_embeds")
    for name in names:
        yield from _of_encoder(name, components.get(name))


def _outputs(component: ComponentEntry) -> set[str]:
    return {spec.name for spec in component.outputs}


def _of_tokenizers(manifest: Manifest) -> Iterator[DecodeError]:
    for name, tokenizer in manifest.tokenizers.items():
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value, size = getattr(tokenizer, key), tokenizer.vocab_size
            if size is not None and value is not None and value >= size:
                yield refusal(f"{within('tokenizers', name)}.{key}", value, f"a number below its vocab_size, {size}")


def _of_encoder(name: str, component: ComponentEntry | None) -> Iterator[DecodeError]:
    """The runtime reads a width, or a number of layers, from the second dimension of these tensors."""
    for kind, tensor, rank in (("inputs", "extra_embeddings", 2), ("outputs", "hidden_states", 4)):
        specs: tuple[TensorSpec, ...] = () if component is None else getattr(component, kind)
        for i, spec in enumerate(specs):
            if spec.name == tensor and not (len(spec.shape) == rank and isinstance(spec.shape[1], int)):
                where = f"{within('components', name)}.{kind}[{i}].shape"
                yield refusal(where, list(spec.shape), f"{rank} dimensions, of which the second is a number")
