"""The UNet with image prompts: what `sdopt.graph.image_prompt` writes, computed by PyTorch for the parity gate.

Ref: Ye et al. 2023, arXiv:2308.06721.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

from sdopt.bundle.adapter import IMAGE_PROMPTED
from sdopt.export.part import Part, Variant
from sdopt.graph import image_prompt
from sdopt.graph.image_prompt import KEYS, MASK, SCALES, VALUES, Layer


class ImagePromptedUNet(torch.nn.Module):
    """A controlled UNet, with a second attention beside each cross-attention: one for each adapter, with its own scale.

    It works inside of the checkpoint's own model: between the linears that make the queries and mix the heads.
    """

    def __init__(self, controlled: torch.nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.controlled, self.layers = controlled, layers

    def forward(self, **tensors: torch.Tensor) -> torch.Tensor:
        keys, values, mask, scales = (tensors.pop(name) for name in (KEYS, VALUES, MASK, SCALES))
        widths = [layer.width for layer in self.layers]
        apart = [cast(Any, tensor).split(widths, -1) for tensor in (keys, values)]
        of_layers = zip(self.layers, *apart, scales.unbind(-1), strict=True)
        model = cast(Any, self.controlled).model
        with ExitStack() as stack:
            for layer, key, value, scale in of_layers:
                attention = model.get_submodule(layer.name)
                added = _Added(layer.heads, key, value, mask, scale)
                stack.callback(attention.to_q.register_forward_hook(added.keep_query).remove)
                stack.callback(attention.to_out[0].register_forward_pre_hook(added.add).remove)
            return self.controlled(**tensors)


class _Added:
    """The second attention of one layer."""

    def __init__(self, heads: int, *tensors: torch.Tensor) -> None:
        self.heads, self.tensors = heads, tensors

    def keep_query(self, module: torch.nn.Module, inputs: Any, query: torch.Tensor) -> None:
        self.query = self._by_heads(query)

    def add(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (total,) = inputs
        for key, value, mask, scale in zip(*(tensor.unbind(1) for tensor in self.tensors), strict=True):
            one = (self._by_heads(key), self._by_heads(value), mask[:, None, None])
            total = total + scale[:, None, None] * scaled_dot_product_attention(self.query, *one).transpose(
                1, 2
            ).flatten(2)
        return total

    def _by_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


def variants(controlled: Part, places: Sequence[int]) -> tuple[Variant, ...]:
    """The variant of a controlled UNet that takes image prompts; none for a UNet that IP-Adapters do not fit.

    `places`: those of the features, see `sdopt.graph.control`.
    """
    model = cast(Any, controlled.module).model
    layers = _layers(model)
    if not layers:
        return ()
    inputs = image_prompt.image_inputs(sum(layer.width for layer in layers), len(layers))
    sizes = tuple({**one, "adapters": 1 + i, "image_tokens": 3 + i} for i, one in enumerate(controlled.sizes))
    module = ImagePromptedUNet(controlled.module, layers)
    part = replace(controlled, name=IMAGE_PROMPTED, module=module, inputs=(*controlled.inputs, *inputs), sizes=sizes)
    return (Variant(part, partial(image_prompt.write_image_prompted_graph, layers=layers, places=places)),)


def _layers(model: Any) -> tuple[Layer, ...]:
    """The cross-attentions in the order in which IP-Adapters number them; none where diffusers numbers others.

    IP-Adapters are made for transformer blocks, which have a self-attention `attn1` and a cross-attention `attn2`.
    """
    named = image_prompt.in_order(name for name, _ in model.named_parameters())
    numbered = [name.removesuffix(".processor") for name in model.attn_processors]
    if named != [name for name in numbered if not name.endswith(".attn1")]:
        return ()
    attentions = [model.get_submodule(name) for name in named]
    return tuple(
        Layer(name, attention.to_q.out_features, attention.heads)
        for name, attention in zip(named, attentions, strict=True)
    )
