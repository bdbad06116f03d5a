"""LoRA on built engines: TensorRT's weights become the bundle's own with the changes, and nothing is built again."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions
from sdopt.bundle.files import Bundle
from sdopt.bundle.weights import Weights
from sdopt.cli.main import main
from sdopt.engine import open_engine
from sdopt.engine.refit import REFIT, Refittable
from sdopt.engine.store import PLAN, stored
from sdopt.errors import BackendError, BundleError, UsageError
from sdopt.metrics import psnr
from tests.adapters.lora_files import shapes, tensors, write
from tests.conftest import EMOJI_BUNDLE, PlugIn
from tests.fakes.trt_builder import inputs_of
from tests.fakes.trt_refit import FakeRefitter

SIZES = ["batch=1 height=64 width=64"]
PARTS = ("unet_step", "text_encoder", "vae_decoder")
OPTIONS: dict[str, Any] = {
    "height": 64, "width": 64, "seed": 1, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np",
}  # fmt: skip
FLOORS_DB = {"fp32": 80.0, "fp16": 50.0, "bf16": 50.0}
BACKEND = {"rtx": "tensorrt-rtx"}


def picture(pipe: sdopt.Pipeline) -> Any:
    return pipe("a red apple", **OPTIONS).images


def refit_build(bundle: Path, backend: str = "tensorrt", precision: str = "fp32", **more: Any) -> list[Path]:
    options = BuildOptions(precision=precision, refit="lora")
    how = {"components": PARTS, "profiles": SIZES, "options": options, "report": lambda line: None, **more}
    return build(Bundle.open(bundle), backend, **how)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One of every linear and convolution of the UNet and the text encoder, another of the UNet's alone."""
    folder, bundle = tmp_path_factory.mktemp("loras"), Bundle.open(EMOJI_BUNDLE)
    unet, text = shapes(bundle, "unet"), shapes(bundle, "text_encoder")
    text = {path: shape for path, shape in text.items() if "text_projection" not in path}
    return (
        write(folder / "a.safetensors", tensors({"unet": unet, "text_encoder": text}, size=0.1)),
        write(folder / "b.safetensors", tensors({"unet": unet}, seed=1, size=0.1)),
    )


@pytest.fixture(scope="module")
def expected(loras: tuple[Path, Path]) -> dict[str, Any]:
    """Pictures of ONNX Runtime: without a LoRA, and with each."""
    with sdopt.load(EMOJI_BUNDLE, backend="ort:cpu") as pipe:
        pictures = {"": picture(pipe)}
        for file in loras:
            pipe.load_lora_weights(file)
            pictures[file.stem] = picture(pipe)
            pipe.unload_lora_weights()
    return pictures


@pytest.fixture(scope="module")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("own")))
        yield


@pytest.fixture
def built(tmp_path_factory: pytest.TempPathFactory, own_state: None, gpu: Any) -> Path:
    """The embedded bundle with refittable float32 engines for TensorRT 10, built once."""
    path = tmp_path_factory.getbasetemp() / "refittable"
    if not path.exists():
        shutil.copytree(EMOJI_BUNDLE, path, ignore=shutil.ignore_patterns("engines"))
        refit_build(path)
    return path


def test_from_one_lora_to_another_and_back_leaves_nothing(
    built: Path, loras: tuple[Path, Path], expected: dict[str, Any]
) -> None:
    with sdopt.load(built, backend="tensorrt") as pipe:
        plain = picture(pipe)
        for file in loras:
            pipe.load_lora_weights(file)
        pictures: dict[str, Any] = {}
        for name in ("a", "b", "a"):
            pipe.set_adapters(name)
            now = picture(pipe)
            assert psnr(now, expected[name], 1.0) >= FLOORS_DB["fp32"]
            assert psnr(now, plain, 1.0) < 40
            np.testing.assert_array_equal(now, pictures.setdefault(name, now))
        assert psnr(pictures["a"], pictures["b"], 1.0) < 40
        pipe.unload_lora_weights()
        np.testing.assert_array_equal(picture(pipe), plain)
        assert psnr(plain, expected[""], 1.0) >= FLOORS_DB["fp32"]


