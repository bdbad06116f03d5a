"""Engines of a tiny autoencoder: one flag builds them, and a missing one is told before the loop."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.build.jobs import build
from sdopt.bundle.files import Bundle
from sdopt.cli.main import main
from sdopt.engine.store import stored
from sdopt.errors import BackendError, UsageError
from sdopt.export.onto import add_adapter
from sdopt.metrics import psnr
from tests import tiny
from tests.build.test_joined_engines import EXACT, SIZES
from tests.fakes.gpu import Simulator

HOW: dict[str, Any] = {"num_inference_steps": 2, "height": 24, "width": 32, "seed": 1, "output_type": "np"}
CODER = ("adapters/tiny/vae_decoder", "adapters/tiny/vae_encoder")
OWN = ("text_encoder", "vae_encoder", "vae_decoder", "unet_step")


def silent(line: str) -> None: ...


@pytest.fixture(scope="module")
def coded(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a tiny autoencoder, without engines."""
    folder = tmp_path_factory.mktemp("coded")
    tiny.taesd().save_pretrained(folder / "taesd")
    bundle = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    add_adapter(folder / "taesd", bundle, "tiny", report=silent, offline=True)
    return bundle


def test_it_is_built_with_the_other_engines_or_alone(coded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(coded, tmp_path / "bundle"))
    with sdopt.load(coded, "ort") as pipe:
        expected = pipe("apple", vae="tiny", **HOW).images
    build(Bundle.open(copy), "ort", components=[CODER[0]], report=silent)
    assert {engine.record.component for engine in stored(Bundle.open(copy), "ort")} == {CODER[0]}
    build(Bundle.open(copy), "ort", adapters=["tiny"], report=silent)
    assert {engine.record.component for engine in stored(Bundle.open(copy), "ort")} >= {*CODER, "vae_decoder"}
    with sdopt.load(copy, "ort") as pipe:
        assert set(CODER) <= set(pipe.pool.built)
        assert psnr(expected, pipe("apple", vae="tiny", **HOW).images) > 60
    with pytest.raises(UsageError, match=f"tiny steers no engine; give --component {CODER[0]} --component {CODER[1]}"):
        build(Bundle.open(copy), "ort", adapters=["tiny"], components=["unet_step"], report=silent)


def test_a_missing_decoder_is_told_before_the_loop(
    coded: Path, tmp_path: Path, gpu: Simulator, own_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(coded, tmp_path / "bundle"))
    build(Bundle.open(copy), "tensorrt", components=OWN, profiles=SIZES, options=EXACT, report=silent)
    with sdopt.load(copy, "tensorrt") as pipe:
        plain = pipe("apple", **HOW).images
        watched: list[int] = []
        with pytest.raises(BackendError, match="adapters/tiny/vae_decoder") as caught:
            pipe("apple", vae="tiny", callback_on_step_end=lambda _, k, *rest: watched.append(k), **HOW)
        assert watched == []
        command = str(caught.value).partition("sdopt build ")[2].split("`")[0]
        assert main(["build", *shlex.split(command), "--precision", "fp32", "--profile", *SIZES]) == 0
        made = pipe("apple", vae="tiny", **HOW).images
    assert psnr(plain, made) < 40
    with sdopt.load(coded, "ort") as host:
        assert psnr(host("apple", vae="tiny", **HOW).images, made) > 60
        np.testing.assert_equal(made.shape, plain.shape)
