"""A checkpoint is read as data: known classes, safetensors, nothing of its own ever runs."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from sdopt.errors import CheckpointError
from sdopt.export import families
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.source import open_checkpoint
from tests.conftest import EMOJI_CHECKPOINT


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMOJI_CHECKPOINT, tmp_path / "checkpoint"))


def opened(source: object, **options: object) -> Checkpoint:
    with open_checkpoint(str(source), **options) as checkpoint:
        return checkpoint


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_opened_and_loads_in_float32() -> None:
    import torch

    checkpoint = opened(EMOJI_CHECKPOINT)
    assert families.of(checkpoint).name == "sd"
    assert checkpoint.provenance["folder"] == "checkpoint"
    assert {p.dtype for p in checkpoint.load("text_encoder").parameters()} == {torch.float32}
    assert checkpoint.nbytes == sum(p.stat().st_size for p in EMOJI_CHECKPOINT.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": ["os", "system"]}, r"unet is os.system; sdopt reads diffusers.UNet2DConditionModel, and never runs"),
        ({"unet": ["modeling_evil", "Model"]}, "unet is modeling_evil.Model"),
        ({"extra": ["torch", "hub"]}, "extra is torch.hub; sdopt reads nothing under this name"),
        (
            {"_class_name": "EvilPipeline"},
            "pipeline class 'EvilPipeline' is not known; known are StableDiffusionPipeline",
        ),
        ({"_class_name": ["custom", "Pipe"]}, "is not known"),
        (
            {"_class_name": "SanaPipeline", "prior": ["diffusers", "SanaTransformer2DModel"]},
            r"'SanaPipeline' is not known \(its prior is not exported.*; known are StableDiffusionPi",
        ),
        (
            {"_class_name": "StableDiffusionControlNetPipeline", "controlnet": ["diffusers", "ControlNetModel"]},
            r"ControlNetPipeline' is not known \(export the model that it was made for, then add its",
        ),
        (
            {"_class_name": "FluxKontextPipeline"},
            r"'FluxKontextPipeline' is not known \(its transformer takes the tokens of a picture beside those",
        ),
        ({"_class_name": "FluxFillPipeline"}, r"is not known \(its transformer takes a masked picture beside"),
        (
            {"controlnet": ["diffusers", "ControlNetModel"]},
            "controlnet is diffusers.ControlNetModel; sdopt reads nothing",
        ),
        ({"text_encoder": [None, None]}, "text_encoder is null; sdopt reads transformers.CLIPTextModel"),
    ],
)
def test_an_unknown_class_is_refused_by_name(copy: Path, changes: dict, message: str) -> None:
    (copy / "modeling_evil.py").write_text("raise SystemExit('ran')")
    edit_index(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        opened(copy)


class Marker:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin"])
def test_a_pickle_checkpoint_is_refused_unopened_with_the_way_to_convert_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"pickle checkpoint.*from_single_file\('.*save_pretrained"):
        opened(path)
    assert not (tmp_path / "ran").exists()


def test_a_component_with_pickle_weights_only_is_refused_unopened(copy: Path, tmp_path: Path) -> None:
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"pickle weights only.*from_pretrained\('.*save_pretrained"):
        opened(copy)
    assert not (tmp_path / "ran").exists()


def test_missing_weights_and_variants_are_told_apart(copy: Path) -> None:
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(CheckpointError, match="as variant fp16; add --variant"):
        opened(copy)
    weights.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"unet has no safetensors weights; it holds config.json"):
        opened(copy)


def test_a_variant_is_read_where_it_is_named(copy: Path) -> None:
    for weights in copy.rglob("*.safetensors"):
        weights.rename(weights.with_name(weights.name.replace(".safetensors", ".fp16.safetensors")))
    checkpoint = opened(copy, variant="fp16")
    assert checkpoint.load("vae") is not None
    assert checkpoint.provenance["variant"] == "fp16"


def test_a_damaged_weight_file_is_named(copy: Path) -> None:
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"vae: cannot be loaded"):
        opened(copy).load("vae")


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_malformed_index_is_named(copy: Path, text: str) -> None:
    (copy / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model_index.json"):
        opened(copy)


def test_what_is_no_checkpoint_says_what_would_be(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no model_index.json"):
        opened(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder or file; give a diffusers folder"):
        opened(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no such file"):
        opened(tmp_path / "nothing.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    with pytest.raises(CheckpointError, match="it is one model, ControlNetModel, and not a pipeline"):
        opened(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        opened(tmp_path / "broken.safetensors")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The cache as huggingface_hub lays it out: snapshots of links into blobs."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub/models--sdopt--emoji"
    for path in filter(Path.is_file, EMOJI_CHECKPOINT.rglob("*")):
        name = path.relative_to(EMOJI_CHECKPOINT)
        blob = repo / "blobs" / name.as_posix().replace("/", "-")
        link = repo / "snapshots" / revision / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return revision


def test_a_hub_id_is_found_in_the_cache_offline_and_its_commit_recorded(hub_cache: str) -> None:
    checkpoint = opened("sdopt/emoji", offline=True)
    assert checkpoint.provenance["hub_id"] == "sdopt/emoji"
    assert checkpoint.provenance["revision"] == hub_cache
    assert checkpoint.load("vae") is not None


def test_a_hub_id_that_is_not_in_the_cache_says_how_to_get_it_offline(hub_cache: str) -> None:
    with pytest.raises(CheckpointError, match=r"not in the local cache.*hf download sdopt/nothing"):
        opened("sdopt/nothing", offline=True)


@pytest.mark.parametrize("name", ["emoji", "tiny"])
def test_one_safetensors_file_is_the_folder_it_was_made_from(name: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    from tests.export.ldm import write_single_file

    folder = EMOJI_CHECKPOINT if name == "emoji" else tiny_checkpoint
    path = write_single_file(folder, tmp_path / "model.safetensors")
    original = opened(folder)
    with open_checkpoint(str(path), config=str(folder), offline=True) as single:
        assert single.provenance["file"] == "model.safetensors"
        assert single.nbytes == pytest.approx(original.nbytes, rel=0.05)
        for component in ("text_encoder", "unet", "vae"):
            expected, unpacked = original.load(component).state_dict(), single.load(component).state_dict()
            assert expected.keys() == unpacked.keys()
            assert all((expected[k] == unpacked[k]).all() for k in expected), component


def test_one_file_without_its_configurations_says_where_they_come_from(tmp_path: Path, tiny_checkpoint: Path) -> None:
    from tests.export.ldm import write_single_file

    path = write_single_file(tiny_checkpoint, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no configurations.*--config"):
        opened(path, offline=True)
