"""How much of a UNet a shallow call of a feature cache computes: its share of the multiply-adds, by depth.

    python benchmarks/cache_macs.py          Stable Diffusion 1.5 at 512x512, SDXL at 1024x1024; no weights are needed

Counted by PyTorch on tensors without numbers, with both halves of guidance. What a call skips is what
`sdopt.build.shallow` cuts off.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

DEPTHS = (1, 2, 3, 4)
SDXL: dict[str, Any] = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5, 512x512": {"sample_size": 64, "cross_attention_dim": 768},
    "SDXL, 1024x1024": SDXL,
}


def counts(config: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """The UNet, and the operations of each of its modules in one call, by name; "" is all of it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).eval()
        size = config["sample_size"]
        text = torch.zeros(2, 77, config["cross_attention_dim"])
        more = {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.zeros(2, 6)}
        counter = FlopCounterMode(display=False, depth=None)  # pyright: ignore[reportArgumentType]
        with counter, torch.no_grad():
            unet(torch.zeros(2, 4, size, size), torch.tensor(500), text, added_cond_kwargs=more)
    own = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return unet, {**own, "": counter.get_total_flops()}


def shares(config: dict[str, Any]) -> list[float]:
    """The share of a shallow call at each depth."""
    unet, ops = counts(config)
    up: list[int] = []  # of the last layer first, with what enlarges its result for the block above
    for block in range(len(unet.up_blocks) - 1, -1, -1):
        for layer in range(len(unet.up_blocks[block].resnets) - 1, -1, -1):
            names = [f"up_blocks.{block}.{kind}.{layer}" for kind in ("resnets", "attentions")]
            is_last = layer == len(unet.up_blocks[block].resnets) - 1
            names += [f"up_blocks.{block}.upsamplers.0"] if is_last else []
            up.append(sum(ops.get(name, 0) for name in names))
    down = [0]  # the first skip is that of `conv_in`
    for block, module in enumerate(unet.down_blocks):
        for layer in range(len(module.resnets)):
            down.append(sum(ops.get(f"down_blocks.{block}.{kind}.{layer}", 0) for kind in ("resnets", "attentions")))
        down.append(ops.get(f"down_blocks.{block}.downsamplers.0", 0))
    ends = sum(ops.get(name, 0) for name in ("conv_in", "conv_out", "time_embedding", "add_embedding"))
    return [(ends + sum(up[:depth]) + sum(down[:depth])) / ops[""] for depth in DEPTHS]


def main() -> None:
    print(f"{'depth':<32}" + "".join(f"{depth:>8}" for depth in DEPTHS))
    for name, config in MODELS.items():
        print(f"{name:<32}" + "".join(f"{share:>8.1%}" for share in shares(config)))


if __name__ == "__main__":
    main()
