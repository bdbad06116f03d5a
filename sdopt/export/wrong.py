"""Sources that are no checkpoint of a pipeline: what each of them is, and what to do. Nothing is loaded to find out.

refuse(source)      raises CheckpointError for one that is recognised; returns for all others
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from sdopt.errors import CheckpointError

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
LFS = b"version https://git-lfs.github.com/spec/"
BESIDE = (
    "give it beside a bundle: sdopt generate --lora FILE, or pipe.load_lora_weights(FILE); or merge it with diffusers "
    "(pipe.load_lora_weights(FILE); pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained('NEW')), and "
    "export NEW"
)
ALONE = "give a checkpoint with UNet, VAE and text encoder"
ONTO = "add it to a bundle: sdopt export FILE --onto BUNDLE"
CONFIG = (
    "name a diffusers folder of the same model, or its id on the hub, with --config; its text encoders and its VAE are "
    "read from there"
)
FOLDER = "give the diffusers folder that it belongs to, the one with model_index.json"
# what a file is -> (a part of its tensors' names, what to do); the first that fits
TENSORS: dict[str, tuple[str, str]] = {
    "a LoRA": (r"lora_(unet|te\d?)_|\.lora[_.](A|B|up|down)\b|lora\.(up|down)\.|\.(hada|lokr)_w|\.alpha$", BESIDE),
    "a ControlNet": (r"^control_model\.|^input_hint_block\.|^controlnet_", f"{ONTO} --name canny"),
    "a T2I-Adapter": (
        r"^adapter\.body\.|^body\.0\.resnets",
        "add its folder to a bundle: sdopt export FOLDER --onto BUNDLE --name a",
    ),
    "an IP-Adapter": (r"^(image_proj|ip_adapter)\.", f"{ONTO} --name face"),
    "the transformer of Flux alone": (r"^double_blocks\.", CONFIG),
    "the transformer of Stable Diffusion 3 alone": (r"^joint_blocks\.", CONFIG),
    "a textual inversion": (
        r"^(emb_params|clip_[lg]|string_to_param.*|<[^>]+>)$",
        "give it beside a bundle: sdopt generate --embedding FILE, or pipe.load_embedding(FILE)",
    ),
}
PIPELINE = r"^(model\.diffusion_model|cond_stage_model|conditioner)\."  # a whole one, in one file
PARTS: dict[str, tuple[str, str]] = {  # parts of a pipeline, in a file that has no other
    "a VAE alone": (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)", ALONE),
    "a UNet alone": (r"^(down_blocks|mid_block|up_blocks|time_embedding)\.", FOLDER),
    "a text encoder alone": (r"^(text_model\.|transformer\.text_model\.|vision_model\.)", FOLDER),
}
SUFFIXES = {
    ".gguf": "a GGUF file, whose weights are quantized; export the checkpoint that it was made from",
    ".onnx": "an ONNX graph, which is exported already; give the PyTorch checkpoint that it was made from",
    ".engine": "a TensorRT engine; give the PyTorch checkpoint that it was made from",
    ".zip": "an archive; unpack it, and give the folder or the .safetensors file in it",
    ".gz": "an archive; unpack it, and give the folder or the .safetensors file in it",
    ".tar": "an archive; unpack it, and give the folder or the .safetensors file in it",
    ".msgpack": "weights of Flax; sdopt reads safetensors",
    ".h5": "weights of TensorFlow; sdopt reads safetensors",
}


def refuse(source: str, has_config: bool = False) -> None:
    """Raises: CheckpointError that says what `source` is and what to do, if it is known to be no checkpoint.

    `has_config`: a second checkpoint is named, which has what a transformer alone lacks.
    """
    path = Path(source).expanduser()
    url = re.match(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)", source)
    if url:
        raise CheckpointError(f"{source} is an address; give the id on the hub: {url[1]}")
    if "://" in source:
        raise CheckpointError(f"{source} is an address; download it, and give the folder or the .safetensors file")
    if path.is_dir():
        found = _folder(path)
        if found:
            has_index = (path / "model_index.json").is_file()
            raise CheckpointError(f"{source} {'is' if has_index else 'has no model_index.json: it is'} {found}")
    elif path.is_file():
        found = _file(path, has_config)
        if found:
            raise CheckpointError(f"{source} is {found}")
    elif _is_local(source, path):
        what = "file" if path.suffix == ".safetensors" else "folder or file"
        raise CheckpointError(
            f"{source}: there is no such {what}; give a diffusers folder, an id such as owner/name, or a "
            f".safetensors file{near(path.name, _names(path.absolute().parent))}"
        )


def near(name: str, names: Iterable[str]) -> str:
    """ "; there is X", if one of the names is spelled nearly like `name`."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f"; there is {', '.join(close)}" if close else ""


def near_id(repo_id: str) -> str:
    """The same for an id of the hub: ids that are in the local cache, and folders of this name."""
    from huggingface_hub import constants

    prefix, parent = "models--", repo_id.partition("/")[0]
    cached = [name for name in _names(Path(constants.HF_HUB_CACHE)) if name.startswith(prefix)]
    ids = [name.removeprefix(prefix).replace("--", "/", 1) for name in cached]
    return near(repo_id, [*ids, *(f"{parent}/{name}" for name in _names(Path(parent)))])


