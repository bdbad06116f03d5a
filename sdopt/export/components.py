"""The components of a family: what is traced, with which inputs and outputs.

Each is the checkpoint's own module behind a `forward` whose arguments and results are the tensors of its spec.
A new family is a new entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from sdopt.bundle.specs import Array, TensorSpec
from sdopt.export.families import conditioning, is_tiny, vae_factor
from sdopt.export.source import Checkpoint


@dataclass(frozen=True)
class Part:
    """One component, loaded and ready to be traced or run.

    `sizes`: the lengths of its named dimensions in the trace, then those of each parity check.
    `limits`: exclusive upper bounds of integer inputs. `shared`: inputs that are the same for both halves of guidance;
    their batch, "images", may be a part of the others' "batch". `prefix`: what stands before the model's names of
    parameters in the checkpoint. `unused`: how the names of parameters begin that the component does not read, and why.
    """

    name: str
    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: tuple[Mapping[str, int], ...]
    limits: Mapping[str, int]
    shared: tuple[str, ...] = ()
    prefix: str = ""
    unused: Mapping[str, str] = field(default_factory=dict[str, str])

    def example(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
        """Seeded inputs of the given sizes: ids and timesteps in their range, everything else standard normal."""
        rng = np.random.default_rng(seed)
        arrays: dict[str, Array] = {}
        for spec in self.inputs:
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
            if spec.name == "timestep":
                arrays[spec.name] = rng.uniform(0, 999, shape).astype(np.float32)
            elif spec.dtype == "int32":
                arrays[spec.name] = rng.integers(0, self.limits[spec.name], shape, np.int32)
                arrays[spec.name].flat[-1] = self.limits[spec.name] - 1  # the highest one is always among them
            else:
                arrays[spec.name] = rng.standard_normal(shape, np.float32)
        return arrays

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """What PyTorch computes in float32: the reference of the parity gate."""
        with torch.inference_mode():
            given = {s.name: torch.from_numpy(arrays[s.name]) for s in self.inputs}
            whole = max(len(tensor) for tensor in given.values())
            for name in self.shared:
                given[name] = given[name].repeat(whole // len(given[name]), *[1] * (given[name].ndim - 1))
            result = self.module(**given)
        tensors = cast(tuple[Any, ...], result if isinstance(result, tuple) else (result,))
        return {spec.name: tensor.numpy() for spec, tensor in zip(self.outputs, tensors, strict=True)}

    def released(self) -> Part:
        """The same without the model; its weights are freed, though torch's ONNX exporter keeps hold of them (2.13)."""
        for weight in self.module.parameters():
            weight.data = torch.empty(0)
        return replace(self, module=torch.nn.Identity())


@contextmanager
def continued(table: Any, extra: torch.Tensor) -> Generator[None]:
    """While it lasts, ids from the length of the token table on address the rows of `extra` (textual inversion)."""
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


class TextEncoder(torch.nn.Module):
    """Token ids to the last hidden state, and to the normalised state after each layer (for `clip_skip`)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, extra_embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with continued(self.model.get_input_embeddings(), extra_embeddings):
            output = self.model(input_ids=input_ids, output_hidden_states=True)
        norm = getattr(self.model, "text_model", self.model).final_layer_norm  # transformers 5.6 dropped the wrapper
        return output.last_hidden_state, norm(torch.stack(output.hidden_states, 1))


class TextEncoderXL(torch.nn.Module):
    """Token ids to the state after each layer, as it is, and from a model with a projection to `text_embeds` too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, extra_embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with continued(self.model.get_input_embeddings(), extra_embeddings):
            output = self.model(input_ids=input_ids, output_hidden_states=True)
        states = torch.stack(output.hidden_states, 1)
        return (states, output.text_embeds) if hasattr(output, "text_embeds") else (states,)


class UNet(torch.nn.Module):
    """A noisy sample, its timestep and the text to the prediction that the checkpoint was trained for.

    SDXL's takes the pooled text and sizes besides, LCM's the guidance scale as an embedding.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]


class VaeDecoder(torch.nn.Module):
    """Latents, already divided by the scaling factor, to a picture in -1..1."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latent_sample, return_dict=False)[0]


