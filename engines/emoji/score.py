"""Score the text-to-emoji bundle, objectively: is it the right emoji, on the right background, and do seeds differ?

    python engines/emoji/score.py                                                       # seen and held-out pairs
    python engines/emoji/score.py --samplers dpmpp_2m euler euler_a unipc --guidance 1 2 5 --prompts 100

The pictures are made by sdopt's runtime. The judge draws every emoji in many places and sizes on the background that
was asked for, and names the nearest; `judge` in the output is how often it is right about pictures drawn by the font
itself, so no score can mean more than that.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import COLOURS, PLACES, SIZE, a, held_out, load_emoji, load_glyphs, render
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import sdopt

COARSE = 32  # pixels a side when all emoji are compared
REACH = 5  # coarse pixels that an emoji may be off the centre
SIZES = (0.72, 0.78, 0.85, 0.92)
FINALISTS = 6
Pair = tuple[int, str]  # emoji, colour


class Judge:
    """Names the emoji in a picture: the nearest of all renders, searched over places and sizes, then refined."""

    def __init__(self) -> None:
        self.emoji = load_emoji()
        self.glyphs = load_glyphs(self.emoji)
        self.small = F.avg_pool2d(self.glyphs, 2)
        self.names = [*COLOURS]
        self.colours = torch.tensor([COLOURS[c] for c in self.names]) / 255
        drawn = [F.interpolate(self.glyphs, size=round(COARSE * s), mode="area") for s in SIZES]
        self.templates = torch.stack([self._padded(d) for d in drawn], 1)  # [emoji, sizes, 4, COARSE, COARSE]

    @staticmethod
    def _padded(glyphs: Tensor) -> Tensor:
        before = (COARSE - glyphs.shape[-1]) // 2
        after = COARSE - glyphs.shape[-1] - before
        return F.pad(glyphs, (before, after, before, after))

    def background(self, picture: Tensor) -> str:
        """The named colour nearest to the median of the border."""
        edges = [picture[:, :3], picture[:, -3:], picture[:, :, :3], picture[:, :, -3:]]
        median = torch.cat([e.flatten(1) for e in edges], 1).median(1).values
        return self.names[int((self.colours - median).square().sum(1).argmin())]

    def identity(self, picture: Tensor, colour: str) -> tuple[int, Tensor]:
        """The nearest emoji on `colour`, and its pose (size, right, down, tilt)."""
        ground = self.colours[self.names.index(colour)][:, None, None]
        flat = (self.templates[:, :, :3] - self.templates[:, :, 3:] * ground).flatten(0, 1)
        seen = F.avg_pool2d(picture, SIZE // COARSE) - ground
        likeness = 2 * F.conv2d(seen[None], flat, padding=REACH)[0] - flat.square().sum((1, 2, 3))[:, None, None]
        best, where = likeness.view(len(self.emoji), -1).max(1)
        finalists = best.topk(FINALISTS).indices
        return self._refined(picture, colour, finalists, where[finalists])

    def _refined(self, picture: Tensor, colour: str, finalists: Tensor, where: Tensor) -> tuple[int, Tensor]:
        """Move each finalist until it fits best; the one that then is nearest, and its pose."""
        span = 2 * REACH + 1
        size, place = where // span**2, where % span**2
        poses = torch.zeros(len(finalists), 4)
        poses[:, 0] = torch.tensor(SIZES)[size]
        poses[:, 1], poses[:, 2] = (place % span - REACH) * 2 / COARSE, (place // span - REACH) * 2 / COARSE
        poses.requires_grad_()
        ground = self.colours[self.names.index(colour)].expand(len(finalists), 3)
        target = F.avg_pool2d(picture, 2) * 2 - 1
        optimizer = torch.optim.Adam([poses], 0.02)
        for _ in range(25):
            error = (render(self.small[finalists], ground, poses) - target).square().mean((1, 2, 3))
            optimizer.zero_grad()
            error.sum().backward()
            optimizer.step()
        first = int(error.argmin())
        return int(finalists[first]), poses.detach()[first]

    def calibration(self, pairs: list[Pair]) -> float:
        """How often the judge is right about the font's own pictures."""
        right = 0
        for i, (e, colour) in enumerate(pairs):
            ground = self.colours[self.names.index(colour)][None]
            drawn = render(self.glyphs[e][None], ground, PLACES[i % len(PLACES)][None])[0]
            right += self.identity((drawn + 1) / 2, colour)[0] == e
        return right / len(pairs)


def pictures(pipe: sdopt.Pipeline, prompts: list[str], seeds: list[int], **options: Any) -> Tensor:
    """The pictures [n, 3, SIZE, SIZE] in 0..1 that sdopt makes."""
    made = [
        pipe(prompts[i : i + 20], seed=seeds[i : i + 20], output_type="np", **options).images
        for i in range(0, len(prompts), 20)
    ]
    return torch.from_numpy(np.concatenate(made)).permute(0, 3, 1, 2).contiguous()


