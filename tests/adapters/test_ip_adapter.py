"""Pictures with IP-Adapters are those of diffusers, on every CPU backend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.adapter import Pixels, open_adapter
from sdopt.bundle.files import Bundle
from sdopt.errors import BundleError, UsageError
from sdopt.export.onto import add_adapter
from sdopt.image.clip import pixel_values
from sdopt.metrics import psnr
from sdopt.request.image_prompt import layer_scales
from tests import tiny
from tests.adapters.nets import controlnet, edges

BACKENDS = ("ort", "openvino")
FLOOR_DB = 60.0
CALL: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np", "height": 24, "width": 32}
Model = tuple[Path, Path, Path]
FACE, STYLE = edges(40, 31), edges(20, 33, seed=9)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A checkpoint, its bundle with IP-Adapters of two layouts, and the folder of these as they are published."""
    names = {"sd": ("tiny_checkpoint", "tiny_bundle"), "sdxl": ("sdxl_checkpoint", "sdxl_bundle")}[request.param]
    checkpoint, bundle = (request.getfixturevalue(name) for name in names)
    folder = tmp_path_factory.mktemp("ip")
    own = Path(shutil.copytree(bundle, folder / "bundle"))
    tiny.image_encoder(folder / "image_encoder")
    for seed, kind in enumerate(("base", "plus")):
        file = tiny.ip_adapter(folder / f"ip-adapter_{kind}.safetensors", checkpoint, kind, seed)
        add_adapter(file, own, kind, report=lambda line: None)
    return checkpoint, own, folder


def reference(model: Model, *kinds: str, pipeline: str = "", **parts: Any) -> Any:
    """diffusers' pipeline of a kind ("", "Img2Img", "Inpaint", "ControlNet") with these IP-Adapters."""
    import diffusers
    from transformers import CLIPVisionModelWithProjection

    checkpoint, bundle, folder = model
    family = "StableDiffusionXL" if Bundle.open(bundle).manifest.family == "sdxl" else "StableDiffusion"
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    pipe = getattr(diffusers, f"{family}{pipeline}Pipeline").from_pretrained(checkpoint, image_encoder=encoder, **parts)
    pipe.set_progress_bar_config(disable=True)
    files = [f"ip-adapter_{kind}.safetensors" for kind in kinds]
    pipe.load_ip_adapter([str(folder)] * len(kinds), subfolder=[""] * len(kinds), weight_name=files)
    return pipe


def drawn(pipe: Any, **options: Any) -> Any:
    import torch

    return pipe("apple", generator=torch.Generator().manual_seed(1), **{**CALL, **options}).images


