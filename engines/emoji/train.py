"""Train a small Stable Diffusion from nothing: text to emoji, in one file, on two CPU cores or a GPU.

    python engines/emoji/train.py --smoke --out /tmp/emoji                   # everything, in less than a minute
    python engines/emoji/train.py --warm-start older/checkpoint              # a CPU, about an hour
    python engines/emoji/train.py --device cuda --every-emoji --random-poses 8 --batch 256 --denoiser-steps 40000

The parts are those of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022):

    picture --encoder--> latents (4 x 16 x 16) --decoder--> picture          phase 1, and phase 3 for the decoder alone
    caption --text encoder--> context --cross-attention--> UNet              phase 2, on cached latents

A run that was killed continues with `--resume`: each step draws its randomness from its own number.
Where others use the same cores, set OMP_WAIT_POLICY=passive: threads that spin while they wait slow each other down.
"""

import argparse
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # SIL Open Font License 1.1
SIZE = 128  # pixels a side
WIDTH, CONTEXT = 128, 32  # of the text encoder: numbers a token, tokens a caption
COLOURS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "gray": (150, 150, 150),
    "red": (222, 40, 40),
    "orange": (255, 140, 30),
    "yellow": (255, 230, 90),
    "green": (40, 165, 70),
    "blue": (40, 85, 225),
    "purple": (135, 60, 180),
    "pink": (250, 165, 200),
}

# --- Data: glyphs, poses, pictures, captions --------------------------------------------------------------------------


@dataclass(frozen=True)
class Emoji:
    char: str
    name: str
    aliases: tuple[str, ...] = ()


def load_bitmaps() -> dict[str, bytes]:
    """The pictures in the font, PNG files of 136 x 128 pixels, by character."""
    from fontTools.ttLib import TTFont

    font = TTFont(FONT)
    strike = font["CBDT"].strikeData[0]
    return {chr(code): strike[glyph].imageData for code, glyph in font.getBestCmap().items() if glyph in strike}


def load_emoji(every: bool = False) -> list[Emoji]:
    """The emoji of `emoji.txt` (or every one-code-point emoji of the font) with their Unicode names and aliases."""
    import emoji

    def words(code: str) -> str:
        return code.strip(":").replace("_", " ").replace("-", " ").replace("’", "'").lower()

    lines = (HERE / "emoji.txt").read_text().splitlines()
    chars = [c for line in lines if not line.startswith("#") for c in line.split()[1:]]
    if every:
        chars = [c for c in load_bitmaps() if c in emoji.EMOJI_DATA]
    data = {c: emoji.EMOJI_DATA.get(c) or emoji.EMOJI_DATA[c + "\ufe0f"] for c in chars}
    names = {c: words(data[c]["en"]) for c in chars}
    uses = Counter([*names.values(), *(words(a) for c in chars for a in data[c].get("alias", []))])

    def aliases(c: str) -> tuple[str, ...]:
        found = {words(a) for a in data[c].get("alias", [])}
        return tuple(sorted(a for a in found if re.fullmatch(r"[a-z ]{3,}", a) and uses[a] == 1 and a != "shit"))

    return [Emoji(c, names[c], aliases(c)) for c in chars]


