"""stable-diffusion.cpp by its Python binding. It cannot take latents, and reads Stable Diffusion's own sizes only.

The tokenizer and the architectures are built in, so the emoji model cannot be run; of models with random weights the
time is right, and the picture another. DDIM is its "ddim_trailing"; Euler, the same cost a step, is used instead.

    python sdcpp.py [default | f32 | f16 | q8_0]     the type that it converts the weights to
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import Adapter, main

WTYPE = sys.argv[1] if len(sys.argv) > 1 else "default"


def imports() -> None:
    import stable_diffusion_cpp  # noqa: F401


def convert(checkpoint: Path, target: Path) -> None:
    target.symlink_to(checkpoint)  # it reads diffusers' folders


def load(model: Path, message: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import numpy as np
    from stable_diffusion_cpp import StableDiffusion

    case = message["case"]
    pipe = StableDiffusion(str(model.resolve()), n_threads=message["threads"], wtype=WTYPE, verbose=False)

    def draw() -> Any:
        pictures = pipe.generate_image(
            prompt=case["prompt"], width=case["width"], height=case["height"], sample_steps=case["steps"],
            cfg_scale=max(case["guidance"], 1.0), sample_method="euler", seed=0, batch_count=case["batch"],
        )  # fmt: skip
        return np.stack([np.asarray(picture.convert("RGB"), np.float32) / 255 for picture in pictures])

    note = "cannot take latents, so its picture is another and is not compared"
    return draw, {"backend": "ggml", "precision": WTYPE, "takes_latents": False, "note": note}


if __name__ == "__main__":
    main(Adapter("stable-diffusion.cpp", ("stable-diffusion-cpp-python",), imports, convert, load))
