"""The inputs of the UNet that come from the prompts.

    encoder_hidden_states   [images, tokens, features]    of one text encoder, or of two side by side
    text_embeds             [images, features]            SDXL: the pooled text of its second encoder
    time_ids                [images, 6]                   SDXL: original size, crop and target size, each height first;
                            [images, 5]                   its refiner: original size, crop and aesthetic score

`conditioning` in the manifest says which of them a UNet takes, and from which encoders.
Ref: Podell et al. 2023, arXiv:2307.01952, sections 2.1 and 2.2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from threading import RLock
from typing import Any

import numpy as np

from sdopt.bundle.files import Bundle
from sdopt.bundle.format import Encoder
from sdopt.bundle.specs import Array, Float32
from sdopt.bundle.weights import Overlay
from sdopt.engine.pool import EnginePool
from sdopt.engine.process import inherit
from sdopt.engine.store import NoEnginesError
from sdopt.errors import BackendError, NumericsError, UsageError
from sdopt.request.plan import Plan, arguments_to_build
from sdopt.text.textual_inversion import Embedding, embedding
from sdopt.text.tokenizer import Tokenizer
from sdopt.text.weights import Chunks, chunks, parse, single, stacked, weighted

Condition = dict[str, Float32]  # by the name of the UNet's input
Encoded = tuple[Float32, "Float32 | None"]  # embeddings [images, tokens, features]; pooled text [images, features]
Texts = tuple[Encoded, "Encoded | None"]  # of the prompts, and of the negative ones


class TextEncoders:
    """The text encoders and tokenizers of the pool's bundle, loaded when first used.

    Threads may add embeddings while others encode. An embedding's rows are there before a tokenizer knows its token.
    """

    def __init__(self, pool: EnginePool, embeddings: Sequence[Embedding] = ()) -> None:
        self._pool, self._bundle = pool, pool.bundle
        self.forget_parent()
        inherit(self)
        self._entry = self._bundle.manifest.conditioning
        self._tokenizers: dict[str, Tokenizer] = {}
        self._extra = {name: np.zeros((1, width), np.float32) for name, width in extra_widths(self._bundle).items()}
        self.embeddings: dict[str, Embedding] = {}
        for added in embeddings:
            self._add(added)

    def forget_parent(self) -> None:
        """In a forked child nobody holds the lock."""
        self._lock = RLock()  # of the tokenizers, and of what is added to them

    def __reduce__(self) -> tuple[Any, ...]:
        """Pool and embeddings; what unpickles them reads its tokenizers anew."""
        return TextEncoders, (self._pool, tuple(self.embeddings.values()))

    def add(self, source: str | os.PathLike[str] | Array | Mapping[str, Array], token: str | None) -> str:
        """Add an embedding, and return the token that prompts may use for it; see `Pipeline.load_embedding`."""
        encoders = self._entry.encoders
        if not self._extra or set(self._extra) != {encoder.component for encoder in encoders}:
            raise UsageError(
                f"{self._bundle.path} was exported before text encoders took further embeddings; export it again"
            )
        added = embedding(source, token, {name: rows.shape[1] for name, rows in self._extra.items()})
        with self._lock:
            self._add(added)
        return added.token

    def _add(self, added: Embedding) -> None:
        tokenizers = {encoder.component: self._tokenizer(encoder.tokenizer) for encoder in self._entry.encoders}
        for name, tokenizer in tokenizers.items():
            tokenizer.refuse_taken(added.token, len(added.rows[name]))
        for name, tokenizer in tokenizers.items():
            # Before the first embedding is added, one row of zeros stands in.
            rows = [self._extra[name]] if self.embeddings else []
            self._extra[name] = np.concatenate([*rows, added.rows[name]])
            tokenizer.add(added.token, len(added.rows[name]))
        self.embeddings = {**self.embeddings, added.token: added}  # a new table: others may be reading the old one

    def encoded(self, plan: Plan) -> Texts:
        """The encoded prompts of a plan and, with guidance, the negative ones, one row per image."""
        try:
            return self._encoded(plan)
        except NoEnginesError as error:  # one command builds all that the picture needs
            raise BackendError(f"{error}{arguments_to_build(plan, self._bundle.manifest.defaults)}") from error

    def conditions(self, plan: Plan, texts: Texts) -> tuple[Condition, Condition | None]:
        """The conditional and, with guidance, the unconditional inputs of the UNet, of texts that are encoded."""
        positive, negative = texts
        cond = self._given(plan, *positive)
        return cond, None if negative is None else self._given(plan, *negative, False)

    def used(self, parameters: Mapping[str, Any]) -> dict[str, str]:
        """token -> digest of the embeddings whose token is in the prompts of these parameters."""
        text = " ".join(str(value) for key, value in parameters.items() if "prompt" in key and value).lower()
        return {token: entry.digest for token, entry in self.embeddings.items() if token.lower() in text}

    def _encoded(self, plan: Plan) -> Texts:
        """The encoded prompts and, with guidance, the encoded negative prompts.

        Embeddings that the caller gave are taken; otherwise the texts are encoded. As in diffusers, some families use
        zeros if there is no negative prompt.
        """
        self._check_weights(plan)
        positive, negative = _embeds(plan, ""), _embeds(plan, "negative_")
        zeros = self._entry.zeros_for_empty and not plan.negative_given
        reads_negative = plan.guided and negative is None and not zeros
        # diffusers applies clip_skip to the prompt alone, AUTOMATIC1111 to both
        negative_skip = plan.clip_skip if plan.prompt_style == "a1111" else 0
        chunks = max(1 if given is None else self._chunks(given[0]) for given in (positive, negative))
        if positive is None and reads_negative and plan.clip_skip == negative_skip:
            n = len(plan.prompts)  # both at once, so that they have as many chunks
            firsts, seconds = plan.prompts + plan.negative_prompts, plan.prompts_2 + plan.negative_prompts_2
            hidden, pooled = self.encode(firsts, seconds, plan.prompt_style, plan.clip_skip, adapters=plan.adapters)
            positive = hidden[:n], None if pooled is None else pooled[:n]
            negative = hidden[n:], None if pooled is None else pooled[n:]
        if positive is None:
            texts = plan.prompts, plan.prompts_2
            positive = self.encode(*texts, plan.prompt_style, plan.clip_skip, chunks, plan.adapters)
        if reads_negative and negative is None:
            texts = plan.negative_prompts, plan.negative_prompts_2
            negative = self.encode(*texts, plan.prompt_style, negative_skip, chunks, plan.adapters)
        if not plan.guided:
            return positive, None
        if negative is None:
            hidden, pooled = positive
            negative = np.zeros_like(hidden), None if pooled is None else np.zeros_like(pooled)
        if positive[0].shape != negative[0].shape:
            raise UsageError(
                f"the prompt has {positive[0].shape[1]} tokens and the negative prompt {negative[0].shape[1]}; "
                "give embeddings of as many tokens",
                "prompt_embeds" if plan.prompt_embeds is not None else "negative_prompt_embeds",
            )
        return positive, negative

    def _check_weights(self, plan: Plan) -> None:
        """Raises: UsageError for a weight that is too large, naming the keyword of its prompt."""
        if plan.prompt_style == "a1111":
            for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
                texts: Sequence[str] = getattr(plan, name.replace("prompt", "prompts"))
                for text in dict.fromkeys(texts):
                    parse(text, name)

    def _chunks(self, embeds: Float32) -> int:
        """The number of chunks that has as many tokens as given embeddings; 1 if there is none."""
        tokenizer = self._bundle.manifest.tokenizers[self._entry.encoders[0].tokenizer]
        count, rest = divmod(embeds.shape[1], tokenizer.max_length)
        return 1 if rest else count

    def encode(
        self,
        prompts: Sequence[str],
        prompts_2: Sequence[str],
        prompt_style: str = "plain",
        clip_skip: int = 0,
        min_chunks: int = 1,
        adapters: Overlay | None = None,
    ) -> Encoded:
        """(embeddings, pooled text or None) of prompts; `prompts_2` go to the second encoder. Equal prompts run once.

        Shorter prompts are filled up with empty chunks to the longest one, or to `min_chunks`.
        `adapters`: other numbers for some of the encoders' weights.
        """
        pairs = list(dict.fromkeys(zip(prompts, prompts_2, strict=True)))
        encoders = self._entry.encoders
        cut: list[list[Chunks]] = []  # for each encoder, the chunks of each text
        with self._lock:
            for i, encoder in enumerate(encoders):
                cut.append(self._cut(encoder.tokenizer, [pair[i] for pair in pairs], prompt_style))
        most = max(min_chunks, *(len(text.ids) for of_encoder in cut for text in of_encoder))
        parts: list[Float32] = []
        pooled: Float32 | None = None
        for encoder, of_encoder in zip(encoders, cut, strict=True):
            all_chunks = stacked(self._tokenizer(encoder.tokenizer), of_encoder, most)
            with self._pool.using(encoder.component, adapters) as engine:
                outputs = engine(**self._inputs(encoder.component, all_chunks))
            state = weighted(_state(outputs, encoder, clip_skip), all_chunks.weights)
            if not np.isfinite(state).all():
                raise NumericsError(f"{encoder.component}: the output has NaN or infinity; its weights are damaged")
            parts.append(state.reshape(len(pairs), -1, state.shape[-1]))
            if encoder.component == self._entry.pooled:
                pooled = outputs["text_embeds"].reshape(len(pairs), most, -1)[:, 0]  # that of the first chunk
        rows = [pairs.index(pair) for pair in zip(prompts, prompts_2, strict=True)]
        hidden = np.concatenate(parts, 2)[rows]
        return hidden, None if pooled is None else pooled[rows]

    def _inputs(self, name: str, chunks: Chunks) -> dict[str, Array]:
        """What a text encoder takes: the ids, and those of its further inputs that it has."""
        inputs = {"input_ids": chunks.ids}
        if name in self._extra:
            inputs["extra_embeddings"] = self._extra[name]
        if any(spec.name == "end_position" for spec in self._bundle.component(name).inputs):
            inputs["end_position"] = chunks.ends
        return inputs

    def _cut(self, name: str, texts: Sequence[str], style: str) -> list[Chunks]:
        """The chunks of each text: all that it needs or, in plain style, one; a longer text is cut with a warning."""
        tokenizer = self._tokenizer(name)
        if style == "a1111":
            return [chunks(tokenizer, text) for text in texts]
        return [single(tokenizer, tokenizer.cut(text)) for text in texts]

    def _tokenizer(self, name: str) -> Tokenizer:
        with self._lock:  # two tokenizers would know different tokens
            if name not in self._tokenizers:
                entry = self._bundle.manifest.tokenizers[name]
                self._tokenizers[name] = Tokenizer(self._bundle.file(entry.file), entry)
            return self._tokenizers[name]

    def _given(self, plan: Plan, hidden: Float32, pooled: Float32 | None, positive: bool = True) -> Condition:
        condition: Condition = {"encoder_hidden_states": hidden}
        if self._entry.pooled:
            if pooled is None:
                raise UsageError("prompt_embeds: this model also takes pooled_prompt_embeds", "pooled_prompt_embeds")
            condition["text_embeds"] = pooled
        if self._entry.time_ids:
            sizes = plan.sizes if positive else plan.negative_sizes
            numbers = [number for name in self._entry.time_ids for number in sizes[name]]
            condition["time_ids"] = np.tile(np.array([numbers], np.float32), (len(hidden), 1))
        return condition


def _embeds(plan: Plan, prefix: str) -> Encoded | None:
    """The embeddings that the caller gave: for the prompts or, with prefix "negative_", for the negative ones."""
    hidden: Float32 | None = getattr(plan, f"{prefix}prompt_embeds")
    return None if hidden is None else (hidden, getattr(plan, f"{prefix}pooled_prompt_embeds"))


def extra_widths(bundle: Bundle) -> dict[str, int]:
    """The width of the extra embeddings, for each text encoder that takes any."""
    encoders = [bundle.component(e.component) for e in bundle.manifest.conditioning.encoders]
    return {
        encoder.name: int(spec.shape[1])
        for encoder in encoders
        for spec in encoder.inputs
        if spec.name == "extra_embeddings"
    }


def _state(outputs: Mapping[str, Float32], encoder: Encoder, clip_skip: int) -> Float32:
    """The text encoder's hidden state, without the last layers that the family and `clip_skip` leave out."""
    skip = encoder.skip + clip_skip
    if not skip:
        return outputs[encoder.output]
    states = outputs["hidden_states"]
    if skip >= states.shape[1]:
        most = states.shape[1] - 1 - encoder.skip
        raise UsageError(
            f"clip_skip = {clip_skip}; {encoder.component} has {states.shape[1] - 1} layers: up to {most}",
            "clip_skip",
        )
    return np.ascontiguousarray(states[:, -1 - skip])
