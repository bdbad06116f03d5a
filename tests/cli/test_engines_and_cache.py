"""What is built and kept can be seen and removed, and what is built never changes what `auto` makes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdopt.bundle.files import Bundle
from sdopt.engine import ort
from sdopt.engine.pool import EnginePool
from tests.conftest import EMOJI_BUNDLE, ROOT, sdopt

SMALL = ("generate", "a", "--seed", "1", "--steps", "2", "--size", "64x64", "--json")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one engine in fp16 for ONNX Runtime on the CPU, and one for CUDA."""
    pytest.importorskip("onnx_ir")
    bundle = Path(shutil.copytree(EMOJI_BUNDLE, tmp_path_factory.mktemp("built") / "bundle"))
    for backend in ("ort", "ort:cuda"):
        done = sdopt("build", bundle, "--backend", backend, "--precision", "fp16", "--component", "vae_decoder")
        assert done.returncode == 0, done.stderr
    return bundle


def made(picture: Path, *arguments: object) -> tuple[str, np.ndarray]:
    done = sdopt(*SMALL, "-o", picture, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["precision"], np.asarray(Image.open(picture))


def test_what_was_built_changes_no_picture_that_names_no_precision(built: Path, tmp_path: Path) -> None:
    before, after = made(tmp_path / "a.png", "-m", EMOJI_BUNDLE), made(tmp_path / "b.png", "-m", built)
    assert before[0] == after[0] == "fp32"
    np.testing.assert_array_equal(before[1], after[1])
    precision, _ = made(tmp_path / "c.png", "-m", built, "--backend", "ort:cpu", "--precision", "fp16")
    assert "vae_decoder fp16" in precision


def test_on_a_gpu_too(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU runs what was built for it if it is named, and never by itself."""
    monkeypatch.setattr(ort, "find_device", lambda device: ort.Device("cuda"))
    bundle = Bundle.open(built)
    assert EnginePool(bundle).precision == "fp32"
    assert EnginePool(bundle).built == ()
    assert EnginePool(bundle, "ort").precision == "fp32 (vae_decoder fp16)"
    assert EnginePool(bundle, "ort", precision="fp32").precision == "fp32"


def test_inspect_names_the_engines_and_what_runs(built: Path) -> None:
    found = json.loads(sdopt("inspect", built, "--json").stdout)
    assert {(e["component"], e["provider"], e["precision"]) for e in found["engines"]} == {
        ("vae_decoder", "CPU", "fp16"),
        ("vae_decoder", "CUDA", "fp16"),
    }
    assert found["auto"] == {"backend": "ort", "precision": "fp32"}
    text = sdopt("inspect", built).stdout
    assert "without --backend and --precision: ort in fp32" in text
    assert all(entry["key"] in text for entry in found["engines"])


def test_engines_are_listed_and_removed(built: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built, tmp_path / "bundle"))
    entries = json.loads(sdopt("engines", bundle, "--json").stdout)["engines"]
    first, second = (entry["key"] for entry in entries)
    done = sdopt("engines", bundle, "--remove", first, "--remove", "typo")
    assert (done.returncode, (bundle / "engines" / first).is_dir()) == (2, True)
    assert f"--remove typo: {bundle} has no engine with this key; there are " in done.stderr
    done = sdopt("engines", bundle, "--remove", first)
    assert done.stdout == f"{bundle / 'engines' / first}\n"
    assert [path.name for path in (bundle / "engines").iterdir() if path.is_dir()] == [second]
    assert sdopt("engines", bundle, "--remove", "all").returncode == 0
    assert "no engines" in sdopt("engines", bundle).stdout
    assert "nothing is built" in sdopt("engines", bundle, "--remove", first).stderr


def test_the_cache_is_listed_and_cleared(own_folders: Path) -> None:
    done = sdopt("cache", "--json")
    assert (done.returncode, json.loads(done.stdout)["entries"]) == (0, [])
    sdopt("generate", "a", "--steps", "1", "--size", "32x32", "-o", own_folders / "a.png")
    kept = json.loads(sdopt("cache", "--json").stdout)
    assert {entry["name"].partition("-")[0] for entry in kept["entries"]} >= {"unet", "vae_decoder"}
    assert kept["bytes"] == sum(entry["bytes"] for entry in kept["entries"]) > 1e6
    elsewhere = own_folders / "elsewhere"
    elsewhere.mkdir()
    (Path(kept["path"]) / "link").symlink_to(elsewhere)  # is removed itself, and not what it leads to
    assert sdopt("cache", "--clear").stdout.startswith(f"removed {len(kept['entries']) + 1} entries")
    assert list(Path(kept["path"]).iterdir()) == []
    assert elsewhere.is_dir()


HOLDER = """
import sys
from pathlib import Path
from sdopt.build.lock import one_builder
with one_builder(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_an_engine_that_is_being_built_is_not_removed(built: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built, tmp_path / "bundle"))
    first, second = (path.name for path in (bundle / "engines").iterdir() if path.is_dir())
    command = [sys.executable, "-c", HOLDER, str(bundle / "engines" / second)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    done = sdopt("engines", bundle, "--remove", "all")
    assert (done.returncode, f"{second}: another process is building it" in done.stderr) == (4, True), done.stderr
    assert (bundle / "engines" / first / "record.json").is_file()  # all of them, or none
    holder.communicate("\n", 60)
    assert sdopt("engines", bundle, "--remove", "all").returncode == 0
    assert list((bundle / "engines").iterdir()) == []


WRITER = """
import sys
from sdopt.bundle.unfinished import unfinished
from sdopt.engine import cache
cache.root().mkdir(parents=True, exist_ok=True, mode=0o700)
with unfinished(cache.root() / "unet-ort-0123456789ab", mode=0o700) as folder:
    (folder / "graph.onnx").write_bytes(bytes(1000))
    print(folder, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.usefixtures("own_folders")
def test_what_another_process_writes_into_the_cache_is_not_cleared() -> None:
    command = [sys.executable, "-c", WRITER]
    living, dead = (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    )
    folders = [Path(process.stdout.readline().rstrip("\n")) for process in (living, dead) if process.stdout]
    dead.kill()
    dead.wait()
    done = sdopt("cache", "--clear")
    assert done.returncode == 0
    assert f"{folders[0].name} stays: another process is writing it" in done.stderr
    assert list(folders[0].parent.iterdir()) == [folders[0]]
    living.communicate("\n", 60)
