"""What `sdopt generate` reads and writes; all that can be known is checked before anything is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdopt.cli import outputs
from sdopt.cli.parser import as_typed
from sdopt.cli.prompts import read_prompts
from sdopt.errors import SdoptError, UsageError
from sdopt.image.files import EXIF, FORMATS, UNICODE, USER_COMMENT, format_of, refuse_lost, save, save_each
from tests.conftest import ROOT, sdopt

SMALL = ("--steps", "1", "--size", "32x32")


def comment(path: Path) -> str:
    content = Image.open(path).getexif().get_ifd(EXIF)[USER_COMMENT]
    assert content.startswith(UNICODE)
    return content.removeprefix(UNICODE).decode("utf-16-be")


@pytest.mark.parametrize("suffix", [suffix for suffix in FORMATS if suffix != ".png"])
def test_jpeg_and_webp_hold_the_text_that_a_png_holds(suffix: str, tmp_path: Path) -> None:
    prompt = "a red apple, ünïcode 🍎\nand a second line"
    for path in (tmp_path / "a.png", tmp_path / f"a{suffix}"):
        assert sdopt("generate", prompt, "--seed", 1, "--steps", 2, "--negative", "b", "-o", path).returncode == 0
    png, other = Image.open(tmp_path / "a.png"), Image.open(tmp_path / f"a{suffix}")
    assert other.format == FORMATS[suffix]
    assert comment(tmp_path / f"a{suffix}") == png.info["parameters"]
    difference = np.abs(np.asarray(png, np.float32) - np.asarray(other, np.float32))
    assert 0 < difference.mean() < 4


def test_no_metadata_leaves_a_jpeg_bare(tmp_path: Path) -> None:
    sdopt("generate", "a secret", *SMALL, "--no-metadata", "-o", tmp_path / "a.jpg")
    assert not Image.open(tmp_path / "a.jpg").getexif()


def test_each_of_several_prompts_is_made_as_if_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\n  a dög  \n", encoding="utf-8")
    ways = {
        "typed": ("a cat", "a dög"),
        "file": ("--prompt-file", tmp_path / "prompts.txt"),
    }
    for name, words in ways.items():
        done = sdopt("generate", *words, "--seed", 3, *SMALL, "--json", "-o", tmp_path / f"{name}.png")
        assert [(i["prompt"], i["seed"]) for i in json.loads(done.stdout)["images"]] == [("a cat", 3), ("a dög", 3)]
    sdopt("generate", "a dög", "--seed", 3, *SMALL, "-o", tmp_path / "alone.png")
    alone = (tmp_path / "alone.png").read_bytes()
    assert alone == (tmp_path / "typed-1.png").read_bytes() == (tmp_path / "file-1.png").read_bytes()


def test_a_line_of_prompts_ends_with_a_newline_and_with_nothing_else(tmp_path: Path) -> None:
    inside = "".join(f"a{mark}b" for mark in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r")
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a cat\r\n{inside}\n \u2028\n\x0c\na dog".encode())
    assert read_prompts([], str(path)) == ["a cat", inside, "a dog"]


@pytest.mark.parametrize("words", [["-"], ["--prompt-file", "-"]])
def test_prompts_come_from_stdin(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sdopt", "generate", *words, *SMALL, "-o", str(tmp_path / "a.png"), "--json"]
    done = subprocess.run(command, input=b"one\ntwo\n", capture_output=True, cwd=ROOT, check=True)
    assert [image["prompt"] for image in json.loads(done.stdout)["images"]] == ["one", "two"]
    done = subprocess.run(command, input=b"one\ncaf\xe9\n", capture_output=True, cwd=ROOT, check=False)
    assert (done.returncode, b"line 2 is not UTF-8" in done.stderr) == (2, True)


def test_several_seeds_are_one_picture_each(tmp_path: Path) -> None:
    done = sdopt("generate", "a", "--seed", "7,3", *SMALL, "--json", "-o", tmp_path / "a.png")
    assert [image["seed"] for image in json.loads(done.stdout)["images"]] == [7, 3]
    sdopt("generate", "a", "--seed", "3", *SMALL, "-o", tmp_path / "b.png")
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "a-1.png")), np.asarray(Image.open(tmp_path / "b.png"))
    )


def test_a_device_is_the_backends(tmp_path: Path) -> None:
    done = sdopt("generate", "a", "--device", "cpu", *SMALL, "--json", "-o", tmp_path / "a.png")
    assert json.loads(done.stdout)["backend"] == "ort:cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "-o", "{folder}/a.png", "-n", "0"], "--number 0; allowed are whole numbers from 1"),
        (["a", "-o", "{folder}/is-folder.png"], "is-folder.png is a folder; name a file"),
        (["a", "-o", "{folder}"], "is a folder; name a file"),
        (["a", "-o", "{folder}/pipe.png"], "pipe.png is a device or a pipe; name a file"),
        (["a", "-o", "{folder}/there.png", "--no-clobber"], "there.png exists, and --no-clobber keeps it"),
        (["a", "-n", "2", "-o", "{folder}/there.png", "--no-clobber"], "there-1.png exists, and --no-clobber"),
        (["a", "-n", "2", "-o", "{folder}/half.png"], "half-1.png is a folder"),
        (["a", "-o", "{folder}/" + 250 * "a" + ".png"], "this name is too long by"),
        (["a", "-o", "{folder}/none/a.png"], "there is no folder"),
        (["a", "-o", "{folder}/there.png/a.png"], "there is no folder"),
        (["caf\udce9", "-o", "{folder}/a.png"], "PROMPT 'caf\\udce9' is not UTF-8"),
        (["a", "--negative", "caf\udce9", "-o", "{folder}/a.png"], "--negative 'caf\\udce9' is not UTF-8"),
        (["a" * 9000, "-o", "{folder}/a.png"], "9000 characters; allowed are 8192 bytes"),
        (["a", "--prompt-file", "x", "-o", "{folder}/a.png"], "PROMPT and --prompt-file: give one of them"),
        (["--prompt-file", "{folder}/none", "-o", "{folder}/a.png"], "it cannot be read: No such file"),
        (["--prompt-file", "{folder}/empty", "-o", "{folder}/a.png"], "there is no prompt in it"),
        (["a", "--seed", "1,x", "-o", "{folder}/a.png"], "'1,x' is not a whole number, or several"),
        (["a", "--backend", "ort:cpu", "--device", "cpu", "-o", "{folder}/a.png"], "leave one out"),
        (["a", "--prompt", "b", "-o", "{folder}/a.png"], "--prompt is not known here; there is --prompt-file"),
        (["a", "--step", "1", "-o", "{folder}/a.png"], "--step is not known here; there is --steps"),
        (["a", "--guidance-interval", "1", "0", "-o", "{folder}/a.png"], "e.g. --guidance-interval 0.1 0.8"),
        (["a", "--threads", "0", "-o", "{folder}/a.png"], "--threads 0; allowed are 1 to 1024; without --threads all"),
        (["a", "--seed", ",".join(map(str, range(70))), "-o", "{folder}/a.png"], "--seed: 70 seeds are 70 pictures"),
        (["a", "-o", "-"], "-o -: pictures are not written to stdout; name a file"),
        (["a", "-n", "2", "-o", "-"], "-o -: pictures are not written to stdout; name a file"),
        (["a", "-o", "{folder}/.png"], "apple.png"),
        (["a", "--timesteps", "-1", "-o", "{folder}/a.png"], "e.g. --timesteps 999 749 499 249"),
    ],
    ids=lambda value: " ".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_a_mistake_is_found_before_the_bundle_is_opened(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "is-folder.png").mkdir()
    (tmp_path / "half-1.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("there.png", "there-1.png", "empty"):
        (tmp_path / name).touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    words = [word.replace("{folder}", str(tmp_path)) for word in arguments]
    done = sdopt("generate", *words, "-m", "no/bundle")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written; name another one"):
        outputs.check_file(tmp_path / "a.png")


def test_a_full_disk_loses_one_file_and_says_so(tmp_path: Path) -> None:
    """A picture whose name a folder has taken meanwhile cannot be written either."""
    image = Image.new("RGB", (8, 8))
    (tmp_path / "b.png").mkdir()
    pictures = [(image, tmp_path / name, None) for name in ("a.png", "b.png", "c.png")]
    with pytest.raises(SdoptError, match=r"b\.png is not written: Is a directory; the other 2 are written"):
        refuse_lost(save_each(pictures), len(pictures))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_a_disk_that_fills_loses_no_other_picture(small_disk: Path) -> None:
    """Of three prompts the second one's picture cannot be written, nor the previews of all."""
    code = """
import os, sys
from pathlib import Path
from sdopt import pipeline
from sdopt.cli.prompts import read_prompts
from sdopt.cli.main import main
disk, made, real = Path(sys.argv[1]), [], pipeline.Pipeline.finish
def finish(pipe, plan, sample):
    made.append(1)
    others = disk / "others"
    if len(made) == 2:
        others.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize))
    elif others.exists():
        others.unlink()
    return real(pipe, plan, sample)
pipeline.Pipeline.finish = finish
for i in range(3):
    (disk / f"a-{i}-step-001.png").mkdir()
words = ["--preview-every", "1", "--steps", "1", "--size", "64x64", "--seed", "1"]
raise SystemExit(main(["generate", "a", "b", "c", *words, "-o", str(disk / "a.png")]))
"""
    command = [sys.executable, "-c", code, str(small_disk)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    for i in range(3):
        assert f"a-{i}-step-001.png is not written: " in done.stderr
    assert "a-1.png is not written: No space left on device; the other 2 are written" in done.stderr
    assert [path.name for path in sorted(small_disk.glob("a-?.png"))] == ["a-0.png", "a-2.png"]


def test_free_space_is_compared_with_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Usage", (), {"free": 3 * 64 * 64 * 2})
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: free)
    outputs.check_space([tmp_path / "a.png", tmp_path / "b.png"], 64, 64)
    with pytest.raises(UsageError, match="3 pictures may take 0 MB, and 0 MB are free"):
        outputs.check_space([tmp_path / f"{i}.png" for i in range(3)], 64, 64)


