"""CLIP's image encoder: a picture to one vector, or to the states of all its patches.

Ref: Radford et al. 2021, arXiv:2103.00020, section 2.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from sdopt.bundle.adapter import IMAGE_ENCODER, Pixels
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import CheckpointError
from sdopt.export.checkpoint import MODEL, Checkpoint, read_json
from sdopt.export.part import Part

CLASS = "transformers.CLIPVisionModelWithProjection"
EMBEDS, PIXELS = "image_embeds", "pixel_values"
DEFAULTS: Mapping[str, Any] = {  # of transformers' CLIPImageProcessor
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    "resample": 3,  # Pillow's BICUBIC
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


class ImageEncoder(torch.nn.Module):
    """Pixels to the projected vector of the whole picture."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).image_embeds


class PatchEncoder(ImageEncoder):
    """Pixels to the states before the last layer: one of the picture, and one of each patch."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-2]


def embeddings(checkpoint: Checkpoint, patches: bool) -> TensorSpec:
    """What the encoder gives for each picture."""
    config = checkpoint.config(MODEL)
    tokens = (config["image_size"] // config["patch_size"]) ** 2 + 1
    shape = (tokens, config["hidden_size"]) if patches else (config["projection_dim"],)
    return TensorSpec(EMBEDS, "float32", ("pictures", *shape))


def part(checkpoint: Checkpoint, patches: bool) -> Part:
    """The encoder, ready to be traced. `patches`: it gives the states of all patches."""
    config, model = checkpoint.config(MODEL), checkpoint.load(MODEL)
    side: int = config["image_size"]
    last = config["num_hidden_layers"] - 1
    names = (f"vision_model.encoder.layers.{last}.", "vision_model.post_layernorm.", "visual_projection.")
    return Part(
        name=IMAGE_ENCODER,
        module=(PatchEncoder if patches else ImageEncoder)(model),
        inputs=(TensorSpec(PIXELS, "float32", ("pictures", config["num_channels"], side, side)),),
        outputs=(embeddings(checkpoint, patches),),
        sizes=({"pictures": 2}, {"pictures": 1}, {"pictures": 3}),
        unused=dict.fromkeys(names, "the states before the last layer are read") if patches else {},
    )


def pixels(checkpoint: Checkpoint) -> Pixels:
    """How its pictures are prepared: as its preprocessor_config.json says; without it as diffusers prepares them.

    Raises: CheckpointError that names the key that asks for something else.
    """
    path, side = checkpoint.folder / "preprocessor_config.json", checkpoint.config(MODEL)["image_size"]
    square = {"height": side, "width": side}
    own = read_json(path) if path.is_file() else {"size": side, "crop_size": side}
    config: dict[str, Any] = {**DEFAULTS, "size": 224, "crop_size": 224, **own}
    given: Any = config["size"]
    size = cast("dict[str, Any]", given if isinstance(given, dict) else {"shortest_edge": given})
    edge: Any = size.get("shortest_edge")
    fits = {
        **{key: config[key] is True for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")},
        "rescale_factor": _is_number(config["rescale_factor"]) and abs(config["rescale_factor"] * 255 - 1) < 1e-6,
        "size": size == square or (len(size) == 1 and type(edge) is int and edge >= side),
        "do_center_crop": config["do_center_crop"] is True or (edge is None and config["do_center_crop"] is False),
        "crop_size": config["do_center_crop"] is False or config["crop_size"] in (side, square),
        "resample": type(config["resample"]) is int and 0 <= config["resample"] <= 5,
        "image_mean": _are_three(config["image_mean"]),
        "image_std": _are_three(config["image_std"]) and min(config["image_std"]) > 0,
    }
    for key, is_so in fits.items():
        if not is_so:
            raise CheckpointError(
                f"{path}: {key} is {config[key]!r}; an image encoder of {side} pixels is given RGB pictures that are "
                "resized, cut out to its size and normalized"
            )
    return Pixels(edge, config["resample"], tuple(config["image_mean"]), tuple(config["image_std"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_three(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(cast("list[Any]", values)) == 3
        and all(map(_is_number, cast("list[Any]", values)))
    )
