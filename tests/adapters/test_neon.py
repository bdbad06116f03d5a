"""The LoRA that comes with sdopt: a real file, by its name, on the embedded model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.adapters.lora.describe import describe
from sdopt.adapters.lora.file import located, read_lora
from sdopt.cli.main import main
from sdopt.metrics import psnr
from tests.conftest import ROOT

PROMPTS = ["a panda on a yellow background", "a guitar on an orange background"]
OPTIONS: dict[str, Any] = {"num_inference_steps": 8, "seed": [1, 2], "output_type": "np"}
FLOOR_DB = 60.0


def brightness(images: Any) -> Any:
    """The mean of the pixels at the border of each picture, 0 to 1: the background."""
    edge = np.concatenate([images[:, :6], images[:, -6:]], axis=1)
    return edge.mean(axis=(1, 2, 3))


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_it_draws_on_a_dark_wall_and_leaves_nothing_behind(backend: str) -> None:
    pipe = sdopt.load(backend=backend)
    plain = pipe(PROMPTS, **OPTIONS).images
    assert pipe.load_lora_weights("neon") == "neon"
    neon = pipe(PROMPTS, **OPTIONS).images
    pipe.set_adapters("neon", 0.5)
    pipe(PROMPTS, **OPTIONS)
    pipe.set_adapters("neon", 1.0)
    assert (pipe(PROMPTS, **OPTIONS).images == neon).all()
    pipe.unload_lora_weights()
    assert (pipe(PROMPTS, **OPTIONS).images == plain).all()
    assert (brightness(plain) > 0.4).all()
    assert (brightness(neon) < 0.2).all()
    assert (neon.max(axis=(1, 2, 3)) > 0.8).all()  # the lines are bright


def test_its_pictures_are_those_of_diffusers_and_peft() -> None:
    pytest.importorskip("peft")
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    checkpoint = ROOT / "engines/emoji/checkpoint"
    reference = diffusers.DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    reference.load_lora_weights(located("neon"), adapter_name="neon")
    reference.set_adapters("neon", 0.8)
    pipe = sdopt.load(backend="ort")
    pipe.load_lora_weights("neon")
    pipe.set_adapters("neon", 0.8)
    steps = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "np"}
    expected = reference(PROMPTS[0], generator=torch.Generator("cpu").manual_seed(1), **steps).images
    assert psnr(pipe(PROMPTS[0], seed=1, **steps).images, expected) >= FLOOR_DB


def test_a_file_of_the_same_name_goes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert located("neon").is_file()
    assert describe(read_lora("neon"))["modules"] == 106
    monkeypatch.chdir(tmp_path)
    os.link(located("neon"), "other.safetensors")
    assert located("other.safetensors") == Path("other.safetensors")
    Path("neon").write_bytes(b"")
    assert located("neon") == Path("neon")


def test_the_command_line_takes_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "neon", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == {"4": 106}
    png = tmp_path / "fox.png"
    assert main(["generate", "a fox", "--lora", "neon:0.9", "--steps", "2", "--seed", "1", "-o", str(png)]) == 0
    again = tmp_path / "again.png"
    assert main(["generate", "--replay", str(png), "--lora", "neon:0.9", "-o", str(again)]) == 0
    assert png.read_bytes() == again.read_bytes()