@pytest.mark.parametrize(
    ("flavour", "precision"), [("10", "fp16"), ("10", "bf16"), ("rtx", "fp16"), ("10.0", "fp16"), ("8.6", "fp16")]
)
def test_every_version_and_precision_refits(
    flavour: str, precision: str, bundle_copy: Path, own_folders: Path, plug_in: PlugIn, loras: Any, expected: Any
) -> None:
    plug_in(flavour)
    backend = BACKEND.get(flavour, "tensorrt")
    refit_build(bundle_copy, backend, precision)
    engine = next(e for e in stored(Bundle.open(bundle_copy), backend) if e.record.component == "unet_step")
    assert bool(Refittable.read(engine.folder / REFIT).constants) == (flavour in ("8.6", "10.0"))  # all weights or none
    with sdopt.load(bundle_copy, backend=backend) as pipe:
        pipe.load_lora_weights(loras[0])
        assert psnr(picture(pipe), expected["a"], 1.0) >= FLOORS_DB[precision]


def test_every_parameter_of_the_model_can_be_changed_and_nothing_else(built: Path) -> None:
    bundle = Bundle.open(built)
    for engine in stored(bundle, "tensorrt"):
        name = engine.record.component
        if name == "vae_decoder":
            assert REFIT not in engine.record.files
            assert engine.record.options["refit"] is False
            continue
        assert engine.record.options["refit"] == "lora"
        table = Refittable.read(engine.checked(REFIT))
        marked = inputs_of(engine.folder / PLAN)["refittable"]
        assert set(marked) == set(table.weights)
        assert not table.constants
        held = {part.partition("@")[0].partition("[")[0] for part in table.weights}
        assert held == set(Weights.of(bundle.component(name.removesuffix("_step"))).parameters)


def test_an_engine_that_was_not_built_for_it_says_the_command(
    bundle_copy: Path, own_folders: Path, gpu: Any, loras: tuple[Path, Path]
) -> None:
    options = BuildOptions(precision="fp32")
    command = "sdopt build BUNDLE --backend tensorrt --precision fp32"
    refit_build(bundle_copy, options=options, command=command)
    with sdopt.load(bundle_copy, backend="tensorrt") as pipe:
        before = picture(pipe)
        pipe.load_lora_weights(loras[1])
        wanted = "--backend tensorrt --precision fp32 --refit lora --component unet_step --profile "
        with pytest.raises(BackendError, match=wanted):
            picture(pipe)
        pipe.set_adapters("b", 0.0)
        np.testing.assert_array_equal(picture(pipe), before)


