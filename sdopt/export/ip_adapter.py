"""Open an IP-Adapter as it is published: one .safetensors file, and the folder of the image encoder that it needs.

    models/ip-adapter_sd15.safetensors             the projection and the attentions
    models/image_encoder/                          config.json and weights of a CLIPVisionModelWithProjection

On the hub the file is `h94/IP-Adapter/models/ip-adapter_sd15.safetensors`.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from sdopt.bundle.adapter import IMAGE_PROMPTED, ImagePrompt
from sdopt.bundle.files import Bundle
from sdopt.bundle.weights import Weights
from sdopt.dataclass import dataclass
from sdopt.errors import BundleError, CheckpointError
from sdopt.export.blocks import image_encoder, image_projection
from sdopt.export.checkpoint import MODEL, Checkpoint, read_json
from sdopt.export.hub import download_files
from sdopt.export.part import Part
from sdopt.export.single_file.file import SingleFile
from sdopt.export.source import require_weights
from sdopt.export.wrong import PICKLES
from sdopt.graph.image_prompt import in_order

FILES = (".safetensors", *PICKLES)
ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)/((?:[\w.-]+/)*[\w.-]+\.safetensors)")
FOLDER_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)")
ENCODER = "image_encoder"  # the folder beside the file
BEGINNINGS = ("image_proj.", "ip_adapter.")  # of the names of its tensors
CONVERT = (
    "python -c \"import torch, safetensors.torch as s; d = torch.load('{old}', map_location='cpu', weights_only=True); "
    "s.save_file({{f'{{a}}.{{b}}': t.contiguous() for a in d for b, t in d[a].items()}}, '{new}')\""
)


@dataclass(frozen=True)
class IpAdapter:
    """An opened file, and its image encoder as a checkpoint whose component is `MODEL`."""

    file: SingleFile
    encoder: Checkpoint
    provenance: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """The bytes of all weights on disk."""
        return self.encoder.nbytes + self.file.path.stat().st_size

    @property
    def patches(self) -> bool:
        """Whether it reads the states of all patches, and not the vector of the whole picture."""
        return image_projection.layout(str(self.file.path), list(self.file.shapes)) != image_projection.BASE


def is_file(source: str) -> bool:
    """Whether a source is the file of an IP-Adapter: by its tensors or, where it is a pickle or on the hub, its name.

    Raises: CheckpointError for a file that cannot be read.
    """
    path = Path(source).expanduser()
    if path.suffix not in FILES or path.is_dir():
        return False
    if path.suffix in PICKLES or not path.exists():
        return bool(ON_HUB.fullmatch(source)) or "ip-adapter" in path.name.lower().replace("_", "-")
    return any(name.startswith(BEGINNINGS) for name in SingleFile.open(path).shapes)


def refuse_folder(source: str) -> None:
    """Raises: CheckpointError for a folder with files of IP-Adapters in it."""
    path = Path(source).expanduser()
    files = sorted(path.glob("ip-adapter*.safetensors")) if path.is_dir() else []
    if files and not (path / "config.json").is_file():
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{source} has several IP-Adapters or one: {names}; name the file, e.g. {files[0]}")


@contextmanager
def open_ip_adapter(
    source: str, encoder: str | None, *, revision: str | None = None, variant: str | None = None, offline: bool = False
) -> Generator[IpAdapter]:
    """The IP-Adapter in the file `source`, local or on the hub.

    `encoder`: its image encoder, a folder or an id on the hub with the folders behind it; without it, the folder
    `image_encoder` beside the file. `variant` is that of the encoder.
    Raises: CheckpointError with what is wrong and what to do.
    """
    path = Path(source).expanduser()
    on_hub = ON_HUB.fullmatch(source)
    if path.suffix in PICKLES:
        command = CONVERT.format(old=source, new=path.with_suffix(".safetensors"))
        raise CheckpointError(
            f"{source} is a pickle. Pickle files can run code when they are opened, so only safetensors are read. "
            f"Convert it where you trust it: {command}"
        )
    if path.is_file():
        provenance: dict[str, Any] = {"file": path.name}
        folder = path.parent / ENCODER
    elif on_hub and not path.is_absolute() and not path.parent.is_dir():
        repository, inside = on_hub.groups()
        above = PurePosixPath(inside).parent
        patterns = [inside, *(_files_of(f"{above / ENCODER}", variant) if encoder is None else ())]
        top = download_files(repository, revision, patterns, offline)
        path, folder = top / inside, top / above / ENCODER
        provenance = {"hub_id": repository, "file": inside, "revision": top.name}
        if not path.is_file():
            raise CheckpointError(f"{source}: {repository} has no file {inside}")
    else:
        raise CheckpointError(
            f"{source}: there is no such file; give the .safetensors file of an IP-Adapter, or its path on the hub: "
            "h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
        )
    if encoder is not None:
        folder = _encoder_folder(encoder, variant, offline)
        provenance["image_encoder"] = encoder if not Path(encoder).expanduser().is_dir() else folder.name
    yield IpAdapter(SingleFile.open(path), _encoder(folder, variant, source), {**provenance, "variant": variant})


def _files_of(folder: str, variant: str | None) -> list[str]:
    infix, inside = f".{variant}" if variant else "", folder.strip("./")
    names = ("config.json", "preprocessor_config.json", f"*model{infix}.safetensors", f"*model{infix}-*.safetensors")
    return [f"{inside}/{name}" if inside else name for name in names]


def _encoder_folder(encoder: str, variant: str | None, offline: bool) -> Path:
    path = Path(encoder).expanduser()
    if path.is_dir():
        return path
    match = FOLDER_ON_HUB.fullmatch(encoder)
    if match is None or path.is_absolute():
        raise CheckpointError(f"image_encoder = {encoder}: there is no such folder; give one, or an id on the hub")
    return download_files(match[1], None, _files_of(match[2], variant), offline) / match[2].strip("/")


def _encoder(folder: Path, variant: str | None, source: str) -> Checkpoint:
    """The image encoder in a folder. Raises: CheckpointError if it is none."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{source} needs an image encoder, and {folder} has none (no config.json); name its folder: "
            "image_encoder=FOLDER, or --image-encoder FOLDER"
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip_vision_model":
        kind = config.get("model_type") or config.get("_class_name")
        raise CheckpointError(
            f"{folder}: it is a model of the type {kind!r}; the image encoder of an IP-Adapter is a clip_vision_model"
        )
    checkpoint = Checkpoint(folder, {MODEL: image_encoder.CLASS}, variant)
    require_weights(checkpoint, MODEL)
    return checkpoint


