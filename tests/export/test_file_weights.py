"""Weights that stay in their files: the model is the one that is loaded, and takes no memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdopt.bundle.files import Component
from sdopt.engine.openvino import OpenVinoEngine
from sdopt.engine.ort import OrtEngine
from sdopt.errors import CheckpointError
from sdopt.export import families
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.component import write_part
from sdopt.export.part import Part
from sdopt.export.source import open_checkpoint
from sdopt.metrics import psnr

LARGE = {"sd3": ("text_encoder_3", "transformer"), "flux": ("text_encoder_2", "transformer")}


@pytest.fixture(params=[(family, name) for family, names in LARGE.items() for name in names], ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, str]:
    """(a checkpoint whose files may be changed, a component of it)."""
    family, name = request.param
    folder = shutil.copytree(request.getfixturevalue(f"{family}_checkpoint"), tmp_path / "checkpoint")
    with open_checkpoint(str(folder)) as checkpoint:
        return checkpoint, name


def part_of(checkpoint: Checkpoint, name: str) -> Part:
    return families.of(checkpoint).builds(checkpoint)[name](checkpoint)


def changed(checkpoint: Checkpoint, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    (path,) = checkpoint.weight_files(name)
    save_file(change(load_file(path)), path, {"format": "pt"})


def test_it_computes_what_the_loaded_model_computes_and_has_no_numbers(made: tuple[Checkpoint, str]) -> None:
    checkpoint, name = made
    part = part_of(checkpoint, name)
    assert part.weights is not None
    inputs = part.example(part.sizes[0])
    for dtype in (torch.float32, torch.float16):
        changed(checkpoint, name, lambda weights: {k: w.to(dtype) for k, w in weights.items()})  # noqa: B023
        found = part_of(checkpoint, name).run(inputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoint, "opened", lambda self, name: (self.load(name), None))
            loaded = part_of(checkpoint, name)
        assert loaded.weights is None
        for output, expected in loaded.run(inputs).items():
            np.testing.assert_array_equal(found[output], expected)
    assert {weight.untyped_storage().nbytes() for weight in part.module.parameters()} == {4}
    assert all(weight.dtype == torch.float32 for weight in part.module.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: dict(list(weights.items())[1:]), "its files lack"),
        (lambda weights: {**weights, "more.weight": torch.ones(2)}, "its files have more.weight"),
        (lambda weights: {k: w * torch.nan for k, w in weights.items()}, "have NaN or infinite values"),
    ],
    ids=["lacking", "unknown", "not finite"],
)  # fmt: skip
def test_files_that_are_not_those_of_the_model_are_refused(
    change: Any, message: str, sd3_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sd3_checkpoint, tmp_path / "checkpoint")
    with open_checkpoint(str(folder)) as checkpoint:
        for name in LARGE["sd3"]:
            changed(checkpoint, name, change)
            with pytest.raises(CheckpointError, match=message):
                part_of(checkpoint, name)


@pytest.mark.parametrize(("dtype", "word"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_a_short_checkpoint_keeps_its_type_and_every_engine_reads_it(
    dtype: torch.dtype, word: str, sd3_checkpoint: Path, tmp_path: Path
) -> None:
    name, folder = "text_encoder_3", shutil.copytree(sd3_checkpoint, tmp_path / "checkpoint")
    with open_checkpoint(str(folder)) as checkpoint:
        least = 1e-8 if dtype == torch.bfloat16 else 0.5  # float16 has no number so small
        changed(checkpoint, name, lambda weights: {k: w.clamp(min=least).to(dtype) for k, w in weights.items()})
        part = part_of(checkpoint, name)
        arrays = part.example(part.sizes[1])
        (expected,) = part.run(arrays).values()
        entry = write_part(part, tmp_path, 23, 100.0, lambda line: None, lambda phase: None)[name]
    assert entry.weights == word
    graph = tmp_path / entry.graph
    component = Component(name, graph, entry.inputs, entry.outputs)
    for engine in (OrtEngine(component), OpenVinoEngine(component)):
        assert psnr(expected, engine(**arrays)["last_hidden_state"]) > 100


def test_weights_in_several_files_are_read(sd3_checkpoint: Path, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    folder = Path(shutil.copytree(sd3_checkpoint, tmp_path / "checkpoint"))
    shutil.rmtree(folder / "transformer")
    model: Any = SD3Transformer2DModel.from_pretrained(sd3_checkpoint / "transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="20KB")
    with open_checkpoint(str(folder)) as checkpoint:
        assert len(checkpoint.weight_files("transformer")) > 1
        _, weights = checkpoint.opened("transformer")
        assert weights is not None
        for name, weight in model.named_parameters():
            assert torch.equal(weights[name], weight), name
