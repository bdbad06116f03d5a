"""A layer that leaves float32 is named, and leaving it alone helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdopt import graph
from sdopt.build.diagnose import diagnose
from sdopt.bundle.files import read_manifest
from sdopt.bundle.write import write_manifest
from sdopt.cli.main import main
from tests.build.common import SIZES, inputs_of
from tests.build.test_half import UNET, WEIGHT, reweigh
from tests.conftest import EMOJI_BUNDLE, edit_manifest, sdopt


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji model with one convolution sixty thousand times as strong: the norm behind it makes up for that."""
    folder = tmp_path_factory.mktemp("overflow") / "bundle"
    shutil.copytree(EMOJI_BUNDLE, folder)
    model = graph.load(UNET)
    reweigh(model, WEIGHT, lambda array: array * 6e4)
    graph.save(model, folder / "unet.onnx")
    manifest = read_manifest(folder)
    (folder / "manifest.json").unlink()
    write_manifest(folder, manifest)
    return folder


def test_the_layer_that_overflows_is_the_first_and_the_worst(overflowing: Path) -> None:
    found = diagnose(overflowing / "unet.onnx", inputs_of(UNET, SIZES))
    assert found.first is not None
    assert found.first == found.worst(1)[0]
    assert (found.first.operator, found.first.output, found.first.island) == ("Conv", "conv2d_4", "node_conv2d_4")
    assert found.first.db == float("-inf")
    assert found.first.largest > 65504
    assert found.first.before_db > 60
    assert found.outputs["noise_pred"] == float("-inf")


def test_with_the_named_islands_nothing_is_lost(overflowing: Path) -> None:
    names = ["node_conv2d_4", "node_add_263", "node_group_norm_3"]
    found = diagnose(overflowing / "unet.onnx", inputs_of(UNET, SIZES), islands=names)
    assert found.first is None
    assert found.outputs["noise_pred"] > 55
    assert found.worst(1)[0].drop < 40


def test_the_command_names_the_layer(overflowing: Path, tmp_path: Path) -> None:
    done = sdopt("diagnose", overflowing, "--component", "unet", "--latent", 8)
    assert done.returncode == 5, done.stderr
    assert "first below 40 dB: Conv conv2d_4 is not finite, after " in done.stdout
    assert "--island 'node_conv2d_4'" in done.stdout
    done = sdopt("diagnose", "--component", "vae_encoder", "--latent", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"]["mean"] > 60


def test_a_wrong_argument_of_the_command_is_named() -> None:
    done = sdopt("diagnose", "--component", "unets")
    assert done.returncode == 3
    assert "has no component 'unets'; it has unet" in done.stderr
    done = sdopt("diagnose", "--latent", 0)
    assert done.returncode == 2
    assert "--latent 0; allowed are whole numbers from 1" in done.stderr


@pytest.mark.parametrize("floor", ["nan", "-1", "-inf"])
def test_a_floor_is_decibels_as_in_an_export(floor: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", f"--floor={floor}"]) == 2
    assert f"--floor {floor}; allowed are decibels from 0 on" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["png", "npy", "half", "text", "pickle", "missing", "device", "nan", "tokens"])
def test_a_file_of_inputs_that_cannot_be_used_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "inputs.npz"
    arrays: dict[str, Any] = {
        "input_ids": np.full((1, 32), 99999 if kind == "tokens" else 1, np.int32),
        "extra_embeddings": np.full((1, 128), np.nan if kind == "nan" else 0, np.float32),
    }
    if kind == "png":
        path.write_bytes((EMOJI_BUNDLE.parent / "apple.png").read_bytes())
    elif kind == "npy":
        np.save(path.with_suffix(".npy"), arrays["input_ids"])
        path = path.with_suffix(".npy")
    elif kind == "text":
        path.write_text("no arrays")
    elif kind == "pickle":
        np.savez(path, input_ids=np.array([{}], object))
    elif kind not in ("missing", "device"):
        np.savez(path, **arrays)
    if kind == "half":
        path.write_bytes(path.read_bytes()[:100])
    assert main(["diagnose", "--component", "text_encoder", "--inputs", str(path)]) == 2
    assert f"sdopt: error: --inputs {path}: " in capsys.readouterr().err


def test_attention_that_overflows_stays_float32_as_in_a_build(
    bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(bundle_copy, float16_attention_unsafe=["text_encoder"])
    command = ["diagnose", str(bundle_copy), "--component", "text_encoder"]
    assert main(command) in (0, 5)
    assert "text_encoder: attention stays float32" in capsys.readouterr().err
    assert main([*command, "--precision", "bf16"]) in (0, 5)
    assert "attention stays" not in capsys.readouterr().err
