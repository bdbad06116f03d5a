"""Ids are those of transformers; pixels and PNG text are what others read."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdopt.bundle.files import Bundle
from sdopt.errors import BundleError, UsageError
from sdopt.image import pil as images
from sdopt.text.tokenizer import Tokenizer
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT

ENTRY = Bundle.open(EMOJI_BUNDLE).manifest.tokenizers["tokenizer"]
PROMPTS = [
    "",
    "a red apple on a blue background",
    "  A  RED\tapple!!  it's 42% of ünïcödé — 日本 🍎 ",
    "\x00 null and \u202e right to left",
    "word " * 100,
    "<|endoftext|> in the middle <|startoftext|>",
]


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_ids_are_those_of_transformers() -> None:
    from transformers import CLIPTokenizer

    ours = Tokenizer(EMOJI_BUNDLE / ENTRY.file, ENTRY)(PROMPTS)
    theirs = CLIPTokenizer.from_pretrained(EMOJI_CHECKPOINT / "tokenizer")(
        PROMPTS, padding="max_length", max_length=ENTRY.max_length, truncation=True, return_tensors="np"
    )
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, theirs["input_ids"])


def test_old_checkpoints_with_vocab_and_merges_only_get_the_same_tokenizer(tmp_path: Path) -> None:
    import shutil

    from sdopt.export.checkpoint import Checkpoint

    folder = tmp_path / "tokenizer"
    shutil.copytree(EMOJI_CHECKPOINT / "tokenizer", folder)
    (folder / "tokenizer.json").unlink()
    checkpoint = Checkpoint(tmp_path, {"tokenizer": "transformers.CLIPTokenizer"})
    assert checkpoint.tokenizer("tokenizer")(PROMPTS[1])["input_ids"] == [
        i for i in Tokenizer(EMOJI_BUNDLE / ENTRY.file, ENTRY)([PROMPTS[1]])[0].tolist() if i != ENTRY.pad_token_id
    ] + [ENTRY.eos_token_id]


def test_a_lone_surrogate_is_not_a_crash() -> None:
    assert Tokenizer(EMOJI_BUNDLE / ENTRY.file, ENTRY)(["\ud800 a"]).shape == (1, ENTRY.max_length)


def test_a_prompt_over_8_kib_is_refused() -> None:
    with pytest.raises(UsageError, match="9000 characters; allowed are 8192 bytes"):
        Tokenizer(EMOJI_BUNDLE / ENTRY.file, ENTRY)(["a" * 9000])


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "BPE", "vocab": 3}}', "\0" * 100])
def test_a_malformed_tokenizer_is_a_bundle_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BundleError, match=r"tokenizer.json cannot be read"):
        Tokenizer(tmp_path / "tokenizer.json", ENTRY)


CATASTROPHE = {"Regex": "(a+)+$"}
STEP = {"type": "Split", "pattern": CATASTROPHE, "behavior": "Removed", "invert": True}
GROWS = {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " " * 1000}
HOSTILE: list[tuple[str, Any, str]] = [
    ("pre_tokenizer", STEP, r"pre_tokenizer\[0\].pattern.Regex is '\(a\+\)\+\$'; allowed is "),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [STEP]}, r"pretokenizers\[0\].pattern.Regex"),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Sequence"}]}, r"type is 'Sequence'; allowed"),
    ("normalizer", {"type": "Replace", "pattern": CATASTROPHE, "content": ""}, r"normalizer\[0\].pattern.Regex"),
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "a"}, "pattern.Regex is None"),
    ("normalizer", {"type": "Sequence", "normalizers": [GROWS] * 9}, "content is .* at most one character"),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 99}, "99 steps; allowed are 16"),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "A" * (2 << 20)}, "more than 1,048,576 characters"),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, ""),  # the library's own error
    ("normalizer", {"type": "Prepend", "prepend": "a"}, "type is 'Prepend'"),
    ("normalizer", [], "normalizer is \\[\\]; allowed is an object"),
    ("decoder", {"type": "Replace", "pattern": CATASTROPHE, "content": ""}, "decoder.type is 'Replace'"),
    ("post_processor", {"type": "X"}, "post_processor.type is 'X'"),
    ("added_tokens", [{"id": 1, "content": ""}], r"added_tokens\[0\].content is ''; allowed is a text of 1 to 1024"),
    ("added_tokens", [{"id": 1, "content": "a"}] * 70_000, "70,000 words; allowed are 65,536"),
    ("added_tokens", 5, "added_tokens is 5; allowed is a list"),
    ("model", {"type": "WordLevel", "vocab": []}, "model.type is 'WordLevel'; allowed is 'BPE' or 'Unigram'"),
    ("model", {"type": "Unigram", "vocab": []}, "model has 0 pieces; allowed are 1 to 1,048,576"),
    ("model", {"type": "Unigram", "vocab": {"a": 1}}, "model.vocab is .*; allowed is a list"),
    ("model", {"type": "Unigram", "vocab": [["a", 1.0], ["b", "x"]]}, r"model.vocab\[1\] is .* a finite score"),
    ("model", {"type": "Unigram", "vocab": [["a" * 2000, 1.0]]}, r"model.vocab\[0\] is .* at most 1024 characters"),
    ("model", {"type": "Unigram", "vocab": [["a", 1.0]], "unk_id": 7}, "unk_id is 7; allowed is null or .* below 1"),
    ("model", {"type": "BPE", "vocab": {}, "merges": []}, "model has 0 words"),
    ("model", {"type": "BPE", "vocab": {"a": 1}, "merges": [["a", "a"]] * (2 << 20)}, "2,097,152 merges; allowed"),
    ("model", {"type": "BPE", "vocab": {"a" * 2000: 1}, "merges": []}, "more than 1024 characters"),
    ("model", {"type": "BPE", "vocab": {"a": 1}, "merges": [], "dropout": 0.5}, "dropout is 0.5; allowed is null"),
]


@pytest.mark.parametrize(
    ("key", "value", "message"), HOSTILE, ids=[f"{i}-{key}" for i, (key, *_) in enumerate(HOSTILE)]
)
def test_a_tokenizer_that_could_take_for_ever_is_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    import json

    entry = json.loads((EMOJI_BUNDLE / ENTRY.file).read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**entry, key: value}))
    with pytest.raises(BundleError, match=f"tokenizer.json cannot be read: .*{message}"):
        Tokenizer(tmp_path / "tokenizer.json", ENTRY)


def test_a_tokenizer_that_is_too_large_or_a_link_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as stream:
        stream.truncate(65 << 20)
    with pytest.raises(BundleError, match="allowed are 67108864"):
        Tokenizer(path, ENTRY)
    path.unlink()
    path.symlink_to(EMOJI_BUNDLE / ENTRY.file)
    with pytest.raises(BundleError, match="is a link"):
        Tokenizer(path, ENTRY)


def test_pixels_are_rounded_as_diffusers_rounds_them() -> None:
    import torch
    from diffusers.image_processor import VaeImageProcessor

    decoded = np.random.default_rng(0).normal(0, 0.7, (2, 3, 8, 6)).astype(np.float32)
    theirs = VaeImageProcessor().postprocess(torch.from_numpy(decoded), output_type="pil")
    for ours, expected in zip(images.to_pil(decoded), theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


PARAMETERS = {
    "prompt": "a cat", "negative_prompt": "", "num_inference_steps": 20, "sampled_by": "Euler", "guidance_scale": 2.0,
    "seed": 7, "rng": "cpu", "width": 64, "height": 64, "model": "a, b: c", "version": "0.1",
}  # fmt: skip


def test_parameters_survive_the_file(tmp_path: Path) -> None:
    images.save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", PARAMETERS)
    assert images.read_parameters(tmp_path / "a.png") == PARAMETERS
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError, match="a.png"):
        images.save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


HUGE = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)  # the header's width, height and format
HUGE_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + HUGE + struct.pack(">I", zlib.crc32(b"IHDR" + HUGE))


@pytest.mark.parametrize("content", [b"", b"not a png", b"\x89PNG\r\n\x1a\n", HUGE_PNG])
def test_a_file_that_is_no_png_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UsageError, match="does not tell how it was made"):
        images.read_parameters(tmp_path / "a.png")
