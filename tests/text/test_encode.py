"""Prompts become the embeddings that diffusers' `encode_prompt` computes from the same checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.errors import UsageError
from tests import tiny
from tests.denoise.test_start import generators
from tests.test_families import theirs
from tests.test_pipeline import FLOOR_DB, picture_psnr

PROMPTS = ["a cat", "", "apple b c d e f g", "a <|endoftext|>", "a<|endoftext|>b", "b c d e"]
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 24, "width": 24, "output_type": "np"}
XL = "StableDiffusionXLPipeline"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reference(checkpoint: Path, kind: str = "StableDiffusionPipeline") -> Any:
    """The checkpoint in diffusers, whose clip_skip looks for a module that transformers 5.6 dropped."""
    pipe = theirs(checkpoint, kind)
    if not hasattr(pipe.text_encoder, "text_model"):
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    return pipe


# ------------------------------------------------------------------------------------------------ masked padding


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> tuple[Any, sdopt.Pipeline]:
    folder = tmp_path_factory.mktemp("masked")
    checkpoint = tiny.sd(folder / "checkpoint")
    edit(checkpoint / "text_encoder/config.json", use_attention_mask=True)
    return reference(checkpoint), sdopt.load(tiny.export_like(checkpoint, folder / "bundle", tiny_bundle))


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_padding_is_masked_where_the_checkpoint_says_so(
    prompt: str, clip_skip: int | None, masked: tuple[Any, sdopt.Pipeline]
) -> None:
    pipe, ours = masked
    expected, _ = pipe.encode_prompt(prompt, "cpu", 1, False, clip_skip=clip_skip)
    np.testing.assert_allclose(ours.encode([prompt], clip_skip=clip_skip or 0), expected.detach().numpy(), atol=1e-5)


def test_masked_padding_changes_the_picture_and_gives_that_of_diffusers(
    masked: tuple[Any, sdopt.Pipeline], tiny_bundle: Path
) -> None:
    pipe, ours = masked
    prompts, options = ["a cat", "b"], {"negative_prompt": ["", "c d"], "clip_skip": 1}
    expected = pipe(prompts, generator=generators(5, 6), **OPTIONS, **options).images
    found = ours(prompts, seed=[5, 6], **OPTIONS, **options).images
    assert picture_psnr(expected, found) >= FLOOR_DB
    with sdopt.load(tiny_bundle) as unmasked:
        assert picture_psnr(expected, unmasked(prompts, seed=[5, 6], **OPTIONS, **options).images) < FLOOR_DB - 20


def test_every_chunk_of_a_long_prompt_masks_its_own_padding(masked: tuple[Any, sdopt.Pipeline]) -> None:
    ours = masked[1]
    chunks = [ours.encode([text]) for text in ("a b c d e", "f g")]
    np.testing.assert_allclose(ours.encode(["a b c d e f g"], "a1111"), np.concatenate(chunks, 1), atol=1e-5)


def test_sdxl_masks_no_padding_as_its_pipelines_do(tmp_path: Path, sdxl_checkpoint: Path, sdxl_bundle: Path) -> None:
    checkpoint = tiny.variant(sdxl_checkpoint, tmp_path / "checkpoint")
    for name in ("text_encoder", "text_encoder_2"):
        edit(checkpoint / name / "config.json", use_attention_mask=True)
    hidden, _, pooled, _ = theirs(checkpoint, XL).encode_prompt("a cat", device="cpu")
    with sdopt.load(tiny.export_like(checkpoint, tmp_path / "bundle", sdxl_bundle)) as ours:
        found = ours._text.encode([("a cat", "a cat")])
    for ours_are, theirs_are in zip(found, (hidden, pooled), strict=True):
        assert ours_are is not None
        np.testing.assert_allclose(ours_are, theirs_are.detach().numpy(), atol=1e-5)


# ------------------------------------------------------------------------------------------------ learnt words


WORDS = {"<Me>": 3, "<cat>": 2, "hat": 1}  # and their numbers of vectors
WITH_WORDS = ["a <Me> b", "a <me>", "A <CAT> b", "<cat><cat>", "hat that HAT", "<cat>_1", "b"]


def taught(checkpoint: Path, kind: str, folder: Path) -> Path:
    """The checkpoint with learnt words, as diffusers saves it."""
    import torch

    pipe = theirs(shutil.copytree(checkpoint, folder / "untaught"), kind)
    random = np.random.default_rng(0)
    for suffix in ("", "_2") if "XL" in kind else ("",):
        parts = {name: getattr(pipe, f"{name}{suffix}") for name in ("text_encoder", "tokenizer")}
        width = parts["text_encoder"].config.hidden_size
        for word, count in WORDS.items():
            rows = torch.from_numpy(random.standard_normal((count, width)).astype(np.float32))
            pipe.load_textual_inversion(rows, token=word, **parts)
    pipe.save_pretrained(folder / "taught")
    return folder / "taught"


def in_old_files(checkpoint: Path) -> None:
    """Write the tokenizer as releases of transformers before 5 did: its learnt words stand in added_tokens.json."""
    folder = checkpoint / "tokenizer"
    content = json.loads((folder / "tokenizer.json").read_text())
    words = {token["content"]: token["id"] for token in content["added_tokens"] if not token["special"]}
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    special = {f"{kind}_token": "<|endoftext|>" for kind in ("eos", "pad", "unk")} | {"bos_token": "<|startoftext|>"}
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "added_tokens.json").write_text(json.dumps(words))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"model_max_length": 7, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()


@pytest.fixture(scope="module", params=["tokenizer.json", "added_tokens.json", "sdxl"])
def learnt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, sdopt.Pipeline]:
    """A checkpoint that was saved with learnt words: in diffusers, and its bundle."""
    family, kind = ("sdxl", XL) if request.param == "sdxl" else ("tiny", "StableDiffusionPipeline")
    folder = tmp_path_factory.mktemp("learnt")
    checkpoint = taught(request.getfixturevalue(f"{family}_checkpoint"), kind, folder)
    if request.param == "added_tokens.json":
        in_old_files(checkpoint)
    base = request.getfixturevalue(f"{family}_bundle")
    return theirs(checkpoint, kind), sdopt.load(tiny.export_like(checkpoint, folder / "bundle", base))


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("prompt", WITH_WORDS)
def test_words_learnt_in_the_checkpoint_are_those_of_diffusers(prompt: str, learnt: tuple[Any, sdopt.Pipeline]) -> None:
    pipe, ours = learnt
    expected = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    np.testing.assert_allclose(ours.encode([prompt]), expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.encode([prompt], "a1111")[:, :7], expected.detach().numpy(), atol=1e-5)


def test_a_word_added_later_stands_beside_those_of_the_checkpoint(learnt: tuple[Any, sdopt.Pipeline]) -> None:
    ours = learnt[1]
    if len(ours.bundle.manifest.conditioning.encoders) > 1:
        pytest.skip("one text encoder is enough")
    before = ours.encode(WITH_WORDS[:3])
    with pytest.raises(UsageError, match="'<cat>_1' is a word that this model has already"):
        ours.load_embedding(np.ones((2, 20), np.float32), "<cat>_1")
    row = np.random.default_rng(1).standard_normal((1, 20), np.float32)
    assert ours.load_embedding(row, "<new>") == "<new>"
    np.testing.assert_array_equal(ours.encode(WITH_WORDS[:3]), before)
    assert np.abs(ours.encode(["a <new>"]) - ours.encode(["a <cat>_1"])).max() > 0.1


def test_a_word_without_a_row_is_refused_when_a_prompt_has_it(
    tmp_path: Path, tiny_checkpoint: Path, tiny_bundle: Path
) -> None:
    """A tokenizer was saved with its learnt word, the text encoder was not."""
    checkpoint = tiny.variant(tiny_checkpoint, tmp_path / "checkpoint")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<cat>"])
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    with sdopt.load(tiny.export_like(checkpoint, tmp_path / "bundle", tiny_bundle)) as ours:
        ours.encode(["a dog"])
        for style in ("plain", "a1111"):
            with pytest.raises(UsageError, match="has no row for the word '<cat>', which its tokenizer has; leave"):
                ours.encode(["a <cat>"], style)


# ------------------------------------------------------------------------------------------------ halves


@pytest.mark.parametrize(
    "options",
    [
        {"clip_skip": 1},
        {"clip_skip": 2, "negative_prompt": "b"},
        {"clip_skip": 1, "guidance_scale": 1.0},
        {"negative_prompt": "a <Me>"},
    ],
    ids=str,
)
def test_layers_are_left_out_of_the_prompts_half_alone(options: dict, learnt: tuple[Any, sdopt.Pipeline]) -> None:
    pipe, ours = learnt
    if hasattr(pipe, "text_encoder_2") and options.get("clip_skip") == 2:
        pytest.skip("its first encoder has no layer to leave out")
    if not hasattr(pipe.text_encoder, "text_model"):
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    options = {**OPTIONS, **options}
    expected = pipe("a <Me> hat", generator=generators(5), **options).images
    assert picture_psnr(expected, ours("a <Me> hat", seed=5, **options).images) >= FLOOR_DB


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_2": ""},
        {"prompt_2": "", "negative_prompt": "b", "negative_prompt_2": ""},
        {"prompt_2": "c", "negative_prompt": ""},
        {"negative_prompt": "b", "negative_prompt_2": "d", "clip_skip": 1},
    ],
    ids=str,
)
def test_a_second_prompt_that_is_empty_is_the_first(options: dict, sdxl_checkpoint: Path, sdxl_bundle: Path) -> None:
    expected = theirs(sdxl_checkpoint, XL)("a cat", generator=generators(5), **OPTIONS, **options).images
    with sdopt.load(sdxl_bundle) as ours:
        assert picture_psnr(expected, ours("a cat", seed=5, **OPTIONS, **options).images) >= FLOOR_DB
