"""Builds that end in the middle: a full disk, Ctrl-C, a damaged cache. What ends them is told, and nothing stays."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from sdopt import graph
from sdopt.build.derive import derive
from sdopt.build.jobs import build
from sdopt.build.options import BuildOptions, part_options
from sdopt.build.recipe import part_profile, read_recipe, user_profiles
from sdopt.build.trt_build import Builder
from sdopt.bundle.files import Bundle
from sdopt.engine.store import engines_folder
from sdopt.engine.trt_api import TensorRT
from tests.conftest import PlugIn
from tests.fakes.trt_builder import FakeConfig

RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='TensorRT-RTX is not installed: pip install "sdopt[tensorrt-rtx]"',
)
SMALL = "batch=1 height=64 width=64"
ASKED: dict[str, Any] = {"components": ["text_encoder"], "profiles": [SMALL], "options": BuildOptions(opt_level=0)}

pytestmark = pytest.mark.usefixtures("own_folders")


def silent(line: str) -> None:
    """A report that nobody reads."""


def interrupt(phase: str, done: int, of: int) -> None:
    raise KeyboardInterrupt


class FullDisk:
    """A file on a disk that is full when the first byte comes, and has room again afterwards."""

    def write(self, data: bytes) -> int:
        raise OSError(28, "No space left on device")


def build_plan(bundle: Bundle, backend: str, folder: Path) -> None:
    """One plan, by the builder alone."""
    part = read_recipe().parts["text_encoder"]
    options = part_options(BuildOptions(precision="fp32", opt_level=0), part, bundle)
    builder = Builder(TensorRT(backend), options, None, report=silent)
    model, _ = derive(bundle, part, options, builder)
    inputs, _ = graph.specs(model)
    (profile,) = user_profiles(bundle, read_recipe(), [SMALL], static=False)
    graph.save(model, folder / "graph.onnx")
    builder.build(folder / "graph.onnx", folder / "a.plan", inputs, [part_profile(bundle, part, inputs, profile)])


@pytest.fixture(params=["fake", pytest.param("real", marks=RTX)])
def library(request: pytest.FixtureRequest, plug_in: PlugIn) -> str:
    """TensorRT-RTX: the one that is installed, and what stands in for it."""
    if request.param == "fake":
        plug_in("rtx")
    return "tensorrt-rtx"


def test_a_plan_that_could_not_be_written_is_no_plan(
    bundle: Bundle, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdopt.build import trt_build

    make = trt_build.make_writer
    monkeypatch.setattr(trt_build, "make_writer", lambda trt, stream, *more: make(trt, FullDisk(), *more))
    with pytest.raises(OSError, match="No space left on device"):
        build_plan(bundle, library, tmp_path)


def test_ctrl_c_ends_a_build_as_ctrl_c(bundle: Bundle, library: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(bundle, library, **ASKED, report=silent, progress=interrupt)
    assert [p.name for p in engines_folder(bundle).iterdir() if not p.name.endswith(".lock")] == []


def test_a_progress_that_fails_is_told(bundle: Bundle, library: str) -> None:
    def broken(phase: str, done: int, of: int) -> None:
        raise BrokenPipeError("nobody reads this")

    with pytest.raises(BrokenPipeError, match="nobody reads this"):
        build(bundle, library, **ASKED, report=silent, progress=broken)


@pytest.mark.parametrize("flavour", ["10", "8.6"])
def test_a_damaged_cache_of_timings_is_made_again(
    bundle: Bundle, plug_in: PlugIn, own_folders: Path, flavour: str
) -> None:
    plug_in(flavour)
    for precision in ("fp32", "fp16"):
        asked = {**ASKED, "options": BuildOptions(precision=precision, opt_level=0)}
        assert build(bundle, "tensorrt", **asked, report=silent)
        (timings,) = (own_folders / "cache/sdopt/timing").iterdir()
        assert timings.read_bytes() == b"timings"
        timings.write_bytes(b"damaged")


@pytest.mark.parametrize("kind", ["open", "link", "pipe", "mine"])
def test_a_cache_of_timings_that_others_could_have_written_is_not_read(
    bundle: Bundle, plug_in: PlugIn, own_folders: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in()
    known: list[bytes] = []
    real = FakeConfig.create_timing_cache

    def create(config: FakeConfig, content: bytes) -> Any:
        known.append(content)
        return real(config, content)

    monkeypatch.setattr(FakeConfig, "create_timing_cache", create)
    build(bundle, "tensorrt", **{**ASKED, "options": BuildOptions(precision="fp32", opt_level=0)}, report=silent)
    (timings,) = (own_folders / "cache/sdopt/timing").iterdir()
    if kind == "open":
        timings.chmod(0o666)
    elif kind == "link":
        timings.rename(own_folders / "elsewhere")
        timings.symlink_to(own_folders / "elsewhere")
    elif kind == "pipe":
        timings.unlink()
        os.mkfifo(timings)
    build(bundle, "tensorrt", **{**ASKED, "options": BuildOptions(precision="fp16", opt_level=0)}, report=silent)
    assert known == [b"", b"timings" if kind == "mine" else b""]
    assert timings.is_file()
    assert not timings.is_symlink()


def test_a_build_needs_no_cache_of_timings(bundle: Bundle, plug_in: PlugIn, own_folders: Path) -> None:
    plug_in()
    (own_folders / "cache/sdopt").mkdir(parents=True)
    (own_folders / "cache/sdopt/timing").write_text("in the way")
    assert build(bundle, "tensorrt", **ASKED, report=silent)