def parts(opened: IpAdapter, bundle: Bundle) -> Iterator[Part]:
    """The parts of the adapter, each loaded when it is its turn.

    Raises: CheckpointError if it is made for another model; BundleError for a bundle that takes no image prompts.
    """
    widths = cross_attentions(bundle)
    embeds = image_encoder.embeddings(opened.encoder, opened.patches)
    text = {spec.name: spec for spec in bundle.component("unet").inputs}["encoder_hidden_states"].shape[2]
    assert isinstance(text, int)
    tensors = {name: opened.file.tensor(name) for name in opened.file.shapes}
    yield image_projection.part(str(opened.file.path), tensors, embeds, text, widths)
    yield image_encoder.part(opened.encoder, opened.patches)


def described(opened: IpAdapter, bundle: Bundle) -> dict[str, ImagePrompt]:
    """Its own fields of the manifest."""
    layers = tuple(cross_attentions(bundle))
    return {"image_prompt": ImagePrompt(layers, opened.patches, image_encoder.pixels(opened.encoder))}


def cross_attentions(bundle: Bundle) -> dict[str, int]:
    """The features of each cross-attention of the bundle's UNet by name, in the order of IP-Adapters.

    Raises: BundleError if the bundle has no UNet with inputs for image prompts.
    """
    if IMAGE_PROMPTED not in bundle.components:
        raise BundleError(
            f"{bundle.path} has no component {IMAGE_PROMPTED}: an earlier sdopt has written it, or IP-Adapters do not "
            f"fit its UNet. Export it again: `sdopt export CHECKPOINT -o {bundle.path} --force`"
        )
    shapes = Weights.of(bundle.component("unet")).shapes
    return {name: shapes[f"{name}.to_q.weight"][0] for name in in_order(shapes)}
