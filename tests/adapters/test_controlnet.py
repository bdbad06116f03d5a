"""Pictures with ControlNets are those of diffusers, on every CPU backend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.adapter import adapter_names, open_adapter
from sdopt.bundle.files import Bundle
from sdopt.errors import BundleError, UsageError
from sdopt.export.onto import add_adapter
from sdopt.metrics import psnr
from tests.adapters.nets import controlnet, edges

BACKENDS = ("ort", "openvino")
FLOOR_DB = 60.0
CALL: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "height": 24, "width": 32}
NETS = {"canny": 3, "pose": 4}  # name -> the seed of its weights


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, its bundle with two ControlNets, and the folder of these as diffusers has them."""
    names = {"sd": ("tiny_checkpoint", "tiny_bundle"), "sdxl": ("sdxl_checkpoint", "sdxl_bundle")}[request.param]
    checkpoint, bundle = (request.getfixturevalue(name) for name in names)
    folder = tmp_path_factory.mktemp("nets")
    own = Path(shutil.copytree(bundle, folder / "bundle"))
    for name, seed in NETS.items():
        controlnet(checkpoint, seed).save_pretrained(folder / name)
        add_adapter(folder / name, own, name, report=lambda line: None)
    return checkpoint, own, folder


def reference(model: tuple[Path, Path, Path], kind: str, *names: str, **changes: Any) -> Any:
    """diffusers' pipeline of a kind ("", "Img2Img" or "Inpaint") with these ControlNets."""
    import diffusers

    checkpoint, bundle, folder = model
    family = "StableDiffusionXL" if Bundle.open(bundle).manifest.family == "sdxl" else "StableDiffusion"
    nets = [diffusers.ControlNetModel.from_pretrained(folder / name) for name in names]
    pipe = getattr(diffusers, f"{family}ControlNet{kind}Pipeline").from_pretrained(
        checkpoint, controlnet=nets[0] if len(nets) == 1 else nets, **changes
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, **options: Any) -> Any:
    import torch

    return pipe("apple", generator=torch.Generator().manual_seed(1), **{**CALL, **options}).images


def alike(pipe: Any, expected: Any, **options: Any) -> None:
    images = pipe("apple", seed=1, **{**CALL, **options}).images
    assert psnr(expected, images) >= FLOOR_DB


