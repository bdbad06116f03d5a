"""Image prompts as inputs of `unet_ip_adapter`: pictures, encoded once for all steps of a request.

    image_keys, image_values   [images, adapters, image_tokens, features]
    image_mask                 [images, adapters, image_tokens]
    image_scales               [images, adapters, layers]

The pictures of one adapter stand side by side in its tokens. An adapter with fewer tokens than another is filled up,
and the mask keeps these places out of its softmax.
Ref: Ye et al. 2023, arXiv:2308.06721.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdopt.bundle.adapter import IMAGE_ENCODER, IMAGE_PROJECTION, adapter_component
from sdopt.bundle.specs import Float32
from sdopt.engine.finite import refuse_nan
from sdopt.engine.pool import EnginePool
from sdopt.request.image_prompt import ImagePrompt

NO_TOKEN = np.float32(-30000)  # a logit whose exponential is 0; float16 has it too
Tokens = tuple[Float32, Float32]  # keys and values, [tokens, features]
Inputs = dict[str, Float32]


class ImagePrompts:
    """The IP-Adapters of the bundle of `pool`. The tokens of the last request are kept for the next one."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._last: tuple[str, list[list[Tokens]]] = ("", [])

    def inputs(self, prompts: Sequence[ImagePrompt], images: int, guided: bool) -> tuple[Inputs, Inputs]:
        """The inputs of the conditional half, and those of the negative half; both are empty without a prompt."""
        if not prompts:
            return {}, {}
        key = f"{guided} {[prompt.described() for prompt in prompts]}"
        last = self._last
        if last[0] != key:
            last = self._last = (key, [self._halves(prompt, guided) for prompt in prompts])
        scales = np.stack([prompt.scales for prompt in prompts])
        cond, negative = (_packed([halves[i] for halves in last[1]], scales, images) for i in (0, -1))
        return cond, negative

    def _halves(self, prompt: ImagePrompt, guided: bool) -> list[Tokens]:
        """The tokens of the conditional half and, with guidance, of the negative half."""
        rows = prompt.embeds if prompt.embeds is not None else self._encoded(prompt, guided)
        pictures = rows.shape[1]
        given = self._run(prompt, IMAGE_PROJECTION, image_embeds=rows.reshape(-1, *rows.shape[2:]))
        keys, values = (np.split(given[name], len(given[name]) // pictures) for name in ("image_keys", "image_values"))
        halves = [
            (key.reshape(-1, key.shape[-1]), value.reshape(-1, value.shape[-1]))
            for key, value in zip(keys, values, strict=True)
        ]
        return halves[::-1]  # the negative half came first

    def _encoded(self, prompt: ImagePrompt, guided: bool) -> Float32:
        """What the image encoder gives, [rows, pictures, ...], with guidance the negative half first.

        The negative half sees zeros as pixels, or has zeros as its vector: as in diffusers.
        """
        assert prompt.pixels is not None  # there are no embeddings
        pixels = prompt.pixels
        black = guided and prompt.patches
        seen = np.concatenate([np.zeros_like(pixels[:1]), pixels]) if black else pixels
        embeds = self._run(prompt, IMAGE_ENCODER, pixel_values=seen)["image_embeds"]
        if not guided:
            return embeds[None]
        if not black:
            return np.stack([np.zeros_like(embeds), embeds])
        return np.stack([np.repeat(embeds[:1], len(pixels), 0), embeds[1:]])

    def _run(self, prompt: ImagePrompt, component: str, **inputs: Float32) -> dict[str, Float32]:
        name = adapter_component(prompt.name, component)
        with self._pool.using(name) as engine:
            given: dict[str, Float32] = engine(**inputs)
        for array in given.values():
            refuse_nan(array, name)
        return given


def _packed(tokens: Sequence[Tokens], scales: Float32, images: int) -> Inputs:
    """The tokens of all adapters as inputs; every image has the same."""
    longest = max(len(keys) for keys, _ in tokens)
    features = tokens[0][0].shape[1]
    keys, values = (np.zeros((len(tokens), longest, features), np.float32) for _ in range(2))
    mask = np.full((len(tokens), longest), NO_TOKEN, np.float32)
    for i, (key, value) in enumerate(tokens):
        keys[i, : len(key)], values[i, : len(key)], mask[i, : len(key)] = key, value, 0
    packed = {"image_keys": keys, "image_values": values, "image_mask": mask, "image_scales": scales}
    return {name: np.repeat(array[None], images, 0) for name, array in packed.items()}
