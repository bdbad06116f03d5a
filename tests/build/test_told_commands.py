"""What an error says to type works: it is typed, and the request made again, on the fake GPU and ONNX Runtime."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions
from sdopt.bundle.files import Bundle
from sdopt.cli.main import main
from sdopt.engine.store import stored
from sdopt.errors import BackendError, SdoptError, UsageError
from tests.conftest import edit_manifest

SIZES = ["batch=1 height=64 width=64"]
OPTIONS: dict[str, Any] = {"seed": 1, "num_inference_steps": 1, "output_type": "latent"}
EXACT = BuildOptions(precision="fp32")
pytestmark = pytest.mark.usefixtures("own_folders")


def quiet(line: str) -> None: ...


def typed(error: SdoptError) -> list[str]:
    """The words behind `sdopt` of the command that an error names."""
    told = re.search(r"sdopt (build .*?)(, or|$)", str(error))
    assert told is not None, str(error)
    return shlex.split(told[1])


def decoded(pipe: sdopt.Pipeline) -> Any:
    return pipe.decode(np.zeros((3, 4, 12, 8), np.float32), "np")


def encoded(pipe: sdopt.Pipeline) -> Any:
    return pipe.encode(["a red apple " * 30, "a cat"], "a1111")


def stepped(pipe: sdopt.Pipeline) -> Any:
    embeds = np.zeros((3, 96, pipe.bundle.component("unet").inputs[2].shape[-1]), np.float32)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds}
    return pipe(None, **OPTIONS, height=128, width=64, **given).images


REQUESTS = [
    ("unet_step", stepped), ("unet", stepped), ("text_encoder", encoded), ("vae_decoder", decoded),
]  # fmt: skip


@pytest.mark.parametrize(("component", "request_"), REQUESTS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_command_for_other_sizes_builds_what_takes_them(
    component: str, request_: Callable[[sdopt.Pipeline], Any], bundle: Bundle, gpu: Any
) -> None:
    build(bundle, "tensorrt", components=[component], profiles=SIZES, options=EXACT, report=quiet)
    with sdopt.load(bundle.path, backend="tensorrt") as pipe:
        with pytest.raises(UsageError, match=f"^{component}: got ") as caught:
            request_(pipe)
        command = typed(caught.value)
        assert command[1:6] == [str(bundle.path), "--backend", "tensorrt", "--component", component]
    assert main(command) == 0
    assert {s.record.component for s in stored(bundle, "tensorrt")} == {component}
    with sdopt.load(bundle.path, backend="tensorrt") as pipe:
        assert np.isfinite(request_(pipe)).all()


def test_more_learnt_words_than_an_engine_takes_are_told_without_a_command(bundle: Bundle, gpu: Any) -> None:
    build(bundle, "tensorrt", components=["text_encoder"], profiles=SIZES, options=EXACT, report=quiet)
    with sdopt.load(bundle.path, backend="tensorrt") as pipe:
        engine = pipe.engine("text_encoder")
        width = {s.name: s.shape for s in engine.inputs}["extra_embeddings"][1]
        given = {"input_ids": np.zeros((1, 32), np.int32), "extra_embeddings": np.zeros((200, int(width)), np.float32)}
        with pytest.raises(UsageError, match="extra_tokens = 200; .*No profile takes it: use --backend ort"):
            engine(**given)


def test_where_nothing_is_built_one_command_builds_all_that_a_picture_needs(bundle: Bundle, gpu: Any) -> None:
    with sdopt.load(bundle.path, backend="tensorrt") as pipe:
        with pytest.raises(BackendError, match=r"has no tensorrt engines. Build them: .* --backend tensorrt$"):
            pipe("a red apple", **OPTIONS)
        with pytest.raises(BackendError, match=r'--profile "batch=1:1:6 height=64 width=96"$') as caught:
            pipe("a red apple", **OPTIONS, height=64, width=96, num_images_per_prompt=6)
    assert main(typed(caught.value)) == 0
    with sdopt.load(bundle.path, backend="tensorrt") as pipe:
        assert pipe("a red apple", **OPTIONS, height=64, width=96).images.shape == (1, 4, 8, 12)


def test_a_stale_engine_of_a_copied_bundle_is_built_there(bundle: Bundle, gpu: Any, tmp_path: Path) -> None:
    build(bundle, "tensorrt", components=["vae_decoder"], profiles=SIZES, options=EXACT, report=quiet)
    copy = Path(shutil.copytree(bundle.path, tmp_path / "a copy"))
    with sdopt.load(copy, backend="tensorrt") as pipe, pytest.raises(UsageError, match="vae_decoder") as caught:
        decoded(pipe)
    assert typed(caught.value)[1] == str(copy)


# ---- precision


def test_half_graphs_do_not_replace_float32_on_a_cpu(bundle: Bundle) -> None:
    def picture(**how: Any) -> tuple[str, Any]:
        with sdopt.load(bundle.path, backend="ort:cpu", **how) as pipe:
            images = pipe("a red apple", **OPTIONS, height=64, width=64).images
            return pipe.precision, images

    own, expected = picture()
    build(bundle, "ort", components=["unet_step"], options=BuildOptions(precision="fp16"), report=quiet)
    for how in ({}, {"precision": "float32"}, {"precision": "fp32"}):
        told, found = picture(**how)
        assert told == own == "fp32"
        np.testing.assert_array_equal(found, expected)
    told, found = picture(precision="float16")
    assert told.startswith("fp16 (text_encoder fp32")
    assert np.abs(found - expected).max() > 0
    build(bundle, "ort", components=["unet_step"], options=EXACT, report=quiet)
    assert picture()[0] == "fp32"


def test_of_two_precisions_the_one_that_is_asked_for_is_used_and_told(
    bundle: Bundle, gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(bundle.path, float16_unsafe=["vae_decoder"])
    bundle = Bundle.open(bundle.path, verify=False)
    words = ["generate", "a red apple", "-m", str(bundle.path), "--backend", "tensorrt", "--size", "64x64"]
    words += ["--steps", "1", "--json", "-o", str(tmp_path / "apple.png"), "--precision"]
    build(bundle, "tensorrt", profiles=SIZES, options=BuildOptions(precision="bf16"), report=quiet)
    assert main([*words, "fp16"]) == 2
    told = capsys.readouterr().err
    assert "in fp16 nothing is; there is bf16. Leave --precision out, or build it: sdopt build" in told
    assert main([*shlex.split(told.partition("build it: sdopt ")[2]), "--profile", *SIZES]) == 0
    for asked, used in {
        "bf16": "bf16",
        "bfloat16": "bf16",
        "float16": "fp16 (vae_decoder bf16)",
        "auto": "fp16",
    }.items():
        capsys.readouterr()
        assert main([*words, asked]) == 0
        assert json.loads(capsys.readouterr().out)["precision"].startswith(used)


@pytest.mark.parametrize("word", ["float16", "fp16"])
def test_a_precision_may_be_typed_in_either_word_when_building(word: str, bundle: Bundle) -> None:
    (folder,) = build(bundle, "ort", components=["vae_encoder"], options=BuildOptions(precision=word), report=quiet)
    assert stored(bundle, "ort")[0].precision == "fp16"
    assert folder.is_dir()
