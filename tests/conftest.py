"""Real parts for the tests: the embedded model, and a tiny pipeline with odd channel counts, exported once."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a network

if "SDOPT_TESTS_CACHE" not in os.environ:  # a child process of a test keeps what its test has set
    CACHE = os.environ["SDOPT_TESTS_CACHE"] = tempfile.mkdtemp(prefix="sdopt-tests-cache-")
    os.environ["XDG_CACHE_HOME"] = CACHE  # no test writes into the user's own
    os.environ["XDG_STATE_HOME"] = f"{CACHE}/state"
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

PlugIn = Callable[..., Any]  # of `plug_in`: (flavour, bytes of memory, GPUs) -> tests.fakes.gpu.Simulator

ROOT = Path(__file__).parent.parent
EMOJI_CHECKPOINT = ROOT / "engines/emoji/checkpoint"
EMOJI_BUNDLE = ROOT / "engines/emoji/bundle"


def make_tiny_tokenizer() -> Any:
    """CLIP's kind of tokenizer, for letters, the word apple, and 7 tokens."""
    return tiny.tokenizer()


def make_tiny_checkpoint(folder: Path, in_channels: int = 4) -> Path:
    """A random Stable Diffusion pipeline whose sizes are nobody's defaults."""
    return tiny.sd(folder, unet=tiny.unet(in_channels=in_channels))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    from sdopt.export import export

    return export(tiny_checkpoint, tiny_checkpoint.parent / "bundle", report=lambda line: None)


@pytest.fixture(scope="session")
def sdxl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sdxl(tmp_path_factory.mktemp("sdxl") / "checkpoint")


@pytest.fixture(scope="session")
def sdxl_bundle(sdxl_checkpoint: Path) -> Path:
    from sdopt.export import export

    return export(sdxl_checkpoint, sdxl_checkpoint.parent / "bundle", report=lambda line: None)


@pytest.fixture
def bundle_copy(tmp_path: Path) -> Path:
    """A copy of the embedded bundle, to be damaged."""
    return Path(shutil.copytree(EMOJI_BUNDLE, tmp_path / "bundle"))


@pytest.fixture
def bundle(bundle_copy: Path) -> Any:
    """The same, opened."""
    from sdopt.bundle.files import Bundle

    return Bundle.open(bundle_copy, verify=False)


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's state and cache that only this test has."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlugIn]:
    """Puts a fake GPU in place, and a TensorRT of some flavour; afterwards nothing may be left on the GPU."""
    from sdopt.engine import device
    from tests.fakes.gpu import TOTAL, Simulator, as_module
    from tests.fakes.trt import FLAVOURS, fake_tensorrt

    plugged: list[Simulator] = []

    def put(flavour: str = "10", total: int = TOTAL, devices: int = 1) -> Simulator:
        simulator = Simulator(total, devices)
        monkeypatch.setattr(device, "_devices", {})
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", as_module(simulator))
        monkeypatch.setitem(sys.modules, FLAVOURS[flavour], fake_tensorrt(simulator, flavour))
        plugged.append(simulator)
        return simulator

    yield put
    for simulator in plugged:
        if not simulator.fail:
            assert simulator.leaks() == {}
            assert simulator.spins == 0


@pytest.fixture
def gpu(plug_in: PlugIn) -> Any:
    """A fake GPU with TensorRT 10."""
    return plug_in()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` imports only modules with such tests: a GPU machine need not have what the others are made with."""
    gpu_only = config.option.markexpr == "gpu" and collection_path.name.startswith("test_")
    return True if gpu_only and "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8") else None


def edit_manifest(bundle: Path, **changes: object) -> None:
    """Change top-level entries of a manifest: JSON, or the dataclasses of `sdopt.bundle.format`."""
    from sdopt.bundle.decode import encode

    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **encode(changes)}))


def sdopt(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does: in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sdopt", *map(str, args)],
        capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT, check=False,
    )  # fmt: skip
