"""The field `preset` of a server: the picture is the one that Python makes, and the server's limits hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.presets import Preset, write_preset
from tests.serve.conftest import pixels, running

SIZE: dict[str, Any] = {"height": 64, "width": 64}
MEASURES: Any = {"seconds": 1.0, "psnr_db": 30.0, "ssim": 0.9, "reference": "", "machine": ""}


@pytest.fixture
def presets(bundle: sdopt.Bundle) -> sdopt.Bundle:
    for name, steps in {"fast": 3, "slow": 9}.items():
        write_preset(
            bundle, name, Preset("ort", "fp32", {"sampler": "euler", "num_inference_steps": steps}, **MEASURES)
        )
    write_preset(bundle, "other", Preset("openvino", "bf16", {"num_inference_steps": 2}, **MEASURES))
    return bundle


def test_a_picture_with_a_preset(presets: sdopt.Bundle, tmp_path: Path) -> None:
    with running(tmp_path, presets.path, "--max-steps", 5, "--backend", "ort") as server:
        body = {"prompt": "a cat", "seed": 1, **SIZE}
        status, answer = server.post("/v1/images/generations", {**body, "preset": "fast"})
        assert status == 200, answer
        with sdopt.load(presets.path, threads=1) as pipe:
            expected = pipe("a cat", seed=1, **SIZE, preset="fast").images[0]
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(expected))
        for preset, words in {"slow": "num_inference_steps = 9", "none": "there are"}.items():
            status, answer = server.post("/v1/images/generations", {**body, "preset": preset})
            assert (status, words in answer["error"]["message"]) == (400, True), answer
        assert "measured with" not in server.log.read_text()
        for _ in range(2):
            assert server.post("/v1/images/generations", {**body, "preset": "other"})[0] == 200
        assert server.log.read_text().count("measured with openvino in bf16, and this is ort in fp32") == 1
        assert server.get("/v1/models")[1]["data"][0]["sdopt"]["presets"]["fast"]["num_inference_steps"] == 3