def score(pipe: sdopt.Pipeline, judge: Judge, pairs: list[Pair], **options: Any) -> dict[str, Any]:
    """Shares of right emoji and right backgrounds, and the names of the mistakes."""
    prompts = [f"{a(judge.emoji[e].name)} on {a(c)} background" for e, c in pairs]
    made = pictures(pipe, prompts, list(range(1000, 1000 + len(pairs))), **options)
    wrong: list[str] = []
    identity = colour = 0
    for picture, (e, wanted), prompt in zip(made, pairs, prompts, strict=True):
        found, ground = judge.identity(picture, wanted)[0], judge.background(picture)
        identity += found == e
        colour += ground == wanted
        if found != e or ground != wanted:
            wrong.append(f"{prompt}: {judge.emoji[found].name} on {ground}")
    return {"n": len(pairs), "identity": identity / len(pairs), "colour": colour / len(pairs), "wrong": wrong}


def variety(pipe: sdopt.Pipeline, judge: Judge, pairs: list[Pair], seeds: int = 6, **options: Any) -> dict[str, float]:
    """How much seeds change a picture, over prompts that name no colour, next to how often it stays the right emoji."""
    prompts = [a(judge.emoji[e].name) for e, _ in pairs for _ in range(seeds)]
    made = pictures(pipe, prompts, [s for _ in pairs for s in range(seeds)], **options)
    found = [judge.identity(p, "white") for p in made]
    groups = made.view(len(pairs), seeds, -1)
    distance = torch.stack([torch.pdist(g, 1).mean() / g.shape[1] for g in groups]).mean()
    spread = torch.stack([pose for _, pose in found]).view(len(pairs), seeds, 4).std(1).mean(0)
    right = sum(e == pairs[i // seeds][0] for i, (e, _) in enumerate(found)) / len(found)
    names = ("size", "right", "down", "tilt")
    return {"identity": right, "distance": float(distance), **dict(zip(names, spread.tolist(), strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", help="default: the embedded one")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--samplers", nargs="+", default=[None], help="default: the checkpoint's own")
    parser.add_argument("--guidance", nargs="+", type=float, default=[None], help="default: the bundle's own")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto", help="fp32, bf16 or int8, which must be built")
    parser.add_argument("--guidance-interval", nargs=2, type=float, metavar=("FROM", "TO"), help="of the schedule")
    parser.add_argument("--cache-interval", type=int, default=1, help="with a feature cache, which must be built")
    parser.add_argument("--cache-depth", type=int)
    parser.add_argument("--vae", help="a tiny autoencoder that was exported onto the bundle")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    pipe = sdopt.load(args.bundle, args.backend, precision=args.precision)
    judge, rng = Judge(), random.Random(1)
    every = [(e, c) for e in range(len(judge.emoji)) for c in COLOURS]
    kinds = {kind: [p for p in every if held_out(judge.emoji[p[0]].char, p[1]) == kind] for kind in (False, True)}
    sets = {name: rng.sample(kinds[kind], args.prompts) for name, kind in (("seen", False), ("held out", True))}
    record: dict[str, Any] = {"judge": judge.calibration(sets["seen"]), "scores": []}
    print(f"judge: right about {record['judge']:.1%} of the font's own pictures")
    print(f"{'sampler':<12}{'guidance':>9}{'pairs':>10}{'n':>5}{'identity':>10}{'colour':>9}{'seconds':>9}")
    choices: list[dict[str, Any]] = [
        {"sampler": sampler, "guidance_scale": guidance, "num_inference_steps": args.steps, "vae": args.vae,
         "cache_interval": args.cache_interval, "cache_depth": args.cache_depth,
         "guidance_interval": args.guidance_interval and tuple(args.guidance_interval)}
        for sampler in args.samplers for guidance in args.guidance
    ]  # fmt: skip
    for options in choices:
        for name, pairs in sets.items():
            started = time.perf_counter()
            result = score(pipe, judge, pairs, **options)
            sampler, guidance = options["sampler"], options["guidance_scale"]
            record["scores"].append({"sampler": sampler, "guidance": guidance, "pairs": name, **result})
            print(
                f"{sampler or 'own':<12}{guidance or 'own':>9}{name:>10}{result['n']:>5}"
                f"{result['identity']:>10.1%}{result['colour']:>9.1%}{time.perf_counter() - started:>9.0f}",
                flush=True,
            )
    record["variety"] = variety(pipe, judge, sets["seen"][:25], **choices[0])
    print("variety: " + ", ".join(f"{key} {value:.3f}" for key, value in record["variety"].items()))
    for result in record["scores"][:2]:
        print(f"wrong, {result['pairs']}: {'; '.join(result['wrong']) or 'none'}")
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
