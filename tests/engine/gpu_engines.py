"""The engines of the GPU's tests: each way of building them is a row, built once, when a test first asks for it.

python -m tests.engine.gpu_engines build-out/tiny       tiny bundles for a GPU machine that has no torch to make them
"""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdopt.build.jobs import BuildOptions, build
from sdopt.bundle.files import Bundle
from tests.conftest import EMOJI_BUNDLE, ROOT, make_tiny_checkpoint

WIDE = ("batch=1:1:4 height=64:128:192 width=64:128:192 tokens=1:32:64",)
NARROW = ("batch=1 height=128 width=128", "batch=1:4:4 height=192 width=192")
ALL = ("unet_step", "text_encoder", "vae_decoder", "vae_encoder")
READY = ROOT / "build-out/tiny"
TORCH = ("torch", "diffusers", "transformers", "onnxscript", "scipy")  # what makes a tiny checkpoint, and exports it


@dataclass(frozen=True)
class Way:
    """One way of building engines of a model's bundle; without profiles they are for the bundle's own size."""

    model: str
    precision: str = "fp16"
    profiles: tuple[str, ...] = ()
    static: bool = False
    components: tuple[str, ...] = ALL
    refit: bool | str = False


WAYS = {
    "fp32": Way("emoji", "fp32", WIDE, components=(*ALL, "unet")),
    "fp16": Way("emoji", "fp16", WIDE, components=(*ALL, "unet")),
    "bf16": Way("emoji", "bf16", WIDE),
    "static": Way("emoji", static=True, profiles=("batch=1 height=128 width=128",)),
    "refit fp32": Way("emoji", "fp32", NARROW[:1], components=ALL[:3], refit="lora"),
    "refit fp16": Way("emoji", "fp16", NARROW[:1], components=ALL[:3], refit="lora"),
    "refit bf16": Way("emoji", "bf16", NARROW[:1], components=ALL[:3], refit="lora"),
    "refit all": Way("emoji", "fp16", NARROW[:1], components=ALL[:3], refit=True),
    "two profiles": Way("emoji", profiles=NARROW),
    "sd15": Way("sd15", static=True, components=("unet_step", "text_encoder", "vae_decoder")),
    "sdxl": Way("sdxl", components=(*ALL, "text_encoder_2")),
    "nine channels": Way("nine channels"),
}


class Engines:
    """Bundles with engines by the name of their way, each built at most once. One that does not build fails the tests
    that need it, and no others."""

    def __init__(self, folder: Path, backend: str) -> None:
        self._folder, self._backend = folder, backend
        self._made: dict[str, Path | BaseException] = {}

    def __call__(self, name: str) -> Path:
        if name not in self._made:
            try:
                self._made[name] = self._build(name)
            except (Exception, pytest.skip.Exception) as error:  # kept: the next test that asks is told the same
                self._made[name] = error
        made = self._made[name]
        if isinstance(made, pytest.skip.Exception):
            raise made
        if isinstance(made, BaseException):
            pytest.fail(f"the engines {name!r} were not built: {type(made).__name__}: {made}", pytrace=False)
        return made

    def _build(self, name: str) -> Path:
        way = WAYS[name]
        path = self._folder / name.replace(" ", "-")
        shutil.copytree(self.source(way.model), path, ignore=shutil.ignore_patterns("engines"))
        options = BuildOptions(precision=way.precision, opt_level=1, refit=way.refit)
        how: dict[str, Any] = {"profiles": way.profiles, "static": way.static, "options": options}
        build(Bundle.open(path), self._backend, components=way.components, **how)
        return path

    def source(self, model: str) -> Path:
        """The bundle of a model, made where it has to be."""
        path = self._folder / f"{model.replace(' ', '-')}-source"
        if model == "emoji":
            return EMOJI_BUNDLE
        ready = READY / model.replace(" ", "-")
        if ready.is_dir():
            return ready
        if not path.is_dir():
            MAKERS[model](path)
        return path


def _sd15(path: Path) -> None:
    """Of full size where there is an exported bundle or a skeleton of one, else a tiny one."""
    full, skeleton = ROOT / "build-out/models/sd15/bundle", ROOT / "build-out/skeletons/sd15"
    if full.is_dir():
        shutil.copytree(full, path, ignore=shutil.ignore_patterns("engines"))
    elif skeleton.is_dir():
        runpy.run_path(str(ROOT / "benchmarks/skeleton.py"))["fill"](skeleton, path)
    else:
        _tiny(lambda folder: make_tiny_checkpoint(folder), path)


def _tiny(make: Callable[[Path], Path], path: Path) -> None:
    missing = [name for name in TORCH if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"there is no bundle of this model here, and making a tiny one needs {', '.join(missing)}")
    from sdopt.export import export

    export(make(path.with_name(f"{path.name}-checkpoint")), path, report=lambda line: None)


def _sdxl(path: Path) -> None:
    from tests import tiny

    _tiny(tiny.sdxl, path)


MAKERS: dict[str, Callable[[Path], None]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "nine channels": lambda path: _tiny(lambda folder: make_tiny_checkpoint(folder, in_channels=9), path),
}


if __name__ == "__main__":
    for name in ("sdxl", "nine channels"):
        target = Path(sys.argv[1]) / name.replace(" ", "-")
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as temporary:
                MAKERS[name](Path(temporary) / "bundle")
                shutil.copytree(Path(temporary) / "bundle", target)
        print(target)
