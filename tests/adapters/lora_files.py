"""LoRA files for tests, with random numbers, in the spelling of any trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdopt.bundle.files import Bundle
from sdopt.bundle.original_names import unet_names
from sdopt.bundle.weights import Weights

Keep = Callable[[str], bool]


def shapes(bundle: Bundle, component: str) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the weight, for linears and convolutions of a component."""
    found = Weights.of(bundle.component(component)).shapes.items()
    return {
        name.removesuffix(".weight"): shape
        for name, shape in found
        if name.endswith(".weight") and len(shape) in (2, 4) and "embeddings" not in name
    }


def is_linear(path: str) -> bool:
    """Whether a module of the UNet is one that every trainer changes."""
    return any(part in path for part in ("attn1", "attn2", ".ff."))


def kohya(component: str, path: str) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}[component]
    return prefix + path.replace(".", "_")


def diffusers_key(component: str, path: str) -> str:
    return f"{component}.{path}"


def comfy(paths: Iterable[str]) -> Callable[[str, str], str]:
    """ComfyUI's keys for a UNet that has these modules."""
    names = unet_names(frozenset(paths))
    return lambda component, path: f"diffusion_model.{names[path]}"


def tensors(
    modules: Mapping[str, Mapping[str, tuple[int, ...]]],
    key: Callable[[str, str], str] = kohya,
    *,
    rank: int = 4,
    alpha: float | None = 2.0,
    size: float = 0.15,
    seed: int = 0,
    ends: tuple[str, str] = (".lora_down.weight", ".lora_up.weight"),
) -> dict[str, Any]:
    """A LoRA of every module: component -> path -> shape of its weight."""
    rng = np.random.default_rng(seed)
    made: dict[str, Any] = {}
    for component, paths in modules.items():
        for path, shape in sorted(paths.items()):
            stem = key(component, path)
            made[stem + ends[0]] = rng.standard_normal((rank, *shape[1:])).astype(np.float32) * size
            ones = [1] * (len(shape) - 2)
            made[stem + ends[1]] = rng.standard_normal((shape[0], rank, *ones)).astype(np.float32) * size
            if alpha is not None:
                made[f"{stem}.alpha"] = np.array(alpha, np.float32)
    return made


def write(path: Path, content: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Path:
    """A .safetensors file."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(content), path, metadata=dict(metadata or {}))
    return path
