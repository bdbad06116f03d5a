"""Train a small Stable Diffusion from nothing: text to emoji, in one file, on two CPU cores or a GPU.

    python engines/emoji/train.py --smoke --out /tmp/emoji                   # everything, in less than a minute
    python engines/emoji/train.py                                            # a CPU, about two hours
    python engines/emoji/train.py --device cuda --every-emoji --poses 16 --batch 256 --denoiser-steps 40000

The parts are those of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022):

    picture --encoder--> latents (4 x 16 x 16) --decoder--> picture          phase 1, and phase 3 for the decoder alone
    caption --text encoder--> context --cross-attention--> UNet              phase 2, on cached latents

`data.py` has pictures, captions and tokenizer, `muon.py` the optimizer. A run that was killed continues with --resume:
each step draws its randomness from its own number. Where others use the same cores, set OMP_WAIT_POLICY=passive.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from data import CONTEXT, SIZE, Pictures, load_emoji, train_tokenizer
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from muon import optimizers_for
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 128  # of the text encoder: numbers a token
NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
GENERATION = dict(num_inference_steps=20, guidance_scale=4.0)  # of its best pictures

# --- Models: the four networks of latent diffusion, small -------------------------------------------------------------


def new_autoencoder() -> AutoencoderKL:
    """A factor of 8 and 4 channels, as Stable Diffusion's. Residual branches start at zero, the latents' noise low."""
    autoencoder = AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=2,
    )
    for name, parameter in autoencoder.named_parameters():
        if ".conv2." in name:
            nn.init.zeros_(parameter)
    nn.init.constant_(autoencoder.quant_conv.bias[4:], -5)
    return autoencoder


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(32, 96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads: diffusers keeps the name for old checkpoints
        norm_num_groups=8,
    )


# --- The training loop, the same for every phase ----------------------------------------------------------------------


def fit(phase: str, network: nn.Module, loss_of: Callable[[], Tensor], steps: int, rate: float, half: bool, args):
    """Minimise `loss_of()` with warm-up and cosine decay, then leave the average of the weights in the network.

    The exponential moving average is that of Ho et al. (2020), with a ramp. The state of the run is written every two
    minutes, and every step seeds its own noise, so a resumed run takes the same steps as one that never stopped.
    """
    path = args.run / f"{phase}.pt"
    weights = [p for p in network.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in weights]
    optimizers = optimizers_for(network, rate)
    first, losses = 0, []
    if path.exists():
        state = torch.load(path, map_location=args.device)
        network.load_state_dict(state["network"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average, losses, first = state["average"], state["losses"], state["step"]

    def save(step: int) -> None:
        state = dict(network=network.state_dict(), optimizers=[o.state_dict() for o in optimizers])
        write(path, state | dict(average=average, losses=losses, step=step))
        plot(losses, f"{phase}: loss", args.run / f"{phase}.png")

    recent, told, saved = [], time.monotonic(), time.monotonic()
    for step in range(first, steps):
        random.seed(step)
        torch.manual_seed(step)
        for group in [g for optimizer in optimizers for g in optimizer.param_groups]:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
        with torch.autocast(args.device, torch.bfloat16, enabled=half):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for mean, weight in zip(average, weights, strict=True):
            mean.lerp_(weight.detach(), 1 - min(0.997, (1 + step) / (10 + step)))
        recent.append(loss.detach())
        if (step + 1) % 50 == 0:
            losses.append((step + 1, torch.stack(recent).mean().item()))
            seconds, told, recent = (time.monotonic() - told) / len(recent), time.monotonic(), []
            print(f"{phase:11s} {step + 1:6d}/{steps}  loss {losses[-1][1]:.4f}  {seconds:.3f} s a step", flush=True)
        if time.monotonic() - saved > 120:
            save(step + 1)
            saved = time.monotonic()
    if first < steps:
        save(steps)
    for weight, mean in zip(weights, average, strict=True):
        weight.data.copy_(mean)


def write(path: Path, state: dict) -> None:
    """Save, never leaving half a file behind."""
    torch.save(state, path.with_suffix(".incomplete"))
    os.replace(path.with_suffix(".incomplete"), path)


def plot(losses: list[tuple[int, float]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True) if losses else ([], []))
    axes.set(title=title, xlabel="step", yscale="log")
    figure.savefig(path)


# --- Phase 1: the autoencoder -----------------------------------------------------------------------------------------


def picture_loss(made: Tensor, real: Tensor) -> Tensor:
    """Colours, and the differences of neighbours: outlines."""
    error = made.float() - real
    outlines = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * outlines


def train_autoencoder(pictures: Pictures, args) -> AutoencoderKL:
    torch.manual_seed(1)
    autoencoder = new_autoencoder().to(args.device, memory_format=torch.channels_last)

    def loss() -> Tensor:
        real = channels_last(pictures[torch.randint(len(pictures), (args.picture_batch,))])
        latents = autoencoder.encode(real).latent_dist
        kl = latents.kl().mean() / latents.mean[0].numel()
        return picture_loss(autoencoder.decode(latents.sample()).sample, real) + 2e-4 * kl

    fit("autoencoder", autoencoder, loss, args.autoencoder_steps, 3e-3, True, args)
    return autoencoder.eval()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def cache_latents(autoencoder: AutoencoderKL, pictures: Pictures, args) -> Tensor:
    """The latents of every picture, scaled to a variance of one; the scale becomes part of the autoencoder."""
    path = args.run / "latents.pt"
    if not path.exists():
        with torch.autocast(args.device, torch.bfloat16):
            batches = torch.arange(len(pictures)).split(64)
            latents = torch.cat([autoencoder.encode(channels_last(pictures[i])).latent_dist.mean for i in batches])
        write(path, dict(latents=latents.float()))
    latents = torch.load(path, map_location=args.device)["latents"]
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * autoencoder.config.scaling_factor


@torch.no_grad()
def psnr(autoencoder: AutoencoderKL, latents: Tensor, pictures: Pictures) -> float:
    """How exactly the decoder gives pictures back, in decibels."""
    batches = torch.arange(0, len(pictures), max(1, len(pictures) // 256)).split(32)
    scale = autoencoder.config.scaling_factor
    errors = [(autoencoder.decode(latents[i] / scale).sample.clamp(-1, 1) - pictures[i]) / 2 for i in batches]
    return -10 * torch.cat(errors).square().mean().log10().item()


# --- Phase 2: the denoiser and its text encoder -----------------------------------------------------------------------


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_denoiser(latents: Tensor, pictures: Pictures, tokenizer: CLIPTokenizer, args):
    """The UNet learns v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents (Salimans & Ho 2022)."""
    torch.manual_seed(2)
    unet = new_unet().to(args.device, memory_format=torch.channels_last)
    text_encoder = new_text_encoder(tokenizer).to(args.device)
    forward_process = DDPMScheduler(**NOISE)

    def loss() -> Tensor:
        which = pictures.training[torch.randint(len(pictures.training), (args.batch,))]
        clean = channels_last(latents[which])
        noise = torch.randn_like(clean)
        spread = (torch.randperm(args.batch) + torch.rand(args.batch)) / args.batch  # stratified: every level of noise
        t = (1000 * spread**0.7).long().to(args.device)
        context = text_encoder(tokenize(tokenizer, pictures.captions(which)).to(args.device)).last_hidden_state
        v = unet(forward_process.add_noise(clean, noise, t), t, context).sample
        return F.mse_loss(v.float(), forward_process.get_velocity(clean, noise, t))

    network = nn.ModuleDict(dict(unet=unet, text_encoder=text_encoder))
    half = args.device != "cpu"  # on a CPU, bfloat16 makes large pictures faster and small latents slower
    fit("denoiser", network, loss, args.denoiser_steps, args.rate, half, args)
    return unet.eval(), text_encoder.eval()


# --- Phase 3: the decoder alone ---------------------------------------------------------------------------------------


def train_decoder(autoencoder: AutoencoderKL, latents: Tensor, pictures: Pictures, args) -> None:
    """Go on with the decoder where the encoder stands still, on latents as inexact as the UNet's."""
    autoencoder.encoder.requires_grad_(False)
    autoencoder.quant_conv.requires_grad_(False)

    def loss() -> Tensor:
        which = torch.randint(len(pictures), (args.picture_batch,))
        inexact = latents[which] + 0.07 * torch.randn_like(latents[which])
        made = autoencoder.decode(channels_last(inexact / autoencoder.config.scaling_factor)).sample
        return picture_loss(made, channels_last(pictures[which]))

    fit("decoder", autoencoder, loss, args.decoder_steps, 2e-3, True, args)


