"""Engines on disk: whose they are, what they were made from, and that nothing else reaches a library."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sdopt import engine as engines
from sdopt.bundle.disk import parse_json
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Profile
from sdopt.bundle.write import new_folder
from sdopt.engine import store
from sdopt.engine.store import RECORD, Record, built_components, check_key, engines_folder, stored, usable, write_record
from sdopt.errors import BackendError, BundleError
from tests.conftest import ROOT

HERE = {"tensorrt": "10.13.3.9", "GPU": "Fake GPU", "driver": "CUDA 13"}
PLAN = b"a plan"


pytestmark = pytest.mark.usefixtures("own_folders")


def put(bundle: Bundle, **changes: object) -> Path:
    component = bundle.component("unet")
    record = Record(
        component="unet", backend="tensorrt", inputs=component.inputs, outputs=component.outputs, carry={},
        profiles=(Profile.parse("batch=1:1:4"),), environment=HERE, options={"precision": "fp16"},
        sources={"unet.onnx": bundle.manifest.files["unet.onnx"].sha256},
        command="sdopt build BUNDLE --backend tensorrt", asked=("batch=1:1:4 height=128",),
    )  # fmt: skip
    record = replace(record, **changes)
    with new_folder(engines_folder(bundle) / record.key) as folder:
        (folder / "engine.plan").write_bytes(PLAN)
        write_record(folder, record, ["engine.plan"])
    return engines_folder(bundle) / record.key


def looked_up(bundle: Bundle, trust: bool = False, **changes: str) -> Path:
    return usable(bundle, "unet", "tensorrt", lambda record: {**HERE, **changes}, trust)[0].checked("engine.plan")


def test_an_engine_of_this_user_for_this_machine_is_found_and_its_record_survives(bundle: Bundle) -> None:
    folder = put(bundle)
    assert looked_up(bundle).read_bytes() == PLAN
    assert folder.name.startswith("unet-")
    (found,) = stored(bundle, "tensorrt")
    assert (found.record.key, found.ours) == (folder.name, True)
    assert built_components(bundle, "tensorrt") == {"unet": "fp16"}
    assert built_components(bundle, "tensorrt-rtx") == {}


def test_engines_lie_beside_the_bundle_and_do_not_change_it(bundle: Bundle) -> None:
    digest = bundle.digest
    put(bundle)
    assert Bundle.open(bundle.path).digest == digest


def test_the_newest_engine_is_taken(bundle: Bundle) -> None:
    put(bundle)
    newer = put(bundle, options={"precision": "fp32"})
    assert looked_up(bundle).parent == newer


def test_without_an_engine_the_command_that_builds_one_is_named(bundle: Bundle) -> None:
    with pytest.raises(
        BackendError, match=r"has no tensorrt engines. Build them: sdopt build .*/bundle --backend tensorrt$"
    ):
        looked_up(bundle)
    put(bundle, component="vae_decoder")
    with pytest.raises(BackendError, match=r"has no tensorrt engine of unet. Build it: .* --component unet$"):
        looked_up(bundle)


def test_a_bundle_that_was_moved_is_named_as_it_is_now(bundle: Bundle, tmp_path: Path) -> None:
    put(bundle)
    moved = Bundle(bundle.path.rename(tmp_path / "a moved one"), bundle.manifest)
    with pytest.raises(
        BackendError, match=r"Build it: sdopt build '.*/a moved one' --backend tensorrt --component unet"
    ):
        looked_up(moved, GPU="NVIDIA H200")


def test_engines_of_the_precision_that_is_asked_for_go_first(bundle: Bundle) -> None:
    def found(precision: str) -> list[Path]:
        own = usable(bundle, "unet", "tensorrt", lambda record: HERE, precision=precision)
        return [stored.folder for stored in own]

    old, new = put(bundle, options={"precision": "bf16"}), put(bundle)
    assert found("") == [new, old]
    assert found("bf16") == [old]
    assert found("fp32") == [new, old]  # what overflows in it was built in another
    assert built_components(bundle, "tensorrt") == {"unet": "fp16"}
    assert built_components(bundle, "tensorrt", precision="bf16") == {"unet": "bf16"}
    assert built_components(bundle, "tensorrt", precision="fp32") == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tensorrt": "11.4.0.106"}, "tensorrt was 10.13.3.9, is 11.4.0.106"),
        (
            {"GPU": "NVIDIA H200", "driver": "CUDA 14"},
            "GPU was Fake GPU, is NVIDIA H200; driver was CUDA 13, is CUDA 14",
        ),
    ],
)
def test_a_stale_engine_says_what_changed(bundle: Bundle, changes: dict[str, str], told: str) -> None:
    put(bundle)
    with pytest.raises(BackendError, match=f'stale: {told}. Build it: .* --profile "batch=1:1:4 height=128"'):
        looked_up(bundle, **changes)


def test_an_engine_of_other_weights_is_stale(bundle: Bundle) -> None:
    put(bundle, sources={"unet.onnx": "0" * 64})
    with pytest.raises(BackendError, match="stale: unet.onnx is another file"):
        looked_up(bundle)


def test_somebody_elses_engine_is_loaded_only_when_it_is_trusted(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bundle)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    with pytest.raises(BackendError, match=r"was not built by you .* an engine is code.*--trust-engines"):
        looked_up(bundle)
    assert looked_up(bundle, trust=True).read_bytes() == PLAN


def test_a_record_that_was_changed_is_nobodys(bundle: Bundle) -> None:
    path = put(bundle) / RECORD
    entry = json.loads(path.read_text())
    entry["environment"]["GPU"] = "NVIDIA H200"
    path.write_text(json.dumps(entry))
    with pytest.raises(BackendError, match="not built by you"):
        looked_up(bundle, GPU="NVIDIA H200")


@pytest.mark.parametrize("damage", [b"another", b"a plam"], ids=["truncated", "flipped"])
def test_a_damaged_engine_never_reaches_the_library(bundle: Bundle, damage: bytes) -> None:
    (put(bundle) / "engine.plan").write_bytes(damage)
    for trust in (False, True):
        with pytest.raises(BackendError, match="build it again"):
            looked_up(bundle, trust=trust)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"signature": 1, "component": "unet"}', "[" * 100000], ids=range(5))
def test_what_is_no_record_is_passed_over(bundle: Bundle, text: str) -> None:
    good = put(bundle)
    bad = engines_folder(bundle) / "unet-0"
    bad.mkdir()
    (bad / RECORD).write_text(text)
    assert looked_up(bundle).parent == good


def test_links_are_not_followed(bundle: Bundle, tmp_path: Path) -> None:
    folder = put(bundle)
    elsewhere = tmp_path / "elsewhere"
    (folder / "engine.plan").rename(elsewhere)
    (folder / "engine.plan").symlink_to(elsewhere)
    with pytest.raises(BackendError, match="a link"):
        looked_up(bundle)
    engines_folder(bundle).rename(tmp_path / "engines")
    (bundle.path / "engines").symlink_to(tmp_path / "engines")
    with pytest.raises(BundleError, match="symbolic link"):
        looked_up(bundle)


def test_a_bundle_that_cannot_be_written_keeps_its_engines_in_the_users_cache(
    bundle: Bundle, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert put(bundle).is_relative_to(own_folders / "cache")
    assert looked_up(bundle).read_bytes() == PLAN


def test_all_that_changes_an_engine_changes_its_key(bundle: Bundle) -> None:
    keys = {
        put(bundle, **change).name
        for change in (
            {}, {"backend": "tensorrt-rtx"}, {"profiles": (Profile.parse("batch=1:1:2"),)}, {"carry": {"a": "b"}},
            {"environment": {**HERE, "driver": "CUDA 12"}}, {"sources": {"unet.onnx": "1"}},
            {"options": {"precision": "bf16"}},
        )
    }  # fmt: skip
    assert len(keys) == 7


def test_the_key_of_a_user_is_readable_by_nobody_else(bundle: Bundle, own_folders: Path) -> None:
    put(bundle)
    assert (own_folders / "state/sdopt/engine-key").stat().st_mode & 0o077 == 0


KILLED = """
import os, signal, sys
from sdopt.engine.store import check_key
folder, left = sys.argv[1], int(sys.argv[2])
WRITING = os.O_WRONLY | os.O_RDWR

