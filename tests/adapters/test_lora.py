"""Pictures with LoRA are those of diffusers and PEFT, on every CPU backend, and leave nothing behind."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.files import Bundle
from sdopt.errors import UsageError
from sdopt.metrics import psnr
from tests.adapters.lora_files import comfy, diffusers_key, is_linear, kohya, shapes, tensors, write

BACKENDS = ("ort", "openvino")
FLOOR_DB = 60.0
OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 1, "output_type": "np"}


@pytest.fixture(params=["sd", "sd2", "sdxl"])
def model(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    name = {"sd": "tiny"}.get(request.param, request.param)
    return request.getfixturevalue(f"{name}_checkpoint"), request.getfixturevalue(f"{name}_bundle")


def picture(pipe: sdopt.Pipeline, **options: Any) -> Any:
    return pipe("apple", **{**OPTIONS, **options}).images


def modules(bundle: Path, linears: bool = False) -> dict[str, dict[str, tuple[int, ...]]]:
    """Component -> path -> shape, of the UNet and the text encoders."""
    opened = Bundle.open(bundle)
    names = [name for name in opened.components if name == "unet" or name.startswith("text_encoder")]
    table = {name: shapes(opened, name) for name in names}
    if linears:
        table["unet"] = {path: shape for path, shape in table["unet"].items() if is_linear(path)}
    return {name: {p: s for p, s in own.items() if "text_projection" not in p} for name, own in table.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_are_those_of_diffusers_and_peft(model: tuple[Path, Path], backend: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    checkpoint, bundle = model
    all_modules = modules(bundle)
    files = [
        write(tmp_path / "a.safetensors", tensors(all_modules, diffusers_key, alpha=None, size=0.3,
                                                  ends=(".lora_A.weight", ".lora_B.weight"))),
        write(tmp_path / "b.safetensors", tensors({"unet": modules(bundle, True)["unet"]}, kohya, seed=1, size=0.3)),
    ]  # fmt: skip
    reference = diffusers_pipeline(checkpoint)
    pipe = sdopt.load(bundle, backend)
    plain = picture(pipe)
    for i, file in enumerate(files):
        reference.load_lora_weights(file, adapter_name=f"{i}")
        pipe.load_lora_weights(file, f"{i}")
    for names, weights in ((["0"], [0.8]), (["1"], [1.3]), (["0", "1"], [0.7, -0.4])):
        reference.set_adapters(names, weights)
        pipe.set_adapters(names, weights)
        own, expected = picture(pipe), diffusers_picture(reference)
        assert psnr(own, expected) >= FLOOR_DB
        assert psnr(own, plain) < FLOOR_DB - 10


def diffusers_pipeline(checkpoint: Path) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_picture(pipe: Any) -> Any:
    import torch

    generator = torch.Generator("cpu").manual_seed(OPTIONS["seed"])
    named = {key: value for key, value in OPTIONS.items() if key != "seed"}
    return pipe("apple", generator=generator, **named).images


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linears", [True, False])
def test_going_from_one_to_another_and_back_leaves_nothing(
    tiny_bundle: Path, backend: str, linears: bool, tmp_path: Path
) -> None:
    own = modules(tiny_bundle, linears)
    files = [write(tmp_path / f"{i}.safetensors", tensors(own, seed=i, size=0.3)) for i in range(2)]
    pipe = sdopt.load(tiny_bundle, backend)
    plain = picture(pipe)
    pipe.load_lora_weights(files[0], "a")
    a = picture(pipe)
    pipe.load_lora_weights(files[1], "b")
    pipe.set_adapters("b")
    b = picture(pipe)
    pipe.set_adapters("a")
    assert (picture(pipe) == a).all()
    pipe.unload_lora_weights()
    assert (picture(pipe) == plain).all()
    assert not (a == b).all()
    for cache in (True, False):  # the graph that was optimised before, and the bundle's own
        fresh = sdopt.load(tiny_bundle, backend, cache=cache)
        fresh.load_lora_weights(files[0])
        assert (picture(fresh) == a).all()


def test_the_spellings_of_all_trainers_are_one_picture(tiny_bundle: Path, tmp_path: Path) -> None:
    unet = {"unet": modules(tiny_bundle)["unet"]}
    peft = (".lora_A.weight", ".lora_B.weight")
    files = [
        write(tmp_path / "kohya.safetensors", tensors(unet, kohya, alpha=4.0)),
        write(tmp_path / "diffusers.safetensors", tensors(unet, diffusers_key, alpha=None, ends=peft)),
        write(tmp_path / "comfy.safetensors", tensors(unet, comfy(unet["unet"]), alpha=4.0)),
    ]
    pipe = sdopt.load(tiny_bundle)
    pictures = []
    for file in files:
        pipe.load_lora_weights(file)
        pictures.append(picture(pipe))
        pipe.unload_lora_weights()
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] == pictures[2]).all()


def test_a_weight_for_each_component_and_a_scale_for_one_call(tiny_bundle: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", tensors(modules(tiny_bundle), size=0.3))
    pipe = sdopt.load(tiny_bundle)
    plain = picture(pipe)
    pipe.load_lora_weights(file)
    assert pipe.get_list_adapters() == {"text_encoder": ["a"], "unet": ["a"]}
    pipe.set_adapters("a", {"unet": 0.5, "text_encoder": 0.0})
    unet_alone = picture(pipe)
    pipe.set_adapters("a", {"unet": 0.0, "text_encoder": 0.5})
    text_alone = picture(pipe)
    pipe.set_adapters("a", 0.5)
    both = picture(pipe)
    assert len({p.tobytes() for p in (plain, unet_alone, text_alone, both)}) == 4
    pipe.set_adapters("a")
    assert (picture(pipe, lora_scale=0.5) == both).all()
    assert (picture(pipe, lora_scale=0) == plain).all()
    pipe.set_adapters("a", 0)
    assert (picture(pipe) == plain).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_with_two_loras_get_their_own_pictures(tiny_bundle: Path, backend: str, tmp_path: Path) -> None:
    """A call keeps the weights that were in use when it began, whatever other threads choose meanwhile."""
    own = modules(tiny_bundle)
    pipe = sdopt.load(tiny_bundle, backend)
    for i in range(2):
        pipe.load_lora_weights(write(tmp_path / f"{i}.safetensors", tensors(own, seed=i, size=0.3)), f"{i}")
    plans, alone = [], []
    for i in range(2):
        pipe.set_adapters(f"{i}")
        plans.append(pipe.plan("apple", num_inference_steps=4, guidance_scale=3.0, seed=1))
        alone.append(picture(pipe))

    def run(i: int) -> Any:
        *_, step = pipe.steps(plans[i])
        return pipe.finish(plans[i], step.sample, "np")

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(run, [0, 1] * 4))
    assert all((image == alone[i % 2]).all() for i, image in enumerate(together))


def test_a_step_that_began_goes_on_with_its_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    pipe = sdopt.load(tiny_bundle)
    pipe.load_lora_weights(write(tmp_path / "a.safetensors", tensors(modules(tiny_bundle), size=0.3)))
    expected = pipe("apple", **{**OPTIONS, "output_type": "latent"}).images
    for step in pipe.denoise("apple", num_inference_steps=4, guidance_scale=3.0, seed=1):
        if step.index == 1:
            pipe.unload_lora_weights()
    assert (step.sample == expected).all()


def test_wrong_files_and_names_are_refused_in_words(tiny_bundle: Path, sdxl_bundle: Path, tmp_path: Path) -> None:
    good = tensors(modules(tiny_bundle, True))
    pipe = sdopt.load(tiny_bundle)
    file = write(tmp_path / "a.safetensors", good)
    with pytest.raises(UsageError, match="20 wide.*sdxl.*32 wide"):
        sdopt.load(sdxl_bundle).load_lora_weights(file)
    unknown = {**good, "lora_unet_down_blocks_7_attentions_0_proj_in.lora_down.weight": np.ones((2, 3), np.float32)}
    odd = write(tmp_path / "odd.safetensors", unknown)
    with pytest.raises(UsageError, match=r"1 of its \d+ tensors fit no module.*down_blocks_7.*strict=False"):
        pipe.load_lora_weights(odd)
    assert pipe.load_lora_weights(odd, strict=False) == "odd"
    key = "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"
    flux = write(tmp_path / "f.safetensors", {key: np.ones((2, 3), np.float32)})
    for strict in (True, False):
        with pytest.raises(UsageError, match="made for Flux. It changes nothing here"):
            pipe.load_lora_weights(flux, strict=strict)
    pipe.load_lora_weights(file)
    with pytest.raises(UsageError, match="'a' is taken"):
        pipe.load_lora_weights(file)
    with pytest.raises(UsageError, match="'b' is not loaded; loaded are"):
        pipe.set_adapters("b")
    for name in (["x"], b"x", 1, "", "a\nb", np.array(["x"])):
        with pytest.raises(UsageError, match="adapter_name = "):
            pipe.load_lora_weights(file, name)  # pyright: ignore[reportArgumentType]
    for names in (None, 1, {"a"}, [["a"]], [None], [1], np.array(["a"]), iter(["a"])):
        with pytest.raises(UsageError, match="adapter_names = "):
            pipe.set_adapters(names)  # pyright: ignore[reportArgumentType]
    for source in (None, 1, ["a"], b"a", "a\0"):
        with pytest.raises(UsageError, match="source: "):
            pipe.load_lora_weights(source)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="strict = 1"):
        pipe.load_lora_weights(file, "b", strict=1)  # pyright: ignore[reportArgumentType]
    for weight in (float("nan"), 1e6, 10**400, "1", True, [1.0, 2.0], {"vae": 1.0}, {1: 1.0}, {"unet": []}, object()):
        with pytest.raises(UsageError, match="weight"):
            pipe.set_adapters("a", weight)  # pyright: ignore[reportArgumentType]
    pipe.unload_lora_weights()
    with pytest.raises(UsageError, match="no LoRA is in use"):
        pipe("apple", lora_scale=0.5)
    stem = next(key for key in good if key.endswith("lora_up.weight"))
    wrong = write(tmp_path / "w.safetensors", {**good, stem: np.ones((3, 4), np.float32)})
    with pytest.raises(UsageError, match=r"the tensors of .* do not fit: up \[3, 4\]"):
        pipe.load_lora_weights(wrong)
    assert pipe.get_list_adapters() == {}


def test_methods_of_diffusers_choose_switch_off_and_delete(tiny_bundle: Path, tmp_path: Path) -> None:
    pipe = sdopt.load(tiny_bundle)
    assert pipe.get_active_adapters() == []
    plain = picture(pipe)
    pictures = {}
    for i, name in enumerate("ab"):
        file = write(tmp_path / f"{name}.safetensors", tensors(modules(tiny_bundle, True), seed=i, size=0.3))
        assert pipe.load_lora_weights(file) == name
        pipe.set_adapters(name)
        pictures[name] = picture(pipe)
    assert pipe.get_active_adapters() == ["b"]
    pipe.disable_lora()
    assert (picture(pipe) == plain).all()
    with pytest.raises(UsageError, match="no LoRA is in use"):
        picture(pipe, lora_scale=0.5)
    pipe.set_adapters("a")
    assert (picture(pipe) == plain).all()
    assert pipe.get_active_adapters() == ["a"]
    pipe.enable_lora()
    assert (picture(pipe) == pictures["a"]).all()
    pipe.set_adapters(["a", "b"])
    pipe.delete_adapters("a")
    assert pipe.get_active_adapters() == ["b"]
    assert pipe.get_list_adapters() == {"text_encoder": ["b"], "unet": ["b"]}
    assert (picture(pipe) == pictures["b"]).all()
    with pytest.raises(UsageError, match="'a' is not loaded; loaded are"):
        pipe.delete_adapters(["b", "a"])
    assert pipe.get_active_adapters() == ["b"]
    pipe.delete_adapters(["b"])
    assert (picture(pipe) == plain).all()
    pipe.disable_lora()
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "a.safetensors", "a")
    pipe.set_adapters("a")
    assert (picture(pipe) == pictures["a"]).all()  # a pipeline that forgot all begins anew


def test_what_is_never_fused_is_said_so(tiny_bundle: Path) -> None:
    pipe = sdopt.load(tiny_bundle)
    with pytest.raises(UsageError, match=r"in the weights already.*set_adapters\(name, 0.7\)"):
        pipe.fuse_lora(lora_scale=0.7)
    with pytest.raises(UsageError, match="disable_lora"):
        pipe.unfuse_lora()
    with pytest.raises(UsageError, match="cross_attention_kwargs.*lora_scale=0.8"):
        pipe("apple", cross_attention_kwargs={"scale": 0.5})  # pyright: ignore[reportCallIssue]


def test_add_initializer_would_be_ignored(tmp_path: Path) -> None:
    """The trap that `sdopt.engine.ort_weights` avoids: what was folded from the old numbers stays."""
    import onnxruntime as ort

    from sdopt.bundle.files import embedded

    graph = embedded() / "unet.onnx"
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.weight@T"
    other = ort.OrtValue.ortvalue_from_numpy(np.ones((96, 96), np.float16))
    inputs = {
        "sample": np.ones((1, 4, 16, 16), np.float32), "timestep": np.ones(1, np.float32),
        "encoder_hidden_states": np.ones((1, 32, 128), np.float32),
    }  # fmt: skip
    outputs = []
    for change in (None, "add_initializer", "add_external_initializers"):
        options = ort.SessionOptions()
        if change == "add_initializer":
            options.add_initializer(name, other)
        elif change:
            options.add_external_initializers([name], [other])
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, inputs)[0])
    assert (outputs[0] == outputs[1]).all()
    assert not (outputs[0] == outputs[2]).all()


@pytest.mark.parametrize("linears", [True, False])
def test_the_graph_that_was_optimised_before_takes_a_lora(
    linears: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In it a float16 weight has the name of what its Cast gave, and convolutions are in the order of kernels.

    The outputs are those of a graph optimised anew.
    """
    from sdopt.bundle.files import embedded
    from sdopt.engine import ort

    bundle = Bundle.open(embedded())
    unet = {path: shape for path, shape in shapes(bundle, "unet").items() if is_linear(path) or not linears}
    taken: list[bool] = []
    takes = ort.takes

    def watched(*arguments: Any) -> Any:
        same = takes(*arguments)
        taken.append(same is not None)
        return same

    monkeypatch.setattr(ort, "takes", watched)
    path = write(tmp_path / "a.safetensors", tensors({"unet": unet}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no optimised graph is there: it is made first
    pictures = []
    for cache in (True, False):
        pipe = sdopt.load(cache=cache)
        pipe.load_lora_weights(path)
        pictures.append(pipe("a red apple", seed=1, num_inference_steps=2, output_type="np").images)
    assert taken == [True]
    assert (pictures[0] == pictures[1]).all()
