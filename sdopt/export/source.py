"""Open a checkpoint: a diffusers folder, a model id on the hub, or one .safetensors file. None of their code is run.

`model_index.json` is compared with the classes that the checkpoint's family names, and only safetensors weights are
read: a pickle can run code when it is opened.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from sdopt.bundle.format import TRANSFORMER
from sdopt.bundle.unfinished import scratch
from sdopt.errors import CheckpointError, SdoptError, UsageError, choices, shown
from sdopt.export import families, hub, wrong
from sdopt.export.checkpoint import Checkpoint, read_json
from sdopt.export.families.contract import Family
from sdopt.export.single_file import convert, recognise
from sdopt.export.single_file.file import SingleFile
from sdopt.export.single_file.names import Layout
from sdopt.export.single_file.published import PUBLISHED
from sdopt.export.wrong import PICKLES

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ABSENT = [None, None]  # how an index writes that a pipeline has no such component
CONVERT = (
    "Pickle files can run code when they are opened, so only safetensors are read. Convert it where you trust it: "
    "python -c \"from diffusers import {pipeline} as P; P.from_{how}('{source}').save_pretrained('NEW')\" "
    "and export NEW."
)


@contextmanager
def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    config: str | None = None,
) -> Generator[Checkpoint]:
    """The checkpoint that `source` names: a folder, a file, or an id on the hub.

    `config`: whose configurations a file has: a folder, an id on the hub, or a name in PUBLISHED. Without it they are
    those of the published model that the file's tensors are like. Models that the file lacks are read from there too.
    Raises: CheckpointError with what is wrong and what to do; UsageError for an option that this source does not take.
    """
    wrong.refuse(source, has_config=config is not None)
    path = Path(source).expanduser()
    if path.is_dir():
        refuse_unused(f"{source} is a folder", revision=revision, config=config)
        yield open_folder(path, variant, {"folder": path.name})
    elif path.suffix in PICKLES:
        convert = CONVERT.format(pipeline="StableDiffusionPipeline", how="single_file", source=source)
        raise CheckpointError(f"{source} is a pickle checkpoint. {convert} For SDXL: StableDiffusionXLPipeline.")
    elif path.suffix == ".safetensors":
        refuse_unused(f"{source} is one file", revision=revision, variant=variant)
        with scratch() as folder, _named(folder / path.name, source):
            yield _unpack(path, folder / path.name, config, offline)
    elif HUB_ID.fullmatch(source) and not path.is_absolute():
        refuse_unused(f"{source} is an id on the hub", config=config)
        folder = hub.download(source, revision, variant, offline)
        yield open_folder(folder, variant, {"hub_id": source, "revision": folder.name})
    else:
        raise CheckpointError(
            f"{source}: there is no such folder or file; give a diffusers folder, an id such as owner/name, "
            "or a .safetensors file"
        )


@contextmanager
def _named(folder: Path, source: str) -> Generator[None]:
    """An error of the block names the user's file in place of the folder that it was unpacked into."""
    try:
        yield
    except SdoptError as error:
        error.args = tuple(str(part).replace(str(folder), source) for part in error.args)
        raise


def refuse_unused(what: str, **options: str | None) -> None:
    """Raises: UsageError for an option that was given, because a source such as `what` does not take it."""
    takers = {"revision": "an id on the hub takes", "variant": "a folder takes", "config": "a single file takes"}
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} = {shown(value)}: {what}, and only {takers[name]} it; leave it out", name)


