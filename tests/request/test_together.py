"""How keywords fit together: embeddings, texts and pictures for several images, as diffusers has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.errors import UsageError
from sdopt.image import pil as images
from sdopt.request.plan import make_plan
from tests.conftest import EMOJI_CHECKPOINT
from tests.test_pipeline import FLOOR_DB, diffusers_pipeline, picture_psnr

OPTIONS = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
SIZE = {"height": 128, "width": 128}


@pytest.fixture(scope="module")
def emoji() -> Iterator[sdopt.Pipeline]:
    with sdopt.load() as pipe:
        yield pipe


@pytest.fixture(scope="module")
def xl(sdxl_bundle: Path) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(sdxl_bundle) as pipe:
        yield pipe


def generators(*seeds: int) -> Any:
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("prompts", [["a red apple"], ["a cat", "a dog"]], ids=len)
@pytest.mark.parametrize("negative", ["embeds", "text", None])
def test_embeddings_stand_for_every_image_of_their_prompt(
    negative: str | None, prompts: list[str], emoji: sdopt.Pipeline
) -> None:
    given = {"prompt_embeds": emoji.encode(prompts)}
    if negative == "embeds":
        given["negative_prompt_embeds"] = emoji.encode(["blue"] * len(prompts))
    tensors = {name: tensor(array) for name, array in given.items()}
    text = {"negative_prompt": ["blue"] * len(prompts)} if negative == "text" else {}
    options = {**OPTIONS, **text, "num_images_per_prompt": 2}
    seeds = list(range(5, 5 + 2 * len(prompts)))
    expected = diffusers_pipeline(EMOJI_CHECKPOINT)(**tensors, generator=generators(*seeds), **SIZE, **options).images
    found = emoji(seed=seeds, **given, **options).images
    assert found.shape == expected.shape == (len(seeds), 128, 128, 3)
    assert picture_psnr(expected, found) >= FLOOR_DB


def test_negative_embeddings_stand_beside_a_text(emoji: sdopt.Pipeline) -> None:
    given = emoji.encode(["a red apple"])
    theirs = diffusers_pipeline(EMOJI_CHECKPOINT)
    options = {**OPTIONS, "num_images_per_prompt": 2}
    expected = theirs("a cat", negative_prompt_embeds=tensor(given), generator=generators(1, 2), **SIZE, **options)
    found = emoji("a cat", negative_prompt_embeds=given, seed=1, **options).images
    assert picture_psnr(expected.images, found) >= FLOOR_DB
    pair = emoji(["a cat", "a dog"], negative_prompt_embeds=given, seed=1, **OPTIONS).images  # one for all
    assert picture_psnr(emoji("a cat", negative_prompt_embeds=given, seed=1, **OPTIONS).images[0], pair[0]) >= 80


@pytest.mark.parametrize("negatives", [True, False])
def test_pooled_embeddings_are_repeated_too(negatives: bool, xl: sdopt.Pipeline) -> None:
    (hidden, pooled), (against, none) = (xl._text.encode(t, t) for t in (["a cat", "a"], ["b", "c"]))
    given: dict[str, Any] = {"prompt_embeds": hidden, "pooled_prompt_embeds": pooled}
    texts: dict[str, Any] = {}
    if negatives:
        given |= {"negative_prompt_embeds": against, "negative_pooled_prompt_embeds": none}
        texts = {"negative_prompt": ["b", "c"]}
    options = {**OPTIONS, "num_images_per_prompt": 2, "seed": 5}
    expected = xl(["a cat", "a"], **texts, **options).images
    found = xl(**given, **options).images
    assert len(found) == 4
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_text_beside_long_embeddings_is_filled_up_to_their_length(emoji: sdopt.Pipeline) -> None:
    long = emoji.encode(["a cat on a blue background " * 8], "a1111")
    assert long.shape[1] == 64
    found = emoji(prompt_embeds=long, negative_prompt="blue", seed=1, **OPTIONS).images
    text = emoji("a cat on a blue background " * 8, negative_prompt="blue", prompt_style="a1111", seed=1, **OPTIONS)
    assert picture_psnr(text.images, found) >= 80
    with pytest.raises(UsageError, match="has 40 tokens and the negative prompt 32") as caught:
        emoji(prompt_embeds=long[:, :40], negative_prompt="blue", **OPTIONS)
    assert caught.value.param == "prompt_embeds"


HIDDEN = np.zeros((1, 32, 128), np.float32)


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"prompt": "a", "prompt_embeds": HIDDEN}, "prompt_embeds", "prompt and prompt_embeds: give one of the two"),
        (
            {"prompt_embeds": HIDDEN, "negative_prompt_embeds": np.zeros((1, 64, 128), np.float32)},
            "negative_prompt_embeds",
            r"is \(1, 64, 128\) and prompt_embeds \(1, 32, 128\); give as many tokens",
        ),
        (
            {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": HIDDEN},
            "negative_prompt_embeds",
            "negative_prompt and negative_prompt_embeds: give one of the two",
        ),
        (
            {"prompt": "a", "negative_prompt_embeds": HIDDEN.repeat(2, 0)},
            "negative_prompt_embeds",
            "2 rows for 1 prompts; give one, or as many",
        ),
        ({"prompt_embeds": HIDDEN[:, :, :3]}, "prompt_embeds", r"got float32 \(1, 32, 3\); this model takes 128 feat"),
        ({"prompt": "a", "pooled_prompt_embeds": HIDDEN[0]}, "pooled_prompt_embeds", "needs prompt_embeds"),
        ({"prompt": ["a"] * 65}, "prompt", "65 images in one call; allowed are 64"),
        ({"prompt": ["a"] * 2, "num_images_per_prompt": 33}, "num_images_per_prompt", "66 images in one call"),
        ({"prompt": "a", "prompt_2": ["a", "b"]}, "prompt_2", "2 texts of prompt_2 for 1 prompts"),
        ({"prompt": "a", "negative_target_size": (8, 8)}, "negative_original_size", "give both, or neither"),
        ({"prompt": "a", "sampler": "euler", "eta": 0.5}, "eta", "euler has no eta"),
        ({"prompt": "a", "num_inference_steps": 10**6}, "num_inference_steps", "trained on 1000 timesteps"),
        ({"prompt": "a", "image": Image.new("RGB", (64, 64)), "strength": 5e-324}, "strength", "nothing to do"),
        ({"prompt": "a", "seed": 2**64 - 1, "num_images_per_prompt": 2}, "seed", "for 2 images"),
        ({"prompt": "a", "sigmas": [1.0, 0.5], "timesteps": [1], "sampler": "euler"}, "sigmas", "not both"),
        ({"prompt": "a", "mask_blur": 3}, "mask_blur", "needs a mask"),
        ({"prompt": "a", "width": 10}, "width", "multiples of 8 pixels"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_together_names_the_keyword(
    options: dict[str, Any], param: str, message: str, emoji: sdopt.Pipeline
) -> None:
    prompt = options.pop("prompt", None)
    with pytest.raises(UsageError, match=message) as caught:
        make_plan(emoji.bundle, prompt, options)  # pyright: ignore
    assert caught.value.param == param


def test_clip_skip_is_for_the_prompt_as_in_diffusers_and_for_both_as_in_automatic1111(emoji: sdopt.Pipeline) -> None:
    theirs = diffusers_pipeline(EMOJI_CHECKPOINT)
    if not hasattr(theirs.text_encoder, "text_model"):
        theirs.text_encoder.__dict__["text_model"] = theirs.text_encoder  # transformers 5.6 has it no more
    options = {**OPTIONS, "clip_skip": 1, "negative_prompt": "blue"}
    expected = theirs("a red apple", generator=generators(1), **SIZE, **options).images
    assert picture_psnr(expected, emoji("a red apple", seed=1, **options).images) >= FLOOR_DB
    given = {f"{sign}prompt_embeds": emoji.encode([text], "plain", 1)
             for sign, text in (("", "a red apple"), ("negative_", "blue"))}  # fmt: skip
    both = emoji(seed=1, **given, **OPTIONS).images
    assert picture_psnr(both, emoji("a red apple", seed=1, prompt_style="a1111", **options).images) >= 80


def test_an_empty_second_prompt_is_the_first_one(xl: sdopt.Pipeline) -> None:
    plain = xl("a cat", negative_prompt="dog", seed=1, **OPTIONS)
    empty = xl("a cat", negative_prompt="dog", prompt_2="", negative_prompt_2="", seed=1, **OPTIONS)
    np.testing.assert_array_equal(plain.images, empty.images)
    assert plain.parameters == empty.parameters


def test_pictures_stand_for_every_image_of_their_prompt(emoji: sdopt.Pipeline) -> None:
    pictures = np.random.default_rng(0).random((2, 128, 128, 3), np.float32)
    options = {**OPTIONS, "strength": 0.5, "seed": [1, 2, 3, 4]}
    found = emoji(["a cat", "a dog"], image=list(pictures), num_images_per_prompt=2, **options).images
    alone = emoji(["a cat"] * 2 + ["a dog"] * 2, image=[pictures[i] for i in (0, 0, 1, 1)], **options).images
    np.testing.assert_array_equal(found, alone)
    np.testing.assert_array_equal(
        found, emoji(["a cat", "a dog"], image=pictures, num_images_per_prompt=2, **options).images
    )  # as output_type="np" gives them


def test_a_mask_of_zeros_and_ones_is_a_mask() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 8:40] = 1
    np.testing.assert_array_equal(images.to_mask(mask, 64, 64, 1), images.to_mask(mask * 255, 64, 64, 1))
    np.testing.assert_array_equal(np.asarray(images.as_pil(mask, "L")), mask * 255)


def test_a_picture_of_16_bits_keeps_its_shades(tmp_path: Path) -> None:
    shades = np.tile(np.linspace(0, 65535, 64), (64, 1)).astype(np.uint16)
    Image.fromarray(shades).save(tmp_path / "a.png")
    found = images.to_array(images.open_image(tmp_path / "a.png"), 64, 64, 1)
    np.testing.assert_allclose(found[0, 0], shades / 32767.5 - 1, atol=0.005)
    for mode in ("F", "I", "LAB"):
        with pytest.raises(UsageError, match=rf'its mode is {mode}.*convert\("RGB"\)'):
            images.to_array(Image.new(mode, (8, 8)), 8, 8, 1)


def test_a_tensor_is_told_how_to_become_a_picture(emoji: sdopt.Pipeline) -> None:
    import torch

    with pytest.raises(UsageError, match=r"torch.Tensor'> \(3, 64, 64\).*image.permute\(1, 2, 0\).numpy\(\)") as caught:
        emoji("a cat", image=torch.zeros(3, 64, 64))
    assert caught.value.param == "image"


@pytest.mark.parametrize("value", [5, "x", {"latents": np.zeros((3, 3))}, {"latents": "x"}])
def test_what_a_callback_returns_is_latents_or_nothing(value: Any, emoji: sdopt.Pipeline) -> None:
    with pytest.raises(UsageError, match="callback_on_step_end returned") as caught:
        emoji("a cat", callback_on_step_end=lambda *given: value, **OPTIONS)
    assert caught.value.param == "callback_on_step_end"


@pytest.mark.parametrize("output_type", [None, 5, "jpeg"])
def test_an_output_type_is_one_of_three(output_type: Any, emoji: sdopt.Pipeline) -> None:
    with pytest.raises(UsageError, match="output_type = .*; allowed are ") as caught:
        emoji("a cat", output_type=output_type)
    assert caught.value.param == "output_type"
