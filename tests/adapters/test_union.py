"""Pictures with union ControlNets are those of diffusers, on every CPU backend; and what does not fit is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.adapter import open_adapter
from sdopt.errors import SdoptError, UsageError
from sdopt.export.onto import add_adapter
from sdopt.metrics import psnr
from tests.adapters.nets import controlnet, edges, union
from tests.conftest import sdopt as command

FLOOR_DB = 110.0
CALL: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "height": 24, "width": 40}
NETS = {"union": (3, 6), "promax": (4, 8)}  # name -> the seed of its weights, and how many modes it has
A, B, C = edges(24, 40), edges(31, 44, seed=5), edges(24, 40, seed=7)  # one is resized


@pytest.fixture(scope="module")
def folder(sdxl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nets as diffusers has them."""
    path = tmp_path_factory.mktemp("unions")
    for name, (seed, modes) in NETS.items():
        union(sdxl_checkpoint, seed, modes).save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path, sdxl_checkpoint: Path, sdxl_bundle: Path) -> Path:
    """The bundle with them, and with a ControlNet that is no union."""
    own = Path(shutil.copytree(sdxl_bundle, folder / "bundle"))
    for name in NETS:
        add_adapter(folder / name, own, name, report=lambda line: None)
    controlnet(sdxl_checkpoint).save_pretrained(folder / "canny")
    add_adapter(folder / "canny", own, "canny", verify=False, report=lambda line: None)
    return own


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(bundle, "ort") as opened:
        yield opened


