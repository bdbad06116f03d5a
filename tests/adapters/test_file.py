"""A file is read as it was written, or refused in words."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdopt.adapters.lora.file import made_for, match, ranks, read_lora
from sdopt.adapters.lora.names import Module, spellings
from sdopt.errors import UsageError
from tests.adapters.lora_files import write

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
STEM = "lora_unet_" + PATH.replace(".", "_")
TABLE = spellings({"unet": [PATH], "text_encoder": []})
UP, DOWN = np.ones((6, 2), np.float32), np.full((2, 5), 0.5, np.float32)
GOOD = {f"{STEM}.lora_up.weight": UP, f"{STEM}.lora_down.weight": DOWN, f"{STEM}.alpha": np.array(1, np.float32)}


def raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    """A file of this very header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("stem", "down", "up"),
    [
        (STEM, ".lora_down.weight", ".lora_up.weight"),
        (f"unet.{PATH}", ".lora_A.weight", ".lora_B.weight"),
        (f"base_model.model.{PATH}", ".lora_A.default.weight", ".lora_B.default.weight"),
        (f"unet.{PATH}", ".lora.down.weight", ".lora.up.weight"),
        (f"unet.{PATH.replace('to_k', 'processor.to_k_lora')}", ".down.weight", ".up.weight"),
    ],
)
def test_every_trainers_keys_are_the_same_factors(tmp_path: Path, stem: str, down: str, up: str) -> None:
    lora = read_lora(write(tmp_path / "a.safetensors", {stem + down: DOWN, stem + up: UP}))
    matched = match(lora, TABLE)
    [(module, factors)] = matched.factors.items()
    assert module == Module("unet", PATH)
    np.testing.assert_array_equal(factors["up"], UP)
    np.testing.assert_array_equal(factors["down"], DOWN)
    assert matched.algorithms == {"LoRA": 1}
    assert ranks(matched.factors.values()) == [2]
    assert made_for(lora) == "a model with cross-attention width 5"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_types_are_widened_exactly(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensor = torch.randn(2, 5).to(getattr(torch, dtype))
    tensors = {f"{STEM}.lora_down.weight": tensor, f"{STEM}.lora_up.weight": torch.ones(6, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    [factors] = match(read_lora(tmp_path / "a.safetensors"), TABLE).factors.values()
    np.testing.assert_array_equal(factors["down"], tensor.float().numpy())


def test_alphas_of_peft_come_from_the_metadata_by_module(tmp_path: Path) -> None:
    config = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"^attn2.to_k": 3}, "unet.use_rslora": True}
    tensors = {f"unet.{PATH}.lora_A.weight": DOWN, f"unet.{PATH}.lora_B.weight": UP}
    lora = read_lora(write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)}))
    [factors] = match(lora, TABLE).factors.values()
    assert (factors.alpha, factors.rank_stabilized) == (3, True)
    del config["unet.alpha_pattern"]
    lora = read_lora(write(tmp_path / "b.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)}))
    [factors] = match(lora, TABLE).factors.values()
    assert factors.alpha == 8


def test_a_folder_of_peft_has_its_configuration_beside_the_file(tmp_path: Path) -> None:
    stem = f"base_model.model.{PATH}"
    path = write(tmp_path / "adapter_model.safetensors", {f"{stem}.lora_A.weight": DOWN, f"{stem}.lora_B.weight": UP})
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6, "use_rslora": false}')
    [factors] = match(read_lora(path), TABLE).factors.values()
    assert (factors.alpha, factors.scale(2)) == (6, 3)


def test_a_textual_inversion_inside_is_read(tmp_path: Path) -> None:
    words = {"bundle_emb.<cat>.string_to_param.*": np.ones((2, 4), np.float32)}
    lora = read_lora(write(tmp_path / "a.safetensors", {**GOOD, **words}))
    assert {token: list(arrays) for token, arrays in lora.embeddings.items()} == {"<cat>": ["emb_params"]}
    assert match(lora, TABLE).unmatched == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({f"{STEM}.lora_up.weight": UP}, "down missing"),
        ({**GOOD, f"{STEM}.lora_up.weight": UP * np.nan}, "NaN or infinity"),
        ({**GOOD, f"{STEM}.lora_down.weight": np.zeros((0, 5), np.float32)}, "has no numbers"),
        ({**GOOD, f"{STEM}.alpha": np.ones(2, np.float32)}, "alpha of .* is 2 numbers"),
        ({**GOOD, f"unet.{PATH}.lora_A.weight": DOWN}, "are both the down of unet.down_blocks"),
        ({**GOOD, f"{STEM}.lora_down.weight": DOWN.astype(np.int32)}, "is I32; read are F16"),
        ({}, "has no tensors|not a sound safetensors file"),
    ],
)
def test_contents_that_are_wrong_are_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.safetensors", content)
    with pytest.raises(UsageError, match=message):
        match(read_lora(path), TABLE)


def test_fp8_is_refused_by_name(tmp_path: Path) -> None:
    entry = {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}
    with pytest.raises(UsageError, match="F8_E4M3; read are F16, BF16"):
        read_lora(raw(tmp_path / "a.safetensors", {f"{STEM}.lora_up.weight": entry}, b"0000"))


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
         b"0000"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"000"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"00000"),
        ({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, b"0000"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"0000"),
        (b"not json", b""),
    ],
)  # fmt: skip
def test_a_file_is_not_read_past_what_its_header_allows(tmp_path: Path, header: Any, data: bytes) -> None:
    with pytest.raises(UsageError, match="not a sound safetensors file"):
        read_lora(raw(tmp_path / "a.safetensors", header, data))


def test_a_huge_header_a_pickle_a_pointer_and_a_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(UsageError, match="not a sound safetensors file"):
        read_lora(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(UsageError, match="git lfs pull"):
        read_lora(path)
    for name, content in (("a.pt", b"PK\x03\x04"), ("b.safetensors", b"PK\x03\x04"), ("c.ckpt", b"\x80\x02")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="a pickle"):
            read_lora(tmp_path / name)
    with pytest.raises(UsageError, match="a name of 70000 characters"):
        read_lora(write(tmp_path / "long.safetensors", {"x" * 70_000: np.zeros(1, np.float32)}))
    with pytest.raises(UsageError, match="not a plain file"):
        read_lora(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        read_lora(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[1]", "no JSON object"),
        ("{", "Expecting"),
        ('{"unet.lora_alpha": "8"}', "allowed is a number"),
        ('{"unet.alpha_pattern": {"(a+)+$": 1}}', "no regular expressions"),
    ],
)
def test_a_configuration_that_is_wrong_is_named(tmp_path: Path, metadata: str, message: str) -> None:
    path = write(tmp_path / "a.safetensors", GOOD, {"lora_adapter_metadata": metadata})
    with pytest.raises(UsageError, match=message):
        read_lora(path)
