"""The command line, in processes of its own: results on stdout, the rest on stderr, exit codes as documented."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdopt.cli.main import COMMANDS, build_parser, main
from sdopt.image.pil import read_parameters
from tests.conftest import EMOJI_CHECKPOINT, ROOT, edit_manifest, hears_interrupts, sdopt


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_generate_writes_a_picture_and_prints_its_path(tmp_path: Path) -> None:
    path = tmp_path / "apple.png"
    done = sdopt("generate", "a red apple", "--steps", 3, "--seed", 7, "-o", path)
    assert (done.returncode, done.stdout) == (0, f"{path}\n")
    assert done.stderr.startswith("seed 7; ")
    assert pixels(path).std() > 10


def test_json_tells_all_that_makes_each_picture_again(tmp_path: Path) -> None:
    done = sdopt(
        "generate", "a cat", "-n", 2, "--steps", 2, "--seed", 7, "--size", "96x64", "--json", "-o", tmp_path / "c.png"
    )
    result = json.loads(done.stdout)
    assert [Path(i["path"]).name for i in result["images"]] == ["c-0.png", "c-1.png"]
    assert [i["seed"] for i in result["images"]] == [7, 8]
    assert {(i["width"], i["height"]) for i in result["images"]} == {(96, 64)}
    assert pixels(tmp_path / "c-1.png").shape == (64, 96, 3)


def test_a_png_carries_its_parameters_and_replays_exactly(tmp_path: Path) -> None:
    first, replayed = tmp_path / "first.png", tmp_path / "again.png"
    prompt = 'a "red" apple, on blue: ünïcode\nand a second line'
    sdopt("generate", prompt, "--negative", "a dog", "--steps", 4, "--guidance", 2.5, "--sampler", "euler", "-o", first)
    text = Image.open(first).info["parameters"]
    assert text.startswith(f"{prompt}\nNegative prompt: a dog\nSteps: 4, Sampler: ")
    assert "CFG scale: 2.5, Seed: " in text
    done = sdopt("generate", "--replay", first, "-o", replayed)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(pixels(first), pixels(replayed))


def test_no_metadata_leaves_the_png_bare(tmp_path: Path) -> None:
    sdopt("generate", "a secret", "--steps", 1, "--no-metadata", "-o", tmp_path / "a.png")
    assert not {"parameters", "sdopt"} & set(Image.open(tmp_path / "a.png").info)
    done = sdopt("generate", "--replay", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert done.returncode == 2
    assert "does not tell how it was made" in done.stderr


def test_a_replay_asks_for_the_backend_and_precision_of_its_picture_and_says_if_it_has_others(tmp_path: Path) -> None:
    first = tmp_path / "a.png"
    common = ("--size", "64x64", "--steps", "1", "--json")
    done = sdopt("generate", "a pear", "-o", first, "--backend", "ort:cpu", *common)
    assert (read_parameters(first)["backend"], read_parameters(first)["precision"]) == ("ort:cpu", "fp32")
    done = sdopt("generate", "--replay", first, "-o", tmp_path / "b.png", "--json")
    assert json.loads(done.stdout)["backend"] == "ort:cpu"
    assert "differ" not in done.stderr
    done = sdopt("generate", "--replay", first, "-o", tmp_path / "c.png", "--backend", "ort")
    assert "was made by ort:cpu in fp32; this picture may differ" in done.stderr


def test_replay_with_another_bundle_names_the_one_it_needs(tmp_path: Path, tiny_bundle: Path) -> None:
    sdopt("generate", "a", "--steps", 1, "-m", tiny_bundle, "-o", tmp_path / "a.png")
    done = sdopt("generate", "--replay", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert done.returncode == 3
    assert "was made by the bundle" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "-o", "a.png"], 2, "no PROMPT given"),
        (["generate", "a", "-o", "a.gif"], 2, "name it a.png"),
        (["generate", "a", "-o", "no/such/folder/a.png"], 2, "there is no folder no/such/folder"),
        (["generate", "a", "-o", "a.png", "--size", "big"], 2, "'big' is not WIDTHxHEIGHT"),
        (["generate", "a", "-o", "a.png", "--size", "65x64"], 2, "width = 65"),
        (["generate", "a", "-o", "a.png", "--steps", "0"], 2, "--steps 0; allowed are whole numbers from 1"),
        (["generate", "a", "-o", "a.png", "--seed", "-1"], 2, "--seed -1; allowed"),
        (["generate", "a", "-o", "a.png", "--backend", "magic"], 2, "backend 'magic' is not known"),
        (["generate", "a", "-o", "a.png", "--sampler", "eulr"], 2, "euler"),
        (["generate", "a", "-o", "a.png", "-m", "no/bundle"], 3, "no such folder"),
        (["generate", "a", "-o", "a.png", "-m", EMOJI_CHECKPOINT], 3, "sdopt export"),
        (["generate", "a", "-o", "a.png", "--replay", "a.png"], 2, "leave out PROMPT"),
        (
            ["generate", "-o", "a.png", "--replay", "a.png", "--clip-skip", "1", "--rng", "numpy"],
            2,
            "--rng, --clip-skip",
        ),
        (["generate", "a", "-o", "a.png", "--image", "no.png"], 2, "no.png: there is no such file"),
        (["generate", "-o", "a.png", "--replay", "no.png"], 2, "no.png: there is no such file"),
        (["generate", "a", "-o", "a.png", "--vae-tile", "2"], 2, "--vae-tile 2"),
        (["inspect", "no/bundle"], 3, "no such folder"),
        (["paint"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
    ],
    ids=lambda v: " ".join(map(str, v))[:50] if isinstance(v, list) else "",
)
def test_a_mistake_ends_with_its_exit_code_and_a_sentence(arguments: list, code: int, message: str) -> None:
    done = sdopt(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_damaged_bundle_ends_with_exit_code_3(bundle_copy: Path, tmp_path: Path) -> None:
    edit_manifest(bundle_copy, format_version=99)
    done = sdopt("generate", "a", "-m", bundle_copy, "-o", tmp_path / "a.png")
    assert done.returncode == 3
    assert "format_version is 99; this sdopt reads 2 to 4. Upgrade sdopt" in done.stderr


def test_a_missing_engine_library_ends_with_exit_code_4(tmp_path: Path) -> None:
    blocked = "import sys, importlib.util as u; real = u.find_spec\n"
    blocked += (
        "u.find_spec = lambda name, *a: None if name in ('onnxruntime', 'openvino', 'tensorrt') else real(name, *a)\n"
    )
    blocked += f"from sdopt.cli.main import main; sys.exit(main(['generate', 'a', '-o', {str(tmp_path / 'a.png')!r}]))"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 4
    assert "pip install" in done.stderr


def test_an_interrupt_ends_with_130_and_leaves_no_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sdopt", "generate", "a", "--steps", "900", "--preview-every", "3"]
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "a.png")], stderr=subprocess.PIPE, text=True, preexec_fn=hears_interrupts
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "a-step-003.png").exists():  # from then on it is in the loop of steps
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "a.png").exists()
    assert all(path.match("a-step-*.png") for path in tmp_path.iterdir())


def test_inspect_shows_components_sizes_parity_and_provenance() -> None:
    text = sdopt("inspect").stdout
    for word in ("unet", "vae_decoder", "parity dB", "source", "versions", "scheduler", "latent_height"):
        assert word in text
    entry = json.loads(sdopt("inspect", "--json").stdout)
    assert entry["bytes"]["unet"] > 10e6
    assert entry["components"]["unet"]["parity"]


def test_help_is_quick_to_import_and_lists_every_command() -> None:
    code = "import sys; from sdopt.cli.main import build_parser, COMMANDS; text = build_parser().format_help()\n"
    code += (
        "assert all(c in text for c in COMMANDS); assert not {'numpy', 'PIL', 'onnxruntime', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert "PROMPT" in sdopt("generate", "--help").stdout


EVERY_COMMAND = [*((name,) for name in COMMANDS), *(("bench", word) for word in ("run", "compare", "report"))]


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_the_help_of_a_command_has_groups_and_examples_that_its_parser_takes(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = build_parser(words[0])
    for word in words:
        parser = parser.commands[word]
    text = parser.format_help()
    plain = text.split("\noptions:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in plain if re.match(r"  -", line)] == ["-h,"]
    examples = re.findall(r"^  (sdopt .*?)(?:   .*)?$", text.split("\nexamples:\n")[1], re.MULTILINE)
    assert examples
    monkeypatch.setattr(f"sdopt.cli.{words[0]}.run", lambda args: 0)
    for example in examples:
        assert main(shlex.split(example)[1:]) == 0, example
