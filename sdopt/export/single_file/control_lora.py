"""A Control-LoRA: a ControlNet that is stored as the difference from the UNet of its base model.

    input_blocks.1.1.transformer_blocks.0.attn1.to_q.up      [out, rank]; of a convolution [out, rank, 1, 1]
    input_blocks.1.1.transformer_blocks.0.attn1.to_q.down    [rank, in]; of a convolution [rank, in, kh, kw]
    input_blocks.1.0.in_layers.0.weight                      what has no two axes, and what is the ControlNet's own
    lora_controlnet                                          a tensor of no numbers, which marks such a file

A weight is the UNet's own plus up x down. A bias and a norm are whole, and no difference. What the file does not have,
the ControlNet has from the UNet. "control_model." may stand before all names.
Ref: huggingface.co/stabilityai/control-lora; github.com/Stability-AI/stability-ComfyUI-nodes, control_lora_create.py;
github.com/comfyanonymous/ComfyUI, comfy/controlnet.py, ControlLora
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdopt.bundle.files import Bundle
from sdopt.bundle.original_names import unet_names
from sdopt.bundle.weights import Weights
from sdopt.dataclass import dataclass
from sdopt.errors import CheckpointError
from sdopt.export import accounting
from sdopt.export.single_file.convert import FLOATS, without_ones
from sdopt.export.single_file.file import Shape, SingleFile

MARK, HINT, PREFIX = "lora_controlnet", "input_hint_block.0.weight", "control_model."
UP, DOWN, WEIGHT = ".up", ".down", ".weight"
COPIED = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")  # of the UNet
LEFT = "time_embedding.cond_proj."  # of distilled UNets, which no ControlNet has
TEXT = "attn2.to_k"  # a layer whose input is the text


@dataclass(frozen=True)
class Merged:
    """The tensors of a file and of a UNet as those of one file, each made when it is read.

    `base`: the name of each parameter of the UNet that a ControlNet copies, by its name in the original code.
    """

    file: SingleFile
    unet: Weights
    base: Mapping[str, str]
    places: Mapping[str, str]  # the names in the file by those without a prefix

    def get_tensor(self, name: str) -> torch.Tensor:
        """In float32, but for what the file has whole, in the file's own precision."""
        if name in self.places:
            return self.file.tensor(self.places[name])
        weight = torch.from_numpy(self.unet.read(self.base[name]))
        module = name.removesuffix(WEIGHT)
        if module + UP not in self.places:
            return weight
        up, down = (self.file.tensor(self.places[module + part]).float().flatten(1) for part in (UP, DOWN))
        return weight + (up @ down).reshape(weight.shape)


def is_control_lora(file: SingleFile) -> bool:
    """Whether a file is a Control-LoRA. Copies of published ones have lost the tensor without numbers."""
    has_hint = HINT in file.shapes or PREFIX + HINT in file.shapes
    return MARK in file.shapes or (has_hint and any(name.endswith(UP) for name in file.shapes))


def merged(file: SingleFile, bundle: Bundle) -> SingleFile:
    """The ControlNet in a Control-LoRA under the names of the original code, as a file that has all of it.

    Raises: CheckpointError if it is made for another UNet than the bundle's, or names all tensors that do not fit.
    """
    unet = Weights.of(bundle.component("unet"))
    copied = [name for name in unet.shapes if name.startswith(COPIED) and not name.startswith(LEFT)]
    modules = unet_names({name.rpartition(".")[0] for name in unet.shapes})
    base: dict[str, str] = {}
    for name in copied:
        module, _, leaf = name.rpartition(".")
        if modules[module] is not None:
            base[f"{modules[module]}.{leaf}"] = name
    shapes = {name: unet.shapes[own] for name, own in base.items()}
    places = {name.removeprefix(PREFIX): name for name in file.shapes if name != MARK}
    stored = {name: file.shapes[place] for name, place in places.items()}
    kinds = {name: file.dtypes[place] for name, place in places.items()}
    _refuse_other_text(file.path, stored, shapes, bundle)
    _refuse_misfits(file.path, stored, kinds, shapes, bundle)
    own = {name: shape for name, shape in stored.items() if not name.endswith((UP, DOWN))}
    dtypes = {**dict.fromkeys(shapes, "F32"), **{name: kinds[name] for name in own}}
    return replace(file, shapes={**shapes, **own}, dtypes=dtypes, handle=Merged(file, unet, base, places))


def _refuse_other_text(path: Path, stored: Mapping[str, Shape], shapes: Mapping[str, Shape], bundle: Bundle) -> None:
    """Raises: CheckpointError if it is made for texts of another width, which tell the families apart."""
    theirs = {shape[-1] for name, shape in stored.items() if shape and name.endswith(TEXT + DOWN)}
    ours = {shape[-1] for name, shape in shapes.items() if name.endswith(TEXT + WEIGHT)}
    if theirs and ours and theirs != ours:
        widths = [", ".join(map(str, sorted(one))) for one in (theirs, ours)]
        raise CheckpointError(
            f"{path} is a Control-LoRA of a model whose text has {widths[0]} features, and the text of "
            f"{bundle.path}, which is {bundle.manifest.family}, has {widths[1]}; add it to a bundle of its base model"
        )


def _refuse_misfits(
    path: Path, stored: Mapping[str, Shape], kinds: Mapping[str, str], shapes: Mapping[str, Shape], bundle: Bundle
) -> None:
    """Raises: CheckpointError for halves of pairs, ranks that differ, and shapes that are not those of the UNet."""
    lacking, unknown, unlike, integers = list[str](), list[str](), list[str](), list[str]()
    for name, shape in stored.items():
        if name.endswith((UP, DOWN)):
            half = UP if name.endswith(UP) else DOWN
            module = name.removesuffix(half)
            other = module + (DOWN if half == UP else UP)
            if other not in stored:
                lacking.append(f"{other} (beside {name})")
            elif module + WEIGHT not in shapes or module + WEIGHT in stored:
                unknown.append(name)
            elif half == UP:
                unlike += _unlike(module, shape, stored[other], shapes[module + WEIGHT])
        elif name in shapes and without_ones(shape) != without_ones(shapes[name]):
            unlike.append(f"{name} is {shape}, that of the UNet is {shapes[name]}")
        if kinds[name] not in FLOATS:
            integers.append(f"{name} ({kinds[name]})")
    hint = f"It is merged with the UNet of {bundle.path}: add it to a bundle of its base model, or get the file again."
    accounting.refuse(str(path), hint, lacking=lacking, unknown=unknown, unlike=unlike, integers=integers)


def _unlike(module: str, up: Shape, down: Shape, weight: Shape) -> list[str]:
    """Why up x down is not of the shape of a weight, if it is not."""
    if len(up) < 2 or len(down) < 2 or math.prod(up[1:]) != down[0]:
        return [f"{module}: up is {up} and down is {down}, which have other ranks"]
    if (up[0], math.prod(down[1:])) != (weight[0], math.prod(weight[1:])):
        return [f"{module}: up is {up} and down is {down}, and the weight of the UNet is {weight}"]
    return []


def provenance(bundle: Bundle) -> dict[str, Any]:
    """What the manifest of an adapter says about the UNet that is in it."""
    return {"merged_with": bundle.digest}
