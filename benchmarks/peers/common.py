"""What the adapters share: the protocol, a folder for what they convert, and a checkpoint that they can read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).parents[2])
)  # an adapter's environment has no sdopt; the protocol needs none of it

from sdopt.bench.protocol import memory, serve


@dataclass(frozen=True)
class Adapter:
    """A peer as four functions.

    packages: whose versions are told. imports: its libraries. convert: (checkpoint, new folder), once.
    load: (converted folder, message) -> (draw, what the answer tells); draw() gives [batch, height, width, 3] in 0..1.
    """

    name: str
    packages: tuple[str, ...]
    imports: Callable[[], object]
    convert: Callable[[Path, Path], object]
    load: Callable[[Path, dict[str, Any]], tuple[Callable[[], Any], dict[str, Any]]]


def main(adapter: Adapter) -> None:
    """Serve the adapter on stdin and stdout."""
    drawing: list[Callable[[], Any]] = []

    def prepare(message: dict[str, Any]) -> dict[str, Any]:
        target = converted(adapter, message)
        if not target.exists():
            temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
            temporary.mkdir(parents=True)
            try:
                adapter.convert(Path(message["checkpoint"]), temporary / "model")
                shutil.rmtree(temporary / "readable", ignore_errors=True)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return {}

    def load(message: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        adapter.imports()
        imported = time.perf_counter()
        draw, told = adapter.load(converted(adapter, message) / "model", message)
        loaded = time.perf_counter()
        drawing[:] = [draw]
        versions = {name: importlib.metadata.version(name) for name in adapter.packages}
        parts = {"import": imported - started, "load": loaded - imported}
        return {"parts": parts, "versions": versions, "note": "", **told}

    def run(message: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        started = time.perf_counter()
        picture = drawing[0]()
        seconds = time.perf_counter() - started
        if message.get("picture"):
            np.save(message["picture"], picture)
        return {"seconds": seconds}

    serve({"prepare": prepare, "load": load, "run": run, "memory": memory})


def converted(adapter: Adapter, message: dict[str, Any]) -> Path:
    """The folder of what was converted from these very files."""
    checkpoint = Path(message["checkpoint"])
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    state = [(p.relative_to(checkpoint).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    digest = hashlib.sha256(json.dumps([adapter.packages, state]).encode()).hexdigest()[:10]
    return Path(message["cache"]) / f"{adapter.name}-{digest}"


def readable(checkpoint: Path, beside: Path) -> Path:
    """The checkpoint with its text encoders' weights under the names that the installed transformers looks for.

    Newer ones dropped the prefix `text_model.`; an older one that misses it warns, and goes on with random weights.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 9,
    }
    wanted = any(name.startswith("text_model.") for name in CLIPTextModel(CLIPTextConfig(**sizes)).state_dict())
    weights = load_file(checkpoint / "text_encoder/model.safetensors")
    if not wanted or any(name.startswith("text_model.") for name in weights):
        return checkpoint
    folder = beside.with_name("readable")
    shutil.copytree(checkpoint, folder, copy_function=os.link if same_disk(checkpoint, folder) else shutil.copy2)
    target = folder / "text_encoder/model.safetensors"
    target.unlink()
    named = {f"text_model.{name}": value.to(torch.float32) for name, value in weights.items()}
    save_file(named, target, metadata={"format": "pt"})
    return folder


def same_disk(a: Path, b: Path) -> bool:
    """Whether hard links from one to the other can be made."""
    return a.stat().st_dev == b.parent.stat().st_dev
