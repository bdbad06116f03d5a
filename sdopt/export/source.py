"""Open a checkpoint: a diffusers folder, a model id on the hub, or one .safetensors file. None of their code is run.

`model_index.json` is compared with the classes that the checkpoint's family names, and only safetensors weights are
read: a pickle can run code when it is opened.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from sdopt.errors import CheckpointError, choices
from sdopt.export import families
from sdopt.export.checkpoint import Checkpoint, read_json, silence_libraries
from sdopt.export.families.contract import Family

ABSENT = [None, None]  # how an index writes that a pipeline has no such component
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
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
    """The checkpoint that `source` names: a folder, a file, or else an id on the hub.

    Raises: CheckpointError with what is wrong and what to do.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        yield open_folder(path, variant, {"folder": path.name})
    elif path.suffix in PICKLES:
        convert = CONVERT.format(pipeline=families.single_file_pipeline(), how="single_file", source=source)
        raise CheckpointError(f"{source} is a pickle checkpoint. {convert}")
    elif path.suffix == ".safetensors":
        if not path.is_file():
            raise CheckpointError(f"{source}: there is no such file")
        with tempfile.TemporaryDirectory(prefix="sdopt-", ignore_cleanup_errors=True) as scratch:
            _unpack_single_file(path, Path(scratch), config, offline)
            yield open_folder(Path(scratch), None, {"file": path.name})
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.is_absolute():
        folder = _download(source, revision, variant, offline)
        yield open_folder(folder, variant, {"hub_id": source, "revision": folder.name})
    else:
        raise CheckpointError(
            f"{source}: there is no such folder or file; give a diffusers folder, an id such as owner/name, "
            "or a .safetensors file"
        )


def open_folder(folder: Path, variant: str | None, provenance: Mapping[str, Any]) -> Checkpoint:
    """A checked checkpoint in `folder`: each component is of a class that its family knows, with safetensors weights.

    Raises: CheckpointError with what is wrong and what to do.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no model_index.json, so it is {_other_content(folder)}")
    index = read_json(path)
    family = families.of_index(index, str(folder))
    classes = _checked_classes(index, family, path)
    checkpoint = Checkpoint(folder, classes, variant, dict(provenance, variant=variant))
    for component in family.models:
        if checkpoint.has(component):
            _require_weights(checkpoint, component)
    return checkpoint


def _other_content(folder: Path) -> str:
    """What a folder without an index holds, as far as it is known."""
    path = folder / "config.json"
    model = read_json(path).get("_class_name") if path.is_file() else None
    return f"one model, {model}, and not a pipeline" if model else "not a diffusers checkpoint"


def _checked_classes(index: Mapping[str, Any], family: Family, path: Path) -> dict[str, str]:
    """The class of each component that is read, with its library; one that the index leaves out has the usual class.

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


def _require_weights(checkpoint: Checkpoint, component: str) -> None:
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


def _variants(names: Iterable[str]) -> Iterator[str]:
    """The variants of weights among the names of files."""
    for name in names:
        match = re.fullmatch(r"(?:diffusion_pytorch_)?model\.(\w+)\.safetensors", name)
        if match:
            yield match[1]


def _download(repo_id: str, revision: str | None, variant: str | None, offline: bool) -> Path:
    """The folder of a hub snapshot: the configurations, and the weights of one variant."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    infix = f".{variant}" if variant else ""
    patterns = ["model_index.json", "generation_config.json", "*/*.json", "*/merges.txt"]
    for component in families.models():
        patterns += [f"{component}/*model{infix}.safetensors", f"{component}/*model{infix}-*-of-*.safetensors"]
    try:
        snapshot = cast(Any, huggingface_hub).snapshot_download
        return Path(snapshot(repo_id, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is not in the local cache, and the hub cannot be asked (offline, or no connection). "
            f"Download it first, where there is a network: hf download {repo_id}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repo_id}: the hub says: {error}") from error


def _unpack_single_file(path: Path, folder: Path, config: str | None, offline: bool) -> None:
    """Write one .safetensors file as a diffusers folder, in its own precision."""
    import diffusers
    from safetensors import SafetensorError, safe_open

    silence_libraries()
    try:
        with cast(Any, safe_open)(path, "pt") as weights:
            dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    dtype = torch.float16 if dtypes <= {"F16", "I64", "I32"} else torch.float32
    local = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    options: dict[str, Any] = {"config": config} if config else {}
    pipeline_class = getattr(diffusers, families.single_file_pipeline())
    try:
        pipeline = pipeline_class.from_single_file(
            str(path), torch_dtype=dtype, local_files_only=local, safety_checker=None, **options
        )
    except Exception as error:  # diffusers raises whatever its parts raise
        raise CheckpointError(
            f"{path} cannot be loaded: {error}\nA single file holds no configurations: diffusers takes them from the "
            "hub, or from a folder of the same model that --config names."
        ) from error
    pipeline.save_pretrained(folder, safe_serialization=True)
