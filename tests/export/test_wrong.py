"""What is no checkpoint is named, with what to do about it, before anything is loaded or downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdopt.errors import CheckpointError
from sdopt.export.source import open_checkpoint
from sdopt.export.wrong import refuse
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def tensors(*names: str) -> bytes:
    """A safetensors file of tensors of one zero."""
    header = json.dumps({n: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, n in enumerate(names)})
    return len(header).to_bytes(8, "little") + header.encode() + bytes(len(names))


UNET = "model.diffusion_model.input_blocks.0.0.weight"
FILES = [
    (
        "lora.safetensors",
        tensors("lora_unet_down_blocks_0.lora_up.weight"),
        "is a LoRA; give it beside a bundle: sdopt",
    ),
    ("peft.safetensors", tensors("unet.down_blocks.0.to_q.lora_A.weight"), "is a LoRA; give"),
    (
        "old.safetensors",
        tensors("unet.mid_block.to_k_lora.up.weight", "unet.x.lora.down.weight"),
        "is a LoRA; give it beside",
    ),
    ("loha.safetensors", tensors("lycoris_x.hada_w1_a"), "is a LoRA"),
    ("vae.safetensors", tensors("encoder.conv_in.weight", "decoder.conv_in.weight"), "is a VAE alone; give a checkp"),
    ("kl.safetensors", tensors("first_stage_model.decoder.conv_in.weight"), "is a VAE alone"),
    ("unet.safetensors", tensors("conv_in.weight", "down_blocks.0.x"), "is a UNet alone; give the diffusers folder"),
    ("text.safetensors", tensors("text_model.embeddings.token_embedding.weight"), "is a text encoder alone"),
    ("control.safetensors", tensors("control_model.input_blocks.0.0.weight", UNET), "is a ControlNet; add it"),
    ("control2.safetensors", tensors("controlnet_cond_embedding.conv_in.weight", "down_blocks.0"), "is a ControlNet"),
    ("ip.safetensors", tensors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "is an IP-Adapter"),
    (
        "flux.safetensors",
        tensors("double_blocks.0.img_attn.qkv.weight"),
        "is the transformer of Flux alone; name a diffusers folder",
    ),
    (
        "sd3.safetensors",
        tensors("joint_blocks.0.x"),
        "is the transformer of Stable Diffusion 3 alone; name a diffusers folder",
    ),
    ("word.safetensors", tensors("emb_params"), "is a textual inversion; give it beside a bundle"),
    ("words.safetensors", tensors("clip_g", "clip_l"), "is a textual inversion"),
    ("m.safetensors", LFS.encode(), "is a pointer of git-lfs, and not the file itself; run `git lfs pull`"),
    ("m.ckpt", LFS.encode(), "is a pointer of git-lfs"),
    ("page.safetensors", b"<!DOCTYPE html><html>", "is a web page"),
    ("none.safetensors", b"", "is an empty file; download it again"),
    ("model.gguf", b"GGUF\3\0\0\0", "is a GGUF file, whose weights are quantized"),
    ("model.safetensors", b"GGUF\3\0\0\0", "is a GGUF file"),
    ("unet.onnx", b"\x08\x0a", "is an ONNX graph, which is exported already"),
    ("model.zip", b"PK\3\4", "is an archive; unpack it"),
    ("notes.txt", b"Dear diary", "is a file that is no checkpoint; give a diffusers folder"),
    ("noend", b"x", "is a file that is no checkpoint"),
    ("model_index.json", b"{}", "is the index of a checkpoint; give its folder"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[f"{n} {m[:24]}" for n, _, m in FILES])
def test_a_wrong_file_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught, open_checkpoint(str(tmp_path / name), offline=True):
        pass
    assert str(caught.value).startswith(f"{tmp_path / name} {message}")


def _onnx(folder: Path) -> None:
    (folder / "unet").mkdir()
    (folder / "unet/model.onnx").write_bytes(b"\x08")
    (folder / "model_index.json").write_text('{"_class_name": "OnnxStableDiffusionPipeline"}')


def _graphs(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\x08")


def _pointers(folder: Path) -> None:
    shutil.copytree(EMOJI_CHECKPOINT, folder, dirs_exist_ok=True)
    (folder / "vae/diffusion_pytorch_model.safetensors").write_text(LFS)


def _lora(folder: Path) -> None:
    (folder / "pytorch_lora_weights.safetensors").write_bytes(tensors("a.lora_A.weight"))


def _control(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}')


def _nested(folder: Path) -> None:
    shutil.copytree(EMOJI_CHECKPOINT, folder / "snapshots/0123")


def _single(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(tensors(UNET))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "has no model_index.json: it is an empty folder; give a diffusers folder"),
        (_onnx, "is a pipeline of ONNX graphs, which is exported already"),
        (_graphs, "has no model_index.json: it is a folder of ONNX graphs, which are exported already"),
        (_pointers, "is a clone without its weights: {}/vae/diffusion_pytorch_model.safetensors is a pointer of git-l"),
        (_lora, "has no model_index.json: it is a LoRA, which changes a model"),
        (_control, "has no model_index.json: it is one model, ControlNetModel, and not a pipeline"),
        (_nested, "has no model_index.json: it is not a checkpoint, but holds one; give {}/snapshots/0123"),
        (_single, "has no model_index.json: it is a folder of files without model_index.json; give one"),
        (
            lambda folder: shutil.copytree(EMOJI_BUNDLE, folder, dirs_exist_ok=True),
            "has no model_index.json: it is a bundle, which is exported already: sdopt generate PROMPT -m {} -o PATH",
        ),
    ],
)
def test_a_wrong_folder_is_named(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(CheckpointError) as caught, open_checkpoint(str(tmp_path)):
        pass
    assert str(caught.value).startswith(f"{tmp_path} {message.format(tmp_path)}")


def test_a_part_of_a_checkpoint_names_the_whole() -> None:
    with pytest.raises(CheckpointError, match=f"is one part of a checkpoint; give the folder .*: {EMOJI_CHECKPOINT}$"):
        refuse(str(EMOJI_CHECKPOINT / "unet"))


def test_a_name_that_is_not_there_comes_with_those_that_are_spelled_nearly_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dreamshaper.safetensors").write_bytes(tensors(UNET))
    (tmp_path / "hub/models--stabilityai--sd-turbo").mkdir(parents=True)
    (tmp_path / "models/emoji").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for source, there in (
        ("dreamshapr.safetensors", "there is no such file; .*; there is dreamshaper.safetensors$"),
        (str(tmp_path / "dreamshaper.ckpt"), "there is no such folder or file; .*; there is dreamshaper.safetensors$"),
        ("stabilityai/sd-turbbo", "not in the local cache.*; there is stabilityai/sd-turbo$"),
        ("models/emojy", "not in the local cache.*; there is models/emoji$"),
        ("./models/emojy", "there is no such folder or file; .*; there is emoji$"),
    ):
        with pytest.raises(CheckpointError, match=there), open_checkpoint(source, offline=True):
            pass


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://huggingface.co/stabilityai/sd-turbo", "is an address; give the id on the hub: stabilityai/sd-turbo"),
        ("https://civitai.com/models/1", "is an address; download it"),
    ],
)
def test_an_address_is_no_source(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        refuse(source)


def test_a_checkpoint_is_none_of_these() -> None:
    refuse(str(EMOJI_CHECKPOINT))
    refuse("owner/name")
