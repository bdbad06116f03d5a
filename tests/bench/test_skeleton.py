"""A bundle whose weights stay behind, and the one that a generator makes of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import sdopt
from sdopt.bundle.files import Bundle, read_manifest
from sdopt.engine.pool import EnginePool
from sdopt.errors import BundleError
from tests.conftest import EMOJI_BUNDLE, ROOT


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("skeleton")


@pytest.fixture
def filled(tool: ModuleType, tmp_path: Path) -> Path:
    return tool.fill(tool.empty(EMOJI_BUNDLE, tmp_path / "skeleton"), tmp_path / "bundle")


def test_a_skeleton_is_small_and_a_filled_one_opens_and_makes_pictures(filled: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in (tmp_path / "skeleton").rglob("*") if path.is_file())
    assert size < sum(path.stat().st_size for path in EMOJI_BUNDLE.glob("*.data")) / 8
    bundle = Bundle.open(filled)
    assert bundle.manifest.random_weights == 0
    assert bundle.digest != Bundle.open(EMOJI_BUNDLE).digest
    with sdopt.Pipeline(EnginePool(bundle, "ort:cpu")) as pipe:
        picture = pipe("an apple", num_inference_steps=2, height=64, width=64, seed=0, output_type="np").images
    assert np.isfinite(picture).all()
    assert picture.std() > 0


def test_matrices_are_drawn_and_vectors_are_kept(tool: ModuleType, filled: Path) -> None:
    manifest = read_manifest(EMOJI_BUNDLE)
    drawn = 0
    for weight in tool.weights(EMOJI_BUNDLE, manifest):
        places = [bundle / weight.file for bundle in (EMOJI_BUNDLE, filled)]
        old, new = (np.fromfile(path, np.uint8, weight.nbytes, offset=weight.offset) for path in places)
        assert np.array_equal(old, new) == (not weight.fan_in), weight
        if weight.fan_in and weight.kind == "FLOAT16" and weight.nbytes > 1 << 16:
            assert new.view(np.float16).astype(float).std() == pytest.approx((3 * weight.fan_in) ** -0.5, rel=0.05)
            drawn += 1
    assert drawn > 20


def test_one_seed_makes_one_bundle(tool: ModuleType, filled: Path, tmp_path: Path) -> None:
    refilled = tool.fill(tmp_path / "skeleton", tmp_path / "again")
    other = tool.fill(tmp_path / "skeleton", tmp_path / "other", seed=1)
    digest = Bundle.open(filled).digest
    assert Bundle.open(refilled).digest == digest
    assert Bundle.open(other).digest != digest


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "BFLOAT16"])
def test_every_kind_of_weight_is_written_as_itself(kind: str, tool: ModuleType) -> None:
    values = np.array([1.0, -0.3, 3e-3], np.float32)
    written = tool.as_bytes(values, kind)
    if kind == "BFLOAT16":
        read = (written.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        read = written.view(np.float32 if kind == "FLOAT" else np.float16).astype(np.float32)
    np.testing.assert_allclose(read, values, rtol=2**-8)


def test_a_bundle_is_no_skeleton(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BundleError, match="is not a skeleton"):
        tool.fill(EMOJI_BUNDLE, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert tool.main(["empty", str(tmp_path / "none"), "-o", str(tmp_path / "skeleton")]) == 3
    assert "no such folder" in capsys.readouterr().err


def test_messages_name_what_can_be_typed(
    tool: ModuleType, filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skeleton, there = tmp_path / "skeleton", tmp_path / "there"
    there.mkdir()
    for words, message in {
        ("empty", EMOJI_BUNDLE, there): "there exists already; choose another name, or remove it first",
        ("fill", skeleton, there): "there exists already; choose another name, or remove it first",
        ("empty", skeleton, tmp_path / "new"): "skeleton is a skeleton already; `skeleton.py fill ",
    }.items():
        assert tool.main([words[0], str(words[1]), "-o", str(words[2])]) == 3
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main([])
    assert "required: empty | fill" in capsys.readouterr().err
