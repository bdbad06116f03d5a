"""CLIP's text encoders. A family decides which of their states it gives; the rest is common."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from sdopt.bundle.specs import TensorSpec
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.part import Part, Sizes


class TextEncoder(torch.nn.Module):
    """The base of a family's wrapper, whose `forward` picks from what `encode` returns."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def encode(
        self, input_ids: torch.Tensor, extra_embeddings: torch.Tensor, end_position: torch.Tensor | None = None
    ) -> Any:
        """The model's output, with the states after each layer. No token sees what follows `end_position`, [batch]."""
        mask = None
        if end_position is not None:
            mask = (torch.arange(input_ids.shape[1]) <= end_position[:, None]).int()
        with extended(self.model.get_input_embeddings(), extra_embeddings):
            return self.model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, return_dict=True)


@contextmanager
def extended(table: Any, extra: torch.Tensor) -> Generator[None]:
    """Inside, the token table is longer: its last row is followed by the rows of `extra` (textual inversion)."""
    last = table.num_embeddings - 1

    def look_up(ids: torch.Tensor) -> torch.Tensor:
        own = torch.nn.functional.embedding(ids.clamp(max=last), table.weight)
        further = torch.nn.functional.embedding((ids - last - 1).clamp(min=0), extra)
        return torch.where((ids > last)[..., None], further, own)

    table.forward = look_up
    try:
        yield
    finally:
        del table.forward


def states(config: Mapping[str, Any]) -> TensorSpec:
    """The output that holds the state after each layer, the embeddings first."""
    shape = ("batch", config["num_hidden_layers"] + 1, "tokens", config["hidden_size"])
    return TensorSpec("hidden_states", "float32", shape)


def part(
    checkpoint: Checkpoint,
    name: str,
    wrapper: Callable[[Any], TextEncoder],
    outputs: tuple[TensorSpec, ...],
    unused: Mapping[str, str] | None = None,
    may_mask: bool = False,
) -> Part:
    """The text encoder `name` of the checkpoint, behind a family's `wrapper`.

    `may_mask`: its pipelines mask the padding if its configuration has `use_attention_mask`. It then takes the position
    of each prompt's end token too.
    """
    config, model = checkpoint.config(name), checkpoint.load(name)
    masked = may_mask and getattr(model.config, "use_attention_mask", False)
    return Part(
        name=name,
        module=wrapper(model),
        inputs=(
            TensorSpec("input_ids", "int32", ("batch", "tokens")),
            TensorSpec("extra_embeddings", "float32", ("extra_tokens", config["hidden_size"])),
            *((TensorSpec("end_position", "int32", ("batch",)),) if masked else ()),
        ),
        outputs=outputs,
        sizes=_sizes(config["max_position_embeddings"]),
        # the parity checks read the first extra row too
        limits={"input_ids": config["vocab_size"] + 1, "end_position": config["max_position_embeddings"]},
        # published files have the prefix; the models of transformers from 5.6 on have no such wrapper
        prefix="" if hasattr(model, "text_model") else "text_model.",
        unused=unused or {},
    )


def _sizes(longest: int) -> tuple[Sizes, ...]:
    return (
        {"batch": 2, "tokens": max(longest - 1, 3), "extra_tokens": 3},
        {"batch": 1, "tokens": max(longest, 3), "extra_tokens": 1},
        {"batch": 3, "tokens": max(longest // 2, 3), "extra_tokens": 2},
    )
