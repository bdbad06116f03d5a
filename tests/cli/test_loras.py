"""`--lora`, `--lora-dir`, tags in prompts, replay, and what `sdopt inspect` tells of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdopt.adapters.lora.few_steps import few_steps
from sdopt.adapters.lora.file import read_lora
from sdopt.adapters.lora.tags import Tag, cut
from sdopt.bundle.files import Bundle
from sdopt.cli.loras import file_and_weight
from sdopt.cli.main import main
from sdopt.errors import UsageError
from sdopt.image.pil import read_parameters
from tests.adapters.lora_files import is_linear, shapes, tensors, write


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files in one folder, and a third in a folder inside it."""
    made = tmp_path_factory.mktemp("loras")
    paths = shapes(Bundle.open(tiny_bundle), "unet")
    modules = {"unet": {path: shape for path, shape in paths.items() if is_linear(path)}}
    words = {"modelspec.trigger_phrase": "neon sign"}
    for i, name in enumerate(("neon", "ink", "old/lcm-lora")):
        write(made / f"{name}.safetensors", tensors(modules, seed=i, size=0.3), words)
    return made


def generate(bundle: Path, target: Path, *options: str, prompt: str = "apple") -> dict[str, Any]:
    """Make a picture and return its parameters."""
    words = ["generate", prompt, "-m", str(bundle), "-o", str(target), "--seed", "1", *options]
    assert main(words) == 0
    return read_parameters(target)


