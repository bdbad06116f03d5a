"""optimum-onnx: diffusers' pipeline with its models on ONNX Runtime. It takes our latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import Adapter, main, readable


def imports() -> None:
    import optimum.onnxruntime  # noqa: F401


def convert(checkpoint: Path, target: Path) -> None:
    from optimum.onnxruntime import ORTPipelineForText2Image

    ORTPipelineForText2Image.from_pretrained(str(readable(checkpoint, target)), export=True).save_pretrained(target)


def load(model: Path, message: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import numpy as np
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTPipelineForText2Image

    case = message["case"]
    torch.set_num_threads(message["threads"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = message["threads"]
    provider = "CUDAExecutionProvider" if message["device"] == "cuda" else "CPUExecutionProvider"
    pipe = ORTPipelineForText2Image.from_pretrained(str(model), provider=provider, session_options=options)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.load(message["latents"]))

    def draw() -> Any:
        return pipe(
            [case["prompt"]] * case["batch"], num_inference_steps=case["steps"], guidance_scale=case["guidance"],
            height=case["height"], width=case["width"], latents=latents, output_type="np",
        ).images  # fmt: skip

    return draw, {"backend": provider, "precision": "fp32", "takes_latents": True}


if __name__ == "__main__":
    packages = ("optimum-onnx", "optimum", "onnxruntime", "diffusers", "transformers", "torch")
    main(Adapter("optimum-onnx", packages, imports, convert, load))
