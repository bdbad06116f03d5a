"""What the embedded model learns from: emoji of a font in several places on plain colours, and captions.

The pictures are the bitmaps of Noto Color Emoji (SIL Open Font License 1.1); the names are Unicode's.
"""

import io
import itertools
import json
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPTokenizer

HERE = Path(__file__).parent
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZE = 128  # pixels a side
CONTEXT = 32  # tokens a caption
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


PLACES = torch.tensor(  # size, shift right, shift down (in half sides of the picture), tilt
    [[0.92, 0.0, 0.0, 0.0], [0.74, 0.0, -0.2, 0.0], [0.72, -0.16, 0.14, 0.17], [0.72, 0.16, 0.14, -0.17]]
)


def choose_poses(n: int) -> Tensor:
    """Poses [n, 4] that all emoji share, so that what one teaches of a place helps the others."""
    size = torch.empty(n).uniform_(0.7, 0.95)
    right, down = torch.empty(2, n).uniform_(-1, 1) * (1 - size) * 0.75
    return torch.cat([PLACES, torch.stack([size, right, down, torch.empty(n).uniform_(-0.2, 0.2)], dim=1)])[:n]


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
    """Every emoji on every background in every pose, drawn whenever they are needed."""

    def __init__(self, emoji: list[Emoji], poses: int, device: str):
        torch.manual_seed(0)
        table = list(itertools.product(range(len(emoji)), COLOURS, range(poses)))
        self.emoji = emoji
        self.which = torch.tensor([e for e, _, _ in table], device=device)
        self.colour_names = [c for _, c, _ in table]
        self.colours = torch.tensor([COLOURS[c] for c in self.colour_names], device=device) / 255
        self.poses = choose_poses(poses).repeat(len(table) // poses, 1).to(device)
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
    split, as_bytes = (
        pre_tokenizers.Split(words, "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
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
