"""A tiny autoencoder in one .safetensors file, under the names of diffusers' AutoencoderTiny.

    encoder.layers.0.weight [64, 3, 3, 3]      decoder.layers.0.weight [64, 4, 3, 3]

Its configuration is read from the shapes: each stage is a convolution and residual blocks. Its scaling factor is 1, as
that of every published one.
Ref: github.com/madebyollin/taesd; diffusers, EncoderTiny and DecoderTiny.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt.errors import CheckpointError
from sdopt.export.checkpoint import MODEL, Checkpoint
from sdopt.export.single_file import convert, names
from sdopt.export.single_file.file import Shape, SingleFile
from sdopt.export.single_file.names import Layout

CLASS = "AutoencoderTiny"
SIDES = ("encoder", "decoder")
LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(conv\.0\.)?weight")
HALF = re.compile(r"\d+\.(conv\.\d+\.|skip\.)?(weight|bias)")  # names of the original code, which has two files
INSTEAD = "give its folder of diffusers or its id on the hub, such as madebyollin/taesd, or the file in there"


def is_tiny_vae(file: SingleFile) -> bool:
    """Whether a file has a tiny autoencoder.

    Raises: CheckpointError for half of one, as the original code writes it.
    """
    if file.shapes and all(HALF.fullmatch(name) for name in file.shapes):
        raise CheckpointError(
            f"{file.path} has numbers as names of its layers ({min(file.shapes)}): if it is half of a tiny "
            f"autoencoder, {INSTEAD}"
        )
    return any(LAYER.fullmatch(name) for name in file.shapes)


def unpack(file: SingleFile, folder: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    """The autoencoder in a file, written into `folder` as diffusers writes one model, in the file's precision.

    `config`: its configuration; without it, the one that its shapes tell.
    Raises: CheckpointError that names all tensors that do not fit.
    """
    if config is not None and config["_class_name"] != CLASS:
        raise CheckpointError(
            f"{file.path} is a tiny autoencoder, and the configuration that was given is that of a "
            f"{config['_class_name']}; leave it out"
        )
    hint = f"Its configuration is read from its shapes, as those of {CLASS} are; else {INSTEAD}."
    config = _configuration(file) if config is None else config
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    checkpoint = Checkpoint(folder, {MODEL: f"diffusers.{CLASS}"}, None, {"file": file.path.name})
    shapes = checkpoint.shapes(MODEL)
    what = "the tiny autoencoder"
    origins = convert.plan(file, {what: shapes}, {what: (Layout("", names.own),)}, hint)[what]
    convert.write(file, what, origins, shapes, folder / "diffusion_pytorch_model.safetensors")
    return checkpoint


def _configuration(file: SingleFile) -> dict[str, Any]:
    """Raises: CheckpointError for a file that has one side alone."""
    config: dict[str, Any] = {"_class_name": CLASS}
    for side in SIDES:
        stages = _stages(file.shapes, side)
        if len(stages) < 2:
            raise CheckpointError(f"{file.path} has no {side} of a tiny autoencoder; {INSTEAD}")
        # the last convolution is no stage: it makes the latents of the encoder, and the decoder's picture
        config[f"{side}_block_out_channels"] = [shape[0] for shape, _ in stages[:-1]]
        config[f"num_{side}_blocks"] = [blocks for _, blocks in stages[:-1]]
        first, last = stages[0][0], stages[-1][0]
        config["in_channels" if side == "encoder" else "latent_channels"] = first[1]
        config["latent_channels" if side == "encoder" else "out_channels"] = last[0]
    return config


def _stages(shapes: Mapping[str, Shape], side: str) -> list[tuple[Shape, int]]:
    """The shape of each convolution of a side, and how many residual blocks come before the next one."""
    layers: dict[int, tuple[Shape, bool]] = {}
    for name, shape in shapes.items():
        match = LAYER.fullmatch(name)
        if match is not None and match[1] == side and len(shape) == 4:
            layers[int(match[2])] = shape, match[3] is not None
    stages: list[tuple[Shape, int]] = []
    for _, (shape, is_block) in sorted(layers.items()):
        if is_block and stages:
            stages[-1] = stages[-1][0], stages[-1][1] + 1
        elif not is_block:
            stages.append((shape, 0))
    return stages