@pytest.fixture
def drawn(folder: Path, sdxl_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: diffusers' picture with these nets, of the pipeline of a kind: "", "Img2Img" or "Inpaint"."""
    import diffusers
    import torch

    own = diffusers.ControlNetUnionModel.forward

    def forward(self: Any, sample: Any, *rest: Any, control_type: Any, **more: Any) -> Any:
        """In guess mode diffusers (0.42) gives types for both halves of guidance and the sample of one, and fails."""
        return own(self, sample, *rest, control_type=control_type[: len(sample)], **more)

    monkeypatch.setattr(diffusers.ControlNetUnionModel, "forward", forward)

    def made(names: tuple[str, ...], kind: str, options: dict[str, Any]) -> Any:
        nets = [diffusers.ControlNetUnionModel.from_pretrained(folder / name) for name in names]
        theirs = getattr(diffusers, f"StableDiffusionXLControlNetUnion{kind}Pipeline").from_pretrained(
            sdxl_checkpoint, controlnet=nets[0] if len(nets) == 1 else nets, add_watermarker=False
        )
        theirs.set_progress_bar_config(disable=True)
        how = {"generator": torch.Generator().manual_seed(1), "controlnet_conditioning_scale": 1.0}
        return theirs("apple", **{**how, **CALL, **options}).images

    return made


def mask() -> Image.Image:
    pixels = np.zeros((24, 40), np.uint8)
    pixels[6:18, 8:24] = 255
    return Image.fromarray(pixels)


ONE: dict[str, Any] = {"control_image": A, "control_mode": 3}
TWO: dict[str, Any] = {"control_image": [A, B], "control_mode": [1, 3]}
WINDOWS = {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.6, 0.9]}
GUESS = {"guess_mode": True, "guidance_scale": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # the kind of pipeline, and its keywords
    "one": ("", ONE),
    "two": ("", TWO),
    "one, scaled, for a part of the way": (
        "", {**ONE, "controlnet_conditioning_scale": 0.6, "control_guidance_start": 0.3, "control_guidance_end": 0.8},
    ),
    "two, with scales and parts of the way of their own": (
        "", {**TWO, "controlnet_conditioning_scale": [0.3, 1.4], **WINDOWS},
    ),
    "two, both for a part of the way": (
        "", {**TWO, "control_guidance_start": [0.5, 0.5], "control_guidance_end": [0.8, 0.8]},
    ),
    "two, of scale 0: the net runs all the same": ("", {**TWO, "controlnet_conditioning_scale": [0.0, 0.0]}),
    "two of one mode": ("", {**TWO, "control_mode": [3, 3]}),
    "three": ("", {"control_image": [A, B, C], "control_mode": [5, 0, 2]}),
    "one, guessed": ("", {**ONE, **GUESS, "controlnet_conditioning_scale": 0.7}),
    "two, guessed": ("", {**TWO, **GUESS, "controlnet_conditioning_scale": [0.3, 1.4]}),
    "without guidance": ("", {**TWO, "guidance_scale": 1.0, "guess_mode": True}),
    "from a picture": ("Img2Img", {**TWO, "image": C, "strength": 0.7}),
    "with a mask": ("Inpaint", {**TWO, "image": C, "strength": 0.7, "mask_image": mask()}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_diffusers(case: str, pipe: sdopt.Pipeline, drawn: Any) -> None:
    kind, options = CASES[case]
    expected = drawn(("union",), kind, options)
    own = {**options, "control_image": {"union": options["control_image"]}}
    plain = {name: value for name, value in options.items() if "control" not in name and name != "guess_mode"}
    assert psnr(expected, pipe("apple", seed=1, **CALL, **plain).images) < 50  # the net matters
    assert psnr(expected, pipe("apple", seed=1, **CALL, **own).images) >= FLOOR_DB


def test_openvino_makes_them_too(bundle: Path, drawn: Any) -> None:
    with sdopt.load(bundle, "openvino") as other:
        for case in ("one", "two, with scales and parts of the way of their own", "two, guessed"):
            kind, options = CASES[case]
            own = {**options, "control_image": {"union": options["control_image"]}}
            expected = drawn(("union",), kind, options)
            assert psnr(expected, other("apple", seed=1, **CALL, **own).images) >= FLOOR_DB


@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
def test_several_nets_are_added_up(kind: str, pipe: sdopt.Pipeline, drawn: Any) -> None:
    """Each net has one scale then, which multiplies its residuals."""
    options = {"control_mode": [3, 7], "controlnet_conditioning_scale": [0.7, 1.2], **WINDOWS}
    begun = {"": {}, "Img2Img": {"image": C, "strength": 0.7}}
    options |= begun.get(kind, {"image": C, "strength": 0.7, "mask_image": mask()})
    expected = drawn(("union", "promax"), kind, {**options, "control_image": [A, B]})
    images = pipe("apple", seed=1, **CALL, **options, control_image={"union": A, "promax": B}).images
    assert psnr(expected, images) >= FLOOR_DB


def test_several_pictures_of_one_of_several_nets(
    folder: Path, sdxl_checkpoint: Path, pipe: sdopt.Pipeline, monkeypatch: pytest.MonkeyPatch, drawn: Any
) -> None:
    """diffusers' model takes them, and its pipelines do not: the lists of one picture and mode become those of two."""
    from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel

    own, size = MultiControlNetUnionModel.forward, len(NETS)

    def forward(
        self: Any, *rest: Any, controlnet_cond: Any, control_type: Any, control_type_idx: Any, **more: Any
    ) -> Any:
        assert len(controlnet_cond) == size
        seen = [[*controlnet_cond[0], *controlnet_cond[1]], controlnet_cond[1]]
        types = [control_type[0].clone(), control_type[1]]
        types[0][:, 2] = 1
        given = {"controlnet_cond": seen, "control_type": types, "control_type_idx": [[*control_type_idx[0], 2], [7]]}
        return own(self, *rest, **given, **more)

    monkeypatch.setattr(MultiControlNetUnionModel, "forward", forward)
    scales = {"controlnet_conditioning_scale": [0.7, 1.2]}
    expected = drawn(("union", "promax"), "", {"control_image": [A, B], "control_mode": [3, 7], **scales})
    named = {"control_image": {"union": [A, B], "promax": B}, "control_mode": [[3, 2], 7], **scales}
    assert psnr(expected, pipe("apple", seed=1, **CALL, **named).images) >= FLOOR_DB


def test_names_and_tables_are_other_words_for_the_same(pipe: sdopt.Pipeline) -> None:
    def picture(control_mode: Any, control_image: Any = None) -> Any:
        seen = control_image or {"promax": [A, B]}
        return pipe("apple", seed=1, control_image=seen, control_mode=control_mode, **CALL).images

    expected = picture([1, 7])
    for modes in (["depth", "repaint"], [["depth", 7]], {"promax": ["depth", 7]}, np.array([1, 7])):
        assert np.array_equal(picture(modes), expected)
    several = {"promax": [A, B], "union": C}
    expected = picture([[1, 7], 3], several)
    assert np.array_equal(picture({"union": "canny", "promax": [1, "repaint"]}, several), expected)
    assert psnr(expected, picture([[1, 7], 2], several)) < 60


def test_a_net_with_modes_beside_one_without(pipe: sdopt.Pipeline) -> None:
    """Scales are those of nets then, and modes those of union ControlNets alone."""
    options = {"control_image": {"canny": A, "union": [B, C]}, "control_mode": ["canny", "depth"]}
    with pytest.raises(
        UsageError, match="a list in a list is for several union ControlNets, and union is the only one"
    ):
        pipe.plan("apple", **{**options, "control_mode": [["canny", "depth"], 1]})
    both = pipe("apple", seed=1, **CALL, **options, controlnet_conditioning_scale=[0.5, 0.9]).images
    alone = pipe("apple", seed=1, **CALL, **options, controlnet_conditioning_scale=[0.0, 0.9]).images
    named = {**options, "control_image": {"union": [B, C]}, "controlnet_conditioning_scale": 0.9}
    assert psnr(both, alone) < 60
    assert (
        psnr(alone, pipe("apple", seed=1, **CALL, **named).images) < 100
    )  # of one net alone, scales are those of pictures


def test_each_image_has_its_own_pictures(pipe: sdopt.Pipeline) -> None:
    """Image i of a batch is the image alone, whatever the others see."""
    seen, how = {"union": [[A, C], B]}, {"control_mode": [3, 0], **CALL}
    both = pipe(["apple", "a"], seed=[1, 2], control_image=seen, **how).images
    for i, (prompt, one) in enumerate((("apple", A), ("a", C))):
        alone = pipe(prompt, seed=i + 1, control_image={"union": [one, B]}, **how).images
        assert psnr(both[i : i + 1], alone) > 100


def test_both_halves_in_two_calls_give_the_same(pipe: sdopt.Pipeline) -> None:
    options = {**CALL, **TWO, "control_image": {"union": [A, B]}, "seed": 1}
    one, two = (pipe("apple", guidance_batch=batch, **options).images for batch in (2, 1))
    assert psnr(one, two) > 100


def test_hires_fix_resizes_what_the_net_sees(pipe: sdopt.Pipeline) -> None:
    options = {"control_image": {"union": [A, B]}, "control_mode": [1, 3], "hires": 1.5}
    plan = pipe.plan("apple", height=24, width=40, **options)
    assert [one.controls[0].picture.shape for one in plan.passes] == [(1, 2, 3, 24, 40), (1, 2, 3, 36, 60)]
    plain = pipe("apple", seed=1, **CALL, hires=1.5).images
    assert psnr(plain, pipe("apple", seed=1, **CALL, **options).images) < 50


def test_requests_with_other_numbers_of_pictures_move_together(pipe: sdopt.Pipeline) -> None:
    from sdopt.denoise.batch import Batch, Job

    options: list[dict[str, Any]] = [
        {"control_image": {"union": [A, B]}, "control_mode": [1, 3]},
        {"control_image": {"union": [B, C]}, "control_mode": [0, 5], "controlnet_conditioning_scale": [0.5, 1.2]},
        {"control_image": {"union": C}, "control_mode": 3, "control_guidance_end": 0.7},
    ]
    how = {"height": 24, "width": 40, "num_inference_steps": 3}
    ready = [pipe.prepare(pipe.plan("apple", seed=i, **how, **one)) for i, one in enumerate(options)]
    engines = {name: pipe.engine(name) for one in ready for name in one.program.engines}
    jobs, batch = [Job(one.board(engines), one.program) for one in ready], Batch()
    for job in jobs:
        batch.join(job)
    assert jobs[0].key == jobs[1].key != jobs[2].key
    while batch.jobs:
        batch.step()
    for i, (job, one) in enumerate(zip(jobs, options, strict=True)):
        alone = pipe("apple", seed=i, output_type="latent", **how, **one).images
        assert psnr(alone, job.board.sample) > 100


def test_a_pool_opens_what_the_pictures_need_once(bundle: Path) -> None:
    with sdopt.load(bundle, "ort") as own:
        off = {"control_image": {"union": A}, "control_mode": 3, "controlnet_conditioning_scale": 0.0}
        own("apple", seed=1, **CALL, **off)
        assert not any("union" in name for name in own.pool.opened)
        own("apple", seed=1, **CALL, control_image={"union": A}, control_mode=3)
        assert {"adapters/union/controlnet", "adapters/union/control_condition"} <= set(own.pool.opened)
    with sdopt.load(bundle, "ort", memory="low") as low:
        low("apple", seed=1, **CALL, control_image={"union": A}, control_mode=3)


def test_with_padding_mask_crop_it_sees_the_region_that_other_nets_see(pipe: sdopt.Pipeline) -> None:
    """diffusers' pipeline for union ControlNets refuses padding_mask_crop (0.42); see `test_cropped_control`."""
    options = {"image": C, "mask_image": mask(), "strength": 0.7, "padding_mask_crop": 3, "height": 24, "width": 40}
    pictures = [A, edges(24, 40, seed=8)]
    plain = [pipe.plan("apple", **options, control_image={"canny": one}).controls[0].picture for one in pictures]
    seen = pipe.plan("apple", **options, control_image={"union": pictures}, control_mode=[1, 3]).controls[0].picture
    assert np.array_equal(seen, np.stack(plain, axis=1))


SEEN = {"union": A}
MODES = "union has the modes 0 openpose, 1 depth, 2 scribble, 3 canny, 4 normal, 5 segment"
WRONG: dict[str, dict[str, Any]] = {
    "control_mode is missing: union is a union ControlNet": {"control_image": SEEN},
    f"control_mode = 6: {MODES}": {"control_image": SEEN, "control_mode": 6},
    f"control_mode = 'tile': {MODES}": {"control_image": SEEN, "control_mode": "tile"},
    "union is given 1 picture and 2 modes; give a picture for each mode": {
        "control_image": SEEN, "control_mode": [1, 3],
    },
    "union is given 2 pictures and 1 mode": {"control_image": {"union": [A, B]}, "control_mode": 3},
    "there is no union ControlNet in control_image": {"control_image": {"canny": A}, "control_mode": 3},
    "canny is no union ControlNet in control_image; there is union": {
        "control_image": {"canny": A, "union": B}, "control_mode": {"canny": 3},
    },
    "it has no mode of promax": {"control_image": {"union": A, "promax": B}, "control_mode": {"union": 3}},
    "1 modes for 2 union ControlNets, union, promax": {"control_image": {"union": A, "promax": B}, "control_mode": 3},
    "a list in a list is for several union ControlNets, and union is the only one": {
        "control_image": {"union": [A, B]}, "control_mode": [[1], [3]],
    },
    "3 numbers for 2 modes": {
        "control_image": {"union": [A, B]}, "control_mode": [1, 3], "controlnet_conditioning_scale": [1.0, 2.0, 3.0],
    },
    "2 numbers for 1 modes": {"control_image": SEEN, "control_mode": 1, "control_guidance_end": [0.5, 1.0]},
    "the start comes before the end": {
        "control_image": {"union": [A, B]}, "control_mode": [1, 3], "control_guidance_start": [0.0, 0.9],
        "control_guidance_end": 0.5,
    },
    "got a list in a list, which a union ControlNet takes": {"control_image": {"canny": [[A], [B]]}},
    "3 pictures for 1 images": {"control_image": {"union": [[A, B, C], B]}, "control_mode": [1, 3]},
    "control_mode needs control_image": {"control_mode": 3},
    "this bundle has canny, promax, union; say which": {"control_image": A, "control_mode": 1},
    "control_mode = -1; allowed are the number or the name of a mode": {"control_image": SEEN, "control_mode": -1},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_said(pipe: sdopt.Pipeline, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        pipe.plan("apple", **WRONG[message])
    assert message in str(caught.value)


def test_a_bundle_with_one_net_needs_no_name(bundle: Path, pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("canny", "promax")))
    with sdopt.load(own, "ort") as alone:
        expected = pipe("apple", seed=1, **CALL, control_image={"union": [A, B]}, control_mode=[1, 3]).images
        images = alone("apple", seed=1, **CALL, control_image=[A, B], control_mode=["depth", "canny"]).images
        assert np.array_equal(expected, images)


def test_a_picture_says_its_modes(pipe: sdopt.Pipeline) -> None:
    result = pipe("apple", seed=1, **CALL, control_image={"union": [A, B]}, control_mode=["depth", 3])
    made = json.loads(json.dumps(result.parameters[0]))
    assert made["control_mode"] == ["depth", 3]
    entry = made["controls"][0]
    digest = open_adapter(pipe.bundle, "union").digest
    assert (entry["name"], entry["digest"], entry["modes"], len(entry["picture"])) == ("union", digest, [1, 3], 64)


def test_the_commands_show_and_use_it(bundle: Path, tmp_path: Path) -> None:
    for name, picture in (("a", A), ("b", B)):
        picture.save(tmp_path / f"{name}.png")
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    shown = command("inspect", bundle).stdout
    assert "controlnet_union, folder union; modes 0 openpose, 1 depth, 2 scribble" in shown
    entries = {one["name"]: one for one in json.loads(command("inspect", bundle, "--json").stdout)["adapters"]}
    assert (entries["union"]["kind"], len(entries["promax"]["modes"]), entries["canny"]["modes"]) == (
        "controlnet_union", 8, [],
    )  # fmt: skip
    made = tmp_path / "made.png"
    generate = ("generate", "apple", "-m", bundle, "--steps", "1", "--size", "40x24", "-o", made, "--json")
    done = command(*generate, "--control", f"union/depth={a}:0.8", "--control", f"union/3={b}")
    entry = json.loads(done.stdout)["images"][0]
    assert (entry["control_mode"], entry["controlnet_conditioning_scale"]) == ({"union": ["depth", 3]}, [0.8, 1.0])
    assert entry["controls"][0]["modes"] == [1, 3]
    done = command("generate", "--replay", made, "-m", bundle, "-o", tmp_path / "b.png")
    assert "was made with ControlNets, whose pictures it does not carry" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("union/depth={a}", "union={a}"), "give each picture its mode"),
        (("union={a}", "union={a}"), "those of a union ControlNet have modes: --control union/MODE=FILE"),
        (("union/1={a}", "--control-mode", "1"), "--control NAME/MODE=FILE and --control-mode: give one of the two"),
        (("union/1={a}:1", "union/3={a}:2", "promax/1={a}"), "--control union=... has the scales 1.0, 2.0; give one"),
        (("union/9={a}",), "--control-mode 9: union has the modes 0 openpose"),
        (("union/" + "9" * 5000 + "={a}",), "union has the modes 0 openpose"),
        (
            ("union={a}", "--control-mode", "1,,3"),
            "--control-mode [1, '', 3]; allowed are the number or the name of a mode",
        ),
        (("union={a}",), "say which, by number or name: --control-mode 0; `sdopt inspect` lists them"),
        (("union={a}", "--control-mode", "1,3"), "union is given 1 picture and 2 modes"),
        (("canny/1={a}",), "canny is no union ControlNet in --control, and only these have modes"),
    ],
)
def test_the_command_says_what_does_not_fit(
    words: tuple[str, ...], message: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdopt.cli.main import main

    A.save(tmp_path / "a.png")
    typed: list[str] = []
    for word in words:
        typed += (["--control"] if "=" in word else []) + [word.format(a=tmp_path / "a.png")]
    assert main(["generate", "apple", "-m", str(bundle), "-o", str(tmp_path / "x.png"), *typed]) == 2
    assert message in capsys.readouterr().err


def test_engines_of_a_build_do_not_run_it_and_it_is_said(bundle: Path) -> None:
    from sdopt.build.jobs import build
    from sdopt.bundle.files import Bundle
    from sdopt.denoise.program import compile_program
    from sdopt.denoise.start import Canvas

    with pytest.raises(
        UsageError, match="union is a union ControlNet, which is not joined with the UNet; it runs with"
    ):
        build(Bundle.open(bundle), "ort", adapters=["union"])
    with sdopt.load(bundle, "ort") as own:
        plan = own.plan("apple", control_image={"union": A}, control_mode=1)
        with pytest.raises(UsageError, match="union is a union ControlNet, which no engine of `sdopt build` runs"):
            compile_program(plan, Canvas(np.zeros((1, 4, 12, 20), np.float32)), guided=True, needs_built=True)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"controlnet_conditioning_channel_order": "bgr"}, "channel_order is 'bgr' and conditioning_channels 3"),
    "channels": ({"num_trans_channel": 5}, "num_trans_channel is 5: the net's first block has"),
    "text": ({"cross_attention_dim": 40}, "cross_attention_dim is 40: the bundle's text has"),
    "modes": ({"num_control_type": 7}, "its weights have other shapes than its config.json says"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_net_that_does_not_fit_is_refused(case: str, folder: Path, sdxl_bundle: Path, tmp_path: Path) -> None:
    changes, message = CHANGES[case]
    own, net = (Path(shutil.copytree(one, tmp_path / one.name)) for one in (sdxl_bundle, folder / "union"))
    config = json.loads((net / "config.json").read_text())
    (net / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(SdoptError, match=message):
        add_adapter(net, own, "union", report=pytest.fail)
    assert not (own / "adapters").exists()


def test_another_family_is_refused(folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with pytest.raises(SdoptError, match="a union ControlNet is made for SDXL, and .* is no SDXL model"):
        add_adapter(folder / "union", own, "union", report=pytest.fail)


def test_a_file_and_the_authors_class_name_are_the_folder(folder: Path, tmp_path: Path) -> None:
    """One .safetensors file, and a config.json that names the class as its authors do."""
    import torch

    from sdopt.export.one_model import open_model
    from sdopt.export.onto import KINDS

    net = Path(shutil.copytree(folder / "union", tmp_path / "config"))
    config = {**json.loads((net / "config.json").read_text()), "_class_name": "ControlNetModel_Union"}
    (net / "config.json").write_text(json.dumps(config))
    file = str(net / "diffusion_pytorch_model.safetensors")
    with (
        open_model(str(folder / "union"), KINDS) as whole,
        open_model(str(net), KINDS) as renamed,
        open_model(file, KINDS, config=str(net)) as single,
    ):
        states = [one.load("").state_dict() for one in (whole, renamed, single)]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    wrong = "is a union ControlNet, and the configuration that was given is that of a ControlNetModel"
    with pytest.raises(SdoptError, match=wrong), open_model(file, KINDS, config=str(folder / "canny")):
        pass