def hook(event, arguments):
    global left
    changes = event in ("os.link", "os.remove", "os.rename") or event == "open" and arguments[2] & WRITING
    left -= bool(changes and folder in str(arguments))
    if changes and left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
check_key()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_the_key_is_complete_or_absent_and_a_killed_process_leaves_nothing_for_good(own_folders: Path) -> None:
    folder, ended = own_folders / "state/sdopt", list[int]()
    while 0 not in ended:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-c", KILLED, str(folder), str(len(ended) + 1)]
        ended.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
        check_key()
        assert [path.name for path in folder.iterdir()] == ["engine-key"]
        assert (folder / "engine-key").stat().st_size == 32
    assert ended == [*[-signal.SIGKILL] * (len(ended) - 1), 0]
    assert len(ended) > 2  # it was killed before it had written the key, and before it had ended


@pytest.mark.parametrize(
    "change",
    [
        {"component": []}, {"backend": {}}, {"carry": "sample"}, {"environment": {"GPU": 1}}, {"options": None},
        {"files": {"engine.plan": {"bytes": 6}}}, {"files": {"engine.plan": 6}}, {"profiles": [1]}, {"asked": [None]},
        {"inputs": [{"name": [], "dtype": "float32", "shape": [1]}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_with_another_kind_of_value_is_none(bundle: Bundle, change: dict[str, object]) -> None:
    """It may be anybody's: a bundle from somewhere else would stop every command with a traceback."""
    folder = put(bundle)
    entry = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**entry, **change}))
    assert built_components(bundle, "tensorrt") == {}
    with pytest.raises(BackendError, match="has no tensorrt engines. Build them"):
        looked_up(bundle, trust=True)


def test_a_trusted_record_that_lists_no_engine_says_so(bundle: Bundle) -> None:
    folder = put(bundle)
    entry = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**entry, "files": {}}))
    with pytest.raises(BackendError, match=r"engine.plan is not listed in its record; build it again"):
        looked_up(bundle, trust=True)


