"""From a bundle to engines: recipes and profiles, the cache of finished engines, and real builds with TensorRT-RTX."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt import graph
from sdopt.build.checks import size_warning
from sdopt.build.derive import derive
from sdopt.build.jobs import build
from sdopt.build.lock import one_builder
from sdopt.build.options import BuildOptions, exceptions, part_options
from sdopt.build.recipe import EngineSpec, part_profile, read_recipe, user_profiles
from sdopt.build.target import Target
from sdopt.build.trt_build import Builder
from sdopt.build.trt_errors import meaning
from sdopt.bundle.files import Bundle
from sdopt.bundle.format import File
from sdopt.bundle.specs import Profile, TensorSpec
from sdopt.cli.main import main
from sdopt.engine import describe
from sdopt.engine.cuda import Gpu
from sdopt.engine.store import stored
from sdopt.engine.trt_api import TensorRT
from sdopt.errors import BackendError, BundleError, UsageError
from tests.conftest import EMOJI_BUNDLE, ROOT, PlugIn, edit_manifest, small_files
from tests.conftest import sdopt as command

RTX = pytest.mark.skipif(
    __import__("importlib").util.find_spec("tensorrt_rtx") is None,
    reason='TensorRT-RTX is not installed: pip install "sdopt[tensorrt-rtx]"',
)
SMALL = "batch=1 height=64 width=64"


pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture
def emoji() -> Bundle:
    return Bundle.open(EMOJI_BUNDLE, verify=False)


def names(bundle: Bundle, *chosen: str) -> list[str]:
    return [part.name for part in read_recipe().chosen(bundle, chosen or None)]


def test_a_bundle_becomes_the_engines_that_it_runs_with(bundle: Bundle) -> None:
    assert names(bundle) == ["unet_step", "text_encoder", "vae_decoder", "vae_encoder"]
    assert names(bundle, "unet", "vae_decoder") == ["unet", "vae_decoder"]
    edit_manifest(bundle.path, defaults=replace(bundle.manifest.defaults, guidance_scale=0.0))
    assert "unet_step_alone" in names(Bundle.open(bundle.path, verify=False))
    with pytest.raises(UsageError, match="component 'unett': this bundle becomes unet, "):
        names(bundle, "unett")


def test_what_a_bundle_becomes_follows_from_its_manifest(bundle: Bundle) -> None:
    told = replace(bundle.manifest.conditioning, guidance_embedding=6)  # LCM: its scale is above 1, and one half
    edit_manifest(bundle.path, conditioning=told)
    assert names(Bundle.open(bundle.path, verify=False))[0] == "unet_step_alone"


def test_a_profile_is_typed_in_pixels_and_completed_with_the_bundles_own_sizes(emoji: Bundle) -> None:
    (own,) = user_profiles(emoji, read_recipe(), [], static=False)
    assert str(own) == "batch=1:1:4 tokens=32 height=128 width=128"
    (given,) = user_profiles(emoji, read_recipe(), ["batch=1:2:4 height=64:128:256 tokens=32:32:64"], static=False)
    (fixed,) = user_profiles(emoji, read_recipe(), ["batch=1:2:4 height=64:128:256"], static=True)
    assert str(fixed) == "batch=2 tokens=32 height=128 width=128"
    ranges = {
        part.name: str(part_profile(emoji, part, emoji.component(part.graph).inputs, given))
        for part in read_recipe().parts.values()
        if part.graph in emoji.components
    }
    assert ranges["unet_step"] == "batch=1:2:4 tokens=32:32:64 latent_height=8:16:32 latent_width=16"
    assert ranges["unet"] == "batch=1:4:8 images=1:2:4 tokens=32:32:64 latent_height=8:16:32 latent_width=16"
    # two chunks of 4 pictures, with and without the prompt
    assert ranges["text_encoder"] == "batch=1:4:16 tokens=32 extra_tokens=1:1:128"
    assert ranges["vae_encoder"] == "batch=1:2:4 height=64:128:256 width=128"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch=4:1:1", "batch=4:1:1; allowed is 1 <= smallest <= best <= largest"),
        ("heigth=64", "heigth is unknown; there are batch, height, width, tokens"),
        ("height=60:64:64", "height must be in multiples of 8 pixels"),
        ("batch=1:1:65", "batch is up to 64 pictures"),
        ("batch", r"'batch' is not NAME=SMALLEST:BEST:LARGEST or NAME=LENGTH"),
        ("batch=1 batch=2", "each name once"),
    ],
)
def test_a_wrong_profile_is_named(emoji: Bundle, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        user_profiles(emoji, read_recipe(), [text], static=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp4"}, "precision 'fp4'; allowed are fp"),
        ({"opt_level": 6}, "opt_level = 6; allowed are 0 to 5"),
        ({"workspace": 3}, "workspace = 3 bytes; allowed is a MiB or more"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize(
    "text", ["", "profile = 3", "profile = 'batch=1'\n[engine.unet]\ngraph = 'unet'\nfues = 1", "["]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UsageError, match=r"recipe\.toml is not a recipe: .+; see engines/recipe\.toml"):
        read_recipe(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('when = "guidet"', "when is 'guidet'; allowed is guided, unguided, asked, or leave it out"),
        ('fuse = "all"', "fuse is 'all'; allowed is guided, alone"),
        ('tokens = "chunks"', "tokens is 'chunks'; allowed is chunk, or"),
        ('rows = "two"', "rows is 'two'; allowed is a whole number from 1 to 2"),
        ("islands = 3", "islands is 3; allowed is a list of text"),
        ('precision = "fp8"', "precision is 'fp8'; allowed is fp16, bf16, fp32"),
        ('fues = "guided"', "fues is unknown; engine.unet has name, graph, fuse"),
    ],
)
def test_a_word_that_a_recipe_does_not_have_is_named(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "recipe.toml").write_text(f"profile = 'batch=1'\n[engine.unet]\ngraph = 'unet'\n{line}\n")
    with pytest.raises(UsageError, match=rf"recipe.toml is not a recipe: engine.unet.{told}"):
        read_recipe(tmp_path / "recipe.toml")


def test_a_profile_that_is_given_twice_is_one(emoji: Bundle) -> None:
    twice = ["batch=1 height=64", "batch=1 height=64 width=128"]
    assert len(user_profiles(emoji, read_recipe(), twice, static=False)) == 1
    assert len(user_profiles(emoji, read_recipe(), ["batch=1:1:2", "batch=1:1:4"], static=True)) == 1


def test_the_lock_of_a_build_is_gone_afterwards(bundle: Bundle) -> None:
    (folder,) = build(bundle, "ort", components=["vae_encoder"], report=lambda line: None)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_graph_for_onnx_runtime_says_what_it_is(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    for backend, precision in (("ort", "fp32"), ("ort", "fp16"), ("ort:cuda", "fp16")):
        build(
            bundle, backend, components=["unet"], options=BuildOptions(precision=precision), report=lines.append,
        )  # fmt: skip
    told = [line for line in lines if "graph for ONNX Runtime" in line]
    assert told[0] == "unet: a graph for ONNX Runtime on the CPU, fp32; taken by --backend ort:cpu"
    assert told[1].endswith("on the CPU, fp16; taken by --backend ort:cpu --precision fp16")
    assert "on CUDA, fp16; taken by --backend ort:cuda" in told[2]
    assert "value type for shape" not in capsys.readouterr().err  # of onnx-ir, for every shape without a type


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["ort", "--static", "--refit", "--profile", "batch=1"],
            "--profile, --static, --refit: a graph for ONNX Runtime",
        ),
        (["tensorrt", "--workspace", "0"], "--workspace 0; allowed are GiB from 0.001 to"),
        (["tensorrt", "--workspace", "nan"], "--workspace nan; allowed are GiB from 0.001 to"),
        (["tensorrt", "--workspace", "inf"], "--workspace inf; allowed are GiB from 0.001 to"),
    ],
)
def test_an_option_without_a_meaning_is_refused_by_name(
    bundle: Bundle, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(bundle.path), "--backend", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("bf16", "instead"), [(True, "bf16"), (False, "fp32")])
def test_what_overflows_in_half_is_built_in_another_precision(bundle: Bundle, bf16: bool, instead: str) -> None:
    edit_manifest(bundle.path, float16_unsafe=["vae_decoder"])
    unsafe = Bundle.open(bundle.path, verify=False)
    parts = read_recipe().chosen(unsafe, None)
    options = {part.name: part_options(BuildOptions(), part, unsafe, bf16) for part in parts}
    precisions = {name: own["precision"] for name, own in options.items()}
    assert precisions == {"unet_step": "fp16", "text_encoder": "fp16", "vae_decoder": instead, "vae_encoder": "fp16"}
    (decoder,) = [part for part in parts if part.name == "vae_decoder"]
    assert exceptions(options["vae_decoder"], "fp16", decoder, unsafe) == [
        f"{instead} instead of fp16, in which this model's vae_decoder overflows"
    ]
    assert part_options(BuildOptions(), EngineSpec("unet", "unet", precision="bf16"), unsafe)["precision"] == "bf16"


def test_attention_that_overflows_in_half_stays_float32(bundle: Bundle) -> None:
    edit_manifest(bundle.path, float16_attention_unsafe=["unet"])
    unsafe = Bundle.open(bundle.path, verify=False)
    recipe = read_recipe()
    for precision, kept in {"fp16": True, "bf16": False, "fp32": False}.items():
        own = part_options(BuildOptions(precision=precision), recipe.parts["unet_step"], unsafe)
        assert own["attention"] is kept
        assert not part_options(BuildOptions(precision=precision), recipe.parts["vae_decoder"], unsafe)["attention"]
        model, _ = derive(unsafe, recipe.parts["unet_step"], own)
        types = {node.outputs[0].dtype for node in model.graph if node.op_type in ("Attention", "MultiHeadAttention")}
        assert types == {{"fp16": graph.F32, "bf16": graph.BF16, "fp32": graph.F32}[precision]}


def test_tensorrts_errors_are_told_in_plain_words() -> None:
    told = meaning("[optimizer.cpp::computeCosts] Could not find any implementation for node {ForeignNode[a...b]}")
    assert told.startswith("no kernel fits into the memory that it may use")
    assert "ForeignNode" in told
    assert meaning("something new") == "something new"
    noise = (
        "cudaError 35: CUDA driver version is insufficient for CUDA runtime version"  # in every log without a driver
    )
    assert meaning(f"{noise} | no tactics").startswith("no kernel fits into the workspace")
    assert meaning(noise).startswith("this option needs an NVIDIA driver")


def test_a_plan_of_float32_weights_is_told_but_kept() -> None:
    weights = 200 << 20
    assert size_warning("fp16", int(1.5 * weights), weights, 1) == ""
    assert "the plan has 419.43 MB for 209.72 MB of fp16 weights" in size_warning("fp16", 2 * weights, weights, 1)
    assert size_warning("fp16", 2 * weights, weights, 2) == ""  # a second profile may bring its own copy
    assert size_warning("fp32", 2 * weights, weights, 1) == ""
    assert size_warning("fp16", 2000, 1000, 1) == ""  # too small to tell


# ---- engines for ONNX Runtime: derived graphs, which need no other library


def test_engines_for_onnx_runtime_make_the_same_picture_with_its_tensors_bound(bundle: Bundle) -> None:
    options: dict[str, Any] = {"seed": 3, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    options |= {"height": 64, "width": 64, "sampler": "dpmpp_2m_sde"}
    with sdopt.load(bundle.path, backend="ort:cpu", threads=1) as pipe:
        expected = pipe("a red apple", **options).images
    lines: list[str] = []
    (folder,) = build(
        bundle, "ort", components=["unet_step"], options=BuildOptions(precision="fp32"), report=lines.append
    )
    assert sorted(p.name for p in folder.iterdir()) == ["graph.onnx", "graph.onnx.data", "record.json"]
    with sdopt.load(bundle.path, backend="ort:cpu", threads=1) as pipe:
        actual = pipe("a red apple", **options).images
        assert set(pipe.pool.opened) == {"text_encoder", "unet_step"}
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    build(bundle, "ort", components=["unet_step"], options=BuildOptions(precision="fp32"), report=lines.append)
    assert lines[-1] == f"unet_step: already built, {folder}"


def test_a_stale_engine_is_built_again_with_a_sentence_and_removed(bundle: Bundle) -> None:
    (old,) = build(bundle, "ort", components=["vae_encoder"], report=lambda line: None)
    with (bundle.path / "vae_encoder.onnx").open("ab") as stream:
        stream.write(b"\n")
    files = {**bundle.manifest.files}
    files["vae_encoder.onnx"] = File(files["vae_encoder.onnx"].bytes + 1, "1" * 64)
    changed = replace(bundle, manifest=replace(bundle.manifest, files=files), opened={})
    shutil.copy(EMOJI_BUNDLE / "vae_encoder.onnx", bundle.path)
    lines: list[str] = []
    (new,) = build(changed, "ort", components=["vae_encoder"], report=lines.append)
    assert "vae_encoder: built again, because vae_encoder.onnx is another file" in lines[0]
    assert new != old
    assert new.exists()
    assert not old.exists()


def test_engines_of_other_sizes_and_providers_stand_beside_each_other(bundle: Bundle) -> None:
    def made(backend: str, size: int) -> Path:
        lines: list[str] = []
        profile = [f"batch=1 height={size} width={size}"]
        (folder,) = build(bundle, backend, components=["vae_encoder"], profiles=profile, report=lines.append)
        assert not [line for line in lines if "already" in line or "again" in line]
        return folder

    folders = [made("ort", 64), made("ort", 128), made("ort:cuda", 64)]
    assert len({*folders}) == 3
    assert {s.folder for s in stored(bundle, "ort")} == {*folders}
    records = {s.folder: s.record for s in stored(bundle, "ort")}
    assert [records[f].environment for f in folders] == [{"provider": "CPU"}] * 2 + [{"provider": "CUDA"}]
    assert [records[f].options["precision"] for f in folders] == ["fp32", "fp32", "fp16"]
    assert all(record.key == folder.name for folder, record in records.items())
    lines: list[str] = []
    build(bundle, "ort:cpu", components=["vae_encoder"], profiles=["batch=1 height=64 width=64"], report=lines.append)
    assert lines == [f"vae_encoder: already built, {folders[0]}"]


def test_a_stale_step_is_found_too(bundle: Bundle) -> None:
    (old,) = build(bundle, "ort", components=["unet_step"], report=lambda line: None)
    files = bundle.manifest.files
    files = {**files, "unet.onnx.data": replace(files["unet.onnx.data"], sha256="1")}
    changed, lines = replace(bundle, manifest=replace(bundle.manifest, files=files)), list[str]()
    (new,) = build(changed, "ort", components=["unet_step"], report=lines.append)
    assert "unet_step: built again, because unet.onnx.data is another file" in lines[0]
    assert (old.exists(), new.exists()) == (False, True)


def test_the_gpu_that_is_named_is_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def no_gpu(index: int = 0) -> Any:
        opened.append(index)
        raise BackendError("there is no such GPU")

    monkeypatch.setattr("sdopt.build.target.shared_device", no_gpu)
    for backend, index in {"tensorrt": 0, "tensorrt:1": 1, "tensorrt-rtx:2": 2}.items():
        with pytest.raises(BackendError, match="there is no such GPU"):
            Target.here(backend)
        assert opened[-1] == index


def test_without_a_driver_the_library_that_builds_without_one_is_named(
    plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu(index: int = 0) -> Any:
        raise BackendError("there is no NVIDIA driver")

    plug_in("rtx")
    monkeypatch.setattr("sdopt.build.target.shared_device", no_gpu)
    monkeypatch.setattr("sdopt.engine.trt.shared_device", no_gpu)
    with pytest.raises(BackendError, match="Without a GPU, --backend tensorrt-rtx builds: only running needs one"):
        Target.here("tensorrt")
    description = describe("tensorrt-rtx")
    assert description["version"] == "fake"
    assert description["lacks"].endswith("`sdopt build` works without: only running needs it")


@pytest.mark.parametrize(("capability", "has"), [("7.5", False), ("8.0", True), ("9.0", True)])
def test_bf16_is_had_from_ampere_on(capability: str, has: bool) -> None:
    assert Target("tensorrt", None, Gpu(0, "GPU", capability, 13000, 1), None).has_bf16 is has
    assert not Target("tensorrt-rtx", None, None, None).has_bf16


BARE = """
import sys
for name in ("onnxruntime", "torch", "diffusers", "transformers"):
    sys.modules[name] = None
