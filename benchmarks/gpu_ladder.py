"""What `gpu.py` measures, in which order, and for how long: data.

Planned seconds are guesses that decide whether a part still begins; no figure comes from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One row of the ladder. `seconds` is what it is planned with, `limit` where it is stopped; both count its start.

    `does` is a function of gpu_parts.py, `env` whose Python runs it, `needs` the parts whose work it builds upon.
    """

    name: str
    does: str
    model: str
    seconds: int
    limit: int
    env: str = "engines"
    needs: tuple[str, ...] = ()
    precision: str = "fp16"
    backend: str = "tensorrt"
    static: bool = True
    components: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()


STEP, REST = ("unet_step",), ("text_encoder", "vae_decoder")
REST_XL, ALONE = (*REST, "text_encoder_2"), "unet_step_alone"
TIMED = ("eager-fp32", "eager-fp16", "eager-fp16-nhwc")
LADDER = (
    # the first minute: does it work at all, and is it right?
    Part("facts", "facts", "emoji", 5, 40),
    Part("emoji-build", "build", "emoji", 30, 120, components=(*STEP, *REST)),
    Part("emoji-picture", "picture", "emoji", 8, 60, needs=("emoji-build",)),
    Part("emoji-replay", "replay", "emoji", 8, 60, needs=("emoji-build",)),
    # to five minutes: Stable Diffusion 1.5
    Part("sd15-weights", "weights", "sd15", 15, 90),
    Part("sd15-build-step", "build", "sd15", 80, 240, needs=("sd15-weights",), components=STEP),
    Part("sd15-step", "step", "sd15", 12, 60, needs=("sd15-build-step",)),
    Part("sd15-build-rest", "build", "sd15", 40, 150, needs=("sd15-weights",), components=REST),
    Part("sd15-picture", "picture", "sd15", 15, 90, needs=("sd15-build-step", "sd15-build-rest")),
    Part("sd15-eager", "torch", "sd15", 60, 150, env="torch", baselines=("eager-fp16-nhwc",)),
    # to ten minutes: what it is compared with, other ways to build it
    Part("sd15-parity", "parity", "sd15", 40, 120, needs=("sd15-build-step", "sd15-build-rest")),
    Part("sd15-compile", "torch", "sd15", 120, 300, env="torch", baselines=("compile-fp16-nhwc",)),
    Part("sd15-build-dynamic", "build", "sd15", 80, 240, needs=("sd15-weights",), static=False, components=STEP),
    Part("sd15-dynamic", "step", "sd15", 12, 60, needs=("sd15-build-dynamic",), static=False),
    # beyond: the decoder's precisions, larger and faster models, other engines, sides in turns
    Part("sd15-vae-fp16", "vae", "sd15", 40, 120, needs=("sd15-weights",)),
    Part("sd15-vae-bf16", "vae", "sd15", 40, 120, needs=("sd15-weights",), precision="bf16"),
    Part("sd15-vae-fp32", "vae", "sd15", 40, 120, needs=("sd15-weights",), precision="fp32"),
    Part("sdxl-weights", "weights", "sdxl", 60, 180),
    Part("sdxl-build-step", "build", "sdxl", 180, 420, needs=("sdxl-weights",), components=STEP),
    Part("sdxl-step", "step", "sdxl", 25, 90, needs=("sdxl-build-step",)),
    Part("sdxl-build-rest", "build", "sdxl", 80, 240, needs=("sdxl-weights",), components=REST_XL),
    Part("sdxl-picture", "picture", "sdxl", 30, 120, needs=("sdxl-build-step", "sdxl-build-rest")),
    Part("sdxl-eager", "torch", "sdxl", 120, 300, env="torch", baselines=("eager-fp16-nhwc",)),
    Part("turbo-weights", "weights", "sdxl-turbo", 60, 180),
    Part("turbo-build", "build", "sdxl-turbo", 220, 480, needs=("turbo-weights",), components=(ALONE, *REST_XL)),
    Part("turbo-picture", "picture", "sdxl-turbo", 25, 90, needs=("turbo-build",)),
    Part("turbo-eager", "torch", "sdxl-turbo", 120, 300, env="torch", baselines=("eager-fp16-nhwc",)),
    Part("sd15-ort", "ort", "sd15", 60, 180, env="torch", needs=("sd15-weights",), precision="fp32",
         backend="ort:cuda"),
    Part("emoji-beside", "beside", "emoji", 60, 180, needs=("emoji-build",), baselines=TIMED),
    Part("sd15-beside", "beside", "sd15", 200, 600, needs=("sd15-build-step", "sd15-build-rest"), baselines=TIMED),
)  # fmt: skip
CPU = (  # what a machine without a GPU can do of it: the same code on other engines
    Part("facts", "facts", "emoji", 5, 60),
    Part("emoji-ort", "ort", "emoji", 5, 120, precision="fp32", backend="ort:cpu"),
    Part("emoji-eager", "torch", "emoji", 10, 180, env="torch", backend="ort:cpu", precision="fp32",
         baselines=("eager-fp32",)),
    Part("emoji-beside", "beside", "emoji", 15, 240, env="torch", backend="ort:cpu", precision="fp32",
         baselines=("eager-fp32",)),
)  # fmt: skip
QUICK = {"width": 64, "height": 64, "steps": 3}  # of the emoji model, with --smoke


def listed(parts: Sequence[Part]) -> Iterator[str]:
    """The table of parts, with the seconds by which each is planned to have ended."""
    total = 0
    yield f"{'part':<20}{'does':<10}{'Python':<9}{'planned':>8}{'limit':>7}{'ends at':>9}"
    for part in parts:
        total += part.seconds
        yield f"{part.name:<20}{part.does:<10}{part.env:<9}{part.seconds:>8}{part.limit:>7}{total:>9}"
