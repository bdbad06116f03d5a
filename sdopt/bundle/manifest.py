"""A manifest from JSON and back: every field is checked alone by its class, and here beside the other fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from sdopt.bundle.decode import DecodeError, decode, encode, refusal, within
from sdopt.bundle.format import ComponentEntry, File, Manifest
from sdopt.bundle.settings import of_the_scheduler
from sdopt.bundle.specs import TensorSpec


def decode_manifest(entry: Any) -> Manifest:
    """The manifest that `entry` is, as json.loads gives it.

    Raises: DecodeError that names the first field that is wrong, and what is allowed.
    """
    manifest: Manifest = decode(Manifest, entry)
    for error in _contradictions(manifest):
        raise error
    return manifest


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as json.dumps takes it; what `decode_manifest` refuses is not written.

    Raises: DecodeError as `decode_manifest` does.
    """
    entry: dict[str, Any] = encode(manifest)
    decode_manifest(entry)
    return entry


def _contradictions(manifest: Manifest) -> Iterator[DecodeError]:
    """Fields that are right alone, but do not fit the other fields."""
    yield from of_the_scheduler(manifest.scheduler)
    yield from _of_files(manifest)
    yield from _of_latents(manifest)
    yield from _of_conditioning(manifest)
    yield from _of_tokenizers(manifest)


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