def alike(pipe: Any, expected: Any, **options: Any) -> None:
    images = pipe("apple", seed=1, **{**CALL, **options}).images
    assert psnr(expected, images) >= FLOOR_DB


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_pictures_are_those_of_diffusers(model: Model, backend: str, kind: str) -> None:
    theirs = reference(model, kind)
    with sdopt.load(model[1], backend) as pipe:
        plain = pipe("apple", seed=1, **CALL).images
        assert not any("ip_adapter" in name for name in pipe.pool.opened)
        for guidance in (7.5, 1.0):
            expected = drawn(theirs, ip_adapter_image=FACE, guidance_scale=guidance)
            assert psnr(expected, plain) < 50  # the picture matters
            alike(pipe, expected, ip_adapter_image={kind: FACE}, guidance_scale=guidance)
        theirs.set_ip_adapter_scale(0.6)
        expected = drawn(theirs, ip_adapter_image=[[FACE, STYLE]])
        alike(pipe, expected, ip_adapter_image={kind: [FACE, STYLE]}, ip_adapter_scale=0.6)
        assert np.array_equal(pipe("apple", seed=1, **CALL).images, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_adapters_have_scales_by_block(model: Model, backend: str) -> None:
    theirs = reference(model, "base", "plus")
    block = "block_0" if Bundle.open(model[1]).manifest.family == "sdxl" else "block_1"
    scales = [0.7, {"down": 0.4, "mid": [1.2], "up": {block: [0.1, 0.9]}}]
    theirs.set_ip_adapter_scale(scales)
    expected = drawn(theirs, ip_adapter_image=[FACE, [STYLE, FACE, FACE]])  # 4 tokens, and 18
    with sdopt.load(model[1], backend) as pipe:
        seen = {"base": FACE, "plus": [STYLE, FACE, FACE]}
        alike(pipe, expected, ip_adapter_image=seen, ip_adapter_scale=scales)


def test_all_images_of_several_prompts_see_it(model: Model) -> None:
    import torch

    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    options: dict[str, Any] = {**CALL, "num_images_per_prompt": 2}
    expected = reference(model, "plus")(["apple", "a"], generator=seeds, ip_adapter_image=FACE, **options).images
    with sdopt.load(model[1]) as pipe:
        images = pipe(["apple", "a"], seed=[0, 1, 2, 3], ip_adapter_image={"plus": FACE}, **options).images
        assert psnr(expected, images) >= FLOOR_DB


@pytest.mark.parametrize("pipeline", ["Img2Img", "Inpaint"])
def test_it_begins_at_a_picture_too(model: Model, pipeline: str) -> None:
    mask = np.zeros((24, 32), np.uint8)
    mask[6:18, 8:24] = 255
    options: dict[str, Any] = {"image": edges(seed=7), "strength": 0.7, "guidance_scale": 6.0}
    if pipeline == "Inpaint":
        options["mask_image"] = Image.fromarray(mask)
    expected = drawn(reference(model, "base", pipeline=pipeline), ip_adapter_image=FACE, **options)
    with sdopt.load(model[1]) as pipe:
        alike(pipe, expected, ip_adapter_image={"base": FACE}, **options)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_embeddings_take_the_place_of_pictures(model: Model, kind: str) -> None:
    theirs = reference(model, kind)
    for guided in (True, False):
        embeds = theirs.prepare_ip_adapter_image_embeds([[FACE, STYLE]], None, "cpu", 1, guided)
        options = {"guidance_scale": 5.0 if guided else 1.0}
        expected = drawn(theirs, ip_adapter_image_embeds=embeds, **options)
        with sdopt.load(model[1]) as pipe:
            alike(pipe, expected, ip_adapter_image_embeds={kind: embeds[0].detach().numpy()}, **options)


def test_a_controlnet_may_be_there_too(model: Model) -> None:
    import diffusers

    checkpoint, bundle, folder = model
    controlnet(checkpoint).save_pretrained(folder / "canny")
    if not (bundle / "adapters/canny").exists():
        add_adapter(folder / "canny", bundle, "canny", report=lambda line: None)
    net = diffusers.ControlNetModel.from_pretrained(folder / "canny")
    theirs = reference(model, "plus", pipeline="ControlNet", controlnet=net)
    expected = drawn(theirs, image=edges(), ip_adapter_image=FACE)
    with sdopt.load(bundle) as pipe:  # a picture without a name is for the only ControlNet
        alike(pipe, expected, control_image=edges(), ip_adapter_image={"plus": FACE})


def test_both_halves_in_two_calls_give_the_same(model: Model) -> None:
    with sdopt.load(model[1]) as pipe:
        options = {**CALL, "seed": 1, "ip_adapter_image": {"plus": FACE}}
        one, two = (pipe("apple", guidance_batch=batch, **options).images for batch in (2, 1))
        assert psnr(one, two) > 100


def test_a_scale_of_0_leaves_the_picture_as_it_is(model: Model) -> None:
    with sdopt.load(model[1]) as pipe:
        images = pipe("apple", seed=1, ip_adapter_image={"base": FACE}, ip_adapter_scale=0, **CALL).images
        assert psnr(pipe("apple", seed=1, **CALL).images, images) > 100


def test_hires_fix_sees_it_in_both_passes_and_encodes_it_once(model: Model) -> None:
    with sdopt.load(model[1]) as pipe:
        encoder, calls = pipe.engine("adapters/base/image_encoder"), list[int]()
        given = pipe.pool.using

        def counted(component: str, *options: Any, **others: Any) -> Any:
            calls.append(component.endswith("image_encoder"))
            return given(component, *options, **others)

        pipe.pool.using = counted  # pyright: ignore[reportAttributeAccessIssue]
        options = {**CALL, "seed": 1, "hires": 1.5}
        pictured = pipe("apple", ip_adapter_image={"base": FACE}, **options).images
        assert encoder.inputs[0].shape[-1] == 18
        assert sum(calls) == 1
        assert psnr(pictured, pipe("apple", **options).images) < 50


def test_requests_share_a_call_and_get_their_own_pictures(model: Model) -> None:
    from sdopt.denoise.batch import Batch, Job

    with sdopt.load(model[1]) as pipe:
        options = [
            {"seed": i, "ip_adapter_image": {"plus": edges(seed=i)}, "num_inference_steps": 2 + i} for i in (1, 2)
        ]
        ready = [pipe.prepare(pipe.plan("apple", height=24, width=32, **one)) for one in options]
        engines = {name: pipe.engine(name) for name in ready[0].program.engines}
        jobs, batch = [Job(one.board(engines), one.program) for one in ready], Batch()
        for job in jobs:
            batch.join(job)
        assert jobs[0].key == jobs[1].key
        while batch.jobs:
            batch.step()
        for job, one in zip(jobs, options, strict=True):
            alone = pipe("apple", output_type="latent", height=24, width=32, **one).images
            assert psnr(alone, job.board.sample) > 100


PAIR = {"base": FACE, "plus": FACE}
EMBEDS = np.zeros((2, 1, 16), np.float32)
WRONG: dict[str, dict[str, Any]] = {
    "has no adapter 'bas'; there are base": {"ip_adapter_image": {"bas": FACE}},
    "this bundle has base, plus; say which": {"ip_adapter_image": FACE},
    "ip_adapter_scale needs ip_adapter_image": {"ip_adapter_scale": 0.5},
    "ip_adapter_image and ip_adapter_image_embeds: give one": {
        "ip_adapter_image": {"base": FACE}, "ip_adapter_image_embeds": {"base": EMBEDS},
    },
    "3 scales for 2 IP-Adapters": {"ip_adapter_image": PAIR, "ip_adapter_scale": [1, 2, 3]},
    "allowed are PIL images": {"ip_adapter_image": {"base": "face.png"}},
    "ip_adapter_image = {}": {"ip_adapter_image": {}},
    "ip_adapter_image = []": {"ip_adapter_image": {"base": []}},
    "base got (2, 1, 16); allowed are float32 [1, pictures, 16] without guidance": {
        "ip_adapter_image_embeds": {"base": EMBEDS}, "guidance_scale": 1.0,
    },
    "base got (1, 1, 16); allowed are float32 [2, pictures, 16] with guidance": {
        "ip_adapter_image_embeds": {"base": EMBEDS[:1]},
    },
    "allowed are float32 [2, pictures, 10, 24] with": {"ip_adapter_image_embeds": {"plus": EMBEDS}},
    "it has NaN": {"ip_adapter_image_embeds": {"base": EMBEDS + np.nan}},
    "[rows, pictures, features]": {"ip_adapter_image_embeds": {"base": EMBEDS.astype(np.float64)}},
    "one in a list": {"ip_adapter_image_embeds": [EMBEDS, EMBEDS]},
    "ip_adapter_scale = {'middle': 1}": {"ip_adapter_image": PAIR, "ip_adapter_scale": {"middle": 1}},
    "ip_adapter_scale = {'mid': {'block_0': 1}}": {
        "ip_adapter_image": PAIR, "ip_adapter_scale": {"mid": {"block_0": 1}},
    },
    "ip_adapter_scale = '1'": {"ip_adapter_image": PAIR, "ip_adapter_scale": "1"},
    "there is no 'block_9' with cross-attentions; there are block_": {
        "ip_adapter_image": PAIR, "ip_adapter_scale": {"up": {"block_9": 1}},
    },
    "3 scales for up.block_": {"ip_adapter_image": PAIR, "ip_adapter_scale": {"up": [1, 2, 3]}},
    "2 scales for mid, which has 1": {"ip_adapter_image": PAIR, "ip_adapter_scale": {"mid": [1, 2]}},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_said(model: Model, message: str) -> None:
    with sdopt.load(model[1]) as pipe, pytest.raises(UsageError) as caught:
        pipe.plan("apple", **WRONG[message])
    assert message in str(caught.value)
    assert str(caught.value.param).startswith("ip_adapter") or "has no adapter" in message


def test_a_bundle_without_an_adapter_says_how_to_add_one(tiny_bundle: Path) -> None:
    with sdopt.load(tiny_bundle) as pipe:
        with pytest.raises(UsageError, match="has no IP-Adapter; add one: sdopt export IP_ADAPTER --onto"):
            pipe.plan("apple", ip_adapter_image=FACE)
        with pytest.raises(UsageError, match="cannot be set: add one to the bundle, sdopt export IP_ADAPTER"):
            pipe.image_encoder = None


def test_a_picture_is_for_the_right_kind_of_adapter(model: Model) -> None:
    with sdopt.load(model[1]) as pipe, pytest.raises(UsageError, match="base is no ControlNet, but a ip_adapter"):
        pipe.plan("apple", control_image={"base": edges()})


def test_an_adapter_of_another_model_is_refused(model: Model, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(model[1], tmp_path / "bundle"))
    path = bundle / "adapters/base/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["image_prompt"]["layers"].append("mid_block.attentions.0.transformer_blocks.9.attn2")
    path.write_text(json.dumps(manifest))
    with sdopt.load(bundle) as pipe, pytest.raises(BundleError, match="is made for another model: it has"):
        pipe.plan("apple", ip_adapter_image={"base": FACE})


def test_the_picture_says_which_adapters_it_was_made_with(model: Model) -> None:
    with sdopt.load(model[1]) as pipe:
        digest = open_adapter(pipe.bundle, "base").digest
        seen: dict[str, Any] = {"ip_adapter_image": {"base": [FACE, STYLE]}, "ip_adapter_scale": {"up": 0.5}}
        record = json.loads(json.dumps(pipe("apple", seed=1, **seen, **CALL).parameters[0]))
        (entry,) = record["image_prompts"]
        assert (entry["name"], entry["digest"], len(set(entry["pictures"]))) == ("base", digest, 2)
        assert record["ip_adapter_scale"] == {"up": 0.5}
        given = {"ip_adapter_image_embeds": {"base": EMBEDS}}
        assert pipe.plan("apple", **given).parameters(0)["made_with_arrays"] == ["ip_adapter_image_embeds"]


CLIP = Pixels(18, 3, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SEEN = {
    "wide": FACE, "high": edges(97, 41), "small": edges(7, 5), "grey": edges(40, 31).convert("L"),
    "clear": edges(40, 31).convert("RGBA"), "array": np.asarray(FACE, np.float32) / 255,
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_an_image_encoder_sees_what_it_sees_in_diffusers(name: str) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size=18, crop_size=18)
    theirs = SEEN[name] if isinstance(SEEN[name], Image.Image) else FACE
    expected = np.asarray(processor(theirs, return_tensors="np").pixel_values)
    assert psnr(expected, pixel_values("ip_adapter_image", [SEEN[name]], 18, CLIP)) >= 100


def test_scales_by_block_are_those_of_the_layers_in_it() -> None:
    layers = [
        *(
            f"down_blocks.{i}.attentions.{j}.transformer_blocks.{k}.attn2"
            for i in (0, 1)
            for j in (0, 1)
            for k in (0, 1)
        ),
        *(f"up_blocks.1.attentions.{j}.transformer_blocks.0.attn2" for j in range(3)),
        "mid_block.attentions.0.transformer_blocks.0.attn2",
    ]
    assert layer_scales(layers, 0.5).tolist() == [0.5] * 12
    given = layer_scales(layers, {"down": {"block_1": [0.25, 0.5]}, "up": [1.0, 2.0, 3.0]})
    assert given.tolist() == [0, 0, 0, 0, 0.25, 0.25, 0.5, 0.5, 1, 2, 3, 0]
    assert layer_scales(layers, {"down": 2.0, "mid": 1.0}).tolist() == [2] * 8 + [0] * 3 + [1]
