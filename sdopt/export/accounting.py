"""Every weight of a model comes from its file, and every tensor of the file is used or known to be unused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdopt.errors import CheckpointError

# tensors that published files of text encoders have beside those of the model: how their names look -> what they are
COUNTED = r"(.*\.)?position_ids"
KNOWN_UNUSED: Mapping[str, str] = {
    COUNTED: "the numbers 0, 1, 2, ..., which the model counts itself",
    r"vision_model\..*|visual_projection\.weight": "CLIP's other half, which sees pictures",
    r"logit_scale": "the temperature of CLIP's training",
    r"text_projection\.weight": "the pooled text of a whole CLIP, which CLIPTextModel does not compute",
}


def require_all(where: Path, info: Mapping[str, Any]) -> None:
    """Raises: CheckpointError with both lists, if weights are missing or tensors of the file are unknown.

    `info`: what diffusers and transformers return for `output_loading_info`.
    """
    missing = sorted(map(str, info["missing_keys"]))
    unknown = sorted(name for name in map(str, info["unexpected_keys"]) if not is_known_unused(where.name, name))
    hint = (
        "Either config.json is of another model, or the weights are; if they have a LoRA that is not merged, call "
        "fuse_lora() and unload_lora_weights() in diffusers and save the pipeline anew"
    )
    refuse(str(where), hint, lacking=missing, unknown=unknown)


def refuse(
    where: str,
    hint: str,
    *,
    lacking: Sequence[str],
    unknown: Sequence[str],
    unlike: Sequence[str] = (),
    integers: Sequence[str] = (),
) -> None:
    """Raises: CheckpointError with every list that is not empty, and what to do."""
    parts = {
        "its files lack {}": lacking,
        "its files have {}, which the model does not have": unknown,
        "of another shape: {}": unlike,
        "not floating point numbers: {}": integers,
    }
    sentences = [text.format(listed(names)) for text, names in parts.items() if names]
    if sentences:
        raise CheckpointError(f"{where}: {'; '.join(sentences)}. {hint}")


def require_finite(where: Path, model: torch.nn.Module) -> None:
    """Raises: CheckpointError that names the weights and buffers with NaN or infinite values."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    refuse_bad(where, [name for name, tensor in tensors if not torch.isfinite(tensor).all()])


def refuse_bad(where: Path, bad: Sequence[str]) -> None:
    """Raises: CheckpointError that names the weights in `bad`, which have NaN or infinite values, if there are any."""
    if bad:
        raise CheckpointError(
            f"{where}: {listed(bad)} {'has' if len(bad) == 1 else 'have'} NaN or infinite values; the file is "
            "damaged, or was saved in a precision that is too narrow for it: get the weights from their source again"
        )


def is_known_unused(component: str, name: str) -> bool:
    """Whether published files of a component have a tensor of this name that no model reads."""
    patterns = KNOWN_UNUSED if component.startswith("text_encoder") else (COUNTED,)
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def listed(names: Sequence[str]) -> str:
    """The first ten names, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
