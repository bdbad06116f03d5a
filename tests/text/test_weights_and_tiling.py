"""Weights and long prompts as AUTOMATIC1111 reads them; large pictures in tiles as diffusers decodes them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.engine.pool import EnginePool
from sdopt.errors import UsageError
from sdopt.image.tiling import decode_tiled, encode_tiled
from sdopt.image.vae import Vae
from sdopt.text.tokenizer import Tokenizer
from sdopt.text.weights import chunks, parse, weighted
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT


@pytest.fixture
def emoji() -> Iterator[sdopt.Pipeline]:
    with sdopt.load() as pipe:
        yield pipe


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a ((red)) cat", [("a ", 1), ("red", 1.21), (" cat", 1)]),
        ("a [red] cat", [("a ", 1), ("red", 1 / 1.1), (" cat", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("(a (red:2) cat:0.5)", [("a ", 0.5), ("red", 1.0), (" cat", 0.5)]),
        (r"a \(red\) cat \[x\] \\", [(r"a (red) cat [x] " + "\\", 1)]),
        ("a (red", [("a ", 1), ("red", 1.1)]),
        ("red) ] cat", [("red) ] cat", 1)]),
        ("ratio 3:4 and a: b", [("ratio 3:4 and a: b", 1)]),
        ("", []),
        ("()", []),
        (r"\[a:1.3\] a|b", [("[a:1.3] a|b", 1)]),
        ("(a|b)", [("a|b", 1.1)]),
        ("(a:0.5", [("a:0.5", 1.1)]),
        ("(a:0.5]", [("a:0.5]", 1.1)]),
        ("a (cat:1.)", [("a cat", 1.0)]),
        ("(cat:2.)(dog:.5)", [("cat", 2.0), ("dog", 0.5)]),
    ],
)
def test_brackets_become_weights(prompt: str, pieces: list) -> None:
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def test_a_long_prompt_is_cut_into_whole_chunks_and_nothing_is_lost() -> None:
    entry = sdopt.Bundle.open(EMOJI_BUNDLE).manifest.tokenizers["tokenizer"]
    tokenizer = Tokenizer(EMOJI_BUNDLE / entry.file, entry)
    prompt = "a cat and (a dog:1.5) " * 9
    ids, weights, _ = chunks(tokenizer, prompt)
    assert ids.shape == weights.shape
    assert len(ids) >= 2
    inner = [i for row in ids.tolist() for i in row if i not in (tokenizer.bos, tokenizer.eos)]
    assert inner == tokenizer.fragment("a cat and a dog " * 9)
    assert set(weights.flatten().tolist()) == {1.0, 1.5}
    assert (weights[:, 0] == 1).all()
    short = chunks(tokenizer, "a cat").ids
    np.testing.assert_array_equal(short, tokenizer(["a cat"]))


def test_a_weighted_chunk_keeps_its_mean_and_an_unweighted_one_is_untouched() -> None:
    hidden = np.random.default_rng(0).normal(0.3, 1, (2, 5, 8)).astype(np.float32)
    weights = np.ones((2, 5), np.float32)
    weights[0, 2] = 1.4
    out = weighted(hidden, weights)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out[1], hidden[1])
    assert out[0].mean() == pytest.approx(hidden[0].mean(), rel=1e-5)
    np.testing.assert_allclose(out[0, 2] / out[0, 1], 1.4 * hidden[0, 2] / hidden[0, 1], rtol=1e-4)


def test_without_brackets_a_short_prompt_is_the_plain_prompt(emoji: sdopt.Pipeline) -> None:
    options = {"seed": 1, "num_inference_steps": 3, "output_type": "np"}
    plain = emoji("a red apple", **options).images
    np.testing.assert_allclose(emoji("a red apple", prompt_style="a1111", **options).images, plain, atol=1e-5)
    heavy = emoji("a (red:1.6) apple", prompt_style="a1111", **options).images
    assert np.abs(heavy - plain).max() > 0.02


def test_a_long_prompt_and_a_short_negative_one_meet_in_one_picture(emoji: sdopt.Pipeline) -> None:
    long = "a cat on a blue background " * 8
    result = emoji([long, "a dog"], negative_prompt="x", prompt_style="a1111", seed=1, num_inference_steps=2)
    assert len(result.images) == 2
    assert emoji.encode([long, "a"], "a1111").shape[1] == 2 * emoji.bundle.manifest.tokenizers["tokenizer"].max_length


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_leaves_out_the_last_layers_and_normalises(skip: int, emoji: sdopt.Pipeline) -> None:
    import torch
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(EMOJI_CHECKPOINT / "text_encoder", dtype=torch.float32)
    entry = emoji.bundle.manifest.tokenizers["tokenizer"]
    ids = torch.from_numpy(Tokenizer(EMOJI_BUNDLE / entry.file, entry)(["a cat"])).long()
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        expected = getattr(model, "text_model", model).final_layer_norm(states[-1 - skip]).numpy()
    np.testing.assert_allclose(emoji.encode(["a cat"], clip_skip=skip), expected, atol=1e-4)
    with pytest.raises(UsageError, match="clip_skip = 50; text_encoder has"):
        emoji("a cat", clip_skip=50)


@pytest.mark.parametrize("size", [(20, 31), (40, 9), (17, 17)])
def test_tiles_are_blended_as_diffusers_blends_them(
    size: tuple[int, int], tiny_checkpoint: Path, tiny_bundle: Path
) -> None:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    vae.enable_tiling()
    assert vae.tile_latent_min_size == 12
    latents = np.random.default_rng(0).standard_normal((2, 4, *size), np.float32)
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latents / np.float32(0.7))).sample.numpy()
    with sdopt.load(tiny_bundle) as pipe:
        found = pipe.decode(latents, "np", vae_tile=12)
        np.testing.assert_allclose(found, np.clip(expected / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(42, 58), (24, 90)])
def test_large_pictures_are_encoded_in_the_tiles_of_diffusers(
    size: tuple[int, int], tiny_checkpoint: Path, tiny_bundle: Path
) -> None:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    vae.enable_tiling()
    pictures = np.random.default_rng(0).uniform(-1, 1, (2, 3, *size)).astype(np.float32)
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(pictures)).latent_dist
    with sdopt.load(tiny_bundle) as pipe:
        mean, deviation = Vae(pipe.pool).encode(pictures, tile=12)
    np.testing.assert_allclose(mean, posterior.mean.numpy() * np.float32(0.7), atol=1e-5)
    assert deviation is not None
    np.testing.assert_allclose(deviation, posterior.std.numpy() * np.float32(0.7), atol=1e-4)


class Counted:
    """An engine that keeps the shape of what it is given."""

    def __init__(self, pipe: sdopt.Pipeline, name: str) -> None:
        self._engine, self.seen = pipe.engine(name), list[tuple[int, ...]]()
        self.inputs, self.outputs = self._engine.inputs, self._engine.outputs

    def __call__(self, **arrays: Any) -> Any:
        self.seen += [array.shape for array in arrays.values()]
        return self._engine(**arrays)

    def close(self) -> None:
        self._engine.close()


def test_a_large_picture_is_decoded_in_calls_of_a_tile(emoji: sdopt.Pipeline) -> None:
    decoder = Counted(emoji, "vae_decoder")
    pipe = sdopt.Pipeline(EnginePool(emoji.bundle, given={"vae_decoder": decoder}))
    latents = np.random.default_rng(0).standard_normal((1, 4, 112, 112), np.float32)
    assert pipe.decode(latents, "np", vae_tile=32).shape == (1, 896, 896, 3)
    assert len(decoder.seen) == 5 * 5
    assert max(decoder.seen) == (1, 4, 32, 32)


@pytest.mark.parametrize("tile", [None, 8])
def test_slicing_gives_the_same_pictures_in_calls_of_one(tile: int | None, emoji: sdopt.Pipeline) -> None:
    image = np.random.default_rng(0).uniform(0, 1, (96, 64, 3)).astype(np.float32)
    options = {"num_images_per_prompt": 3, "seed": 1, "num_inference_steps": 2, "output_type": "np"}
    options |= {"image": image, "vae_tile": tile}
    expected = emoji("a cat", **options).images
    coders = {name: Counted(emoji, name) for name in ("vae_encoder", "vae_decoder")}
    pipe = sdopt.Pipeline(EnginePool(emoji.bundle, given=coders))
    np.testing.assert_allclose(pipe("a cat", vae_slice=True, **options).images, expected, atol=1e-5)
    edges = (64, 8) if tile else (96, 12)
    for coder, edge in zip(coders.values(), edges, strict=True):
        assert {shape[0] for shape in coder.seen} == {1}
        assert max(max(shape[2:]) for shape in coder.seen) == edge


def test_no_call_decodes_more_than_a_tile() -> None:
    seen: list[tuple[int, ...]] = []

    def decode(part: Any) -> Any:
        seen.append(part.shape[2:])
        return np.repeat(np.repeat(part[:, :3], 8, 2), 8, 3)

    latents = np.ones((1, 4, 256, 256), np.float32)
    assert decode_tiled(decode, latents, 16, 8).shape == (1, 3, 2048, 2048)
    assert max(max(shape) for shape in seen) == 16
    np.testing.assert_array_equal(decode_tiled(decode, latents, 16, 8), np.ones((1, 3, 2048, 2048), np.float32))
    with pytest.raises(UsageError, match="vae_tile = 2; allowed are 4"):
        decode_tiled(decode, latents, 2, 8)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("text", ["(" * 8000 + "apple", "(apple:" + "9" * 400 + ")", "(apple:-9999999)"], ids=len)
def test_a_weight_without_bounds_is_the_prompts_fault(name: str, text: str, emoji: sdopt.Pipeline) -> None:
    options: dict[str, Any] = {"prompt": "a cat", name: text}
    with pytest.raises(UsageError, match=f"^{name}: the weight of 'apple' is .*; allowed are -1,000,000 to") as caught:
        emoji(options.pop("prompt"), prompt_style="a1111", num_inference_steps=1, guidance_scale=3.0, **options)
    assert caught.value.param == name


@pytest.mark.parametrize("tile", range(4, 16))
def test_any_tile_gives_a_picture_of_the_full_size(tile: int) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 19), np.float32)

    def decode(part: Any) -> Any:
        return np.repeat(np.repeat(part, 8, 2), 8, 3)

    pixels = decode(latents)
    np.testing.assert_allclose(decode_tiled(decode, latents, tile, 8), pixels, atol=1e-5)
    np.testing.assert_allclose(encode_tiled(lambda part: part[:, :, ::8, ::8], pixels, tile, 8), latents, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a cat AND a dog", "AND joins prompts"),
        ("a [cat:dog:0.5]", r"\[from:to:when\] changes the prompt"),
        ("a [dog:0.5]", r"\[from:to:when\] changes the prompt"),
        ("a [(cat:1.2):[dog]: 5 ]", r"\[from:to:when\] changes the prompt"),
        ("a [cat|dog]", r"\[one\|other\] changes the prompt"),
        ("a [cat|(dog:1.2)]", r"\[one\|other\] changes the prompt"),
    ],
)
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_syntax_that_changes_the_prompt_in_each_step_is_refused_by_name(
    name: str, text: str, named: str, emoji: sdopt.Pipeline
) -> None:
    options: dict[str, Any] = {"prompt": "a cat", name: text}
    with pytest.raises(UsageError, match=f"^{name}: {named}") as caught:
        emoji(options.pop("prompt"), prompt_style="a1111", num_inference_steps=1, **options)
    assert caught.value.param == name


def test_break_begins_a_new_chunk() -> None:
    entry = sdopt.Bundle.open(EMOJI_BUNDLE).manifest.tokenizers["tokenizer"]
    tokenizer = Tokenizer(EMOJI_BUNDLE / entry.file, entry)
    ids, weights, _ = chunks(tokenizer, "a cat BREAK (a dog BREAK a hat:1.5)")
    np.testing.assert_array_equal(ids, tokenizer(["a cat", "a dog", "a hat"]))
    assert [set(row.tolist()) for row in weights] == [{1.0}, {1.0, 1.5}, {1.0, 1.5}]
    np.testing.assert_array_equal(chunks(tokenizer, "BREAKFAST").ids, tokenizer(["BREAKFAST"]))


@pytest.mark.parametrize(
    "text",
    ["(" * 4000 + "a" + ":1.0)" * 800, "(a" * 4000, "(" * 8000, ":" + "9" * 8000, "(a: " + " " * 8000, "[a|" * 2700,
     "(a)" * 2700, "\\(" * 4000, "(a " * 1600 + ":1.0)" * 600],
    ids=lambda text: text[:5],
)  # fmt: skip
def test_the_time_for_a_prompt_grows_with_its_length_alone(text: str) -> None:
    began = time.process_time()
    with contextlib.suppress(UsageError):
        parse(text)
    assert time.process_time() - began < 0.5


def test_a_long_prompt_has_the_limit_that_plain_ones_have(emoji: sdopt.Pipeline) -> None:
    for style in ("plain", "a1111"):
        with pytest.raises(UsageError, match="allowed are 8192"):
            emoji.encode(["(a)" * 3000], style)