def test_an_engine_that_another_process_removes_meanwhile_is_passed_over(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, kept = put(bundle), put(bundle, options={"precision": "fp32"})

    def remove_then_parse(content: bytes) -> object:
        shutil.rmtree(gone, ignore_errors=True)
        return parse_json(content)

    monkeypatch.setattr(store, "parse_json", remove_then_parse)
    assert [s.folder for s in stored(bundle, "tensorrt")] == [kept]


def test_somebody_elses_engine_does_not_stop_a_backend_that_has_the_bundles_own_graph(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bundle, backend="ort", environment={"provider": "CPU"}, options={"precision": "fp32"})
    assert "unet" in engines.built_components(bundle, "ort:cpu")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    assert engines.built_components(bundle, "ort:cpu") == {}
    assert engines.built_components(bundle, "ort:cpu", trust=True) == {"unet": "fp32"}
    with engines.open_engine(bundle, "unet", "ort:cpu") as engine:
        assert engine.inputs


def test_a_key_that_others_may_read_signs_nothing(bundle: Bundle, own_folders: Path) -> None:
    put(bundle)
    (own_folders / "state/sdopt/engine-key").chmod(0o644)
    assert [engine.ours for engine in stored(bundle, "tensorrt")] == [False]
    with pytest.raises(BackendError, match="not a signing key that this user alone can read; remove it"):
        put(bundle, options={"precision": "fp32"})