def test_a_picture_that_a_format_cannot_hold_is_refused() -> None:
    assert format_of(Path("a.webp"), 16383, 8) == "WEBP"
    with pytest.raises(UsageError, match=r"WEBP holds 16383 a side: name it \.png"):
        format_of(Path("a.webp"), 16384, 8)


def test_a_picture_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        save(Image.new("RGB", (8, 8)), tmp_path / "none/a.jpg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("num_inference_steps = 0; e.g. num_inference_steps=20", "--steps 0; e.g. --steps 20"),
        ("negative_prompt_2 needs SDXL", "--negative-prompt-2 needs SDXL"),
        ('sampler = 3, e.g. sampler="euler"', "--sampler 3, e.g. --sampler euler"),
        ("timesteps=[9, 4] beside num_inference_steps=2", "--timesteps 9 4 beside --steps 2"),
        ("mask_image without an image", "--mask without an image"),
        ("prompt_style='a1111' reads all of it.", "--prompt-style a1111 reads all of it."),
        (
            "width = 65; allowed are multiples of 8, e.g. width=64",
            "width = 65; allowed are multiples of 8, e.g. width 64",
        ),
    ],
)
def test_errors_are_in_the_words_of_the_command_line(message: str, typed: str) -> None:
    assert as_typed(message) == typed


def test_remarks_are_in_the_words_of_the_command_line(tmp_path: Path) -> None:
    done = sdopt("generate", "apple " * 60, *SMALL, "-o", tmp_path / "a.png")
    assert (done.returncode, "--prompt-style a1111 reads all of it" in done.stderr) == (0, True), done.stderr


def test_help_has_groups_and_examples() -> None:
    text = sdopt("generate", "--help").stdout
    for title in (
        "files:",
        "model and engine:",
        "text:",
        "steps:",
        "guidance:",
        "from a picture:",
        "SDXL:",
        "examples:",
    ):
        assert f"\n{title}\n" in text