def test_the_commands_that_errors_name_build_what_takes_the_lora(
    bundle_copy: Path, own_folders: Path, gpu: Any, loras: tuple[Path, Path], expected: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with sdopt.load(bundle_copy, backend="tensorrt") as pipe:
        pipe.load_lora_weights(loras[0])
        with pytest.raises(BackendError, match="has no tensorrt engines. Build them: .* --refit lora") as caught:
            picture(pipe)
    command = re.search(r"sdopt (build .*)$", str(caught.value))
    assert command is not None
    assert main([*shlex.split(command[1]), "--precision", "fp32"]) == 0
    with sdopt.load(bundle_copy, backend="tensorrt") as pipe:
        pipe.load_lora_weights(loras[0])
        assert psnr(picture(pipe), expected["a"], 1.0) >= FLOORS_DB["fp32"]
    capsys.readouterr()
    assert main(["engines", str(bundle_copy), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["engines"]
    refits = {entry["component"]: entry["refit"] for entry in entries}
    assert refits == {"unet_step": "lora", "text_encoder": "lora", "vae_decoder": "", "vae_encoder": ""}
    assert main(["engines", str(bundle_copy)]) == 0
    assert capsys.readouterr().out.count("  refit: lora\n") == 2
    assert {s.record.options["refit"] for s in stored(Bundle.open(bundle_copy), "tensorrt")} == {"lora", False}
    with pytest.raises(SystemExit):
        main(["build", str(bundle_copy), "--backend", "tensorrt", "--refit", "all"])
    assert "'all'; allowed is lora, or nothing" in capsys.readouterr().err
    assert main(["build", str(bundle_copy), "--backend", "ort", "--refit", "lora"]) == 2
    assert "--refit: a graph for ONNX Runtime" in capsys.readouterr().err


def test_a_stale_engine_says_the_command_with_the_option(
    bundle_copy: Path, own_folders: Path, plug_in: PlugIn, loras: tuple[Path, Path]
) -> None:
    plug_in()
    refit_build(bundle_copy, components=["unet_step"], options=BuildOptions(precision="fp32"))
    plug_in().driver = 14000
    with pytest.raises(BackendError, match="is stale: .* --refit lora --component unet_step"):
        open_engine(Bundle.open(bundle_copy), "unet_step", "tensorrt", overlay=overlay(bundle_copy, loras[1]))


def test_of_several_engines_one_that_can_be_changed_is_taken(
    built: Path, tmp_path: Path, loras: tuple[Path, Path], expected: dict[str, Any]
) -> None:
    bundle = Path(shutil.copytree(built, tmp_path / "bundle"))
    refit_build(bundle, components=["unet_step"], options=BuildOptions(precision="fp32"))
    with sdopt.load(bundle, backend="tensorrt") as pipe:
        pipe.load_lora_weights(loras[1])
        assert psnr(picture(pipe), expected["b"], 1.0) >= FLOORS_DB["fp32"]


def overlay(bundle: Path, lora: Path) -> Any:
    with sdopt.load(bundle, backend="ort:cpu") as pipe:
        pipe.load_lora_weights(lora)
        return pipe.loras.overlay


def test_what_the_library_refuses_is_told_and_leaves_nothing(
    built: Path, loras: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, gpu: Any
) -> None:
    changes, bundle = overlay(built, loras[1]), Bundle.open(built)

    def refused(what: str) -> None:
        with pytest.raises(BackendError, match=what):
            open_engine(bundle, "unet_step", "tensorrt", overlay=changes)

    with monkeypatch.context() as patch:
        patch.setattr(FakeRefitter, "set_named_weights", lambda self, name, weights: self._refuse("reason"))
        refused(r"unet_step: TensorRT does not take float32 numbers for '.*': \[refit.cpp\] reason")
    with monkeypatch.context() as patch:
        patch.setattr(FakeRefitter, "refit_cuda_engine", lambda self: self._refuse("reason"))
        refused(r"unet_step: TensorRT does not change its weights: \[refit.cpp\] reason")
    for name in ("", "const/unknown"):
        with monkeypatch.context() as patch:
            patch.setattr(FakeRefitter, "get_missing_weights", lambda self, name=name: [name])
            refused(f"unet_step: TensorRT needs {name or 'a weight without a name'!r} to change its weights")
    gpu.full_at["refits"] = range(1, 2)  # once: idle memory is freed, and it is tried again
    with open_engine(bundle, "unet_step", "tensorrt", overlay=changes):
        gpu.full_at["refits"] = range(1, 100)
        refused("unet_step")
        gpu.full_at.clear()


def test_numbers_that_half_cannot_hold_are_refused(
    bundle_copy: Path, own_folders: Path, gpu: Any, loras: tuple[Path, Path]
) -> None:
    refit_build(bundle_copy, precision="fp16", components=["text_encoder"])
    huge = overlay(bundle_copy, loras[0]).scaled(1e6)
    with pytest.raises(UsageError, match="would be beyond 65504, and this engine keeps it in float16"):
        open_engine(Bundle.open(bundle_copy), "text_encoder", "tensorrt", overlay=huge)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.write_text("{}"), "is missing, truncated or a link"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "is damaged"),
    ],
)
def test_a_damaged_table_is_told(
    change: Callable[[Path], Any], told: str, built: Path, tmp_path: Path, loras: tuple[Path, Path]
) -> None:
    bundle = Path(shutil.copytree(built, tmp_path / "bundle"))
    (table,) = (bundle / "engines").glob(f"unet_step*/{REFIT}")
    change(table)
    with pytest.raises(BackendError, match=told):
        open_engine(Bundle.open(bundle), "unet_step", "tensorrt", overlay=overlay(built, loras[1]))


def test_a_bundle_that_changes_under_an_open_pipeline_is_told(
    built: Path, tmp_path: Path, loras: tuple[Path, Path]
) -> None:
    bundle = Path(shutil.copytree(built, tmp_path / "bundle"))
    opened, changes = Bundle.open(bundle), overlay(bundle, loras[1])
    data = bundle / "unet.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000:2000] = bytes(1000)
    data.unlink()
    data.write_bytes(content)
    with pytest.raises(BundleError, match="has changed"):
        open_engine(opened, "unet_step", "tensorrt", overlay=changes)


@pytest.mark.parametrize(
    "content",
    [
        '{"weights": {"a": "int8"}}', '{"weights": 1}', "no", "[]",
        '{"weights": {}, "constants": {"a": {"type": "float32", "base64": "!"}}}',
        '{"weights": {}, "constants": {"a": {"type": "float64", "base64": ""}}}',
    ],
)  # fmt: skip
def test_a_table_that_says_nothing_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / REFIT
    path.write_text(content)
    with pytest.raises(BackendError, match=r"refit.json cannot be read: .*; build the engine again"):
        Refittable.read(path)


