"""Feature caches: the pictures are those of a loop in PyTorch whose UNet takes the same features in the same calls."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array
from sdopt.denoise.batch import Batch, job_of
from sdopt.denoise.model import Predict
from sdopt.errors import BackendError, UsageError
from sdopt.metrics import psnr
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT
from tests.test_pipeline import picture_psnr

FLOOR_DB = 60.0
OPTIONS: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "np"}
DEPTHS = (1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("own")))
        yield


def with_caches(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    for depth in DEPTHS:
        build(Bundle.open(folder, verify=False), "ort", cache_depth=depth, report=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_caches(EMOJI_BUNDLE, tmp_path_factory.mktemp("cache") / "bundle")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(folder, "ort", threads=1, verify=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def emoji() -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(EMOJI_CHECKPOINT, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@contextmanager
def caching(unet: Any, depth: int, full: Collection[int]) -> Iterator[None]:
    """The UNet of diffusers with a feature cache: the layer of the up path that is `depth` from the end is given the
    deep features of the latest of the calls `full`, beside its own skip."""
    import torch

    channels = unet.config.block_out_channels
    skips = [channels[0]]
    for i, width in enumerate(channels):
        skips += [width] * unet.config.layers_per_block + [width] * (i + 1 < len(channels))
    layer = [layer for block in unet.up_blocks for layer in block.resnets][-depth]
    state: dict[str, Any] = {"calls": 0}

    def count(module: Any, args: Any) -> None:
        state["calls"] += 1

    def replaced(module: Any, args: Any) -> Any:
        joined, *rest = args
        deep, skip = joined.split([joined.shape[1] - skips[depth - 1], skips[depth - 1]], 1)
        if state["calls"] - 1 in full:
            state["deep"] = deep
        return (torch.cat([state["deep"], skip], 1), *rest)

    hooks = [unet.register_forward_pre_hook(count), layer.register_forward_pre_hook(replaced)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def generators(*seeds: int) -> Any:
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


SCHEDULES = [
    ({"cache_interval": 2}, {0, 2, 4, 6}),
    ({"cache_interval": 3, "cache_depth": 2}, {0, 3, 6}),
    ({"cache_schedule": [1, 4], "cache_depth": 3}, {0, 1, 4}),
    ({"cache_interval": 100, "guidance_scale": 1.0}, {0}),
    ({"cache_interval": 2, "guidance_batch": 1}, {0, 2, 4, 6}),
]


@pytest.mark.parametrize(("options", "full"), SCHEDULES, ids=lambda o: str(o) if isinstance(o, dict) else "")
def test_the_picture_is_that_of_the_same_cache_in_pytorch(
    options: dict[str, Any], full: set[int], pipe: sdopt.Pipeline, emoji: Any
) -> None:
    prompts = ["a red apple", "a cat on a blue background"]
    theirs = {**OPTIONS, "guidance_scale": options.get("guidance_scale", 4.0)}
    with caching(emoji.unet, options.get("cache_depth", 1), full):
        expected = emoji(prompts, generator=generators(5, 6), height=128, width=128, **theirs).images
    found = pipe(prompts, seed=[5, 6], **{**OPTIONS, **options})
    assert picture_psnr(expected, found.images) >= FLOOR_DB
    without = {name: value for name, value in options.items() if not name.startswith("cache")}
    assert picture_psnr(expected, pipe(prompts, seed=[5, 6], **{**OPTIONS, **without}).images) < 40
    record = found.parameters[0]
    assert record["cache_depth"] == options.get("cache_depth", 1)
    again = pipe("a red apple", seed=5, **{**OPTIONS, **{n: v for n, v in record.items() if n.startswith("cache")},
                                           "guidance_scale": record["guidance_scale"]}).images  # fmt: skip
    assert picture_psnr(found.images[:1], again) >= 80


def test_where_guidance_ends_a_full_call_begins_anew(pipe: sdopt.Pipeline, emoji: Any) -> None:
    def end_guidance(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    with caching(emoji.unet, 1, {0, 3, 4, 6}):
        how = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        expected = emoji("a cat", generator=generators(3), height=128, width=128, **how, **OPTIONS).images
    found = pipe("a cat", seed=3, cache_interval=3, guidance_interval=(0.0, 0.5), **OPTIONS).images
    assert picture_psnr(expected, found) >= FLOOR_DB


def test_sdxl_whose_last_layers_do_not_see_the_prompt(sdxl_checkpoint: Path, sdxl_bundle: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    theirs = StableDiffusionXLPipeline.from_pretrained(
        sdxl_checkpoint, torch_dtype=torch.float32, add_watermarker=False
    )
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np", "height": 24, "width": 32}
    with sdopt.load(with_caches(sdxl_bundle, tmp_path / "bundle"), "ort", threads=1, verify=False) as ours:
        assert "encoder_hidden_states" not in {spec.name for spec in ours.engine("unet_shallow_1").inputs}
        for depth in DEPTHS:
            with caching(theirs.unet, depth, {0, 2, 4}):
                expected = theirs("a cat", negative_prompt="b", generator=generators(5), **options).images
            cache = {"cache_interval": 2, "cache_depth": depth}
            found = ours("a cat", negative_prompt="b", seed=5, **cache, **options).images
            assert picture_psnr(expected, found) >= FLOOR_DB


def latents(pipe: sdopt.Pipeline, request: dict[str, Any]) -> Array:
    return pipe(**request, output_type="latent").images


SMALL = {"height": 96, "width": 64, "num_inference_steps": 6}
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a cat", "seed": 1, "cache_interval": 2, **SMALL},
    {"prompt": ["a dog", "a fish"], "seed": [2, 3], "cache_schedule": [2, 3], "sampler": "euler_a", **SMALL},
    {"prompt": "a car", "seed": 4, "cache_interval": 3, "guidance_interval": (0.2, 0.7), **SMALL},
    {"prompt": "a bird", "seed": 5, "cache_interval": 2, "cache_depth": 2, **SMALL},
    {"prompt": "the sun", "seed": 6, **SMALL},
    {"prompt": "the moon", "seed": 7, "cache_interval": 4, "guidance_batch": 1, **SMALL},
    {"prompt": "a tree", "seed": 8, "cache_interval": 4, "guidance_scale": 1.0, **SMALL},
]


def test_image_i_of_any_batch_equals_that_image_alone(pipe: sdopt.Pipeline) -> None:
    batch, waiting, last = Batch(), list(enumerate(REQUESTS)), dict[int, Array]()
    index, shared = dict[int, int](), 0
    while waiting or batch.jobs:
        if waiting:
            i, request = waiting.pop(0)
            options = dict(request)
            job = job_of(pipe.prepare(pipe.plan(options.pop("prompt"), **options)))
            index[id(job)] = i
            batch.join(job)
        for jobs in batch.groups().values():
            launch = jobs[0].launch
            assert isinstance(launch, Predict)
            shared += len(jobs) > 1 and launch.cached is not None and launch.cached.takes
            with ExitStack() as stack:
                engines = {name: stack.enter_context(pipe.pool.using(name)) for name in jobs[0].engines}
                for job, step in batch.advance(jobs, engines):
                    last[index[id(job)]] = step.sample  # type: ignore[union-attr]
    assert shared > 1
    for i, request in enumerate(REQUESTS):
        np.testing.assert_array_equal(last[i], latents(pipe, request), err_msg=str(request))


def test_each_pass_of_hires_fix_begins_with_a_full_call(pipe: sdopt.Pipeline) -> None:
    plan = pipe.plan("a cat", hires=1.5, cache_interval=3, num_inference_steps=5, height=64, width=64)
    for one in plan.passes:
        launches = pipe.prepare(one).program.launches
        takes = [launch.cached.takes for launch, *_ in launches if isinstance(launch, Predict) and launch.cached]
        assert takes == [k % 3 > 0 for k in range(len(one.table))]
    assert np.isfinite(pipe("a cat", hires=1.5, cache_interval=3, height=64, width=64, **OPTIONS).images).all()


@pytest.mark.parametrize("depth", [1, 3])
def test_loras_change_both_engines(depth: int, folder: Path) -> None:
    with sdopt.load(folder, "ort", threads=1, verify=False) as pipe:
        pipe.load_lora_weights("neon")
        overlay, rng = pipe.loras.overlay, np.random.default_rng(0)
        given: dict[str, Array] = {
            "sample": rng.standard_normal((1, 4, 16, 16), np.float32),
            "timestep": np.full(1, 501, np.float32),
            "encoder_hidden_states": rng.standard_normal((2, 32, 128), np.float32),
        }
        predictions: list[Array] = []
        for name in ("unet", f"unet_deep_{depth}", f"unet_shallow_{depth}"):
            with pipe.pool.using(name, overlay) as engine:
                made = engine(**{spec.name: given[spec.name] for spec in engine.inputs})
            given |= made
            predictions.append(made["noise_pred"])
    assert psnr(predictions[0], predictions[1]) >= FLOOR_DB  # what was built keeps changed weights as float16
    np.testing.assert_array_equal(predictions[2], predictions[1])


def test_a_bundle_without_the_engines_says_how_to_build_them(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"cache of depth 6; there are those of depth 1, 2, 3: give cache_depth=3\. Build "
    ):
        pipe("a cat", cache_interval=2, cache_depth=6)
    shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle")
    with sdopt.load(tmp_path / "bundle", "ort", verify=False) as plain:
        build_it = f"sdopt build {tmp_path}/bundle --backend ort --cache-depth 1"
        with pytest.raises(BackendError, match=f"of depth 1. Build them: {build_it}$"):
            plain("a cat", cache_interval=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cache_interval": 2, "cache_schedule": [0]},
            "cache_interval and cache_schedule: both say which calls are full",
        ),
        ({"cache_schedule": [0, 8]}, "cache_schedule: there is no call 8; this request has 8, the first is 0"),
        ({"cache_schedule": [0], "hires": 2.0}, "cache_schedule and hires: its two passes"),
        ({"cache_interval": 2, "control_image": np.zeros((8, 8, 3))}, "cache_interval and control_image: ControlNets"),
        ({"cache_schedule": [1], "ip_adapter_image": np.zeros((8, 8, 3))}, "cache_schedule and ip_adapter_image: IP-"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_its_name(options: dict[str, Any], message: str, pipe: sdopt.Pipeline) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pipe.plan("a cat", num_inference_steps=8, **options)
    assert caught.value.param in ("cache_interval", "cache_schedule")


def test_where_every_call_is_full_there_is_no_cache(pipe: sdopt.Pipeline) -> None:
    for options in ({"cache_interval": 1}, {"cache_schedule": range(8)}):
        plan = pipe.plan("a cat", num_inference_steps=8, **options)
        assert pipe.prepare(plan).program.engines == ("unet",)
        assert "cache_depth" not in plan.parameters(0)


def test_a_picture_says_in_which_precision_its_cached_unet_ran(folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(folder, tmp_path / "bundle"), verify=False)
    how: dict[str, Any] = {"options": BuildOptions(precision="fp16"), "report": lambda line: None}
    build(bundle, "ort", cache_depth=2, **how)
    with sdopt.load(bundle.path, "ort:cpu", precision="fp16", verify=False) as pipe:
        cached = pipe("a cat", seed=1, cache_interval=2, cache_depth=2, **OPTIONS)
        assert cached.parameters[0]["precision"].startswith("fp16")
        plain = pipe("a cat", seed=1, **{**OPTIONS, "num_inference_steps": 1})
        assert plain.parameters[0]["precision"] == "fp32"
    with sdopt.load(bundle.path, "ort:cpu", precision="fp32", threads=1, verify=False) as exact:
        expected = exact("a cat", seed=1, cache_interval=2, cache_depth=2, **OPTIONS).images
    assert 35 < picture_psnr(expected, cached.images) < 200
