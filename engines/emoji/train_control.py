"""Teach the embedded model to draw in a given shape: a ControlNet that sees silhouettes, on two CPU cores.

    python engines/emoji/train_control.py --smoke --out /tmp/silhouette     # everything, in a minute
    python engines/emoji/train_control.py                                     # an hour or two

The model has learnt four poses, with which its seeds play. Here the font's pictures are drawn in any size, place and
tilt, and the ControlNet sees what is covered, white on black. The UNet stays as it is; a copy of its downward path
learns residuals that begin at zero (Zhang et al. 2023, arXiv:2302.05543). A run that was killed continues with
--resume.
"""

import argparse
import math
import os
import random
from pathlib import Path

import numpy as np
import torch
from data import COLOURS, SIZE, caption, load_emoji, load_glyphs, render
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
HINT_CHANNELS = (8, 16, 24, 32)  # of the layers that see the silhouette; each but the first halves it


def any_poses(n: int) -> Tensor:
    """Poses [n, 4]: size, shift right, shift down, tilt; the whole emoji stays in the picture."""
    size = torch.empty(n).uniform_(0.4, 0.95)
    right, down = torch.empty(2, n).uniform_(-1, 1) * (1 - size)
    return torch.stack([size, right, down, torch.empty(n).uniform_(-0.6, 0.6)], dim=1)


@torch.no_grad()
def make_data(count: int, path: Path) -> dict[str, Tensor]:
    """Latents [n, 4, 16, 16], silhouettes [n, SIZE, SIZE] and embeddings [n, tokens, width], kept in a file."""
    if path.exists():
        return torch.load(path)
    vae = AutoencoderKL.from_pretrained(CHECKPOINT / "vae", torch_dtype=torch.float32).eval()
    encoder = CLIPTextModel.from_pretrained(CHECKPOINT / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    emoji = load_emoji()
    glyphs, colours, rng = load_glyphs(emoji), list(COLOURS), random.Random(0)
    torch.manual_seed(0)
    parts: dict[str, list[Tensor]] = {"latents": [], "silhouettes": [], "contexts": []}
    for first in range(0, count, 32):
        which = [i % len(emoji) for i in range(first, first + 32)]
        chosen, poses = [rng.choice(colours) for _ in which], any_poses(len(which))
        plain = torch.tensor([COLOURS[c] for c in chosen]) / 255
        own = glyphs[which]
        covered = torch.cat([own[:, 3:].expand(-1, 3, -1, -1), own[:, 3:]], 1)  # the glyph in white
        seen = render(covered, torch.zeros(len(which), 3), poses)[:, 0] > 0
        latents = vae.encode(render(own, plain, poses)).latent_dist.mean * vae.config.scaling_factor
        texts = [caption(emoji[e], c, rng) for e, c in zip(which, chosen, strict=True)]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for name, tensor in zip(parts, (latents, seen, encoder(ids).last_hidden_state), strict=True):
            parts[name].append(tensor)
        if first % 960 == 0:
            print(f"picture {first}/{count}", flush=True)
    data = {name: torch.cat(tensors) for name, tensors in parts.items()}
    write(path, data)
    return data


def write(path: Path, state: dict) -> None:
    """Save, never leaving half a file behind."""
    torch.save(state, path.with_suffix(".incomplete"))
    os.replace(path.with_suffix(".incomplete"), path)


def train(data: dict[str, Tensor], net: ControlNetModel, unet: UNet2DConditionModel, args: argparse.Namespace) -> None:
    """Predict v of noisy latents, as the model was trained (Salimans & Ho 2022)."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.rate, weight_decay=0.01)
    process, path, first = DDPMScheduler(**NOISE), args.run / "net.pt", 0
    if path.exists():
        state = torch.load(path)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        net.load_state_dict(state["net"])
    recent: list[float] = []
    for step in range(first, args.steps):
        torch.manual_seed(step)
        which = torch.randint(len(data["latents"]), (args.batch,))
        clean, context = data["latents"][which], data["contexts"][which]
        seen = data["silhouettes"][which][:, None].float().expand(-1, 3, -1, -1)
        t = (1000 * ((torch.arange(args.batch) + torch.rand(args.batch)) / args.batch)).long()
        noise = torch.randn_like(clean)
        noisy = process.add_noise(clean, noise, t)
        down, mid = net(noisy, t, context, seen, return_dict=False)
        predicted = unet(
            noisy, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        loss = F.mse_loss(predicted, process.get_velocity(clean, noise, t))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 50) * (0.505 + 0.495 * math.cos(math.pi * step / args.steps))
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}/{args.steps}  loss {np.mean(recent[-25:]):.4f}", flush=True)
            write(path, {"step": step + 1, "net": net.state_dict(), "optimizer": optimizer.state_dict()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "silhouette", help="the folder of the ControlNet")
    parser.add_argument("--run", type=Path, help="state of the run [OUT.run]")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--pictures", type=int, default=5152)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.run = args.run or args.out.with_suffix(".run")
    if args.smoke:
        args.pictures, args.steps, args.batch = 32, 3, 4
    args.run.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for name in ("net.pt", "data.pt"):
            (args.run / name).unlink(missing_ok=True)
    data = make_data(args.pictures, args.run / "data.pt")
    unet = UNet2DConditionModel.from_pretrained(CHECKPOINT / "unet", torch_dtype=torch.float32).requires_grad_(False)
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
    train(data, net, unet, args)
    net.half().save_pretrained(args.out)
    megabytes = sum(path.stat().st_size for path in args.out.iterdir()) / 1e6
    print(f"{args.out}: {megabytes:.1f} MB, {SIZE}x{SIZE}")


if __name__ == "__main__":
    main()