# --- The checkpoint, and the command line -----------------------------------------------------------------------------


def save_checkpoint(parts: dict, folder: Path) -> None:
    """Write a `StableDiffusionPipeline` in float16, with the sampler, steps and guidance that suit it best."""
    for network in (parts["vae"], parts["text_encoder"], parts["unet"]):
        network.to("cpu", torch.float16, memory_format=torch.contiguous_format)
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    absent = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    StableDiffusionPipeline(**parts, scheduler=scheduler, **absent).save_pretrained(folder)
    weights = folder / "text_encoder" / "model.safetensors"  # transformers 4 looks for the names that CLIP has had
    renamed = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in load_file(weights).items()}
    save_file(renamed, weights, {"format": "pt"})
    for file in ("vocab.json", "merges.txt"):  # transformers 5 leaves these two out, and others want them
        shutil.copy(Path(parts["tokenizer"].name_or_path) / file, folder / "tokenizer")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "checkpoint", help="the checkpoint, in diffusers format"
    )
    parser.add_argument("--run", type=Path, help="state of the run, loss plots [OUT.run]")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every-emoji", action="store_true", help="all one-code-point emoji, not those of emoji.txt")
    parser.add_argument("--poses", type=int, default=4, help="places, sizes and tilts of each emoji on each colour")
    parser.add_argument("--picture-batch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="of latents")
    parser.add_argument("--rate", type=float, default=3e-3, help="the denoiser's learning rate")
    parser.add_argument("--autoencoder-steps", type=int, default=3000)
    parser.add_argument("--denoiser-steps", type=int, default=6500)
    parser.add_argument("--decoder-steps", type=int, default=900)
    args = parser.parse_args()
    args.run = args.run or args.out.with_name(args.out.name + ".run")
    if args.smoke:
        args.picture_batch, args.batch = 4, 16
        args.autoencoder_steps = args.denoiser_steps = args.decoder_steps = 6
    if not args.resume:
        shutil.rmtree(args.run, ignore_errors=True)
    args.run.mkdir(parents=True, exist_ok=True)

    emoji = load_emoji(args.every_emoji)[: 12 if args.smoke else None]
    pictures = Pictures(emoji, args.poses, args.device)
    print(f"{len(emoji)} emoji, {len(pictures)} pictures, {len(pictures.training)} of them for the denoiser")
    autoencoder = train_autoencoder(pictures, args)
    latents = cache_latents(autoencoder, pictures, args)
    print(f"autoencoder: PSNR {psnr(autoencoder, latents, pictures):.2f} dB")
    tokenizer = train_tokenizer(emoji, args.run / "tokenizer")
    unet, text_encoder = train_denoiser(latents, pictures, tokenizer, args)
    train_decoder(autoencoder, latents, pictures, args)
    print(f"decoder: PSNR {psnr(autoencoder, latents, pictures):.2f} dB")
    parts = dict(vae=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
    save_checkpoint(parts, args.out)


if __name__ == "__main__":
    main()
