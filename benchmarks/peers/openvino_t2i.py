"""OpenVINO GenAI's Text2ImagePipeline. It takes our latents, through a Generator of ours; its pictures have 8 bits.

python openvino_t2i.py [f32 | bf16 | f16]     the precision it computes in; default: its own choice for the device
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from common import Adapter, main, readable

PRECISION = sys.argv[1] if len(sys.argv) > 1 else ""


def imports() -> None:
    import openvino_genai  # noqa: F401


def convert(checkpoint: Path, target: Path) -> None:
    command = [
        Path(sys.executable).with_name("optimum-cli"),
        "export",
        "openvino",
        "--model",
        readable(checkpoint, target),
    ]
    command += ["--task", "text-to-image", "--weight-format", "fp32", target]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def load(model: Path, message: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import numpy as np
    import openvino
    import openvino_genai

    case, device = message["case"], "GPU" if message["device"] == "cuda" else "CPU"
    hint = {"INFERENCE_PRECISION_HINT": PRECISION} if PRECISION else {}
    pipe = openvino_genai.Text2ImagePipeline(str(model), device, INFERENCE_NUM_THREADS=message["threads"], **hint)
    latents = np.load(message["latents"])

    class Given(openvino_genai.Generator):
        def next(self) -> float:
            raise RuntimeError("the pipeline draws its noise number by number; this adapter gives it whole")

        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(latents.reshape(tuple(shape)).copy())

    def draw() -> Any:
        tensor = pipe.generate(
            case["prompt"], width=case["width"], height=case["height"], num_inference_steps=case["steps"],
            guidance_scale=case["guidance"], num_images_per_prompt=case["batch"], generator=Given(),
        )  # fmt: skip
        return np.array(tensor.data, np.float32) / 255

    chosen = openvino.Core().get_property(device, "INFERENCE_PRECISION_HINT")
    told = PRECISION or f"{getattr(chosen, 'get_type_name', lambda: chosen)()} (its own choice)"
    note = "its picture has 8 bits a channel, so its parity ends at about 59 dB"
    return draw, {"backend": device, "precision": told, "takes_latents": True, "note": note}


if __name__ == "__main__":
    packages = ("openvino-genai", "openvino", "openvino-tokenizers", "optimum-intel", "torch")
    main(Adapter("openvino-genai", packages, imports, convert, load))
