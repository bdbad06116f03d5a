"""`sdopt export ... --image-encoder` and `sdopt generate --ip-adapter`: the flags are the keywords of Python."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.adapter import adapter_names, open_adapter
from sdopt.cli.main import main
from sdopt.image.pil import read_parameters
from tests import tiny
from tests.adapters.nets import edges

FACE, STYLE = edges(40, 31), edges(20, 33, seed=9)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the IP-Adapters `base` and `plus`, whose image encoder was not beside their files."""
    folder = tmp_path_factory.mktemp("ip")
    own = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    encoder = tiny.image_encoder(folder / "elsewhere" / "encoder")
    for seed, kind in enumerate(("base", "plus")):
        file = tiny.ip_adapter(folder / f"ip-adapter_{kind}.safetensors", tiny_checkpoint, kind, seed)
        words = ["export", str(file), "--onto", str(own), "--name", kind]
        assert main(words) == 3
        assert main([*words, "--image-encoder", str(encoder)]) == 0
    return own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FACE.save(tmp_path / "face.png")
    STYLE.save(tmp_path / "style.png")
    return tmp_path


def generate(bundle: Path, folder: Path, *words: str, out: str = "out.png") -> int:
    files = [(word, *word.rpartition("=")) for word in words]
    own = [f"{name}{sign}{folder}/{file}" if ".png" in word else word for word, name, sign, file in files]
    how = [] if "--replay" in words else ["apple", "--steps", "2", "--seed", "1", "--size", "32x24"]
    return main(["generate", "-m", str(bundle), "-o", str(folder / out), *own, *how])


def test_the_image_encoder_is_the_one_that_was_named(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = sdopt.Bundle.open(bundle)
    assert adapter_names(opened) == ("base", "plus")
    assert open_adapter(opened, "base").manifest.source["image_encoder"] == "encoder"
    for words, says in (
        (("-o", "new", "--image-encoder", "x"), "--image-encoder x needs --onto BUNDLE; leave it out"),
        (("--onto", str(bundle), "--name", "a", "--image-encoder", "/nowhere"), "there is no such folder"),
    ):
        file = str(bundle.parent / "ip-adapter_base.safetensors")
        assert main(["export", file, *words]) in (2, 3)
        assert says in capsys.readouterr().err
    assert adapter_names(opened) == ("base", "plus")


WAYS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "one": (("--ip-adapter", "base=face.png"), {"ip_adapter_image": {"base": FACE}}),
    "a scale": (
        ("--ip-adapter", "base=face.png:0.6"), {"ip_adapter_image": {"base": FACE}, "ip_adapter_scale": 0.6},
    ),
    "the flag of the scale": (
        ("--ip-adapter", "base=face.png", "--ip-adapter-scale", "0.6"),
        {"ip_adapter_image": {"base": FACE}, "ip_adapter_scale": 0.6},
    ),
    "several pictures": (
        ("--ip-adapter", "plus=face.png", "--ip-adapter", "plus=style.png:0.5"),
        {"ip_adapter_image": {"plus": [FACE, STYLE]}, "ip_adapter_scale": 0.5},
    ),
    "several adapters": (
        ("--ip-adapter", "plus=face.png", "--ip-adapter", "base=style.png:0.5"),
        {"ip_adapter_image": {"plus": FACE, "base": STYLE}, "ip_adapter_scale": [1.0, 0.5]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WAYS)
def test_the_command_makes_the_picture_that_python_makes_and_again_from_its_file(
    case: str, bundle: Path, folder: Path
) -> None:
    words, keywords = WAYS[case]
    assert generate(bundle, folder, *words) == 0
    with sdopt.load(bundle) as pipe:
        (expected,) = pipe("apple", seed=1, num_inference_steps=2, height=24, width=32, **keywords).images
    assert np.array_equal(np.asarray(Image.open(folder / "out.png")), np.asarray(expected))
    seen = [word.partition(":")[0] for word in words if "=" in word]
    given = [word for one in seen for word in ("--ip-adapter", one)]
    assert generate(bundle, folder, "--replay", "out.png", *given, out="again.png") == 0
    assert np.array_equal(np.asarray(Image.open(folder / "again.png")), np.asarray(expected))
    assert read_parameters(folder / "again.png") == read_parameters(folder / "out.png")


WRONG: list[tuple[Sequence[str], str]] = [
    (("--ip-adapter", "face.png"), "this bundle has base, plus; say which"),
    (("--ip-adapter", "base=face.png", "--ip-adapter", "face.png"), "several --ip-adapter: each needs its name"),
    (("--ip-adapter", "bas=face.png"), "has no adapter 'bas'; there are base"),
    (("--ip-adapter", "base=none.png"), "there is no such file"),
    (("--ip-adapter", "base=face.png:1", "--ip-adapter", "base=style.png:2"), "has the scales 1.0, 2.0; give one"),
    (("--ip-adapter", "base=face.png:1", "--ip-adapter-scale", "2"), "--ip-adapter-scale: give one of the two"),
    (("--ip-adapter-scale", "2"), "--ip-adapter-scale needs --ip-adapter"),
    (("--control", "base=face.png:1"), "base is no ControlNet"),
    (("--replay", "old.png"), "was made with IP-Adapters, whose pictures it does not carry; give the same: --ip-"),
    (("--replay", "old.png", "--ip-adapter", "base=style.png"), "was made with another picture; give the same"),
    (("--replay", "old.png", "--ip-adapter", "base=face.png", "--ip-adapter", "base=style.png"), "another picture"),
    (("--replay", "old.png", "--ip-adapter", "base=face.png:1"), "--replay takes the scale from the PNG"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "says"), WRONG, ids=lambda value: value[-28:] if isinstance(value, str) else "")
def test_what_is_wrong_is_said(
    words: Sequence[str], says: str, bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--replay" in words:
        assert generate(bundle, folder, "--ip-adapter", "base=face.png", out="old.png") == 0
        capsys.readouterr()
    assert generate(bundle, folder, *words) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "out.png").exists()
