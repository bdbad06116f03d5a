"""Teach a tiny autoencoder the latents of the embedded model, on one CPU core.

    python engines/emoji/train_tiny.py --smoke --out /tmp/tiny     # everything, in a minute
    python engines/emoji/train_tiny.py                              # about half an hour

It is an AutoencoderTiny of few channels (github.com/madebyollin/taesd). Its decoder learns what the model's own
decoder makes of latents: of the font's pictures, and of pictures that the UNet draws. Its encoder learns the mean that
the model's own encoder gives. Both see crops, because they have convolutions alone. A run that was killed continues
with --resume.
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
from data import COLOURS, SIZE, caption, load_emoji, load_glyphs, render
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from train_control import any_poses, write

import sdopt

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
FACTOR = 8  # pixels for each latent
CROP = 8  # latents a side
EDGES = 0.5  # weight of the differences between neighbours


def new_autoencoder(channels: int) -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 4,
        decoder_block_out_channels=(channels,) * 4,
        num_encoder_blocks=(1, 2, 3, 3),
        num_decoder_blocks=(3, 3, 2, 1),
    )


@torch.no_grad()
def make_data(count: int, drawn: int, path: Path) -> dict[str, Tensor]:
    """Latents [n, 4, 16, 16], scaled as the UNet's, and pictures [n, 3, SIZE, SIZE] of them, kept in a file.

    `count` latents are the font's, `drawn` ones the UNet's.
    """
    if path.exists():
        return torch.load(path)
    vae = AutoencoderKL.from_pretrained(CHECKPOINT / "vae", torch_dtype=torch.float32).eval()
    emoji, colours, rng = load_emoji(), list(COLOURS), random.Random(0)
    glyphs, pipe = load_glyphs(emoji), sdopt.load(HERE / "bundle")
    torch.manual_seed(0)
    parts: dict[str, list[Tensor]] = {"latents": [], "pictures": []}
    for first in range(0, count + drawn, 32):
        chosen = [(rng.randrange(len(emoji)), rng.choice(colours)) for _ in range(32)]
        if first < count:
            plain = torch.tensor([COLOURS[colour] for _, colour in chosen]) / 255
            pictures = render(glyphs[[which for which, _ in chosen]], plain, any_poses(32))
            latents = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
        else:
            prompts = [caption(emoji[which], colour, rng) for which, colour in chosen]
            latents = torch.from_numpy(pipe(prompts, seed=first, num_inference_steps=8, output_type="latent").images)
        parts["latents"].append(latents)
        parts["pictures"].append(vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1).half())
        print(f"picture {first}/{count + drawn}", flush=True)
    data = {name: torch.cat(tensors) for name, tensors in parts.items()}
    write(path, data)
    return data


def crops(data: dict[str, Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """Latents [batch, 4, CROP, CROP] and their pictures."""
    which = torch.randint(len(data["latents"]), (batch,)).tolist()
    places = torch.randint(data["latents"].shape[-1] - CROP + 1, (batch, 2)).tolist()
    latents, pictures, side = [], [], CROP * FACTOR
    for i, (y, x) in zip(which, places, strict=True):
        latents.append(data["latents"][i, :, y : y + CROP, x : x + CROP])
        y, x = y * FACTOR, x * FACTOR
        pictures.append(data["pictures"][i, :, y : y + side, x : x + side].float())
    return torch.stack(latents), torch.stack(pictures)


def picture_loss(made: Tensor, real: Tensor) -> Tensor:
    """L1 of pictures, and of the differences between neighbours, which keep edges sharp."""
    difference = made - real
    return difference.abs().mean() + EDGES * (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean())


def fit(side: str, model: AutoencoderTiny, data: dict[str, Tensor], steps: int, args: argparse.Namespace) -> None:
    network: nn.Module = getattr(model, side)
    optimizer, path, first = torch.optim.AdamW(network.parameters(), lr=args.rate), args.run / f"{side}.pt", 0
    if path.exists():
        state = torch.load(path)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        network.load_state_dict(state["network"])
    recent: list[float] = []
    for step in range(first, steps):
        torch.manual_seed(step)
        latents, pictures = crops(data, args.batch)
        is_decoder = side == "decoder"
        loss = picture_loss(network(latents), pictures) if is_decoder else F.l1_loss(network(pictures), latents)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 50) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"{side} step {step + 1}/{steps}  loss {np.mean(recent[-50:]):.4f}", flush=True)
            write(path, {"step": step + 1, "network": network.state_dict(), "optimizer": optimizer.state_dict()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "tiny", help="the folder of the autoencoder")
    parser.add_argument("--run", type=Path, help="state of the run [OUT.run]")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--pictures", type=int, default=960, help="of the font")
    parser.add_argument("--drawn", type=int, default=256, help="by the UNet")
    parser.add_argument("--steps", type=int, default=3000, help="of the decoder; the encoder makes a third of them")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--channels", type=int, default=16)
    args = parser.parse_args()
    args.run = args.run or args.out.with_suffix(".run")
    if args.smoke:
        args.pictures, args.drawn, args.steps, args.batch = 32, 32, 3, 4
    args.run.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for name in ("data.pt", "decoder.pt", "encoder.pt"):
            (args.run / name).unlink(missing_ok=True)
    data = make_data(args.pictures, args.drawn, args.run / "data.pt")
    torch.manual_seed(0)
    model = new_autoencoder(args.channels)
    fit("decoder", model, data, args.steps, args)
    fit("encoder", model, data, -(-args.steps // 3), args)
    model.half().save_pretrained(args.out)
    megabytes = sum(path.stat().st_size for path in args.out.iterdir()) / 1e6
    print(f"{args.out}: {megabytes:.2f} MB, {SIZE}x{SIZE}")


if __name__ == "__main__":
    main()
