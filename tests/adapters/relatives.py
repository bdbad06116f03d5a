"""Tiny random ControlNets and their relatives, for the tiny UNets of `tests.tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def awake(model: Any, strength: float = 0.2) -> Any:
    """The model with random numbers where training begins with zeros."""
    import torch

    torch.manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=strength)
    return model.eval()


def controlnet(unet: Any, **changes: Any) -> Any:
    """A ControlNet of a tiny UNet, with random zero convolutions."""
    import torch
    from diffusers import ControlNetModel

    torch.manual_seed(2)
    net = ControlNetModel.from_unet(unet, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32))
    if changes:
        net = ControlNetModel(**{**net.config, **changes})
    return awake(net)


def original(model: Any, prefix: str = "control_model.") -> dict[str, Any]:
    """The tensors of a ControlNet (of one layer in each block) under the names of the original code."""
    from tests.export import ldm

    tensors = model.state_dict()
    hints = len({name.split(".")[2] for name in tensors if name.startswith("controlnet_cond_embedding.blocks.")})
    made: dict[str, Any] = {}
    for name, tensor in tensors.items():
        module, leaf = name.rsplit(".", 1)
        match module.split("."):
            case ["controlnet_mid_block"]:
                there = "middle_block_out.0"
            case ["controlnet_down_blocks", number]:
                there = f"zero_convs.{number}.0"
            case ["controlnet_cond_embedding", "blocks", number]:
                there = f"input_hint_block.{2 + 2 * int(number)}"
            case ["controlnet_cond_embedding", end]:
                there = f"input_hint_block.{0 if end == 'conv_in' else 2 + 2 * hints}"
            case _:
                there, leaf = ldm.unet_name(name, set()).rsplit(".", 1)
        made[f"{prefix}{there}.{leaf}"] = tensor.contiguous()
    return made


def save(tensors: dict[str, Any], path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path)
    return path


def t2i_adapter(seed: int = 4, **changes: Any) -> Any:
    """A T2I-Adapter of a tiny UNet of three blocks."""
    import torch
    from diffusers import T2IAdapter

    torch.manual_seed(seed)
    config = {"in_channels": 3, "channels": [12, 28, 28], "num_res_blocks": 1, "downscale_factor": 2, **changes}
    return T2IAdapter(**config).eval()
