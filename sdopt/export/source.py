"""Checkpoints: a diffusers folder, a model id on the hub, or one .safetensors file, opened without running their code.

`model_index.json` is read here, against a table of known classes. Only safetensors weights are read: a pickle can run
code when it is opened.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from sdopt.errors import CheckpointError, choices

# pipeline class -> family of the manifest
PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "LatentConsistencyModelPipeline": "sd",
    "LatentConsistencyModelImg2ImgPipeline": "sd",
}
# a word in the class of another pipeline -> what to do with such a checkpoint
OTHERS = {
    "ControlNet": "a ControlNet is not exported; export the Stable Diffusion model that it was made for",
    "StableDiffusion3": "its transformer is not exported; what is read has a UNet",
    "Flux": "its transformer is not exported; what is read has a UNet",
    "Pix2Pix": "its UNet takes a second guidance, which is not exported",
    "Upscale": "its UNet takes the small picture, which is not exported",
}
# component of model_index.json -> the (library, class) pairs that are read
KNOWN = {
    "text_encoder": {("transformers", "CLIPTextModel")},
    "text_encoder_2": {("transformers", "CLIPTextModelWithProjection")},
    "tokenizer": {("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")},
    "tokenizer_2": {("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")},
    "unet": {("diffusers", "UNet2DConditionModel")},
    "vae": {("diffusers", "AutoencoderKL"), ("diffusers", "AutoencoderTiny")},
}
NOT_USED = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")  # the scheduler is data: its config
WEIGHTED = {"sd": ("text_encoder", "unet", "vae"), "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae")}
ABSENT = ("None", "None")  # null, null: a pipeline without this component
OPTIONAL = {"sd": (), "sdxl": ("text_encoder", "tokenizer")}  # SDXL's refiner has the second ones alone
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
CONVERT = (
    "Pickle files can run code when they are opened, so only safetensors are read. Convert it where you trust it: "
    "python -c \"from diffusers import StableDiffusionPipeline as P; P.from_{how}('{source}').save_pretrained('NEW')\" "
    "and export NEW."
)


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder whose index has been checked; `load` brings one component into memory, in float32."""

    folder: Path
    family: str
    variant: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def config(self, component: str) -> dict[str, Any]:
        """The configuration file of a component, as it is."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        config = read_json(self.folder / component / name)
        return {key: _plain(value) for key, value in config.items()}

    def load(self, component: str) -> torch.nn.Module:
        """The component's model in float32, ready to be traced.

        Raises: CheckpointError if its weights cannot be read.
        """
        import diffusers
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        _silence()
        classes: dict[str, Any] = {
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
            "unet": diffusers.UNet2DConditionModel,
            "vae": getattr(diffusers, self.class_name("vae")),
        }
        model_class = classes[component]
        options = {"dtype" if component.startswith("text_encoder") else "torch_dtype": torch.float32}
        try:
            model = model_class.from_pretrained(
                self.folder / component, variant=self.variant, use_safetensors=True, local_files_only=True, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"{self.folder / component}: cannot be loaded: {error}") from error
        return model.eval().requires_grad_(False)

    def index(self) -> dict[str, Any]:
        """model_index.json, as it is."""
        return read_json(self.folder / "model_index.json")

    @property
    def pipeline(self) -> str:
        """The name of its pipeline class."""
        return str(self.index().get("_class_name"))

    def class_name(self, component: str) -> str:
        """The name of a component's class."""
        entry: Any = self.index().get(component)
        return str(cast(list[Any], entry)[1]) if isinstance(entry, list) else min(KNOWN[component])[1]

    def has(self, component: str) -> bool:
        """Whether it has a component of its family; SDXL's refiner has one text encoder of two."""
        return component in self.index() and self.class_name(component) != ABSENT[1]

    @property
    def weighted(self) -> tuple[str, ...]:
        """The components that have weights."""
        return tuple(name for name in WEIGHTED[self.family] if self.has(name) or name not in OPTIONAL[self.family])

    def tokenizer(self, name: str = "tokenizer") -> Any:
        """The transformers tokenizer in folder `name`, backed by the `tokenizers` library."""
        from transformers import CLIPTokenizer

        return cast(Any, CLIPTokenizer).from_pretrained(self.folder / name, local_files_only=True)

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component: one, or the shards of its index."""
        infix = f".{self.variant}" if self.variant else ""
        stems = ("diffusion_pytorch_model", "model")
        pattern = re.compile(rf"({'|'.join(stems)}){re.escape(infix)}(-\d+-of-\d+)?\.safetensors")
        return sorted(p for p in (self.folder / component).glob("*.safetensors") if pattern.fullmatch(p.name))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as they are on disk."""
        return sum(p.stat().st_size for c in self.weighted for p in self.weight_files(c))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: CheckpointError if the file is missing or something else.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: holds {type(entry).__name__}, not a JSON object")
    return cast(dict[str, Any], entry)


