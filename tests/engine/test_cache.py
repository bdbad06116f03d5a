"""What was kept of an earlier start gives the same picture, and never stands in the way of a start."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdopt.bundle.disk import is_private
from sdopt.bundle.files import Bundle
from sdopt.bundle.format import File
from sdopt.bundle.specs import Array
from sdopt.cli.main import main
from sdopt.engine import BACKENDS, cache, installed_backends, open_engine
from sdopt.errors import BundleError
from tests.conftest import EMOJI_BUNDLE, ROOT, edit_manifest
from tests.engine.contract import unet_inputs

CACHING = [name for name in installed_backends() if BACKENDS[name].precisions]
pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture(params=CACHING)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def answer(backend: str, path: Path = EMOJI_BUNDLE, **how: bool) -> Array:
    with open_engine(Bundle.open(path), "unet", backend, **how) as engine:
        return engine(**unet_inputs(engine))["noise_pred"]


def entries() -> list[Path]:
    return sorted(cache.root().glob("*"))


def test_the_second_start_reads_what_the_first_one_kept_and_answers_the_same(backend: str) -> None:
    plain = answer(backend, cache=False)
    assert not cache.root().exists()
    first, (entry,) = answer(backend), entries()
    before = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
    second, (again,) = answer(backend), entries()
    assert again == entry
    assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == before
    np.testing.assert_array_equal(first, plain)
    np.testing.assert_array_equal(second, plain)


def test_what_is_kept_is_really_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(backend)
    (entry,) = entries()
    read: list[Path] = []
    module = importlib.import_module(BACKENDS[backend].module)
    real = cache.load

    def watched(bundle: Bundle, component: str, folder: Path, **how: Any) -> Any:
        def kept(folder: Path) -> Any:
            read.append(folder)
            return how["kept"](folder)

        return real(bundle, component, folder, kept=kept, new=lambda _: pytest.fail("it was made anew"))

    monkeypatch.setattr(module.cache, "load", watched)
    answer(backend)
    assert read == [entry]


TOGETHER = """
import sys, time
from pathlib import Path
from sdopt.bundle.files import Bundle
from sdopt.engine import BACKENDS, cache, open_engine
backend, bundle, go = sys.argv[1:]
real = cache.load
def watched(bundle, component, folder, *, kept, new):
    def watched_new(to):
        print("made")
        time.sleep(1.0)  # so that the others come meanwhile
        return new(to)
    return real(bundle, component, folder, kept=kept, new=watched_new)
cache.load = watched
opened = Bundle.open(bundle)
print("here", flush=True)
while not Path(go).exists():
    time.sleep(0.01)
open_engine(opened, "unet", backend).close()
"""


def test_processes_that_start_together_do_the_work_once(backend: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOGETHER, backend, str(EMOJI_BUNDLE), str(tmp_path / "go")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(said) == ["", "", "made\n"]
    assert len(entries()) == 1


def test_nothing_is_kept_of_a_bundle_that_was_not_verified(backend: str, bundle_copy: Path) -> None:
    """Its manifest may tell the hashes of other files, and so the key of another bundle."""
    expected = answer(backend)
    before = snapshot()
    weights = np.fromfile(bundle_copy / "unet.onnx.data", np.float16)
    weights[:200000] *= np.float16(0.5)
    weights.tofile(bundle_copy / "unet.onnx.data")
    with open_engine(Bundle.open(bundle_copy, verify=False), "unet", backend) as engine:
        changed = engine(**unet_inputs(engine))["noise_pred"]
    assert np.abs(changed - expected).max() > 0.1
    assert snapshot() == before
    np.testing.assert_array_equal(answer(backend), expected)


def snapshot() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in cache.root().rglob("*")}


@pytest.mark.parametrize("damage", ["empty", "garbage"])
def test_what_is_damaged_is_made_anew(backend: str, damage: str) -> None:
    expected, (entry,) = answer(backend), entries()
    for path in entry.iterdir():
        path.write_bytes(b"" if damage == "empty" else b"no model" * 999)
    np.testing.assert_array_equal(answer(backend), expected)
    np.testing.assert_array_equal(answer(backend), expected)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    elsewhere = path.parents[3] / path.name
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def open_to_all(path: Path) -> None:
    path.chmod(0o666)


def absent(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, cut, zeros, pipe, link, open_to_all, absent], ids=lambda d: d.__name__)
def test_a_kept_file_that_is_not_what_was_written_is_made_anew(backend: str, damage: Callable[[Path], None]) -> None:
    expected, (entry,) = answer(backend), entries()
    for name in sorted(path.name for path in entry.iterdir()):
        began = time.monotonic()
        damage(entry / name)
        np.testing.assert_array_equal(answer(backend), expected)
        assert time.monotonic() - began < 30
        assert all(is_private(path) and path.is_file() for path in entry.iterdir())
        assert not list(cache.root().glob(".*"))


def test_a_file_that_no_record_lists_makes_a_folder_unsound() -> None:
    expected, (entry,) = answer("ort"), entries()
    (entry / "more").write_bytes(b"x")
    np.testing.assert_array_equal(answer("ort"), expected)
    assert not (entry / "more").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_what_belongs_to_another_user_is_not_read() -> None:
    expected, (entry,) = answer("ort"), entries()
    os.chown(entry / "graph.onnx.data", 12345, 12345)
    np.testing.assert_array_equal(answer("ort"), expected)
    assert (entry / "graph.onnx.data").stat().st_uid == os.geteuid()
    os.chown(cache.root(), 12345, 12345)
    before = snapshot()
    np.testing.assert_array_equal(answer("ort"), expected)
    assert snapshot() == before


@pytest.mark.parametrize("kind", ["open", "link", "file", "pipe"])
def test_a_cache_that_others_could_fill_is_not_used(kind: str, own_folders: Path) -> None:
    expected = answer("ort")
    top = cache.root()
    if kind == "open":
        top.chmod(0o777)
    else:
        top.rename(own_folders / "elsewhere")
        {"link": lambda: top.symlink_to(own_folders / "elsewhere"), "file": top.touch, "pipe": lambda: os.mkfifo(top)}[
            kind
        ]()
    before = snapshot()
    np.testing.assert_array_equal(answer("ort"), expected)
    assert snapshot() == before


def test_where_an_entry_would_be_a_link_goes_and_what_it_leads_to_stays(own_folders: Path) -> None:
    expected, (entry,) = answer("ort"), entries()
    entry.rename(own_folders / "elsewhere")
    entry.symlink_to(own_folders / "elsewhere")
    np.testing.assert_array_equal(answer("ort"), expected)
    assert not entry.is_symlink()
    assert (own_folders / "elsewhere" / "graph.onnx").is_file()


WRITER = """
import os, signal, sys
from sdopt.engine import cache, open_engine
from sdopt.bundle.files import Bundle
real = cache.sha256
def last(path):  # all is written, and nothing has its name yet
    print("ready", flush=True)
    sys.stdin.readline()
    return real(path)
