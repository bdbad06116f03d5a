"""A bundle is read strictly, and appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sdopt.bundle.files import Bundle
from sdopt.bundle.format import ComponentEntry, Conditioning, Defaults, Encoder, Latents, Manifest, TokenizerEntry
from sdopt.bundle.specs import TensorSpec
from sdopt.bundle.write import new_folder, write_manifest
from sdopt.errors import BundleError
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT, edit_manifest

SAMPLE = TensorSpec("sample", "float32", ("batch", 4, "latent_height", "latent_width"))
IDS = TensorSpec("input_ids", "int32", ("batch", "tokens"))
STATES = TensorSpec("last_hidden_state", "float32", ("batch", "tokens", 8))
MINIMAL = Manifest(
    family="sd",
    source={},
    versions={},
    latents=Latents(channels=4, factor=8, scaling_factor=0.18215, shift_factor=0.0),
    defaults=Defaults(512, 512, 50, 7.5, strength=0.8, inpaint_strength=1.0, strength_cuts="steps"),
    conditioning=Conditioning((Encoder("text_encoder", "tokenizer", "last_hidden_state", 0),), None, (), False, 0),
    float16_unsafe=(),
    float16_attention_unsafe=(),
    requires_safety_checker=False,
    tokenizers={"tokenizer": TokenizerEntry("tokenizer/tokenizer.json", 77, 1, 2, 3)},
    components={
        "text_encoder": ComponentEntry("text_encoder.onnx", 23, "float16", (IDS,), (STATES,), (), {}),
        "unet": ComponentEntry("unet.onnx", 23, "float16", (SAMPLE,), (replace(SAMPLE, name="noise_pred"),), (), {}),
    },
    scheduler={"_class_name": "DDIMScheduler"},
    prediction_type="epsilon",
    verified=False,
    files={},
)


def minimal_bundle(folder: Path) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    for name in MINIMAL.components:
        (folder / f"{name}.onnx").write_bytes(b"\x08\x0a")  # an ONNX model that has but its version
    write_manifest(folder, MINIMAL)
    return folder


def test_the_format_is_this_text_to_the_byte(tmp_path: Path) -> None:
    text = (minimal_bundle(tmp_path) / "manifest.json").read_text()
    assert text.startswith('{\n "format_version": 4,\n "family": "sd",\n')
    assert text.endswith(
        """ "files": {
  "text_encoder.onnx": {
   "bytes": 2,
   "sha256": "c745bff5807b8395268c224c9c6c3cc4916369c0ff03ef0b8c015efbb3f054f2"
  },
  "tokenizer/tokenizer.json": {
   "bytes": 2,
   "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
  },
  "unet.onnx": {
   "bytes": 2,
   "sha256": "c745bff5807b8395268c224c9c6c3cc4916369c0ff03ef0b8c015efbb3f054f2"
  }
 }
}
"""
    )
    assert Bundle.open(tmp_path).component("unet").graph == tmp_path / "unet.onnx"


def test_the_embedded_bundle_opens_and_knows_its_sizes() -> None:
    bundle = Bundle.open(EMOJI_BUNDLE)
    own = [name for name, entry in bundle.manifest.components.items() if entry.weights_of is None]
    assert own == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert set(bundle.components) - set(own) == {"unet_controlled", "unet_ip_adapter"}
    assert bundle.nbytes("unet") > 10e6
    assert len(bundle.digest) == 10
    with pytest.raises(BundleError, match="no component 'unett'; it has unet"):
        bundle.component("unett")


def damage_byte(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)


@pytest.mark.parametrize("name", sorted(json.loads((EMOJI_BUNDLE / "manifest.json").read_text())["files"]))
def test_one_flipped_bit_in_any_file_is_refused(bundle_copy: Path, name: str) -> None:
    damage_byte(bundle_copy, name)
    with pytest.raises(BundleError, match=rf"{name} does not match its SHA-256.*again"):
        Bundle.open(bundle_copy)
    if not name.endswith(".onnx"):  # a graph is read in any case, to know its weights
        assert not Bundle.open(bundle_copy, verify=False).verified


def test_a_missing_or_truncated_file_is_refused(bundle_copy: Path) -> None:
    data = bundle_copy / "unet.onnx.data"
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(BundleError, match=r"unet.onnx.data is truncated.*copy the bundle again"):
        Bundle.open(bundle_copy)
    data.unlink()
    with pytest.raises(BundleError, match=r"unet.onnx.data is missing"):
        Bundle.open(bundle_copy)


def test_a_folder_without_a_manifest_is_no_bundle(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "manifest.json").unlink()
    with pytest.raises(BundleError, match="incomplete"):
        Bundle.open(bundle_copy)
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match="diffusers checkpoint, not a bundle. `sdopt export"):
        Bundle.open(EMOJI_CHECKPOINT)


@pytest.mark.parametrize("version", [1, 0, None, "2", True, 2.0])
def test_an_older_format_version_is_exported_again(bundle_copy: Path, version: object) -> None:
    edit_manifest(bundle_copy, format_version=version)
    again = f"xport it again: `sdopt export CHECKPOINT -o {bundle_copy} --force`"
    with pytest.raises(BundleError, match=f"format_version is .* this sdopt reads 2 to 4. .*{re.escape(again)}"):
        Bundle.open(bundle_copy)


def test_a_newer_format_version_needs_a_newer_sdopt(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, format_version=5)
    with pytest.raises(BundleError, match="format_version is 5; this sdopt reads 2 to 4. .*pgrade sdopt"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"format_version": 2, "format_version": 2}',
        '{"format_version": NaN}',
        "[" * 100_000,
        " " * (1 << 20) + "{}",
        '{"format_version": 2}',
        "[1]",
        "null",
        "\xff\xfe",
    ],
    ids=["empty", "cut", "duplicate", "nan", "deep", "huge", "keys", "list", "null", "bytes"],
)
def test_a_manifest_that_is_none_is_refused(bundle_copy: Path, text: str) -> None:
    (bundle_copy / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "C:x", "a\0b", "", "a" * 300])
def test_a_path_that_leaves_the_bundle_is_refused_before_it_is_opened(bundle_copy: Path, name: str) -> None:
    edit_manifest(bundle_copy, files={name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(
        BundleError, match=r"files\[.*allowed is (a relative POSIX path that does|text without control)"
    ):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["unet.onnx.data", "tokenizer"])
def test_symbolic_links_are_refused_with_the_way_out(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).rename(bundle_copy / "moved")
    (bundle_copy / name).symlink_to(bundle_copy / "moved")
    with pytest.raises(BundleError, match=r"symbolic link.*cp -rL"):
        Bundle.open(bundle_copy)


def test_a_pipe_or_folder_in_place_of_a_file_does_not_hang(bundle_copy: Path) -> None:
    for make in (os.mkfifo, os.mkdir):
        path = bundle_copy / "unet.onnx"
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(BundleError, match="not a plain file"):
            Bundle.open(bundle_copy)


def test_a_manifest_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    minimal_bundle(tmp_path)
    (tmp_path / "manifest.json").unlink()
    for changes, problem in (
        ({"latents": replace(MINIMAL.latents, factor=0)}, "latents.factor is 0; allowed is a whole number from 1"),
        ({"tokenizers": {}}, r"conditioning.encoders\[0\].tokenizer is 'tokenizer'"),
        ({"scheduler": {"_class_name": "X", "text": "a" * (1 << 20)}}, "more than 1048576"),
    ):
        with pytest.raises(BundleError, match=f"manifest.json cannot be written: .*{problem}"):
            write_manifest(tmp_path, replace(MINIMAL, **changes))
        assert not (tmp_path / "manifest.json").exists()


def test_a_block_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "b") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


def test_an_existing_bundle_is_replaced_only_with_force(tmp_path: Path) -> None:
    target = minimal_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match=r"exists already.*--force"), new_folder(target):
        pass
    with new_folder(target, force=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["b", "manifest.json"]


def test_force_never_replaces_a_folder_that_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/photo.jpg").write_text("dear")
    with (
        pytest.raises(BundleError, match="not a bundle; it is not replaced"),
        new_folder(tmp_path / "holiday", force=True),
    ):
        pass
    assert (tmp_path / "holiday/photo.jpg").exists()


def test_a_full_disk_is_said_before_the_work_starts(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"GB free, about .* needed"),
        new_folder(tmp_path / "b", needed_bytes=1 << 60),
    ):
        pass
    assert not list(tmp_path.iterdir())
