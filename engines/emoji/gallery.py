"""Pictures of what the embedded model makes, each by one command.

python engines/emoji/gallery.py gallery -o engines/emoji/gallery.jpg     # a dozen prompts
python engines/emoji/gallery.py seeds -o engines/emoji/seeds.jpg         # six prompts, eight seeds each
python engines/emoji/gallery.py samplers -o engines/emoji/samplers.jpg   # twelve samplers, four numbers of steps
python engines/emoji/gallery.py sheet -o engines/emoji/sheet.jpg         # every emoji once
python engines/emoji/gallery.py neon -o engines/emoji/neon.jpg           # six prompts, without and with the LoRA
python engines/emoji/gallery.py shapes -o engines/emoji/shapes.jpg       # three prompts in five shapes
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

import sdopt
from sdopt.samplers import SAMPLERS

PROMPTS = (
    "a red apple on a blue background", "a fox on a green background", "a rocket on a black background",
    "a cactus on a pink background", "a panda on a yellow background", "a unicorn on a purple background",
    "a pizza on a white background", "a guitar on an orange background", "a penguin on a red background",
    "an alarm clock on a gray background", "a snowman", "a sunflower on a blue background",
)  # fmt: skip
SAMPLER_NAMES = (
    "ddim", "pndm", "euler", "euler_a", "heun", "dpm2", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "deis", "lms",
)  # fmt: skip
NEON_PROMPTS = tuple(PROMPTS[i] for i in (0, 1, 4, 5, 7, 8))
SHAPE_PROMPTS = ("a red apple on a blue background", "a cat face", "a star on a purple background")
SIDE = 128  # pixels
STEPS = (5, 10, 20, 40)
Tile = tuple[Image.Image, str]


def gallery(pipe: sdopt.Pipeline) -> Iterator[Tile]:
    """A dozen prompts as a newcomer would type them, seed 1."""
    for prompt in PROMPTS:
        yield pipe(prompt, seed=1).images[0], ""


def seeds(pipe: sdopt.Pipeline) -> Iterator[Tile]:
    """What a seed decides: six prompts without a colour, seeds 0 to 7."""
    for prompt in PROMPTS[:6]:
        subject = prompt.split(" on ")[0]
        yield from ((image, "") for image in pipe(subject, num_images_per_prompt=8, seed=0).images)


def samplers(pipe: sdopt.Pipeline) -> Iterator[Tile]:
    """One prompt and seed, by twelve samplers in 5, 10, 20 and 40 steps."""
    for steps in STEPS:
        for name in SAMPLER_NAMES:
            image = pipe(PROMPTS[0], sampler=name, num_inference_steps=steps, seed=1).images[0]
            yield image, f"{SAMPLERS[name].title}, {steps}"


def sheet(pipe: sdopt.Pipeline) -> Iterator[Tile]:
    """Every emoji once, on one background after another."""
    from data import COLOURS, a, load_emoji

    colours = [*COLOURS]
    for i, emoji in enumerate(load_emoji()):
        colour = colours[i % len(colours)]
        yield pipe(f"{a(emoji.name)} on {a(colour)} background", seed=i).images[0], emoji.name


def neon(pipe: sdopt.Pipeline) -> Iterator[Tile]:
    """Six prompts and their seeds, without the LoRA and with it in two weights."""
    pipe.load_lora_weights("neon")
    for weight in (0.0, 0.7, 1.0):
        pipe.set_adapters("neon", weight)
        for seed, prompt in enumerate(NEON_PROMPTS):
            yield pipe(prompt, seed=seed).images[0], ""
    pipe.unload_lora_weights()


def shapes(pipe: sdopt.Pipeline) -> Iterator[Tile]:
    """Five silhouettes, and below them what three prompts and one seed make of each; at the left without one."""
    silhouettes = [_silhouette(kind) for kind in ("small", "large", "wide", "star", "square")]
    yield Image.new("RGB", (SIDE, SIDE), "white"), ""
    yield from ((silhouette, "") for silhouette in silhouettes)
    for prompt in SHAPE_PROMPTS:
        yield pipe(prompt, seed=3).images[0], ""
        for silhouette in silhouettes:
            yield pipe(prompt, seed=3, control_image={"silhouette": silhouette}).images[0], ""


def _silhouette(kind: str) -> Image.Image:
    """A shape in white on black."""
    picture = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(picture)
    ellipses = {"small": (10, 60, 60, 115), "large": (14, 10, 116, 118), "wide": (8, 40, 120, 90)}
    if kind in ellipses:
        draw.ellipse(ellipses[kind], fill="white")
    elif kind == "square":
        draw.rectangle((30, 20, 80, 70), fill="white")
    else:
        corners = [(55 if i % 2 == 0 else 25, i * math.pi / 5) for i in range(10)]
        draw.polygon([(64 + r * math.sin(a), 64 - r * math.cos(a)) for r, a in corners], fill="white")
    return picture


KINDS = {
    "gallery": (gallery, 6), "seeds": (seeds, 8), "samplers": (samplers, 12), "sheet": (sheet, 20), "neon": (neon, 6),
    "shapes": (shapes, 6),
}  # fmt: skip
LABEL = 14  # pixels under a tile that has one


def tiled(tiles: list[Tile], columns: int) -> Image.Image:
    """The tiles in rows, each with its label beneath."""
    width, height = tiles[0][0].size
    height += LABEL if any(label for _, label in tiles) else 0
    rows = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    draw = ImageDraw.Draw(page)
    for i, (image, label) in enumerate(tiles):
        x, y = i % columns * (width + 2), i // columns * (height + 2)
        page.paste(image, (x, y))
        draw.text((x + 2, y + image.height + 1), label[: width // 6], fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-m", "--model", type=Path, help="a bundle; default: the embedded one")
    args = parser.parse_args()
    make, columns = KINDS[args.kind]
    with sdopt.load(args.model) as pipe:
        page = tiled(list(make(pipe)), columns)
    page.save(args.output, quality=90, optimize=True)
    print(args.output)


if __name__ == "__main__":
    main()
