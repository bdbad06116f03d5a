"""A graph reads the weights that the manifest lists, and nothing else, however its file says otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import pytest

from sdopt.bundle.disk import read_plain
from sdopt.bundle.files import Bundle
from sdopt.bundle.graphs import GraphError, weight_spans
from sdopt.engine import built_components
from sdopt.errors import BundleError
from tests.conftest import EMOJI_BUNDLE

Change = Callable[[Any], None]


def put(bundle: Path, name: str, content: bytes) -> None:
    """Another file, which the manifest lists as it is."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def first(model: Any) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def told(key: str, value: str) -> Change:
    def change(model: Any) -> None:
        entry = next(entry for entry in first(model).external_data if entry.key == key)
        entry.value = value

    return change


def add(key: str, value: str) -> Change:
    def change(model: Any) -> None:
        first(model).external_data.add(key=key, value=value)

    return change


def drop_keys(model: Any) -> None:
    del first(model).external_data[1:]


def longer(model: Any) -> None:
    first(model).dims[0] += 1


def constant(model: Any) -> None:
    """In a node's attribute, inside a graph that is an attribute."""
    inner = onnx.helper.make_node("Constant", [], ["c"])
    tensor = inner.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
    tensor.CopyFrom(first(model))
    tensor.external_data[0].value = "hidden.bin"
    body = onnx.helper.make_graph([inner], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (told("location", "hidden.bin"), "is in the file 'hidden.bin'; allowed is 'vae_encoder.onnx.data'"),
        (told("location", "../vae_encoder.onnx.data"), "is in the file '../vae"),
        (told("location", "*/_ORT_MEM_ADDR_/*"), "is in the file"),
        (told("offset", "-4"), "offset is '-4'; allowed is a whole number"),
        (told("offset", "0x10"), "allowed is a whole number"),
        (told("offset", str(1 << 50)), "ends at byte .* has 1301568"),
        (told("length", "4"), "has 4 bytes; it needs"),
        (longer, "it needs"),
        (add("checksum", "0"), "allowed is location, offset, length"),
        (add("location", "hidden.bin"), "allowed is location, offset, length"),
        (drop_keys, "allowed is location, offset, length"),
        (constant, "is in the file 'hidden.bin'"),
    ],
    ids=lambda value: getattr(value, "__name__", "")[:20] or None,
)
@pytest.mark.parametrize("verify", [True, False])
def test_weights_elsewhere_are_refused_when_the_bundle_is_opened(
    bundle_copy: Path, change: Change, problem: str, verify: bool
) -> None:
    (bundle_copy / "hidden.bin").write_bytes((bundle_copy / "vae_encoder.onnx.data").read_bytes())
    for name in ("vae_encoder.onnx", "vae_encoder.ort.onnx"):
        model = onnx.load(str(EMOJI_BUNDLE / name), load_external_data=False)
        change(model)
        put(bundle_copy, name, model.SerializeToString())
        with pytest.raises(BundleError, match=rf"{name}: tensor .*{problem}"):
            Bundle.open(bundle_copy, verify=verify)
        put(bundle_copy, name, (EMOJI_BUNDLE / name).read_bytes())


def test_weights_that_the_manifest_does_not_list_are_refused(bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    del manifest["files"]["unet.onnx.data"]
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"unet.onnx.data, which the manifest does not list"):
        Bundle.open(bundle_copy)


def test_every_cut_of_a_graph_is_refused_or_names_no_other_file(tmp_path: Path) -> None:
    name, size = "vae_encoder.onnx", (EMOJI_BUNDLE / "vae_encoder.onnx.data").stat().st_size
    content = (EMOJI_BUNDLE / name).read_bytes()
    for cut in range(0, len(content), 997):
        (tmp_path / name).write_bytes(content[:cut])
        with suppress(GraphError):
            spans = weight_spans(tmp_path / name, f"{name}.data", size)
            assert all(0 <= first < last <= size for first, last in spans)


def listed(bundle: Path, name: str, nbytes: int) -> None:
    """A file of so many bytes, most of them a hole; the manifest lists it with a hash that nobody can check soon."""
    with (bundle / name).open("ab") as stream:
        stream.truncate(nbytes)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": nbytes, "sha256": "0" * 64}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", ["end", "hole", "graph", "other"])
def test_a_file_far_larger_than_what_is_in_it_is_refused_at_once(bundle_copy: Path, kind: str, verify: bool) -> None:
    huge, data = 1 << 40, "vae_encoder.onnx.data"
    name = {"graph": "vae_encoder.onnx", "other": "more.bin"}.get(kind, data)
    problem = rf"{name} has {huge} bytes; "
    if kind == "hole":  # the tensors are at both ends
        for graph in ("vae_encoder.onnx", "vae_encoder.ort.onnx"):
            model = onnx.load(str(bundle_copy / graph), load_external_data=False)
            entries = {entry.key: entry for entry in first(model).external_data}
            entries["offset"].value = str(huge - int(entries["length"].value))
            put(bundle_copy, graph, model.SerializeToString())
    listed(bundle_copy, name, huge)
    began = time.monotonic()
    with pytest.raises(BundleError, match=problem):
        Bundle.open(bundle_copy, verify=verify)
    assert time.monotonic() - began < 10


def test_a_second_opening_reads_no_graph_and_a_damaged_verdict_counts_for_nothing(own_folders: Path) -> None:
    Bundle.open(EMOJI_BUNDLE)
    (verdict,) = (own_folders / "cache/sdopt/graphs").iterdir()
    kept = verdict.read_bytes()
    verdict.write_bytes(b"x" * len(kept))
    Bundle.open(EMOJI_BUNDLE)
    assert verdict.read_bytes() == kept


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder", "large", "text", "list"])
def test_a_bad_record_of_an_engine_breaks_no_bundle_and_takes_no_time(bundle_copy: Path, kind: str) -> None:
    record = bundle_copy / "engines/x/record.json"
    record.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(record)
    elif kind in ("device", "link"):
        record.symlink_to("/dev/zero" if kind == "device" else EMOJI_BUNDLE / "manifest.json")
    elif kind == "folder":
        record.mkdir()
    elif kind == "large":
        record.touch()
        os.truncate(record, 1 << 40)
    else:
        record.write_text("no record" if kind == "text" else '{"component": [], "signature": ""}')
    bundle, began = Bundle.open(bundle_copy), time.monotonic()
    assert built_components(bundle, "ort:cpu") == {}
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("kind", ["pipe", "link", "large"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(bytes(11))
    with pytest.raises(OSError, match=r"not a plain file|has 11 bytes; allowed are 10"):
        read_plain(path, 10)
