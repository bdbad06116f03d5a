"""SD3's and Flux's transformers and T5 in half precision, and as engines of TensorRT-RTX, built without a GPU."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.build.half import half
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions
from sdopt.build.recipe import part_profile, read_recipe, user_profiles
from sdopt.bundle.files import Bundle
from sdopt.engine.store import stored
from sdopt.graph import load
from sdopt.metrics import psnr
from tests.build.common import half_outputs, inputs_of, outputs
from tests.conftest import edit_manifest

NEEDS_RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='TensorRT-RTX is not installed: pip install "sdopt[tensorrt-rtx]"',
)
LIBRARIES = {"ort": "onnxruntime", "openvino": "openvino"}
PROFILE = "batch=1:1:2 height=24:24:32 width=32"
T5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}
LEAST_DB = {"float16": 55, "bfloat16": 35}

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture(params=T5)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    own: Path = request.getfixturevalue(f"{request.param}_bundle")
    return Bundle.open(Path(shutil.copytree(own, tmp_path / "bundle")))


def t5(bundle: Bundle) -> str:
    return T5[bundle.manifest.family]


@pytest.mark.parametrize("dtype", LEAST_DB)
def test_a_half_graph_is_near_the_float32_one(dtype: str, bundle: Bundle, tmp_path: Path) -> None:
    for name in ("transformer", t5(bundle)):
        path = bundle.component(name).graph
        arrays, model = inputs_of(path), load(path)
        (expected,) = outputs(load(path), arrays, tmp_path).values()
        report = half(model, dtype=dtype)
        assert report.half_nodes > 3 * len(report.islands)
        (found,) = half_outputs(model, arrays, tmp_path).values()
        assert psnr(expected, found) > LEAST_DB[dtype], name


def test_what_leaves_the_range_of_fp16_is_known(bundle: Bundle) -> None:
    unsafe = bundle.manifest.float16_unsafe
    assert unsafe == ((T5["sd3"],) if bundle.manifest.family == "sd3" else (T5["flux"], "transformer"))


def test_each_engine_takes_the_tokens_of_its_own_text(bundle: Bundle) -> None:
    recipe = read_recipe()
    (profile,) = user_profiles(bundle, recipe, [PROFILE], static=False)
    own = {
        part.name: part_profile(bundle, part, bundle.component(part.graph).inputs, profile).ranges
        for part in recipe.chosen(bundle, None)
    }
    clip, both = {"sd3": (7, 7 + 13), "flux": (7, 13)}[bundle.manifest.family]
    assert own["text_encoder"]["tokens"] == (clip,) * 3
    assert own[t5(bundle)]["tokens"] == (13,) * 3
    assert own["transformer"] == {
        "batch": (1, 2, 4), "tokens": (both,) * 3, "latent_height": (12, 12, 16), "latent_width": (16,) * 3,
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_a_transformer_in_int8_makes_nearly_the_same_picture(backend: str, bundle: Bundle) -> None:
    pytest.importorskip(LIBRARIES[backend])
    edit_manifest(bundle.path, defaults=replace(bundle.manifest.defaults, height=32, width=32))  # of its pictures
    bundle = Bundle.open(bundle.path)
    options = BuildOptions("int8", floor=20.0, prompts=("an apple", "apple pie", "apple tea"))
    build(bundle, backend, options=options)
    made = {one.record.component: one.record.notes for one in stored(bundle, backend)}
    assert made["transformer"]["quantized_layers"] > 10
    assert made["transformer"]["quantized_db"] >= 20
    request: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "np"}
    with sdopt.load(bundle.path, "ort") as exact, sdopt.load(bundle.path, backend, precision="int8") as pipe:
        one, other = (np.asarray(p("an apple", **request).images) for p in (exact, pipe))
    assert 20 < psnr(one, other) < 80


@NEEDS_RTX
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_transformer_of_8_bits_is_built(precision: str, bundle: Bundle) -> None:
    options = BuildOptions(precision, opt_level=0, floor=15.0, prompts=("an apple", "apple pie", "apple tea"))
    build(bundle, "tensorrt-rtx", components=["transformer"], profiles=[PROFILE], options=options)
    (made,) = stored(bundle, "tensorrt-rtx")
    overflows = "transformer" in bundle.manifest.float16_unsafe  # then the rest of it could not be fp16
    assert (made.precision in ("bf16", "fp32")) if overflows else (made.precision == precision)


@NEEDS_RTX
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_engines_are_built(precision: str, bundle: Bundle) -> None:
    options = BuildOptions(precision=precision, opt_level=0)
    build(bundle, "tensorrt-rtx", components=["transformer", t5(bundle)], profiles=[PROFILE], options=options)
    made = {one.record.component: one.precision for one in stored(bundle, "tensorrt-rtx")}
    expected = dict.fromkeys(("transformer", t5(bundle)), precision)
    if precision == "fp16":
        expected |= {name: made[name] for name in bundle.manifest.float16_unsafe if made[name] in ("bf16", "fp32")}
    assert made == expected