class VaeEncoder(torch.nn.Module):
    """A picture in -1..1 to the mean and log-variance of its posterior, so that the caller samples it.

    A tiny autoencoder has no posterior: its latents are the mean, and nothing else is given.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoded = self.model.encode(sample, return_dict=False)[0]
        return (encoded,) if isinstance(encoded, torch.Tensor) else (encoded.mean, encoded.logvar)


# Traced at sizes that no power of two divides, so that upsampling follows the skip connection and one graph takes every
# size that diffusers takes; batch 2, because a batch of 1 would be taken for a constant.
LATENT_SIZES = (
    {"batch": 2, "latent_height": 11, "latent_width": 13},
    {"batch": 1, "latent_height": 16, "latent_width": 24},
    {"batch": 3, "latent_height": 9, "latent_width": 8},
)


def _text_inputs(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Inputs, sizes, limits and prefix of a text encoder; the parity checks address the first extra row too."""
    lengths = [max(config["max_position_embeddings"] + cut, 3) for cut in (-1, 0)]
    lengths.append(max(config["max_position_embeddings"] // 2, 3))
    return {
        "inputs": (
            TensorSpec("input_ids", "int32", ("batch", "tokens")),
            TensorSpec("extra_embeddings", "float32", ("extra_tokens", config["hidden_size"])),
        ),
        "sizes": tuple(
            {"batch": b, "tokens": t, "extra_tokens": e} for b, t, e in zip((2, 1, 3), lengths, (3, 1, 2), strict=True)
        ),
        "limits": {"input_ids": config["vocab_size"] + 1},
        "prefix": ""
        if hasattr(model, "text_model")
        else "text_model.",  # as in published files; transformers 5.6 drops it
    }


def text_encoder(checkpoint: Checkpoint) -> Part:
    config, model = checkpoint.config("text_encoder"), checkpoint.load("text_encoder")
    width = config["hidden_size"]
    return Part(
        name="text_encoder",
        module=TextEncoder(model),
        outputs=(
            TensorSpec("last_hidden_state", "float32", ("batch", "tokens", width)),
            TensorSpec("hidden_states", "float32", ("batch", config["num_hidden_layers"] + 1, "tokens", width)),
        ),
        **_text_inputs(config, model),
    )


def text_encoder_xl(checkpoint: Checkpoint) -> Part:
    return _states_of(checkpoint, "text_encoder", ())


def text_encoder_2(checkpoint: Checkpoint) -> Part:
    width = checkpoint.config("text_encoder_2")["projection_dim"]
    return _states_of(checkpoint, "text_encoder_2", (TensorSpec("text_embeds", "float32", ("batch", width)),))


def _states_of(checkpoint: Checkpoint, name: str, pooled: tuple[TensorSpec, ...]) -> Part:
    config, model = checkpoint.config(name), checkpoint.load(name)
    layers = config["num_hidden_layers"]
    states = TensorSpec("hidden_states", "float32", ("batch", layers + 1, "tokens", config["hidden_size"]))
    return Part(
        name=name,
        module=TextEncoderXL(model),
        outputs=(states, *pooled),
        unused={} if pooled else {"text_model.final_layer_norm.": "the states are given as they are, before it"},
        **_text_inputs(config, model),
    )


def unet(checkpoint: Checkpoint) -> Part:
    config, model = checkpoint.config("unet"), checkpoint.load("unet")
    tokens = _tokens(checkpoint)
    latent = ("latent_height", "latent_width")
    return Part(
        "unet",
        UNet(model),
        (
            TensorSpec("sample", "float32", ("images", config["in_channels"], *latent)),
            TensorSpec("timestep", "float32", ("images",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", config["cross_attention_dim"])),
            *_further_inputs(checkpoint),
        ),
        (TensorSpec("noise_pred", "float32", ("batch", config["out_channels"], *latent)),),
        (
            {**LATENT_SIZES[0], "images": 2, "tokens": tokens},
            {**LATENT_SIZES[1], "images": 1, "tokens": tokens},
            {**LATENT_SIZES[2], "images": 2, "batch": 4, "tokens": 2 * tokens},
        ),
        {},
        shared=("sample", "timestep"),
    )


def _further_inputs(checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    """What the UNet takes beside sample, timestep and text: pooled text and sizes (SDXL), the guidance scale (LCM)."""
    wanted = conditioning(checkpoint)
    widths: dict[str, int] = {}
    if wanted.pooled:
        numbers = sum(1 if name == "aesthetic_score" else 2 for name in wanted.time_ids)
        widths = {"text_embeds": checkpoint.config(wanted.pooled)["projection_dim"], "time_ids": numbers}
    if wanted.guidance_embedding:
        widths["timestep_cond"] = wanted.guidance_embedding
    return tuple(TensorSpec(name, "float32", ("batch", width)) for name, width in widths.items())


def _tokens(checkpoint: Checkpoint) -> int:
    """How many tokens the text encoders read."""
    return checkpoint.config(conditioning(checkpoint).encoders[0].component)["max_position_embeddings"]


def vae_decoder(checkpoint: Checkpoint) -> Part:
    config = checkpoint.config("vae")
    return Part(
        "vae_decoder",
        VaeDecoder(checkpoint.load("vae")),
        (
            TensorSpec(
                "latent_sample", "float32", ("batch", config["latent_channels"], "latent_height", "latent_width")
            ),
        ),
        (TensorSpec("sample", "float32", ("batch", config["out_channels"], "height", "width")),),
        LATENT_SIZES,
        {},
        unused=dict.fromkeys(("encoder.", "quant_conv."), "the encoder's"),
    )


def vae_encoder(checkpoint: Checkpoint) -> Part:
    config = checkpoint.config("vae")
    factor = vae_factor(config)
    latent = ("batch", config["latent_channels"], "latent_height", "latent_width")
    return Part(
        "vae_encoder",
        VaeEncoder(checkpoint.load("vae")),
        (TensorSpec("sample", "float32", ("batch", config["in_channels"], "height", "width")),),
        tuple(TensorSpec(name, "float32", latent) for name in (("mean",) if is_tiny(config) else ("mean", "logvar"))),
        tuple(
            {"batch": s["batch"], "height": factor * s["latent_height"], "width": factor * s["latent_width"]}
            for s in LATENT_SIZES
        ),
        {},
        unused=dict.fromkeys(("decoder.", "post_quant_conv."), "the decoder's"),
    )


Build = Callable[[Checkpoint], Part]
FAMILIES: dict[str, dict[str, Build]] = {
    "sd": {"text_encoder": text_encoder, "unet": unet, "vae_decoder": vae_decoder, "vae_encoder": vae_encoder},
    "sdxl": {
        "text_encoder": text_encoder_xl,
        "text_encoder_2": text_encoder_2,
        "unet": unet,
        "vae_decoder": vae_decoder,
        "vae_encoder": vae_encoder,
    },
}


def builds(checkpoint: Checkpoint) -> dict[str, Build]:
    """How each component of the checkpoint is made, in order."""
    table = FAMILIES[checkpoint.family]
    return {name: build for name, build in table.items() if not name.startswith("text_encoder") or checkpoint.has(name)}