def _is_local(source: str, path: Path) -> bool:
    """Whether a name that is not there can only mean a file or a folder. An id of the hub has two words."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.is_absolute() and source[0] not in ".~"
    return not is_id or path.suffix in (*PICKLES, *SUFFIXES, ".safetensors")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


# ------------------------------------------------------------------------------------------------ folders


def _folder(path: Path) -> str:
    """What a folder is that is no checkpoint; empty for one with an index of a pipeline, whose weights are here."""
    names = _names(path)
    if "model_index.json" in names:
        if "Onnx" in str(_json(path / "model_index.json").get("_class_name")):
            return "a pipeline of ONNX graphs, which is exported already; give the PyTorch checkpoint that it came from"
        return _pointers(path)
    if not names:
        return "an empty folder; give a diffusers folder, one with model_index.json"
    return next(filter(None, (known(path, names) for known in _FOLDERS)), "")


def _pointers(path: Path) -> str:
    """Weights that were not downloaded by git."""
    pointers = [file for file in sorted(path.glob("*/*.safetensors")) if _head(file).startswith(LFS)]
    if not pointers:
        return ""
    return f"a clone without its weights: {pointers[0]} is a pointer of git-lfs; run `git lfs pull` in it"


def _bundle(path: Path, names: list[str]) -> str:
    if "manifest.json" in names and "format_version" in _json(path / "manifest.json"):
        return f"a bundle, which is exported already: sdopt generate PROMPT -m {path} -o PATH"
    return ""


def _onnx(path: Path, names: list[str]) -> str:
    if any(path.glob("*.onnx")) or any(path.glob("*/*.onnx")):
        return "a folder of ONNX graphs, which are exported already; give the PyTorch checkpoint that they came from"
    return ""


def _lora_folder(path: Path, names: list[str]) -> str:
    if "adapter_config.json" in names or "pytorch_lora_weights.safetensors" in names:
        return f"a LoRA, which changes a model and is none itself; {BESIDE}"
    return ""


def _component(path: Path, names: list[str]) -> str:
    parent = path.absolute().parent
    if (parent / "model_index.json").is_file():
        return f"one part of a checkpoint; give the folder that holds it: {parent}"
    kind = _json(path / "config.json").get("_class_name") if "config.json" in names else None
    if kind is None:
        return ""
    return f"one model, {kind}, and not a pipeline; {ALONE}, in a folder with model_index.json"


def _outer(path: Path, names: list[str]) -> str:
    inner = [*path.glob("*/model_index.json"), *path.glob("snapshots/*/model_index.json")]
    return f"not a checkpoint, but holds one; give {inner[0].parent}" if inner else ""


def _files(path: Path, names: list[str]) -> str:
    files = [name for name in names if name.endswith(".safetensors")]
    if not files:
        return ""
    return f"a folder of files without model_index.json; give one of them, e.g. {path / files[0]}"


_FOLDERS: tuple[Callable[[Path, list[str]], str], ...] = (_bundle, _onnx, _lora_folder, _component, _outer, _files)


# ------------------------------------------------------------------------------------------------ files


def _file(path: Path, has_config: bool) -> str:
    """What a file is that is no checkpoint; empty for a pickle, and for tensors that may be one."""
    head = _head(path)
    if head.startswith(LFS):
        return "a pointer of git-lfs, and not the file itself; run `git lfs pull` in its folder"
    if path.name == "model_index.json":
        return f"the index of a checkpoint; give its folder: {path.parent}"
    if head.startswith(b"GGUF"):
        return SUFFIXES[".gguf"]
    if path.suffix in SUFFIXES:
        return SUFFIXES[path.suffix]
    if path.suffix in PICKLES:
        return ""
    if not path.stat().st_size:
        return "an empty file; download it again"
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, and not the file that its name says; download it again, from the file's own address"
    if path.suffix == ".safetensors":
        return _tensors(_tensor_names(path), has_config)
    return "a file that is no checkpoint; give a diffusers folder, an id such as owner/name, or a .safetensors file"


def _tensors(names: list[str], has_config: bool) -> str:
    """What the tensors of a file are, by their names."""
    has_pipeline = any(re.search(PIPELINE, name) for name in names)
    for what, (pattern, advice) in TENSORS.items():
        if has_pipeline and what == "a LoRA":
            continue  # a whole model with parts of a LoRA: its lists name them when it is read
        if any(re.search(pattern, name) for name in names):
            return "" if advice == CONFIG and has_config else f"{what}; {advice}"
    if not has_pipeline:
        for what, (pattern, advice) in PARTS.items():
            if any(re.search(pattern, name) for name in names):
                return f"{what}; {advice}"
    return ""


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError:
        return b""


def _tensor_names(path: Path) -> list[str]:
    """The names in the header of a safetensors file; none for a file that is damaged, which its reader refuses."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: Any = json.loads(file.read(length)) if length <= MAX_HEADER else None
    except (OSError, ValueError, RecursionError):
        return []
    return [str(name) for name in cast("dict[str, Any]", header)] if isinstance(header, dict) else []


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one for a file that is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}
