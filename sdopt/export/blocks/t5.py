"""T5's text encoder, as SD3 and Flux read it: one sequence of tokens, of which none is masked."""

from __future__ import annotations

from typing import Any, cast

import torch

from sdopt.bundle.specs import TensorSpec
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.part import Part

SIZES = ({"batch": 2, "tokens": 9}, {"batch": 1, "tokens": 24}, {"batch": 3, "tokens": 4})


class T5(torch.nn.Module):
    """From token ids [batch, tokens] to the last hidden state. As in diffusers' pipelines, padding is text like any."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, return_dict=False)[0]


def part(checkpoint: Checkpoint, name: str) -> Part:
    config, (model, weights) = checkpoint.config(name), checkpoint.opened(name)
    return Part(
        name=name,
        module=T5(cast(Any, model).encoder),  # what is around it holds the embeddings a second time
        inputs=(TensorSpec("input_ids", "int32", ("batch", "tokens")),),
        outputs=(TensorSpec("last_hidden_state", "float32", ("batch", "tokens", config["d_model"])),),
        sizes=SIZES,
        limits={"input_ids": config["vocab_size"]},
        prefix="encoder.",
        weights=weights,
    )
