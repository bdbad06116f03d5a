"""Random checkpoints of every family, a few hundred kB each, whose sizes are nobody's defaults: 7 tokens, factor 2.

Equal arguments give equal weights, so that checkpoints share components, and `export_like` need not trace them again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tokenizer(pad: str = "<|endoftext|>") -> Any:
    """CLIP's kind of tokenizer, for letters, the word apple, and 7 tokens."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    words += ["ap", "app", "appl", "apple</w>", "!"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("a", "p"), ("ap", "p"), ("app", "l"), ("appl", "e</w>")]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=7, pad_token=pad)


def text_encoder(projected: bool = False, **changes: Any) -> Any:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = {
        "vocab_size": len(tokenizer()), "hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 7, "projection_dim": 20,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**{**config, **changes}))


def unet(**changes: Any) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 12, "block_out_channels": (12, 28), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 20, "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**config, **changes})


def unet_xl(numbers: int = 6, **changes: Any) -> Any:
    """SDXL's UNet, which takes so many numbers of sizes and crop."""
    config = {
        "cross_attention_dim": 32, "attention_head_dim": (2, 4), "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8 + numbers * 4,
    }  # fmt: skip
    return unet(**{**config, **changes})


def vae(**changes: Any) -> Any:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = {
        "block_out_channels": (6, 10), "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 24,
        "scaling_factor": 0.7, "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }  # fmt: skip
    return AutoencoderKL(**{**config, **changes})


def taesd(**changes: Any) -> Any:
    """The autoencoder without a posterior."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    sizes = {f"{side}_block_out_channels": (6, 6) for side in ("encoder", "decoder")}
    blocks = {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    return AutoencoderTiny(**{**sizes, **blocks, "scaling_factor": 0.9, **changes})


def sd(folder: Path, kind: str = "StableDiffusionPipeline", **parts: Any) -> Path:
    """A Stable Diffusion checkpoint; `parts` replace its own."""
    import diffusers

    own = {
        "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "vae": vae,
        "scheduler": lambda: diffusers.PNDMScheduler(skip_prk_steps=True, **BETAS),
    }  # fmt: skip
    made = {name: parts.pop(name) if name in parts else make() for name, make in own.items()}
    getattr(diffusers, kind)(
        **made, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    ).save_pretrained(folder)
    return folder


def sd2(folder: Path) -> Path:
    """As Stable Diffusion 2: OpenCLIP's text encoder padded with "!", velocity prediction; and with TAESD."""
    from diffusers import DDIMScheduler

    words = tokenizer("!")
    return sd(
        folder,
        text_encoder=text_encoder(hidden_act="gelu", num_hidden_layers=3, pad_token_id=words.pad_token_id),
        tokenizer=words,
        unet=unet(attention_head_dim=(2, 4), use_linear_projection=True),
        vae=taesd(),
        scheduler=DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False),
    )


def least(folder: Path) -> Path:
    """A Stable Diffusion checkpoint of the fewest layers: one block on each side, and TAESD."""
    small = unet(block_out_channels=(12,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    return sd(folder, unet=small, vae=taesd(), text_encoder=text_encoder(num_hidden_layers=1))


def sdxl(folder: Path, kind: str = "StableDiffusionXLPipeline", **parts: Any) -> Path:
    """An SDXL checkpoint; `parts` replace its own."""
    import diffusers

    own = {
        "text_encoder": lambda: text_encoder(intermediate_size=24),
        "text_encoder_2": lambda: text_encoder(
            True, hidden_size=12, intermediate_size=24, num_hidden_layers=3, projection_dim=8, hidden_act="gelu"
        ),
        "tokenizer": tokenizer, "tokenizer_2": tokenizer,
        "unet": lambda: unet_xl(transformer_layers_per_block=(1, 2)),
        "vae": lambda: vae(scaling_factor=0.13025, force_upcast=True),
        "scheduler": lambda: diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
    }  # fmt: skip
    made = {name: parts.pop(name) if name in parts else make() for name, make in own.items()}
    getattr(diffusers, kind)(**made, add_watermarker=False, **parts).save_pretrained(folder)
    return folder


def refiner(folder: Path) -> Path:
    """As SDXL's refiner: the second text encoder alone, and a score instead of the target size."""
    return sdxl(
        folder, "StableDiffusionXLImg2ImgPipeline", text_encoder=None, tokenizer=None,
        unet=unet_xl(5, cross_attention_dim=12), requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )  # fmt: skip


def small_lcm(folder: Path) -> Path:
    """As lcm-ssd-1b: blocks of different depth, no middle, and the guidance scale as an input."""
    from diffusers import LCMScheduler

    small = unet_xl(
        layers_per_block=(2, 1), transformer_layers_per_block=[[1, 1], [2]], mid_block_type=None,
        reverse_transformer_layers_per_block=[[1, 2], [1, 1, 1]], time_cond_proj_dim=6,
    )  # fmt: skip
    return sdxl(folder, unet=small, scheduler=LCMScheduler(**BETAS))


def t5_tokenizer() -> Any:
    """T5's kind of tokenizer, for letters, the words apple and cat, and 13 tokens."""
    from transformers import T5Tokenizer

    letters = [(letter, -3.0 - i / 100) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    pieces += [("▁a", -2.5), ("▁apple", -1.0), ("▁cat", -1.1)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=13)


def t5(**changes: Any) -> Any:
    import torch
    from transformers import T5Config, T5EncoderModel

    config = {
        "vocab_size": 60, "d_model": 24, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2,
        "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 6, "relative_attention_max_distance": 9,
    }  # fmt: skip
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(**{**config, **changes}))


def vae_16(**changes: Any) -> Any:
    """An autoencoder of 16 channels that are shifted, and without the layers around them."""
    config = {"latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.06}
    return vae(**{**config, "use_quant_conv": False, "use_post_quant_conv": False, **changes})


def transformer_sd3(**changes: Any) -> Any:
    import torch
    from diffusers import SD3Transformer2DModel

    config = {
        "sample_size": 12, "patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 36, "caption_projection_dim": 16, "pooled_projection_dim": 28,
        "out_channels": 16, "pos_embed_max_size": 14, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    torch.manual_seed(0)
    return SD3Transformer2DModel(**{**config, **changes})


def sd3(folder: Path, kind: str = "StableDiffusion3Pipeline", **parts: Any) -> Path:
    """As Stable Diffusion 3.5: two CLIP encoders, T5, a transformer; `parts` replace its own."""
    import diffusers

    own = {
        "text_encoder": lambda: text_encoder(True, hidden_size=12, intermediate_size=20),
        "text_encoder_2": lambda: text_encoder(True, hidden_size=16, projection_dim=8, hidden_act="gelu"),
        "text_encoder_3": lambda: t5(d_model=36),
        "tokenizer": tokenizer, "tokenizer_2": lambda: tokenizer("!"), "tokenizer_3": t5_tokenizer,
        "transformer": transformer_sd3, "vae": vae_16,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip
    made = {name: parts.pop(name) if name in parts else make() for name, make in own.items()}
    getattr(diffusers, kind)(**made, **parts).save_pretrained(folder)
    return folder


def transformer_flux(guidance: bool = True, **changes: Any) -> Any:
    import torch
    from diffusers import FluxTransformer2DModel

    config = {
        "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": guidance,
        "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    torch.manual_seed(0)
    return FluxTransformer2DModel(**{**config, **changes})


def flux(folder: Path, kind: str = "FluxPipeline", **parts: Any) -> Path:
    """As Flux dev, which takes the guidance scale; `parts` replace its own."""
    import diffusers

    own = {
        "text_encoder": text_encoder, "text_encoder_2": t5, "tokenizer": tokenizer, "tokenizer_2": t5_tokenizer,
        "transformer": transformer_flux, "vae": vae_16,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }  # fmt: skip
    made = {name: parts.pop(name) if name in parts else make() for name, make in own.items()}
    getattr(diffusers, kind)(**made, **parts).save_pretrained(folder)
    return folder


def schnell(folder: Path) -> Path:
    """As Flux schnell: no guidance scale, and noise levels that are not shifted."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return flux(folder, transformer=transformer_flux(False), scheduler=FlowMatchEulerDiscreteScheduler())


def variant(checkpoint: Path, folder: Path, scheduler: Any = None, **index: Any) -> Path:
    """A copy of a checkpoint with another scheduler, and other entries in its index."""
    shutil.copytree(checkpoint, folder)
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **index}))
    return folder


def export_like(checkpoint: Path, target: Path, base: Path, **options: Any) -> Path:
    """The bundle of a checkpoint; a graph of the bundle `base` that passes the gate for it is copied, not traced."""
    from sdopt.bundle.files import Bundle
    from sdopt.errors import BackendError, ParityError
    from sdopt.export import component, export, parity

    known, write = Bundle.open(base), component.write_component

    def reuse(build: Any, opened: Any, folder: Path, *rest: Any) -> Any:
        part = build(opened)
        if part.name in known.components:
            there = known.component(part.name)
            if (there.inputs, there.outputs) == (part.inputs, part.outputs):
                try:
                    parity.gate(part, parity.measure(part, there.graph))
                except (ParityError, BackendError):  # another model, or other sizes inside of it
                    return write(build, opened, folder, *rest)
                names = [part.name, *(variant.part.name for variant in part.variants)]
                for file in (file for name in names for file in base.glob(f"{name}.*")):
                    shutil.copy(file, folder)
                return {name: known.manifest.components[name] for name in names}
        return write(build, opened, folder, *rest)

    with mock.patch.object(component, "write_component", reuse):
        return export(checkpoint, target, **{"report": lambda line: None, **options})


def image_encoder(folder: Path, **changes: Any) -> Path:
    """CLIP's image encoder for 18 pixels a side: 10 tokens of 24 features, 16 features in all."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = {
        "hidden_size": 24, "intermediate_size": 40, "projection_dim": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 18, "patch_size": 6,
    }  # fmt: skip
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**{**config, **changes})).save_pretrained(folder)
    return folder


def ip_adapter(file: Path, checkpoint: Path, kind: str = "base", seed: int = 0, **others: Any) -> Path:
    """An IP-Adapter for the UNet of a checkpoint, in the published layout; `others` are further tensors, or None."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    model: Any = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    text, inner, hidden = model.config.cross_attention_dim, 128, 12
    layers = [name.removesuffix(".processor") for name in model.attn_processors if "attn2" in name]
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "base":
        shapes |= {
            "proj.weight": (4 * text, 16),
            "proj.bias": (4 * text,),
            "norm.weight": (text,),
            "norm.bias": (text,),
        }
    elif kind == "full":
        shapes |= {"proj.0.weight": (24, 24), "proj.0.bias": (24,), "proj.2.weight": (text, 24), "proj.2.bias": (text,)}
        shapes |= {"proj.3.weight": (text,), "proj.3.bias": (text,)}
    else:
        shapes |= {"latents": (1, 6, hidden), "proj_in.weight": (hidden, 24), "proj_in.bias": (hidden,)}
        shapes |= {"proj_out.weight": (text, hidden), "proj_out.bias": (text,)}
        shapes |= {"norm_out.weight": (text,), "norm_out.bias": (text,)}
        for i in range(4):
            norms = {
                f"{i}.{name}": (hidden,) for n in ("0.norm1", "0.norm2", "1.0") for name in (f"{n}.weight", f"{n}.bias")
            }
            linears = {"0.to_q": (inner, hidden), "0.to_kv": (2 * inner, hidden), "0.to_out": (hidden, inner)}
            linears |= {"1.1": (4 * hidden, hidden), "1.3": (hidden, 4 * hidden)}
            shapes |= {f"layers.{name}": shape for name, shape in norms.items()}
            shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in linears.items()}
    named = {f"image_proj.{name}": shape for name, shape in shapes.items()}
    for i, layer in enumerate(layers):
        width = model.get_submodule(layer).to_q.out_features
        named |= {f"ip_adapter.{2 * i + 1}.{name}.weight": (width, text) for name in ("to_k_ip", "to_v_ip")}
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: 0.5 * torch.randn(shape, generator=draw) for name, shape in named.items()}
    tensors = {name: tensor for name, tensor in {**tensors, **others}.items() if tensor is not None}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return file
