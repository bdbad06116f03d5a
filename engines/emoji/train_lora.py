"""Teach the embedded model a style: a LoRA that draws emoji as neon signs, in one file, on two CPU cores.

    python engines/emoji/train_lora.py --smoke --out /tmp/neon.safetensors       # everything, in less than a minute
    python engines/emoji/train_lora.py                                             # about half an hour

A style needs no collection of pictures. The model draws emoji itself, a filter makes bright outlines on a dark wall of
each picture, and the LoRA learns to draw the result from the same prompt:

    W' = W + (alpha / r) up @ down          Hu et al. 2021, arXiv:2106.09685

Only `up` and `down` are trained, of every linear and convolution of the UNet's attentions and residual blocks. They are
written under the names of kohya's sd-scripts. A run that was killed continues with --resume.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from data import COLOURS, load_emoji
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import sdopt

HERE = Path(__file__).parent
WALL = (0.04, 0.03, 0.12)
RANK = 4
NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2")


class Lora(nn.Module):
    """A linear or a convolution with a change of low rank beside it, which begins at zero."""

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        if isinstance(base, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(
                base.in_channels, RANK, base.kernel_size, base.stride, base.padding, bias=False
            )
            self.up: nn.Module = nn.Conv2d(RANK, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, RANK, bias=False)
            self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=1 / RANK)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # alpha is the rank, so the scale is 1


def add_lora(unet: UNet2DConditionModel) -> dict[str, Lora]:
    """Put a LoRA beside every target of the UNet; path -> LoRA."""
    added: dict[str, Lora] = {}
    for path, module in list(unet.named_modules()):
        if path.endswith(TARGETS) and isinstance(module, (nn.Linear, nn.Conv2d)):
            parent, _, name = path.rpartition(".")
            added[path] = Lora(module)
            setattr(unet.get_submodule(parent), name, added[path])
    return added


def neon(picture: np.ndarray) -> np.ndarray:
    """A picture [height, width, 3] in 0..1 as a neon sign: where colours change, a bright line of these colours."""
    blurred = np.asarray(Image.fromarray((picture * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.2)))
    rises = [np.abs(np.roll(blurred / 255, -2, axis) - np.roll(blurred / 255, 2, axis)) for axis in (0, 1)]
    line = np.clip(1.6 * (rises[0] + rises[1]).max(axis=-1, keepdims=True), 0, 1)
    return np.clip(np.array(WALL) + line * (0.35 + 0.9 * picture), 0, 1).astype(np.float32)


def make_data(count: int, path: Path) -> dict[str, Tensor]:
    """Latents of styled pictures [n, 4, 16, 16] and embeddings of their prompts [n, tokens, width], kept in a file."""
    if path.exists():
        return torch.load(path)
    pipe, emoji, colours = sdopt.load(), load_emoji(), list(COLOURS)
    latents, contexts = [], []
    for i in range(count):
        e, colour = emoji[i % len(emoji)], colours[(i * 7 + i // len(emoji)) % len(colours)]
        prompt = f"a {e.name}" if colour == "white" else f"a {e.name} on a {colour} background"
        picture = pipe(prompt, seed=i, num_inference_steps=12, output_type="np").images
        with pipe.pool.using("vae_encoder") as encoder:
            styled = neon(picture[0]).transpose(2, 0, 1)[None] * 2 - 1
            mean = encoder(sample=np.ascontiguousarray(styled, np.float32))["mean"]
        latents.append(mean * pipe.bundle.manifest.latents.scaling_factor)
        contexts.append(pipe.encode([prompt]))
        if (i + 1) % 50 == 0:
            print(f"picture {i + 1}/{count}", flush=True)
    data = {
        "latents": torch.from_numpy(np.concatenate(latents)),
        "contexts": torch.from_numpy(np.concatenate(contexts)),
    }
    write(path, {**data, "empty": torch.from_numpy(pipe.encode([""]))})
    return torch.load(path)


def write(path: Path, state: dict) -> None:
    """Save, never leaving half a file behind."""
    torch.save(state, path.with_suffix(".incomplete"))
    os.replace(path.with_suffix(".incomplete"), path)


def train(
    data: dict[str, Tensor], loras: dict[str, Lora], unet: UNet2DConditionModel, args: argparse.Namespace
) -> None:
    """Predict v of noisy latents, as the model was trained (Salimans & Ho 2022); one prompt in ten is empty."""
    weights = [p for lora in loras.values() for p in (lora.down.weight, lora.up.weight)]
    optimizer = torch.optim.AdamW(weights, lr=args.rate, weight_decay=0.01)
    process, path, first = DDPMScheduler(**NOISE), args.run / "lora.pt", 0
    if path.exists():
        state = torch.load(path)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        for weight, saved in zip(weights, state["weights"], strict=True):
            weight.data.copy_(saved)
    recent: list[float] = []
    for step in range(first, args.steps):
        torch.manual_seed(step)
        which = torch.randint(len(data["latents"]), (args.batch,))
        clean, context = data["latents"][which], data["contexts"][which]
        context = torch.where(torch.rand(args.batch, 1, 1) < 0.1, data["empty"], context)
        t = (1000 * ((torch.arange(args.batch) + torch.rand(args.batch)) / args.batch)).long()
        noise = torch.randn_like(clean)
        predicted = unet(process.add_noise(clean, noise, t), t, context).sample
        loss = F.mse_loss(predicted, process.get_velocity(clean, noise, t))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 50) * (0.505 + 0.495 * math.cos(math.pi * step / args.steps))
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{args.steps}  loss {np.mean(recent[-50:]):.4f}", flush=True)
            saved = {"step": step + 1, "weights": [w.data for w in weights], "optimizer": optimizer.state_dict()}
            write(path, saved)


def save(loras: dict[str, Lora], path: Path) -> None:
    """Write a kohya file in float16."""
    tensors: dict[str, Tensor] = {}
    for module, lora in loras.items():
        stem = "lora_unet_" + module.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = lora.down.weight.data.half().contiguous()
        tensors[f"{stem}.lora_up.weight"] = lora.up.weight.data.half().contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(float(RANK))
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": str(RANK), "ss_network_alpha": str(RANK),
        "ss_base_model_version": "sdopt emoji", "modelspec.title": "emoji as neon signs",
        "modelspec.license": "Apache-2.0",
        "ss_training_comment": json.dumps({"pictures": "the model's own, their outlines"}),
    }  # fmt: skip
    save_file(tensors, path, metadata)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, {len(loras)} modules")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "neon.safetensors")
    parser.add_argument("--run", type=Path, help="state of the run [OUT.run]")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--pictures", type=int, default=960)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    args.run = args.run or args.out.with_suffix(".run")
    if args.smoke:
        args.pictures, args.steps, args.batch = 4, 3, 4
    args.run.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for name in ("lora.pt", "data.pt"):
            (args.run / name).unlink(missing_ok=True)
    data = make_data(args.pictures, args.run / "data.pt")
    unet = UNet2DConditionModel.from_pretrained(HERE / "checkpoint" / "unet", torch_dtype=torch.float32)
    unet.requires_grad_(False)
    torch.manual_seed(0)
    loras = add_lora(unet)
    train(data, loras, unet, args)
    save(loras, args.out)


if __name__ == "__main__":
    main()