def _plain(value: Any) -> Any:
    """A number that JSON does not have as text: diffusers writes -Infinity into the configurations of DPM-Solver."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
        raise CheckpointError(f"{source} is a pickle checkpoint. {CONVERT.format(how='single_file', source=source)}")
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
    """A checked checkpoint in `folder`; every component must be of a known class, with safetensors weights."""
    if not (folder / "model_index.json").is_file():
        alone = read_json(folder / "config.json").get("_class_name") if (folder / "config.json").is_file() else None
        what = f"one model, {alone}, and not a pipeline" if alone else "not a diffusers checkpoint"
        raise CheckpointError(f"{folder} has no model_index.json, so it is {what}")
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        advice = next((f" ({text})" for word, text in OTHERS.items() if word in name), "")
        raise CheckpointError(
            f"{folder}: pipeline class {name!r} is not known{advice}; known are {', '.join(PIPELINES)}"
        )
    family = PIPELINES[name]
    for component, entry in index.items():
        if component.startswith("_") or component in NOT_USED or not isinstance(entry, list):
            continue
        pair = tuple(map(str, cast(list[Any], entry)))
        if pair == ABSENT and (component not in KNOWN or component in OPTIONAL[family]):
            continue
        if pair not in KNOWN.get(component, ()):
            allowed = [".".join(p) for p in KNOWN.get(component, ())] or ["nothing under this name"]
            raise CheckpointError(
                f"{folder / 'model_index.json'}: {component} is {'null' if pair == ABSENT else '.'.join(pair)}; "
                f"sdopt reads {', '.join(sorted(allowed))}, and never runs a checkpoint's own code"
            )
    checkpoint = Checkpoint(folder, family, variant, dict(provenance, variant=variant))
    for component in checkpoint.weighted:
        _check_weights(checkpoint, component)
    return checkpoint


def _check_weights(checkpoint: Checkpoint, component: str) -> None:
    if checkpoint.weight_files(component):
        return
    folder = checkpoint.folder / component
    names = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
    variants = {m[1] for n in names if (m := re.fullmatch(r"(?:diffusion_pytorch_)?model\.(\w+)\.safetensors", n))}
    if variants:
        raise CheckpointError(f"{folder} has its weights as variant {choices('', variants)}; add --variant to name one")
    if any(n.endswith(PICKLES) for n in names):
        raise CheckpointError(
            f"{folder} has pickle weights only. {CONVERT.format(how='pretrained', source=checkpoint.folder)}"
        )
    raise CheckpointError(f"{folder} has no safetensors weights; it holds {', '.join(names) or 'nothing'}")


def _download(repo_id: str, revision: str | None, variant: str | None, offline: bool) -> Path:
    """The folder of a hub snapshot: the configurations, and the weights of one variant."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    dot = f".{variant}" if variant else ""
    weights = [f"{c}/*model{dot}{part}.safetensors" for c in WEIGHTED["sdxl"] for part in ("", "-*-of-*")]
    patterns = ["model_index.json", "generation_config.json", "*/*.json", "*/merges.txt", *weights]
    try:
        download = cast(Any, huggingface_hub).snapshot_download
        return Path(download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is not in the local cache, and the hub cannot be asked (offline, or no connection). "
            f"Download it first, where there is a network: hf download {repo_id}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repo_id}: the hub says: {error}") from error


def _silence() -> None:
    """Keep the libraries' progress bars off the terminal; ours are the lines that `report` is given."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _unpack_single_file(path: Path, folder: Path, config: str | None, offline: bool) -> None:
    """Write one .safetensors file as a diffusers folder, in its own precision."""
    from diffusers import StableDiffusionPipeline
    from safetensors import SafetensorError, safe_open

    _silence()
    try:
        with cast(Any, safe_open)(path, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    dtype = torch.float16 if kinds <= {"F16", "I64", "I32"} else torch.float32
    local = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    options: dict[str, Any] = {"config": config} if config else {}
    try:
        pipeline: Any = StableDiffusionPipeline.from_single_file(
            str(path), torch_dtype=dtype, local_files_only=local, safety_checker=None, **options
        )
    except Exception as error:  # diffusers raises whatever its parts raise
        raise CheckpointError(
            f"{path} cannot be loaded: {error}\nA single file holds no configurations: diffusers takes them from the "
            "hub, or from a folder of the same model that --config names."
        ) from error
    pipeline.save_pretrained(folder, safe_serialization=True)