CASES: list[dict[str, Any]] = [
    {},
    {"guess_mode": True, "guidance_scale": 4.0},
    {"guidance_scale": 1.0, "guess_mode": True, "controlnet_conditioning_scale": 0.6},
    {"control_guidance_start": 0.3, "control_guidance_end": 0.8, "controlnet_conditioning_scale": 1.7},
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_are_those_of_diffusers(model: tuple[Path, Path, Path], backend: str) -> None:
    with sdopt.load(model[1], backend) as pipe:
        theirs = reference(model, "", "canny")
        plain = pipe("apple", seed=1, **CALL).images
        for options in CASES if backend == "ort" else CASES[:2]:
            expected = drawn(theirs, image=edges(), **options)
            assert psnr(expected, plain) < 50  # the net matters
            alike(pipe, expected, control_image={"canny": edges()}, **options)


def test_other_sizes_are_resized_as_diffusers_resizes(model: tuple[Path, Path, Path]) -> None:
    with sdopt.load(model[1]) as pipe:
        expected = drawn(reference(model, "", "canny"), image=edges(40, 31), num_images_per_prompt=2)
        images = pipe("apple", seed=1, control_image={"canny": edges(40, 31)}, **CALL).images
        assert psnr(expected[:1], images) >= FLOOR_DB


def test_several_nets_are_added_up(model: tuple[Path, Path, Path]) -> None:
    with sdopt.load(model[1]) as pipe:
        scales, ends = [0.7, 1.2], [1.0, 0.6]
        several = {"controlnet_conditioning_scale": scales, "control_guidance_end": ends}
        pictures = [edges(), edges(seed=5)]
        expected = drawn(reference(model, "", *NETS), image=pictures, control_guidance_start=[0.0, 0.0], **several)
        alike(pipe, expected, control_image=dict(zip(NETS, pictures, strict=True)), **several)


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_it_begins_at_a_picture_too(model: tuple[Path, Path, Path], kind: str) -> None:
    mask = np.zeros((24, 32), np.uint8)
    mask[6:18, 8:24] = 255
    options = {"image": edges(seed=7), "strength": 0.7, "controlnet_conditioning_scale": 1.0}
    if kind == "Inpaint":
        options["mask_image"] = Image.fromarray(mask)
    with sdopt.load(model[1]) as pipe:
        expected = drawn(reference(model, kind, "canny"), control_image=edges(), **options)
        alike(pipe, expected, control_image={"canny": edges()}, **options)


def test_both_halves_in_two_calls_give_the_same(model: tuple[Path, Path, Path]) -> None:
    with sdopt.load(model[1]) as pipe:
        options = {**CALL, "seed": 1, "control_image": {"canny": edges()}}
        one, two = (pipe("apple", guidance_batch=batch, **options).images for batch in (2, 1))
        assert psnr(one, two) > 100


def test_a_net_of_scale_0_is_not_run_and_leaves_the_picture_as_it_is(model: tuple[Path, Path, Path]) -> None:
    with sdopt.load(model[1]) as pipe:
        controlled = {"control_image": {"canny": edges()}, "controlnet_conditioning_scale": 0.0}
        images = pipe("apple", seed=1, **CALL, **controlled).images
        assert not any("canny" in name for name in pipe.pool.opened)
        assert np.array_equal(images, pipe("apple", seed=1, **CALL).images)


def test_each_image_has_its_own_picture(model: tuple[Path, Path, Path]) -> None:
    with sdopt.load(model[1]) as pipe:
        pictures = [edges(), edges(seed=5)]
        both = pipe(["apple", "a"], seed=[1, 2], control_image={"canny": pictures}, **CALL).images
        for i, (prompt, seed) in enumerate((("apple", 1), ("a", 2))):
            alone = pipe(prompt, seed=seed, control_image={"canny": pictures[i]}, **CALL).images
            assert psnr(both[i : i + 1], alone) > 100


def test_hires_fix_resizes_what_the_net_sees(model: tuple[Path, Path, Path]) -> None:
    with sdopt.load(model[1]) as pipe:
        plan = pipe.plan("apple", seed=1, height=24, width=32, hires=1.5, control_image={"canny": edges()})
        assert [one.controls[0].picture.shape[2:] for one in plan.passes] == [(24, 32), (36, 48)]
        assert np.isfinite(pipe("apple", seed=1, **CALL, hires=1.5, control_image={"canny": edges()}).images).all()


def test_a_pooled_net_guides_alone(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """The ControlNet of `shuffle`: means over height and width, and guess mode without its weights."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    changes = {"global_pool_conditions": True, "controlnet_conditioning_channel_order": "bgr"}
    controlnet(tiny_checkpoint, **changes).save_pretrained(tmp_path / "shuffle")
    add_adapter(tmp_path / "shuffle", bundle, "shuffle", report=lambda line: None)
    expected = drawn(reference((tiny_checkpoint, bundle, tmp_path), "", "shuffle"), image=edges())
    with sdopt.load(bundle) as pipe:
        alike(pipe, expected, control_image=edges())


def test_requests_share_a_call_and_get_their_own_pictures(model: tuple[Path, Path, Path]) -> None:
    from sdopt.denoise.batch import Batch, Job

    with sdopt.load(model[1]) as pipe:
        options = [{"seed": i, "control_image": {"canny": edges(seed=i)}, "num_inference_steps": 3 + i} for i in (1, 2)]
        plans = [pipe.plan("apple", height=24, width=32, **one) for one in options]
        ready = [pipe.prepare(plan) for plan in plans]
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


WRONG: dict[str, dict[str, Any]] = {
    "has no adapter 'cany'; there are canny": {"control_image": {"cany": edges()}},
    "this bundle has canny, pose; say which": {"control_image": edges()},
    "controlnet_conditioning_scale needs control_image": {"controlnet_conditioning_scale": 0.5},
    "guess_mode needs control_image": {"guess_mode": True},
    "3 numbers for 1 ControlNets": {"control_image": {"canny": edges()}, "controlnet_conditioning_scale": [1, 2, 3]},
    "the start comes before the end": {
        "control_image": {"canny": edges()}, "control_guidance_start": 0.8, "control_guidance_end": 0.2,
    },
    "3 pictures for 1 images": {"control_image": {"canny": [edges()] * 3}},
    "allowed are PIL images": {"control_image": {"canny": "edges.png"}},
    "control_image = {}": {"control_image": {}},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_said(model: tuple[Path, Path, Path], message: str) -> None:
    with sdopt.load(model[1]) as pipe, pytest.raises(UsageError) as caught:
        pipe.plan("apple", **WRONG[message])
    assert message in str(caught.value)


def test_a_bundle_without_a_net_says_how_to_add_one(tiny_bundle: Path) -> None:
    with sdopt.load(tiny_bundle) as pipe, pytest.raises(UsageError, match="has no ControlNet; add one: sdopt export"):
        pipe.plan("apple", control_image=edges())


def test_the_picture_says_which_nets_it_was_made_with(model: tuple[Path, Path, Path]) -> None:
    with sdopt.load(model[1]) as pipe:
        result = pipe("apple", seed=1, control_image={"canny": edges()}, **CALL)
        digest = open_adapter(pipe.bundle, "canny").digest
        entry = json.loads(json.dumps(result.parameters[0]))["controls"][0]
        assert (entry["name"], entry["digest"], len(entry["picture"])) == ("canny", digest, 64)


def test_a_damaged_net_is_named_and_the_bundle_still_works(model: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(model[1], tmp_path / "bundle"))
    data = bundle / "adapters/canny/controlnet.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    (bundle / "adapters/pose/manifest.json").write_text("{}")
    with sdopt.load(bundle) as pipe:
        for name, message in (("canny", "does not match its SHA-256"), ("pose", "is not the manifest of an adapter")):
            with pytest.raises(BundleError, match=message):
                pipe.plan("apple", control_image={name: edges()})
        assert pipe("apple", seed=1, **CALL).images.shape == (1, 24, 32, 3)
    shutil.rmtree(bundle / "adapters/canny")
    assert adapter_names(Bundle.open(bundle)) == ("pose",)