def load_glyphs(emoji: list[Emoji]) -> Tensor:
    """The font's bitmaps, cropped and centred: [N, 4, SIZE, SIZE], red, green and blue premultiplied by alpha, 0..1."""
    bitmaps = load_bitmaps()
    glyphs = []
    for e in emoji:
        bitmap = Image.open(io.BytesIO(bitmaps[e.char])).convert("RGBA")
        bitmap = bitmap.crop(bitmap.getchannel("A").getbbox())
        square = Image.new("RGBA", (max(bitmap.size),) * 2)
        square.paste(bitmap, tuple((max(bitmap.size) - side) // 2 for side in bitmap.size))
        glyphs.append(np.asarray(square.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(glyphs)).permute(0, 3, 1, 2).float() / 255


PLACES = torch.tensor([[0.86, 0.0, 0.0, 0.0]])  # the usual pose: size, shift right and down (in half sides), tilt


def free_poses(n: int) -> Tensor:
    """Random poses [n, 4]: size, shift right, shift down (in half sides of the picture), tilt."""
    size = torch.empty(n).uniform_(0.72, 0.98)
    right, down = torch.empty(2, n).uniform_(-1, 1) * (1.02 - size)
    return torch.stack([size, right, down, torch.empty(n).uniform_(-12, 12).deg2rad()], dim=1)


def render(glyphs: Tensor, colours: Tensor, poses: Tensor) -> Tensor:
    """Draw each glyph in its pose over its colour [n, 3]: pictures [n, 3, SIZE, SIZE] in -1..1."""
    size, right, down, tilt = poses.unbind(1)
    cos, sin = tilt.cos() / size, tilt.sin() / size
    inverse = torch.stack([cos, sin, -cos * right - sin * down, -sin, cos, sin * right - cos * down], 1).view(-1, 2, 3)
    rgba = F.grid_sample(glyphs, F.affine_grid(inverse, glyphs.shape, align_corners=False), align_corners=False)
    return (rgba[:, :3] + (1 - rgba[:, 3:]) * colours[:, :, None, None]).clamp(0, 1) * 2 - 1


def held_out(char: str, colour: str) -> bool:
    """Whether the UNet never sees this emoji on this background: about a tenth of the pairs, to score composition."""
    return colour != "white" and zlib.crc32(f"{char} on {colour}".encode()) % 10 == 0


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def caption(emoji: Emoji, colour: str, rng: random.Random) -> str:
    """One of the many ways to ask for this picture; nothing at all for one in ten (Ho & Salimans 2022)."""
    if rng.random() < 0.1:
        return ""
    name = rng.choice(emoji.aliases) if emoji.aliases and rng.random() < 0.25 else emoji.name
    subject = rng.choice([name, a(name), a(name), f"the {name}", f"{name} emoji"])
    if colour == "white" and rng.random() < 0.7:
        return subject
    background = f"{a(colour)} background"
    where = [f" on {background}"] * 4 + [f" with {background}", f", {colour} background", f" on {colour}"]
    return subject + rng.choice(where)


class Pictures:
    """Every emoji on every background, in the one usual pose or in random ones; drawn whenever they are needed."""

    def __init__(self, emoji: list[Emoji], random_poses: int, device: str):
        torch.manual_seed(0)
        poses = random_poses or len(PLACES)
        table = list(itertools.product(range(len(emoji)), COLOURS, range(poses)))
        self.emoji, self.device = emoji, device
        self.which = torch.tensor([e for e, _, _ in table], device=device)
        self.colour_names = [c for _, c, _ in table]
        self.colours = torch.tensor([COLOURS[c] for c in self.colour_names], device=device) / 255
        self.poses = (free_poses(len(table)) if random_poses else PLACES.repeat(len(table) // poses, 1)).to(device)
        self.glyphs = load_glyphs(emoji).to(device)
        shown = [i for i, (e, c, _) in enumerate(table) if not held_out(emoji[e].char, c)]
        again = [i for i in shown if self.colour_names[i] == "white"]  # prompts that name no colour mean white
        self.training = torch.tensor(shown + again)

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, i: Tensor) -> Tensor:
        return render(self.glyphs[self.which[i]], self.colours[i], self.poses[i])

    def captions(self, indices: Tensor) -> list[str]:
        about = zip(self.which[indices].tolist(), indices.tolist(), strict=True)
        return [caption(self.emoji[e], self.colour_names[i], random) for e, i in about]


# --- Tokenizer: byte-pair encoding, learned from the captions ---------------------------------------------------------


def train_tokenizer(emoji: list[Emoji], folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer (Radford et al. 2021) with a vocabulary of its own, in every file format that readers expect."""
    if (folder / "vocab.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    rng = random.Random(0)
    corpus = [caption(e, rng.choice([*COLOURS]), rng) for e in emoji for _ in range(50)]
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    end = "</w>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix=end))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, min_frequency=2, end_of_word_suffix=end, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = [*alphabet, *(c + end for c in alphabet), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


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


GENERATION = dict(num_inference_steps=20, guidance_scale=2.0)
NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")


# --- The training loop, the same for every phase ----------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan 2024): every direction of a weight matrix moves as much as any other.

    On these networks it needs a fraction of AdamW's steps. Kernels count as matrices, output channels by all the rest;
    the factor of Liu et al. (2025) gives an update the size of AdamW's, so that both take the same learning rate.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(weights, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                momentum = self.state[w].setdefault("momentum", torch.zeros_like(w))
                momentum.lerp_(w.grad, 1 - group["momentum"])
                update = self.orthogonal(w.grad.lerp(momentum, group["momentum"]).flatten(1))
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(update.view_as(w), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)

    @staticmethod
    def orthogonal(matrix: Tensor) -> Tensor:
        """The nearest orthogonal matrix, nearly: five Newton-Schulz steps bring every singular value close to one."""
        wide = matrix.shape[0] <= matrix.shape[1]
        x = (matrix if wide else matrix.T).bfloat16()
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return (x if wide else x.T).float()


def optimizers_for(network: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the networks; AdamW for embeddings, gains, biases, the first and the last layer."""
    outside = ("embedding", "conv_in", "conv_out", "quant_conv")
    weights = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    inside = [p.ndim >= 2 and not any(part in name for part in outside) for name, p in weights]
    matrices = [p for (_, p), is_inside in zip(weights, inside, strict=True) if is_inside]
    others = [p for (_, p), is_inside in zip(weights, inside, strict=True) if not is_inside]
    return [Muon(matrices, rate), torch.optim.AdamW(others, rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)]


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
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
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


def train_denoiser(latents: Tensor, pictures: Pictures, tokenizer: CLIPTokenizer, args):
    """The UNet learns v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents (Salimans & Ho 2022)."""
    torch.manual_seed(2)
    unet = new_unet().to(args.device, memory_format=torch.channels_last)
    text_encoder = new_text_encoder(tokenizer).to(args.device)
    if args.warm_start:  # a network that already knows which shape a name means learns other latents in a few minutes
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.warm_start / "unet").state_dict())
        text_encoder.load_state_dict(CLIPTextModel.from_pretrained(args.warm_start / "text_encoder").state_dict())
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
    for file in ("vocab.json", "merges.txt"):  # transformers 5 leaves these two out, and others want them
        shutil.copy(Path(parts["tokenizer"].name_or_path) / file, folder / "tokenizer")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint", help="the checkpoint, in diffusers format")
    parser.add_argument("--run", type=Path, help="state of the run, loss plots [OUT.run]")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--warm-start", type=Path, help="a checkpoint to take text encoder, UNet and tokenizer from")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every-emoji", action="store_true", help="all one-code-point emoji, not those of emoji.txt")
    parser.add_argument("--random-poses", type=int, default=0, help="for each pair, instead of the usual one")
    parser.add_argument("--picture-batch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="of latents")
    parser.add_argument("--rate", type=float, default=3e-3, help="the denoiser's learning rate")
    parser.add_argument("--autoencoder-steps", type=int, default=1400)
    parser.add_argument("--denoiser-steps", type=int, default=5000)
    parser.add_argument("--decoder-steps", type=int, default=1000)
    args = parser.parse_args()
    args.run = args.run or args.out.with_name(args.out.name + ".run")
    if args.smoke:
        args.picture_batch, args.batch = 4, 16
        args.autoencoder_steps = args.denoiser_steps = args.decoder_steps = 6
    if not args.resume:
        shutil.rmtree(args.run, ignore_errors=True)
    args.run.mkdir(parents=True, exist_ok=True)

    emoji = load_emoji(args.every_emoji)[: 12 if args.smoke else None]
    pictures = Pictures(emoji, args.random_poses, args.device)
    print(f"{len(emoji)} emoji, {len(pictures)} pictures, {len(pictures.training)} of them for the denoiser")
    autoencoder = train_autoencoder(Pictures(emoji, 3, args.device), args)
    latents = cache_latents(autoencoder, pictures, args)
    print(f"autoencoder: PSNR {psnr(autoencoder, latents, pictures):.2f} dB")
    if args.warm_start:
        tokenizer = CLIPTokenizer.from_pretrained(args.warm_start / "tokenizer")
    else:
        tokenizer = train_tokenizer(emoji, args.run / "tokenizer")
    unet, text_encoder = train_denoiser(latents, pictures, tokenizer, args)
    train_decoder(autoencoder, latents, pictures, args)
    print(f"decoder: PSNR {psnr(autoencoder, latents, pictures):.2f} dB")
    parts = dict(vae=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
    save_checkpoint(parts, args.out)


if __name__ == "__main__":
    main()