import sdopt.cli.build, sdopt.build.jobs
from sdopt.bundle.files import Bundle
folders = sdopt.build.jobs.build(Bundle.open(sys.argv[1], verify=False), sys.argv[2], components=["vae_encoder"],
                                 profiles=["batch=1 height=64 width=64"],
                                 options=sdopt.build.jobs.BuildOptions(opt_level=0))
"""


@pytest.mark.parametrize("backend", ["ort", pytest.param("tensorrt-rtx", marks=RTX)])
def test_a_build_needs_neither_onnx_runtime_nor_torch(backend: str, bundle: Bundle) -> None:
    done = subprocess.run([sys.executable, "-c", BARE, bundle.path, backend], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(stored(bundle, backend)) == 1


def test_a_damaged_engine_is_built_again(bundle: Bundle) -> None:
    (folder,) = build(bundle, "ort", components=["vae_encoder"], report=lambda line: None)
    (folder / "graph.onnx.data").write_bytes(b"")
    lines: list[str] = []
    build(bundle, "ort", components=["vae_encoder"], report=lines.append)
    assert "vae_encoder: built again, because" in lines[0]
    assert (folder / "graph.onnx.data").stat().st_size


def _build_and_tell(path: Path, told: Any) -> None:
    build(Bundle.open(path, verify=False), "ort", components=["vae_encoder"], report=told.put)
    told.put("done")


def test_two_processes_build_an_engine_once(bundle: Bundle) -> None:
    (folder,) = build(bundle, "ort", components=["vae_encoder"], report=lambda line: None)
    shutil.rmtree(folder)
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=_build_and_tell, args=(bundle.path, told)) for _ in range(2)]
    with one_builder(folder, pytest.fail):
        for process in processes:
            process.start()
        waiting = [told.get(timeout=120) for _ in processes]
        assert waiting == [f"{folder.name}: another process is building it; waiting"] * 2
    lines: list[str] = []
    while lines.count("done") < 2:
        lines.append(told.get(timeout=120))
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert lines.count(f"vae_encoder: already built, {folder}") == 1
    assert [path.name for path in (bundle.path / "engines").iterdir()] == [folder.name]


def test_what_a_killed_build_left_of_another_engine_goes(bundle: Bundle) -> None:
    left = bundle.path / "engines/.unet-0123456789ab.tmp-01234567"
    left.mkdir(parents=True)
    (folder,) = build(bundle, "ort", components=["vae_encoder"], report=lambda line: None)
    assert list(folder.parent.iterdir()) == [folder]


def test_what_the_callers_own_function_raises_reaches_the_caller(bundle: Bundle) -> None:
    class CancelledError(OSError): ...

    def cancel(line: str) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        build(bundle, "ort", components=["vae_encoder"], report=cancel)
    assert list((bundle.path / "engines").iterdir()) == []


def test_a_disk_that_is_too_small_for_an_engine_is_refused_before_the_build(small_disk: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle"))
    engines = path / "engines"
    engines.mkdir()
    subprocess.run(["mount", "--bind", small_disk, engines], check=True)
    try:
        with pytest.raises(BundleError, match=r"engines has 4\.\d\d MB free, about 1\d\.\d+ MB needed"):
            build(Bundle.open(path, verify=False), "ort", components=["unet"], report=pytest.fail)
        assert list(engines.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", engines], check=True)


def test_a_build_whose_file_cannot_be_written_ends_in_words_and_leaves_nothing(bundle: Bundle) -> None:
    with small_files(), pytest.raises(BundleError, match=r"vae_encoder-\w+ is not written: .* free"):
        build(bundle, "ort", components=["vae_encoder"], report=lambda line: None)
    assert list((bundle.path / "engines").iterdir()) == []


def test_a_build_whose_engines_could_not_be_signed_does_not_begin(bundle: Bundle, own_folders: Path) -> None:
    (own_folders / "state").write_text("in the way")
    with pytest.raises(BackendError, match="the key that signs engines cannot be kept"):
        build(bundle, "ort", report=pytest.fail)
    assert not (bundle.path / "engines").exists()


def test_a_build_that_fails_leaves_nothing(bundle: Bundle) -> None:
    part = replace(read_recipe().parts["vae_encoder"], islands=("nothing matches this",))
    recipe = replace(read_recipe(), parts={"vae_encoder": part})
    with pytest.raises(UsageError, match="nothing matches this"):
        build(bundle, "ort", recipe=recipe, options=BuildOptions(precision="fp16"), report=lambda line: None)
    assert not [p for p in (bundle.path / "engines").iterdir() if not p.name.endswith(".lock")]


def test_a_backend_that_builds_nothing_is_named(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="backend 'pytorch' builds no engines; these do: "):
        build(bundle, "pytorch")
    with pytest.raises(UsageError, match="backend 'tensorrt:cuda' is not known; there are tensorrt, tensorrt:0, tens"):
        build(bundle, "tensorrt:cuda")
    with pytest.raises(UsageError, match="backend 'ort:0' is not known; there are ort, ort:cpu and ort:cuda"):
        build(bundle, "ort:0")


def test_a_build_for_a_gpu_that_is_missing_says_why_and_leaves_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu(index: int = 0) -> Any:
        raise BackendError("there is no NVIDIA driver")

    monkeypatch.setattr("sdopt.build.target.shared_device", no_gpu)
    with pytest.raises(
        BackendError, match=r"^there is no NVIDIA driver\. Without a GPU, --backend tensorrt-rtx builds"
    ):
        build(bundle, "tensorrt", report=pytest.fail)
    assert not (bundle.path / "engines").exists()


# ---- TensorRT-RTX: real builds, without a GPU


@RTX
@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder", "unet_step"])
def test_tensorrt_rtx_builds_it_in_half(bundle: Bundle, component: str) -> None:
    phases: list[str] = []
    (folder,) = build(
        bundle, "tensorrt-rtx", components=[component], profiles=[SMALL], options=BuildOptions(opt_level=0),
        report=lambda line: None, progress=lambda phase, done, of: phases.append(phase),
    )  # fmt: skip
    (engine,) = stored(bundle, "tensorrt-rtx")
    assert engine.folder == folder
    assert engine.ours
    assert sorted(p.name for p in folder.iterdir()) == ["engine.plan", "record.json"]
    layers = engine.record.notes["layers"]
    assert layers["HALF"] > 3 * layers.get("FLOAT", 0)
    assert phases
    if component == "unet_step":
        assert engine.record.carry == {"next_sample": "sample", "next_history": "history"}
        assert "negative_encoder_hidden_states" in {s.name for s in engine.record.inputs}


@RTX
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_tensorrt_rtx_builds_it_in_8_bits(precision: str, bundle: Bundle) -> None:
    prompts = ("a red apple", "a blue heart", "a yellow star")
    options = BuildOptions(precision, opt_level=0, floor=10.0, prompts=prompts)
    build(bundle, "tensorrt-rtx", components=["unet_step"], profiles=[SMALL], options=options, report=lambda line: None)
    (engine,) = stored(bundle, "tensorrt-rtx")
    assert engine.precision == precision
    layers: Any = engine.record.notes["layers"]
    assert layers[precision.upper()] > 100
    assert layers["HALF"] > layers["FLOAT"]


@RTX
def test_tensorrt_rtx_builds_all_of_sdxl(sdxl_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(sdxl_bundle, tmp_path / "sdxl"), verify=False)
    # in float16 the first encoder, of a width that no real one has, trips over a check inside of TensorRT-RTX 1.7
    for precision, components in {
        "fp32": ["text_encoder"],
        "fp16": ["text_encoder_2", "unet_step", "vae_decoder", "vae_encoder"],
    }.items():
        options = BuildOptions(precision=precision, opt_level=0)
        build(
            bundle, "tensorrt-rtx", components=components, profiles=[SMALL], options=options, report=lambda line: None
        )
    records = {engine.record.component: engine.record for engine in stored(bundle, "tensorrt-rtx")}
    assert set(records) == set(names(bundle))
    layers = {name: record.notes["layers"] for name, record in records.items()}
    assert layers["unet_step"]["HALF"]
    assert layers["text_encoder_2"]["HALF"]
    assert {"text_embeds", "time_ids"} <= {s.name for s in records["unet_step"].inputs}


@RTX
def test_float32_attention_builds_too_and_several_profiles_are_one_engine(bundle: Bundle) -> None:
    build(
        bundle, "tensorrt-rtx", components=["text_encoder"], profiles=["batch=1", "batch=2:4:4"],
        options=BuildOptions(precision="fp32", opt_level=0), report=lambda line: None,
    )  # fmt: skip
    (engine,) = stored(bundle, "tensorrt-rtx")
    assert [str(p) for p in engine.record.profiles] == [
        "batch=1:2:2 tokens=32 extra_tokens=1:1:128",
        "batch=2:8:8 tokens=32 extra_tokens=1:1:128",
    ]
    assert engine.record.notes["layers"]["FLOAT"]


@RTX
def test_static_engines_have_their_lengths_in_the_graph_and_their_names_in_the_record(bundle: Bundle) -> None:
    sizes = ["batch=1:2:4 height=64", "batch=1 height=64:128:128"]
    folders = build(
        bundle, "tensorrt-rtx", components=["unet_step"], profiles=sizes, static=True,
        options=BuildOptions(opt_level=0), report=lambda line: None,
    )  # fmt: skip
    records = {s.folder: s.record for s in stored(bundle, "tensorrt-rtx")}
    assert [str(p) for folder in folders for p in records[folder].profiles] == [
        "batch=2 tokens=32 latent_height=8 latent_width=16", "batch=1 tokens=32 latent_height=16 latent_width=16",
    ]  # fmt: skip
    for folder in folders:
        record = records[folder]
        assert {s.name: s.shape for s in record.inputs}["sample"] == ("batch", 4, "latent_height", "latent_width")
        assert record.notes["fixed"]["nodes"] > 30
        assert record.key == folder.name


@RTX
def test_operators_that_the_parser_does_not_know_are_written_in_others_and_said(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Builder, "unsupported", lambda self, names: ["GroupNormalization"])
    lines: list[str] = []
    build(
        bundle, "tensorrt-rtx", components=["vae_encoder"], profiles=[SMALL], options=BuildOptions(opt_level=0),
        report=lines.append,
    )  # fmt: skip
    assert re.search(r"vae_encoder: written in operators that tensorrt-rtx .* knows: GroupNormalization", lines[0])
    (engine,) = stored(bundle, "tensorrt-rtx")
    assert engine.record.notes["lowered"] == ["GroupNormalization"]


@RTX
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("hardware_compatible", "--hardware-compatible: tensorrt-rtx does not have it: its engines run on every GPU"),
        ("version_compatible", "--version-compatible: tensorrt-rtx does not have it: its engines run with the version"),
    ],
)
def test_options_that_tensorrt_rtx_would_ignore_are_refused(bundle: Bundle, option: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(bundle, "tensorrt-rtx", components=["vae_encoder"], options=BuildOptions(**{option: True}), report=print)


@RTX
def test_weights_can_be_streamed(bundle: Bundle) -> None:
    options = BuildOptions(weight_streaming=True, opt_level=0)
    build(
        bundle, "tensorrt-rtx", components=["vae_encoder"], profiles=[SMALL], options=options, report=lambda line: None
    )
    assert stored(bundle, "tensorrt-rtx")[0].record.options["weight_streaming"]


@RTX
def test_a_refused_profile_is_told_with_tensorrts_words(bundle: Bundle, tmp_path: Path) -> None:
    component = bundle.component("vae_encoder")
    builder = Builder(TensorRT("tensorrt-rtx"), asdict(BuildOptions(precision="fp32")), None, name="vae_encoder")
    fixed = Profile({"batch": (1, 1, 1), "height": (64, 64, 64), "width": (64, 64, 64)})
    wrong = TensorSpec("sample", "float32", ("batch", 4, "height", "width"))  # it takes 3 channels
    with pytest.raises((UsageError, BackendError), match=r"vae_encoder: tensorrt-rtx .*(sample|profile|dimension)"):
        builder.build(component.graph, tmp_path / "plan", [wrong], [fixed])


@RTX
def test_a_graph_in_half_that_became_float32_is_refused_before_it_is_built(bundle: Bundle, tmp_path: Path) -> None:
    component = bundle.component("vae_encoder")
    builder = Builder(TensorRT("tensorrt-rtx"), asdict(BuildOptions(precision="fp16")), None, name="vae_encoder")
    with pytest.raises(BackendError, match=r"vae_encoder: the graph has 30 convolutions .* --precision fp32"):
        builder.build(component.graph, tmp_path / "plan", component.inputs, [], half_products=30)


@RTX
def test_what_cannot_be_built_says_why_and_leaves_nothing(bundle: Bundle) -> None:
    options = BuildOptions(refit=True, opt_level=0)
    with pytest.raises(
        BackendError, match=r"text_encoder: tensorrt-rtx .* builds no engine: --refit needs a GPU.*TensorRT says"
    ):
        build(bundle, "tensorrt-rtx", components=["text_encoder"], options=options, report=lambda line: None)
    assert stored(bundle, "tensorrt-rtx") == []


@RTX
def test_a_broken_graph_names_its_node(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    builder = Builder(TensorRT("tensorrt-rtx"), asdict(BuildOptions(precision="fp16")), None, name="bad")
    with pytest.raises(BackendError, match="bad: tensorrt-rtx .* cannot parse it"):
        builder.build(tmp_path / "bad.onnx", tmp_path / "plan", [], [])
    assert builder.unsupported(["Attention", "Conv", "NoSuchOperator"]) == ["NoSuchOperator"]


@RTX
def test_the_command_builds_and_then_finds_what_it_built(bundle: Bundle, own_folders: Path) -> None:
    arguments = ["build", bundle.path, "--backend", "tensorrt-rtx", "--component", "vae_encoder", "--opt-level", "0"]
    arguments += ["--profile", SMALL]
    first, again = command(*arguments), command(*arguments)
    assert first.returncode == again.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert "building, fp16, batch=1 height=64 width=64" in first.stderr
    assert "already built" in again.stderr
    assert stored(bundle, "tensorrt-rtx")[0].record.rebuild_command.endswith(
        '--profile "batch=1 tokens=32 height=64 width=64"'
    )


def test_the_command_refuses_what_is_wrong(bundle: Bundle) -> None:
    done = command("build", bundle.path, "--backend", "tensorrt", "--precision", "fp4")
    assert (done.returncode, done.stdout) == (2, "")
    assert "precision 'fp4'" in done.stderr


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    yield
    assert not (EMOJI_BUNDLE / "engines").exists()