def test_a_file_and_its_weight_are_in_the_picture(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    options = ("--steps", "2")
    plain = generate(tiny_bundle, tmp_path / "plain.png", *options)
    made = generate(tiny_bundle, tmp_path / "a.png", *options, "--lora", f"{folder / 'neon.safetensors'}:0.8")
    assert "loras" not in plain
    lora = read_lora(folder / "neon.safetensors")
    [used] = made["loras"]
    assert used == {
        "name": "neon", "sha256": lora.digest, "a1111_hash": lora.a1111_hash,
        "weights": {"text_encoder": 0.8, "unet": 0.8},
    }  # fmt: skip
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    text = _text(tmp_path / "a.png")
    assert text.startswith("apple <lora:neon:0.8>\n")
    assert f'Lora hashes: "neon: {lora.a1111_hash}"' in text


def _text(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return image.info["parameters"]


def test_tags_name_files_of_a_folder_and_are_cut_out(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    style = ("--steps", "2", "--prompt-style", "a1111", "--lora-dir", str(folder))
    tagged = generate(tiny_bundle, tmp_path / "a.png", *style, prompt="an apple <lora:neon:0.8> <lora:ink:0:0.5>")
    assert tagged["prompt"] == "an apple"
    assert [(lora["name"], lora["weights"]["unet"]) for lora in tagged["loras"]] == [("neon", 0.8), ("ink", 0.5)]
    flags = ("--lora", f"{folder}/neon.safetensors:0.8", "--lora", f"{folder}/ink.safetensors:0:0.5")
    options = ("--steps", "2", "--prompt-style", "a1111", *flags)
    flagged = generate(tiny_bundle, tmp_path / "b.png", *options, prompt="an apple")
    assert flagged["loras"] == tagged["loras"]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_every_prompt_has_the_files_of_its_own_tags(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    prompts = ["an apple <lora:neon>", "an apple", "an apple <lora:old/lcm-lora:0.5>"]
    common = ("-m", str(tiny_bundle), "--seed", "1", "--steps", "2")
    style = ("--prompt-style", "a1111", "--lora-dir", str(folder))
    assert main(["generate", *prompts, "-o", str(tmp_path / "a.png"), *common, *style]) == 0
    made = [read_parameters(tmp_path / f"a-{i}.png") for i in range(3)]
    assert [[lora["name"] for lora in one.get("loras", [])] for one in made] == [["neon"], [], ["lcm-lora"]]


def test_replay_asks_for_the_same_files_and_weights(
    tiny_bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neon = str(folder / "neon.safetensors")
    generate(tiny_bundle, tmp_path / "a.png", "--steps", "2", "--lora", f"{neon}:0.8")
    again = ["generate", "--replay", str(tmp_path / "a.png"), "-m", str(tiny_bundle), "-o", str(tmp_path / "b.png")]
    for wrong in ([], ["--lora", neon], ["--lora", f"{folder / 'ink.safetensors'}:0.8"]):
        assert main([*again, *wrong]) == 2
        assert "give --lora neon.safetensors:0.8" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()
    assert main([*again, "--lora", f"{neon}:0.8"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_lora_for_few_steps_suggests_how_it_is_called(
    tiny_bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lcm = ("--lora", str(folder / "old/lcm-lora.safetensors"))
    made = generate(tiny_bundle, tmp_path / "a.png", *lcm)
    assert (made["num_inference_steps"], made["sampler"], made["guidance_scale"]) == (4, "lcm", 1.0)
    assert "LCM-LoRA: --steps 4, sampler lcm, --guidance 1.0" in capsys.readouterr().err
    own = generate(tiny_bundle, tmp_path / "b.png", *lcm, "--steps", "2", "--sampler", "euler")
    assert (own["num_inference_steps"], own["sampler"], own["guidance_scale"]) == (2, "euler", 1.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Hyper-SD15-8steps-CFG-lora",
         {"num_inference_steps": 8, "sampler": "ddim", "schedule": "trailing", "guidance_scale": 5.0}),
        ("Hyper-SDXL-4steps-lora",
         {"num_inference_steps": 4, "sampler": "ddim", "schedule": "trailing", "guidance_scale": 1.0}),
        ("Hyper-SD15-1step-lora", {"num_inference_steps": 1, "sampler": "tcd", "eta": 1.0, "guidance_scale": 1.0}),
        ("sdxl_lightning_2step_lora",
         {"num_inference_steps": 2, "sampler": "euler", "schedule": "trailing", "guidance_scale": 1.0}),
        ("sd_xl_turbo_lora_v1",
         {"num_inference_steps": 4, "sampler": "euler_a", "schedule": "trailing", "guidance_scale": 1.0}),
        ("TCD-SDXL-LoRA", {"num_inference_steps": 4, "sampler": "tcd", "eta": 0.3, "guidance_scale": 1.0}),
        ("my-welcome-style", None),
    ],
)  # fmt: skip
def test_the_kinds_of_few_steps(tmp_path: Path, name: str, options: dict[str, Any] | None) -> None:
    (tmp_path / "files").mkdir()
    path = write(tmp_path / "files" / f"{name}.safetensors", {"a.alpha": np.ones(1, np.float32)})
    suggestion = few_steps(read_lora(path))
    assert (suggestion and suggestion.options) == options


def test_inspect_tells_what_a_file_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "old/lcm-lora.safetensors")]) == 0
    told = capsys.readouterr().out
    for text in ("(LoRA)", "cross-attention width 20", "LoRA", "ranks      4", "alphas     2", "neon sign", "LCM-LoRA"):
        assert text in told
    assert main(["inspect", str(folder / "neon.safetensors"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["ranks"], values["few_steps"], values["unknown_keys"]) == ({"4": values["modules"]}, None, [])


def test_tags_are_read_as_the_web_ui_reads_them() -> None:
    assert cut("a <lora:x> b") == ("a b", [Tag("x", 1.0, 1.0)])
    assert cut("a<lora:x:0.5>") == ("a", [Tag("x", 0.5, 0.5)])
    assert cut("<lora:x:0.5:0.8> a")[1] == [Tag("x", 0.5, 0.8)]
    assert cut("<lora:x:1:te=0.5:unet=0.8>")[1] == [Tag("x", 0.5, 0.8)]
    assert cut("<lora:x:0.5><lora:x:0.25>")[1] == [Tag("x", 0.75, 0.75)]
    for wrong in ("<lora:x:y>", "<lora::1>", "<lora:x:1:2:3>", "<lora:x:1:dyn=4>"):
        with pytest.raises(UsageError, match="write <lora:name:0.8>"):
            cut(wrong)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:0.5:0.8", "a.safetensors", {"unet": 0.8, "text_encoder": 0.5}),
        ("C:a.safetensors", "C:a.safetensors", 1.0),
    ],
)
def test_a_file_and_its_weight(text: str, path: str, weight: Any) -> None:
    assert file_and_weight(text, ("unet", "text_encoder")) == (Path(path), weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora", "absent.safetensors"], "there is no such file"),
        (["--lora", "{neon}", "--lora", "{neon}:0.5"], "is given twice"),
        (["--lora", "{neon}:1e9"], "allowed are numbers from -100 to 100"),
        (
            ["--prompt-style", "a1111", "--lora-dir", "{folder}", "--prompt", "<lora:nein>"],
            "there is no nein.safetensors",
        ),
        (["--prompt-style", "a1111", "--prompt", "<lora:neon>"], "with --lora-dir DIR"),
    ],
)
def test_mistakes_are_named(
    tiny_bundle: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    given = [option.format(neon=folder / "neon.safetensors", folder=folder) for option in options]
    prompt = "apple"
    if "--prompt" in given:
        place = given.index("--prompt")
        prompt, given = given[place + 1], given[:place] + given[place + 2 :]
    assert main(["generate", prompt, "-m", str(tiny_bundle), "-o", str(tmp_path / "a.png"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("a*"))
