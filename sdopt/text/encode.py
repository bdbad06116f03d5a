"""From prompts to what the UNet takes beside the sample and the timestep.

    encoder_hidden_states   [images, tokens, features]    of one text encoder, or of two side by side
    text_embeds             [images, features]            SDXL: the pooled text of its second encoder
    time_ids                [images, 6]                   SDXL: original size, crop and target size, each height first;
                            [images, 5]                   its refiner: original size, crop and aesthetic score

Which of them a UNet takes, and from which encoders, is data: `conditioning` in the manifest.
Ref: Podell et al. 2023, arXiv:2307.01952, sections 2.1 and 2.2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from sdopt.bundle.files import Bundle
from sdopt.bundle.format import Encoder
from sdopt.bundle.specs import Array, Float32
from sdopt.engine.pool import EnginePool
from sdopt.errors import NumericsError, UsageError
from sdopt.request.plan import Plan
from sdopt.text.textual_inversion import Embedding, embedding
from sdopt.text.tokenizer import Tokenizer
from sdopt.text.weights import Chunks, chunks, stacked, weighted

Condition = dict[str, Float32]  # by the name of the UNet's input


class TextEncoders:
    """The text encoders and tokenizers of the bundle of `pool`, loaded when first used."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool, bundle = pool, pool.bundle
        self._bundle = bundle
        self._entry = bundle.manifest.conditioning
        self._tokenizers: dict[str, Tokenizer] = {}
        self._extra = {name: np.zeros((1, width), np.float32) for name, width in extra_widths(bundle).items()}
        self.embeddings: dict[str, Embedding] = {}

    def add(self, source: str | os.PathLike[str] | Array | Mapping[str, Array], token: str | None) -> str:
        """The token of an embedding that prompts may use from now on; see `Pipeline.load_embedding`."""
        encoders = self._entry.encoders
        if not self._extra or set(self._extra) != {encoder.component for encoder in encoders}:
            raise UsageError(
                f"{self._bundle.path} was exported before text encoders took further embeddings; export it again"
            )
        found = embedding(source, token, {name: rows.shape[1] for name, rows in self._extra.items()})
        tokenizers = {encoder.component: self._tokenizer(encoder.tokenizer) for encoder in encoders}
        for name, tokenizer in tokenizers.items():
            tokenizer.refuse_taken(found.token, len(found.rows[name]))
        for name, tokenizer in tokenizers.items():
            tokenizer.add(found.token, len(found.rows[name]))
            known = self._extra[name] if self.embeddings else self._extra[name][:0]
            self._extra[name] = np.concatenate([known, found.rows[name]])
        self.embeddings[found.token] = found
        return found.token

    def conditions(self, plan: Plan) -> tuple[Condition, Condition | None]:
        """The conditional and, with guidance, the unconditional inputs of the UNet, one row per image."""
        if plan.prompt_embeds is not None:
            cond = self._given(plan, plan.prompt_embeds, plan.pooled_prompt_embeds)
            if not plan.guided or plan.negative_prompt_embeds is None:
                return cond, None
            return cond, self._given(plan, plan.negative_prompt_embeds, plan.negative_pooled_prompt_embeds, False)
        n = len(plan.prompts)
        zeros = self._entry.zeros_for_empty and not plan.negative_given
        firsts, seconds = plan.prompts, plan.prompts_2
        if plan.guided and not zeros:
            firsts, seconds = firsts + plan.negative_prompts, seconds + plan.negative_prompts_2
        hidden, pooled = self.encode(firsts, seconds, plan.prompt_style, plan.clip_skip)
        cond = self._given(plan, hidden[:n], None if pooled is None else pooled[:n])
        if not plan.guided:
            return cond, None
        against, pooled = (
            (np.zeros_like(hidden), None if pooled is None else np.zeros_like(pooled))
            if zeros
            else (hidden[n:], None if pooled is None else pooled[n:])
        )
        return cond, self._given(plan, against, pooled, False)

    def encode(
        self, prompts: Sequence[str], prompts_2: Sequence[str], prompt_style: str = "plain", clip_skip: int = 0
    ) -> tuple[Float32, Float32 | None]:
        """(embeddings, pooled text or None) of prompts; `prompts_2` go to the second encoder. Equal ones run once."""
        pairs = list(dict.fromkeys(zip(prompts, prompts_2, strict=True)))
        encoders = self._entry.encoders
        texts = [[pair[i] for pair in pairs] for i in range(len(encoders))]
        cut = [self._cut(e.tokenizer, t, prompt_style) for e, t in zip(encoders, texts, strict=True)]
        most = max(len(ids) for of_encoder in cut for ids, _ in of_encoder)
        parts: list[Float32] = []
        pooled: Float32 | None = None
        for encoder, of_encoder in zip(encoders, cut, strict=True):
            ids, weights = stacked(self._tokenizer(encoder.tokenizer), of_encoder, most)
            name = encoder.component
            extra = {"extra_embeddings": self._extra[name]} if name in self._extra else {}
            with self._pool.using(name) as engine:
                outputs = engine(input_ids=ids.reshape(-1, ids.shape[-1]), **extra)
            state = weighted(_state(outputs, encoder, clip_skip), weights.reshape(-1, ids.shape[-1]))
            if not np.isfinite(state).all():
                raise NumericsError(f"{encoder.component}: the output has NaN or infinity; its weights are damaged")
            parts.append(state.reshape(len(pairs), -1, state.shape[-1]))
            if encoder.component == self._entry.pooled:
                pooled = outputs["text_embeds"].reshape(len(pairs), most, -1)[:, 0]  # the first chunk speaks for all
        rows = [pairs.index(pair) for pair in zip(prompts, prompts_2, strict=True)]
        hidden = np.concatenate(parts, 2)[rows]
        return hidden, None if pooled is None else pooled[rows]

    def _cut(self, name: str, texts: Sequence[str], style: str) -> list[Chunks]:
        """Token ids and weights of each text, as many chunks as it needs; in plain style one, cut with a warning."""
        tokenizer = self._tokenizer(name)
        if style == "a1111":
            return [chunks(tokenizer, text) for text in texts]
        return [(ids[None], np.ones((1, len(ids)), np.float32)) for ids in tokenizer(texts)]

    def _tokenizer(self, name: str) -> Tokenizer:
        if name not in self._tokenizers:
            entry = self._bundle.manifest.tokenizers[name]
            self._tokenizers[name] = Tokenizer(self._bundle.file(entry.file), entry)
        return self._tokenizers[name]

    def _given(self, plan: Plan, hidden: Float32, pooled: Float32 | None, positive: bool = True) -> Condition:
        condition: Condition = {"encoder_hidden_states": hidden}
        if self._entry.pooled:
            if pooled is None:
                raise UsageError("prompt_embeds: this model also takes pooled_prompt_embeds (and negative ones)")
            condition["text_embeds"] = pooled
        if self._entry.time_ids:
            sizes = plan.sizes if positive else plan.negative_sizes
            numbers = [number for name in self._entry.time_ids for number in sizes[name]]
            condition["time_ids"] = np.tile(np.array([numbers], np.float32), (len(hidden), 1))
        return condition


def extra_widths(bundle: Bundle) -> dict[str, int]:
    """The width of the extra embeddings that each text encoder takes; without those that take none."""
    encoders = [bundle.component(e.component) for e in bundle.manifest.conditioning.encoders]
    inputs = {encoder.name: {spec.name: spec for spec in encoder.inputs} for encoder in encoders}
    return {
        name: int(specs["extra_embeddings"].shape[1]) for name, specs in inputs.items() if "extra_embeddings" in specs
    }


def _state(outputs: Mapping[str, Float32], encoder: Encoder, clip_skip: int) -> Float32:
    """The text encoder's state after all layers but those that the family and `clip_skip` leave out."""
    skip = encoder.skip + clip_skip
    if not skip:
        return outputs[encoder.output]
    states = outputs["hidden_states"]
    if skip >= states.shape[1]:
        most = states.shape[1] - 1 - encoder.skip
        raise UsageError(f"clip_skip = {clip_skip}; {encoder.component} has {states.shape[1] - 1} layers: up to {most}")
    return np.ascontiguousarray(states[:, -1 - skip])
