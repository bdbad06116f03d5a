"""The inputs of the denoiser that come from the prompts.

    encoder_hidden_states   [images, tokens, features]    of one text encoder, of two side by side, of T5 behind them
    text_embeds             [images, features]            the pooled text: of one encoder, or of two side by side
    time_ids                [images, 6]                   SDXL: original size, crop and target size, each height first;
                            [images, 5]                   its refiner: original size, crop and aesthetic score

`conditioning` in the manifest says which of them a denoiser takes, and from which encoders.
Ref: Podell et al. 2023, arXiv:2307.01952, sections 2.1 and 2.2; Esser et al. 2024, arXiv:2403.03206, section 4.
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
from sdopt.text.sequence import Joined
from sdopt.text.textual_inversion import Embedding, embedding
from sdopt.text.tokenizer import Tokenizer
from sdopt.text.weights import Chunks, chunks, first, parse, sequence, single, stacked, weighted

PROMPTS = ("prompt", "prompt_2", "prompt_3")
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
        if self._entry.sequence:
            raise UsageError(
                f"{self._bundle.path} is {self._bundle.manifest.family}: its text encoders read a text in different "
                "ways, and no embedding is for all of them; write what it stands for into the prompt"
            )
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
        chunks = max(1 if given is None else self._chunks(given[0], plan.sequence) for given in (positive, negative))
        how: dict[str, Any] = {"min_chunks": chunks, "adapters": plan.adapters, "sequence": plan.sequence}
        texts, negatives = plan.texts, plan.negative_texts
        if positive is None and reads_negative and plan.clip_skip == negative_skip:
            n = len(texts)  # both at once, so that they have as many chunks
            hidden, pooled = self.encode([*texts, *negatives], plan.prompt_style, plan.clip_skip, **how)
            positive = hidden[:n], None if pooled is None else pooled[:n]
            negative = hidden[n:], None if pooled is None else pooled[n:]
        if positive is None:
            positive = self.encode(texts, plan.prompt_style, plan.clip_skip, **how)
        if reads_negative and negative is None:
            negative = self.encode(negatives, plan.prompt_style, negative_skip, **how)
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
            for name in (f"{sign}{own}" for own in PROMPTS for sign in ("", "negative_")):
                texts: Sequence[str] = getattr(plan, name.replace("prompt", "prompts"))
                for text in dict.fromkeys(texts):
                    parse(text, name)

    def _chunks(self, embeds: Float32, sequence: int) -> int:
        """The number of chunks that has as many tokens as given embeddings; 1 if there is none.

        `sequence`: how many of the tokens follow those of the chunks.
        """
        beside = [encoder for encoder in self._entry.encoders if encoder.join == "features"]
        if not beside:
            return 1
        tokenizer = self._bundle.manifest.tokenizers[beside[0].tokenizer]
        count, rest = divmod(embeds.shape[1] - sequence, tokenizer.max_length)
        return 1 if rest else max(1, count)

    def encode(
        self,
        texts: Sequence[tuple[str, ...]],
        prompt_style: str = "plain",
        clip_skip: int = 0,
        *,
        min_chunks: int = 1,
        sequence: int | None = None,
        adapters: Overlay | None = None,
    ) -> Encoded:
        """(embeddings, pooled text or None) of texts, each with one for every encoder. Equal ones run once.

        Shorter prompts are filled up with empty chunks to the longest one, or to `min_chunks`. `sequence`: the tokens
        of the encoder that reads one sequence; by default the bundle's.
        `adapters`: other numbers for some of the encoders' weights.
        """
        unique, encoders = list(dict.fromkeys(texts)), self._entry.encoders
        length = self._bundle.manifest.sequence if sequence is None else sequence
        cut: list[list[Chunks]] = []  # for each encoder, the chunks of each text
        with self._lock:
            for i, encoder in enumerate(encoders):
                cut.append(self._cut(encoder, [text[i] for text in unique], prompt_style, length))
        most = max(min_chunks, *(len(text.ids) for of_encoder in cut for text in of_encoder))
        joined = Joined(len(unique))
        for encoder, of_encoder in zip(encoders, cut, strict=True):
            count = most if encoder.join == "features" else 1
            all_chunks = stacked(self._tokenizer(encoder.tokenizer), of_encoder, count)
            with self._pool.using(encoder.component, adapters) as engine:
                outputs = engine(**self._inputs(encoder.component, all_chunks))
            if encoder.join != "none":
                skip = clip_skip if encoder.join == "features" else 0
                state = weighted(_state(outputs, encoder, skip), all_chunks.weights)
                _refuse_nan(encoder.component, state)
                joined.add(encoder.join, state)
            if encoder.component in self._entry.pooling:
                _refuse_nan(encoder.component, outputs["text_embeds"])
                joined.pooled.append(outputs["text_embeds"].reshape(len(unique), count, -1)[:, 0])  # the first chunk's
        place = {text: i for i, text in enumerate(unique)}
        rows = [place[text] for text in texts]
        hidden, pooled = joined.embeddings(self._width, length)[rows], joined.pooled
        return hidden, np.concatenate(pooled, 1)[rows] if pooled else None

    @property
    def _width(self) -> int:
        """The features of the text that the denoiser takes."""
        inputs = {spec.name: spec.shape for spec in self._bundle.denoiser.inputs}
        width = inputs["encoder_hidden_states"][-1]
        return width if isinstance(width, int) else 0

    def _inputs(self, name: str, chunks: Chunks) -> dict[str, Array]:
        """What a text encoder takes: the ids, and those of its further inputs that it has."""
        inputs = {"input_ids": chunks.ids}
        if name in self._extra:
            inputs["extra_embeddings"] = self._extra[name]
        if any(spec.name == "end_position" for spec in self._bundle.component(name).inputs):
            inputs["end_position"] = chunks.ends
        return inputs

    def _cut(self, encoder: Encoder, texts: Sequence[str], style: str, length: int) -> list[Chunks]:
        """The chunks of each text: all that it needs or, in plain style, one; a longer text is cut with a warning.

        T5 reads one sequence of `length` tokens in either style, and of an encoder whose states are not used the first
        chunk gives the pooled text.
        """
        tokenizer = self._tokenizer(encoder.tokenizer)
        if encoder.join == "tokens":
            return [sequence(tokenizer, text, length, style) for text in texts]
        if style == "a1111":
            cut = [chunks(tokenizer, text) for text in texts]
            return cut if encoder.join == "features" else [first(of_text) for of_text in cut]
        return [single(tokenizer, tokenizer.cut(text)) for text in texts]

    def _tokenizer(self, name: str) -> Tokenizer:
        with self._lock:  # two tokenizers would know different tokens
            if name not in self._tokenizers:
                entry = self._bundle.manifest.tokenizers[name]
                self._tokenizers[name] = Tokenizer(self._bundle.file(entry.file), entry)
            return self._tokenizers[name]

    def _given(self, plan: Plan, hidden: Float32, pooled: Float32 | None, positive: bool = True) -> Condition:
        condition: Condition = {"encoder_hidden_states": hidden}
        if self._entry.pooling:
            if pooled is None:
                raise UsageError("prompt_embeds: this model also takes pooled_prompt_embeds", "pooled_prompt_embeds")
            condition["text_embeds"] = pooled
        if self._entry.time_ids:
            sizes = plan.sizes if positive else plan.negative_sizes
            numbers = [number for name in self._entry.time_ids for number in sizes[name]]
            condition["time_ids"] = np.tile(np.array([numbers], np.float32), (len(hidden), 1))
        return condition


def _refuse_nan(component: str, array: Float32) -> None:
    if not np.isfinite(array).all():
        raise NumericsError(f"{component}: the output has NaN or infinity; its weights are damaged")


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
