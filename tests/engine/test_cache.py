"""What was kept of an earlier start gives the same picture, and never stands in the way of a start."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdopt.bundle.files import Bundle
from sdopt.bundle.format import File
from sdopt.bundle.specs import Array
from sdopt.cli.main import main
from sdopt.engine import BACKENDS, cache, installed_backends, open_engine
from sdopt.errors import BundleError
from tests.conftest import EMOJI_BUNDLE
from tests.engine.contract import unet_inputs

CACHING = [name for name in installed_backends() if BACKENDS[name].precisions]
pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture(params=CACHING)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def answer(backend: str, path: Path = EMOJI_BUNDLE, **how: bool) -> Array:
    with open_engine(Bundle.open(path, verify=False), "unet", backend, **how) as engine:
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


def test_what_is_kept_is_really_read(backend: str, bundle_copy: Path) -> None:
    expected = answer(backend, bundle_copy)
    weights, times = bundle_copy / "unet.onnx.data", (bundle_copy / "unet.onnx").stat()
    weights.write_bytes(bytes(weights.stat().st_size))  # zeros: a graph that is loaded anew answers otherwise
    os.utime(bundle_copy / "unet.onnx", ns=(times.st_atime_ns, times.st_mtime_ns))
    np.testing.assert_array_equal(answer(backend, bundle_copy), expected)
    assert np.abs(answer(backend, bundle_copy, cache=False) - expected).max() > 0.1


@pytest.mark.parametrize("damage", ["empty", "garbage"])
def test_what_is_damaged_is_made_anew(backend: str, damage: str) -> None:
    expected, (entry,) = answer(backend), entries()
    for path in entry.iterdir():
        path.chmod(0o600)
        path.write_bytes(b"" if damage == "empty" else b"no model" * 999)
    np.testing.assert_array_equal(answer(backend), expected)
    np.testing.assert_array_equal(answer(backend), expected)


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
    with open_engine(Bundle.open(EMOJI_BUNDLE, verify=False), "vae_decoder", "ort"):
        assert [path.name.partition("-")[0] for path in entries()] == ["vae_decoder"]


def test_a_bundle_that_is_no_good_says_so_and_nothing_is_kept(bundle_copy: Path, backend: str) -> None:
    graph = Bundle.open(bundle_copy, verify=False).component("unet", backend).graph
    graph.write_bytes(b"x" * graph.stat().st_size)
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
