"""Open one model that is no pipeline: a folder of diffusers with config.json, an id on the hub, or a single file."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdopt.bundle.files import Bundle
from sdopt.errors import CheckpointError, choices
from sdopt.export.checkpoint import MODEL, Checkpoint, read_json
from sdopt.export.hub import download_files
from sdopt.export.single_file import adapter, tiny_vae
from sdopt.export.source import HUB_ID, refuse_unused, require_weights
from sdopt.export.wrong import PICKLES

ALIASES = {"ControlNetModel_Union": "ControlNetUnionModel"}  # as the authors of the union ControlNet call its class
CONVERT = (
    "Pickle files can run code when they are opened, so only safetensors are read. Convert it where you trust it: "
    "python -c \"from diffusers import ControlNetModel as C; C.from_single_file('{source}').save_pretrained('NEW')\" "
    "and add NEW"
)


@contextmanager
def open_model(
    source: str,
    classes: Iterable[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    config: str | None = None,
    base: Bundle | None = None,
) -> Generator[Checkpoint]:
    """The model that `source` names, of one of these classes of diffusers: a checkpoint whose component is `MODEL`.

    `config`: a folder whose config.json a single file has. Without it that of a published model is taken.
    `base`: the bundle whose UNet a Control-LoRA is merged with.
    Raises: CheckpointError with what is wrong and what to do; UsageError for an option that this source does not take.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        refuse_unused(f"{source} is a folder", revision=revision, config=config)
        yield _open_folder(path, classes, variant, {"folder": path.name})
    elif path.suffix in PICKLES:
        if "taesd" in path.name.lower():
            raise CheckpointError(f"{source} is a pickle file, and only safetensors are read; {tiny_vae.INSTEAD}")
        raise CheckpointError(f"{source} is a pickle file. {CONVERT.format(source=source)}")
    elif path.suffix == ".safetensors":
        refuse_unused(f"{source} is one file", revision=revision, variant=variant)
        own = None if config is None else _configuration(Path(config).expanduser(), classes)
        with tempfile.TemporaryDirectory(prefix="sdopt-", ignore_cleanup_errors=True) as scratch:
            yield adapter.unpack(path, Path(scratch) / path.name, own, base)
    elif HUB_ID.fullmatch(source) and not path.is_absolute() and not path.exists():
        refuse_unused(f"{source} is an id on the hub", config=config)
        infix = f".{variant}" if variant else ""
        patterns = ["config.json", f"*model{infix}.safetensors", f"*model{infix}-*-of-*.safetensors"]
        folder = download_files(source, revision, patterns, offline)
        yield _open_folder(folder, classes, variant, {"hub_id": source, "revision": folder.name})
    else:
        raise CheckpointError(
            f"{source}: there is no such folder or file; give a folder of diffusers with config.json and weights, an "
            "id on the hub such as owner/name, or a .safetensors file"
        )


def _open_folder(folder: Path, classes: Iterable[str], variant: str | None, provenance: dict[str, str]) -> Checkpoint:
    if (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is a whole pipeline; to make a bundle of it: sdopt export {folder} -o BUNDLE")
    name = _configuration(folder, classes)["_class_name"]
    checkpoint = Checkpoint(folder, {MODEL: f"diffusers.{name}"}, variant, {**provenance, "variant": variant})
    require_weights(checkpoint, MODEL)
    return checkpoint


def _configuration(folder: Path, classes: Iterable[str]) -> dict[str, Any]:
    """The config.json of a folder. Raises: CheckpointError if it is of none of these classes."""
    known, config = tuple(classes), read_json(folder / "config.json")
    name = config["_class_name"] = ALIASES.get(str(config.get("_class_name")), str(config.get("_class_name")))
    if name not in known:
        raise CheckpointError(f"{folder}: its class is {name}; what can be added to a bundle is {choices(name, known)}")
    return config