def test_a_lora_that_is_built_in_runs_where_exactly_it_is_used(
    bundle_copy: Path, own_folders: Path, gpu: Any, loras: tuple[Path, Path], expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["build", str(bundle_copy), "--backend", "tensorrt", "--precision", "fp32", "--profile", SIZES[0]]
    words += [word for part in PARTS for word in ("--component", part)]
    assert main([*words, "--lora", f"{loras[0]}:1"]) == 0
    made = {s.record.component: s for s in stored(Bundle.open(bundle_copy), "tensorrt")}
    assert {name: len(s.record.options.get("loras", [])) for name, s in made.items()} == {
        "unet_step": 1, "text_encoder": 1, "vae_decoder": 0,
    }  # fmt: skip
    assert made["unet_step"].record.rebuild_command.startswith(
        f"sdopt build {bundle_copy} --backend tensorrt --precision fp32 --lora {loras[0]}:1 --component unet_step"
    )
    refitted: list[Any] = []
    monkeypatch.setattr("tests.fakes.trt_refit.FakeRefitter.__init__", lambda *args: refitted.append(args))
    with sdopt.load(bundle_copy, backend="tensorrt") as pipe:
        with pytest.raises(BackendError, match="only with other LoRAs built into them. Build one without: sdopt build"):
            picture(pipe)
        pipe.load_lora_weights(loras[0])
        result = pipe("a red apple", **OPTIONS)
        assert psnr(result.images, expected["a"], 1.0) >= FLOORS_DB["fp32"]
        assert result.parameters[0]["precision"] == "fp32"
        pipe.set_adapters("a", 0.5)
        with pytest.raises(BackendError, match="only with other LoRAs built into them. Build one without: .*--refit"):
            picture(pipe)
    assert main(words) == 0  # beside it, engines with the bundle's own weights
    assert len(stored(Bundle.open(bundle_copy), "tensorrt")) == 5
    with sdopt.load(bundle_copy, backend="tensorrt") as pipe:
        assert psnr(picture(pipe), expected[""], 1.0) >= FLOORS_DB["fp32"]
        pipe.load_lora_weights(loras[0], "another name")
        np.testing.assert_array_equal(picture(pipe), result.images)
        pipe.load_lora_weights(loras[1])
        with pytest.raises(BackendError, match="takes no LoRA. Build one that does: .* --refit lora --component"):
            picture(pipe)
    assert refitted == []
    capsys.readouterr()
    assert main(["engines", str(bundle_copy)]) == 0
    assert capsys.readouterr().out.count("  with a\n") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tensorrt", "--refit", "lora"], "--lora and --refit: LoRAs that are built in do not come out again"),
        (["tensorrt", "--component", "vae_decoder"], "these LoRAs, with these weights, change none of vae_decoder"),
        (["ort"], "--lora: a graph for ONNX Runtime takes every size"),
    ],
)
def test_a_lora_that_cannot_be_built_in_is_refused(
    words: list[str], told: str, bundle_copy: Path, own_folders: Path, gpu: Any, loras: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["build", str(bundle_copy), "--lora", str(loras[1]), "--backend", *words]) == 2
    assert told in capsys.readouterr().err
    assert not (bundle_copy / "engines").exists()


def test_a_fused_step_with_another_lora_is_passed_over_for_the_unet_alone(
    bundle_copy: Path, own_folders: Path, gpu: Any, loras: tuple[Path, Path], expected: dict[str, Any]
) -> None:
    exact = BuildOptions(precision="fp32")
    refit_build(bundle_copy, components=["unet", *PARTS[1:]], options=exact)
    refit_build(bundle_copy, components=["unet_step"], options=exact, overlay=overlay(bundle_copy, loras[1]))
    with sdopt.load(bundle_copy, backend="tensorrt") as pipe:
        assert psnr(picture(pipe), expected[""], 1.0) >= FLOORS_DB["fp32"]
        assert "unet" in pipe.pool.opened
        pipe.load_lora_weights(loras[1])
        assert psnr(picture(pipe), expected["b"], 1.0) >= FLOORS_DB["fp32"]
        assert "unet_step" in pipe.pool.opened
        pipe.unload_lora_weights()
        assert psnr(picture(pipe), expected[""], 1.0) >= FLOORS_DB["fp32"]