def open_folder(folder: Path, variant: str | None, provenance: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in `folder`, after a check that its classes are known and its weights are safetensors files.

    Raises: CheckpointError with what is wrong and what to do; UsageError for a variant that no component has.
    """
    checkpoint = read_folder(folder, variant, provenance)
    for component in families.of(checkpoint).models:
        if checkpoint.has(component):
            require_weights(checkpoint, component)
    _require_variant(checkpoint)
    return checkpoint


def read_folder(folder: Path, variant: str | None, provenance: Mapping[str, Any]) -> Checkpoint:
    """The same without its weights.

    Raises: CheckpointError with what is wrong and what to do.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no model_index.json, so it is {_other_content(folder)}")
    index = read_json(path)
    classes = _checked_classes(index, families.of_index(index, str(folder)), path)
    return Checkpoint(folder, classes, variant, dict(provenance, variant=variant))


def _other_content(folder: Path) -> str:
    """What a folder without an index is, for an error message."""
    path = folder / "config.json"
    model = read_json(path).get("_class_name") if path.is_file() else None
    return f"one model, {model}, and not a pipeline" if model else "not a diffusers checkpoint"


def _checked_classes(index: Mapping[str, Any], family: Family, path: Path) -> dict[str, str]:
    """The class of each component that is read, with its library. A component that the index lacks has the usual class.

    Raises: CheckpointError for a class that the family does not name.
    """
    known = {**family.models, **family.tokenizers}
    classes = {name: allowed[0] for name, allowed in known.items() if name not in family.optional}
    ignored = {"scheduler", *family.not_used}  # the scheduler is data: only its configuration is read
    for component, entry in index.items():
        if component.startswith("_") or component in ignored or not isinstance(entry, list):
            continue
        may_be_absent = component in family.optional or component not in known
        if entry == ABSENT and may_be_absent:
            continue
        class_name = "null" if entry == ABSENT else ".".join(map(str, cast("list[Any]", entry)))
        allowed = known.get(component, ())
        if class_name not in allowed:
            raise CheckpointError(
                f"{path}: {component} is {class_name}; sdopt reads "
                f"{', '.join(sorted(allowed)) or 'nothing under this name'}, and never runs a checkpoint's own code"
            )
        classes[component] = class_name
    return classes


def require_weights(checkpoint: Checkpoint, component: str) -> None:
    """Raises: CheckpointError if a model has no safetensors weights."""
    if checkpoint.weight_files(component):
        return
    folder = checkpoint.folder / component
    names = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    variants = set(_variants(names))
    if variants:
        raise CheckpointError(f"{folder} has its weights as variant {choices('', variants)}; add --variant to name one")
    if any(name.endswith(PICKLES) for name in names):
        convert = CONVERT.format(pipeline="DiffusionPipeline", how="pretrained", source=checkpoint.folder)
        raise CheckpointError(f"{folder} has pickle weights only. {convert}")
    raise CheckpointError(f"{folder} has no safetensors weights; it holds {', '.join(names) or 'nothing'}")


def _require_variant(checkpoint: Checkpoint) -> None:
    """Raises: UsageError if no component has weights of the variant that was named; some may lack it."""
    models = [name for name in families.of(checkpoint).models if checkpoint.has(name)]
    if checkpoint.variant is None or any(checkpoint.has_variant(name) for name in models):
        return
    present = {one for name in models for one in _variants(p.name for p in (checkpoint.folder / name).glob("*"))}
    there = f"there are {choices(checkpoint.variant, present)}" if present else "it has none"
    raise UsageError(
        f"variant = {shown(checkpoint.variant)}: {checkpoint.folder} has no weights of this variant; {there}, and "
        "without it the weights that have no variant are read",
        "variant",
    )


def _variants(names: Iterable[str]) -> Iterator[str]:
    """The variants of weights among the names of files."""
    for name in names:
        match = re.fullmatch(r"(?:diffusion_pytorch_)?model\.(\w+)\.safetensors", name)
        if match:
            yield match[1]


def _unpack(path: Path, folder: Path, config: str | None, offline: bool) -> Checkpoint:
    """The model in one .safetensors file, written into `folder` as a diffusers folder with the file's precision."""
    file = SingleFile.open(path)
    provenance, source = {"file": path.name}, None
    hint = f"The configurations are those that --config {config} names: name those of the file's own model."
    if config is None:
        name, published = recognise.recognise(file)
        published.write(folder)
        provenance["configurations"] = name
        hint = (
            f"A single file holds no configurations, and those of {published.title} were taken, which its tensors are "
            "most like. If it is of another model, name a diffusers folder of that model with --config."
        )
    elif config in PUBLISHED:
        recognise.require_model(file)
        PUBLISHED[config].write(folder)
        provenance["configurations"] = config
    else:
        recognise.require_model(file)
        source = _copy_configurations(config, folder, offline)
    checkpoint = read_folder(folder, None, provenance)
    family = families.of(checkpoint)
    components = [name for name in family.models if checkpoint.has(name)]
    if source is not None and family.denoiser == TRANSFORMER:
        beside = [name for name in components if not _is_in(file, family.single_file[name])]
        _link_weights(checkpoint, beside, source, str(config), offline)
        components = [name for name in components if name not in beside]
    models = {name: checkpoint.shapes(name) for name in components}
    for component, origins in convert.plan(file, models, family.single_file, hint).items():
        library = checkpoint.classes[component].partition(".")[0]
        name = "model.safetensors" if library == "transformers" else "diffusion_pytorch_model.safetensors"
        convert.write(file, component, origins, models[component], folder / component / name)
    return checkpoint


def _is_in(file: SingleFile, layouts: Sequence[Layout]) -> bool:
    """Whether a file has a model in one of these layouts. Names without a prefix are those of a transformer."""
    return any(file.has(layout.prefix) and (layout.prefix or recognise.has_transformer(file)) for layout in layouts)


def _link_weights(checkpoint: Checkpoint, components: Sequence[str], source: Path, config: str, offline: bool) -> None:
    """Let the checkpoint have the weights of components that its file lacks, from the folder `source` or from the hub.

    Raises: CheckpointError that names a component without weights there.
    """
    if components and not Path(config).expanduser().is_dir():
        patterns = [f"{name}/*model{shard}.safetensors" for name in components for shard in ("", "-*-of-*")]
        source = hub.download_files(config, None, patterns, offline)
    for name in components:
        paths = Checkpoint(source, checkpoint.classes).weight_files(name)
        if not paths:
            raise CheckpointError(
                f"{checkpoint.folder} has no {name}, and {config} has no safetensors weights of it; name a folder with "
                "all weights, or the id of the model on the hub, with --config"
            )
        for path in [*paths, *(source / name).glob("*.safetensors.index.json")]:
            (checkpoint.folder / name / path.name).symlink_to(path.resolve())


def _copy_configurations(config: str, folder: Path, offline: bool) -> Path:
    """Copy the configurations and tokenizers of a diffusers folder, or of an id on the hub, into `folder`.

    Returns the folder that they are from.
    """
    source = Path(config).expanduser()
    if not source.is_dir():
        if not HUB_ID.fullmatch(config):
            raise CheckpointError(
                f"--config {config}: there is no such folder; give a diffusers folder of the same model, its id on "
                f"the hub (owner/name), or one of {', '.join(PUBLISHED)}"
            )
        source = hub.download(config, None, None, offline, weights=False)
    checkpoint = read_folder(source, None, {})
    for part in ("", "scheduler", *checkpoint.classes):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for path in (source / part).glob("*"):
            is_shards = path.name.endswith(".index.json")  # of weights that are not read
            if path.suffix in (".json", ".txt", ".model") and not is_shards:
                shutil.copyfile(path, folder / part / path.name)
    return source