cache.sha256 = last
open_engine(Bundle.open(sys.argv[1]), "unet", "ort", threads=1)
"""


def writer() -> subprocess.Popen[str]:
    """A process that has written an entry, and waits before it gives it its name."""
    command = [sys.executable, "-c", WRITER, str(EMOJI_BUNDLE)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(list(cache.root().glob(".unet-*"))) == 1
    return process


def test_what_a_killed_writer_left_goes_at_the_next_start() -> None:
    dead = writer()
    dead.kill()
    dead.wait()
    answer("ort")
    assert not list(cache.root().glob(".*"))
    assert len(entries()) == 1


def test_a_writer_that_hangs_holds_up_nobody_for_ever_and_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.5)
    living = writer()
    answer("ort")
    (left,) = cache.root().glob(".*")
    assert any(path.stat().st_size > 1e6 for path in left.iterdir())
    living.communicate("\n\n\n")
    assert living.returncode == 0
    assert [path.name.partition("-")[0] for path in entries()] == ["unet"]  # no name begins with a dot


def test_another_processor_graph_or_precision_has_its_own(
    bundle: Bundle, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(found: Bundle = bundle, **options: str) -> Path:
        return cache.entry(found, found.component("unet"), backend, options)

    changed = replace(bundle.manifest, files={**bundle.manifest.files, "unet.onnx.data": File(1, "another")})
    keys = {key(), key(precision="bf16"), key(Bundle(bundle.path, changed))}
    monkeypatch.setattr(cache, "processor", lambda: "another")
    assert len(keys | {key()}) == 4


def test_where_nothing_can_be_kept_the_engine_is_loaded_as_ever(
    backend: str, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer(backend, cache=False)
    shutil.rmtree(own_folders / "cache", ignore_errors=True)
    (own_folders / "cache").write_text("a file where the folder would be")
    np.testing.assert_array_equal(answer(backend), expected)
    (own_folders / "cache").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    np.testing.assert_array_equal(answer(backend), expected)
    assert entries() == []


def test_what_nobody_used_for_a_month_goes_when_something_new_comes() -> None:
    answer("ort")
    (old,) = entries()
    past = time.time() - cache.UNUSED_SECONDS - 60
    os.utime(old, (past, past))
    answer("ort")  # a use
    assert time.time() - old.stat().st_mtime < 3600
    os.utime(old, (past, past))
    with open_engine(Bundle.open(EMOJI_BUNDLE), "vae_decoder", "ort"):
        assert [path.name.partition("-")[0] for path in entries()] == ["vae_decoder"]


def test_a_bundle_that_is_no_good_says_so_and_nothing_is_kept(bundle_copy: Path, backend: str) -> None:
    graph = Bundle.open(bundle_copy).component("unet", backend).graph
    content = b"\x08\x0a" * 99  # a model without a graph
    graph.write_bytes(content)
    file = File(len(content), hashlib.sha256(content).hexdigest())
    edit_manifest(bundle_copy, files={**Bundle.open(EMOJI_BUNDLE).manifest.files, graph.name: file})
    with pytest.raises(BundleError, match=rf"{graph.name}: .* cannot load it"):
        answer(backend, bundle_copy)
    assert entries() == []


def test_the_command_line_can_do_without_and_the_doctor_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = ["generate", "a cat", "-o", str(tmp_path / "cat.png"), "--steps", "1", "--backend", "ort"]
    assert main([*picture, "--no-cache"]) == 0
    assert not cache.root().exists()
    assert main([*picture[:3], str(tmp_path / "again.png"), *picture[4:]]) == 0
    assert {path.name.partition("-")[0] for path in entries()} == {"text_encoder", "unet", "vae_decoder"}
    capsys.readouterr()
    assert main(["doctor"]) == 0
    assert f"{cache.nbytes() / 1e6:.0f} MB for quicker starts in {cache.root()}" in capsys.readouterr().out
