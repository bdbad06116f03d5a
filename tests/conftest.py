"""Real parts for the tests: the embedded model, and a tiny pipeline with odd channel counts, exported once."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a network
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of `pytest -n` that wait leave the cores to the others

if "SDOPT_TESTS_CACHE" not in os.environ:  # a child process of a test keeps what its test has set
    CACHE = os.environ["SDOPT_TESTS_CACHE"] = tempfile.mkdtemp(prefix="sdopt-tests-cache-")
    os.environ["XDG_CACHE_HOME"] = CACHE  # no test writes into the user's own
    os.environ["XDG_STATE_HOME"] = f"{CACHE}/state"
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

PHASES = "phases.jsonl"  # a file beside the tiny bundle: what its export has reported of its progress, line by line
SHARED = {  # fixtures of folders that are made once in a run
    "tiny_checkpoint", "tiny_bundle", "sdxl_checkpoint", "sdxl_bundle", "sd2_checkpoint", "sd2_bundle",
    "least_checkpoint", "controlled",
}  # fmt: skip
SLOW = ("test_families.py", "adapters", "export", "build", "text/test_encode.py", "bench", "engine")  # slowest first
PlugIn = Callable[..., Any]  # of `plug_in`: (flavour, bytes of memory, GPUs) -> tests.fakes.gpu.Simulator

ROOT = Path(__file__).parent.parent
EMOJI_CHECKPOINT = ROOT / "engines/emoji/checkpoint"
EMOJI_BUNDLE = ROOT / "engines/emoji/bundle"


def without_address(value: object) -> str:
    """The id of a test's parameter, equal in every process: a picture's text has its address."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(value))


def make_tiny_tokenizer() -> Any:
    """CLIP's kind of tokenizer, for letters, the word apple, and 7 tokens."""
    return tiny.tokenizer()


def make_tiny_checkpoint(folder: Path, in_channels: int = 4) -> Path:
    """A random Stable Diffusion pipeline whose sizes are nobody's defaults."""
    return tiny.sd(folder, unet=tiny.unet(in_channels=in_channels))


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of the run. One process makes it, and those of `pytest -n` all use it.

    `make` is given a path, which is renamed when it is finished.
    """
    from filelock import FileLock  # late: a machine that runs `-m gpu` alone need not have it

    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


def exported(factory: pytest.TempPathFactory, checkpoint: Path, **options: Any) -> Path:
    """The bundle of a checkpoint, beside it; exported once in a run."""
    from sdopt.export import export

    how: dict[str, Any] = {"report": lambda line: None, **options}
    return once(factory, f"{checkpoint.parent.name}/bundle", lambda folder: export(checkpoint, folder, **how))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "tiny/checkpoint", make_tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def progress(*phase: Any) -> None:
        with tiny_checkpoint.with_name(PHASES).open("a", encoding="utf-8") as file:
            print(json.dumps(phase), file=file)

    return exported(tmp_path_factory, tiny_checkpoint, progress=progress)


@pytest.fixture(scope="session")
def sdxl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "sdxl/checkpoint", tiny.sdxl)


@pytest.fixture(scope="session")
def sdxl_bundle(sdxl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, sdxl_checkpoint)


@pytest.fixture(scope="session")
def sd3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "sd3/checkpoint", tiny.sd3)


@pytest.fixture(scope="session")
def sd3_bundle(sd3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, sd3_checkpoint)


@pytest.fixture(scope="session")
def flux_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "flux/checkpoint", tiny.flux)


@pytest.fixture(scope="session")
def flux_bundle(flux_checkpoint: Path, sd3_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the autoencoder of `sd3_bundle`, which is the same."""
    return once(tmp_path_factory, "flux/bundle", lambda folder: tiny.export_like(flux_checkpoint, folder, sd3_bundle))


@pytest.fixture(scope="session")
def sd2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "sd2/checkpoint", tiny.sd2)


@pytest.fixture(scope="session")
def sd2_bundle(sd2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, sd2_checkpoint)


@pytest.fixture(scope="session")
def least_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests of what an export does beside tracing: it is exported in less than half of the time."""
    return once(tmp_path_factory, "least/checkpoint", tiny.least)


@pytest.fixture(autouse=True)
def shared_folders_stay(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that changes a folder of the whole run fails, rather than some test after it."""
    shared = SHARED & set(request.fixturenames)
    folders = [request.getfixturevalue(name) for name in sorted(shared)]
    before = [contents(folder) for folder in folders]
    yield
    assert [contents(folder) for folder in folders] == before


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path in a folder, with the size of a file and the time when it was written."""
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found}


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
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process can grow beyond 8 KB. No fixture: pytest reports a test before it ends the fixtures."""
    resource = pytest.importorskip("resource", reason="this system limits no files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


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


def hears_interrupts() -> None:
    """For a child process, before it begins: a shell that starts jobs in the background lets them ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` imports only modules with such tests: a GPU machine need not have what the others are made with."""
    gpu_only = config.option.markexpr == "gpu" and collection_path.name.startswith("test_")
    return True if gpu_only and "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8") else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """With `pytest -n`, one process runs all tests of a file, so that what its fixtures make is made once."""
    from xdist.scheduler import LoadFileScheduling  # a GPU machine need not have it

    config.option.loadscopereorder = False  # by the number of tests; `pytest_collection_modifyitems` knows better
    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files come first, so that no process has one of them left at the end."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT / "tests")
        return next((i for i, slow in enumerate(SLOW) if path.is_relative_to(slow)), len(SLOW))

    items.sort(key=place)


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
