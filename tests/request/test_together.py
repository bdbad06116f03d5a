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
from sdopt.image import masks
from sdopt.image import pil as images
from sdopt.request.keywords import replayed
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


@pytest.mark.parametrize("negatives", [True, False])
def test_pooled_embeddings_are_repeated_too(negatives: bool, xl: sdopt.Pipeline) -> None:
    (hidden, pooled), (against, none) = (
        xl._text.encode([(word,) * 3 for word in t]) for t in (["a cat", "a"], ["b", "c"])
    )
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


@pytest.mark.parametrize("name", ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"])
@pytest.mark.parametrize("rows", [1, 3])
def test_pooled_embeddings_have_as_many_rows_as_the_others(rows: int, name: str, xl: sdopt.Pipeline) -> None:
    hidden, pooled = xl._text.encode([("a cat",) * 3, ("a",) * 3])
    assert pooled is not None
    given = {"prompt_embeds": hidden, "pooled_prompt_embeds": pooled}
    given |= {f"negative_{key}": array for key, array in given.items()}
    given[name] = np.repeat(pooled[:1], rows, 0)
    with pytest.raises(UsageError, match=f"{name} has {rows} rows, and there are 2 prompts") as caught:
        xl(**given, **OPTIONS)
    assert caught.value.param == name


def test_a_picture_from_arrays_says_so_and_cannot_be_replayed_without_them(emoji: sdopt.Pipeline) -> None:
    hidden = emoji.encode(["a cat"])
    noise = np.zeros((1, 4, 16, 16), np.float32)
    plan = make_plan(emoji.bundle, None, {"prompt_embeds": hidden, "latents": noise})
    assert plan.parameters(0)["made_with_arrays"] == ["latents", "prompt_embeds"]
    with pytest.raises(UsageError, match="was made with latents, prompt_embeds, which its PNG does not carry"):
        replayed(plan.parameters(0))
    text = make_plan(emoji.bundle, "a cat", {}).parameters(0)
    assert "made_with_arrays" not in text
    assert replayed(text)["prompt"] == "a cat"


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
            "negative_prompt_embeds has 2 rows, and there are 1 prompts; give as many rows$",
        ),
        (
            {"prompt": ["a", "b"], "negative_prompt_embeds": HIDDEN},
            "negative_prompt_embeds",
            r"has 1 rows, and there are 2 prompts; give as many rows: np.repeat\(negative_prompt_embeds, 2, 0\)",
        ),
        (
            {"prompt_embeds": HIDDEN.repeat(2, 0), "negative_prompt_embeds": HIDDEN},
            "negative_prompt_embeds",
            "has 1 rows, and there are 2 prompts",
        ),
        (
            {"prompt": "a", "num_images_per_prompt": 2, "negative_prompt_embeds": HIDDEN.repeat(2, 0)},
            "negative_prompt_embeds",
            "has 2 rows, and there are 1 prompts",
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
    zeros_and_ones, black_and_white = masks.read(mask), masks.read(mask * 255)
    np.testing.assert_array_equal(images.to_mask(zeros_and_ones, 64, 64, 1), images.to_mask(black_and_white, 64, 64, 1))
    np.testing.assert_array_equal(np.asarray(zeros_and_ones), mask * 255)


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


def test_pictures_of_several_sizes_are_not_squeezed_to_the_first_ones(emoji: sdopt.Pipeline) -> None:
    small, wide = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (96, 64), "red")
    mask, wide_mask = (Image.new("L", one.size, 255) for one in (small, wide))
    both = {"image": [small, wide], "num_inference_steps": 2}
    prompts, masks_of_both = ["a cat", "a dog"], {"mask_image": [mask, wide_mask]}
    latents = {"image": np.zeros((2, 4, 8, 8), np.float32)}
    arrays = {"image": [np.zeros((64, 64, 3)), np.zeros((64, 96, 3))]}
    for options, name in ((both, "image"), ({**both, **masks_of_both}, "image"), (arrays, "image"),
                          ({**latents, **masks_of_both}, "mask_image"), ({**both, "height": 64}, "image")):  # fmt: skip
        with pytest.raises(UsageError, match=f"{name}: number 0 is 64x64 pixels and number 1 96x64; give") as caught:
            emoji.plan(prompts, **options)  # pyright: ignore
        assert caught.value.param == name
    assert emoji.plan(prompts, **both, height=64, width=64).image is not None  # pyright: ignore
    cropped = emoji.plan(prompts, **both, **masks_of_both, padding_mask_crop=8)  # pyright: ignore
    assert [overlay.over(small).size for overlay in cropped.overlays] == [(64, 64), (96, 64)]
    assert emoji.plan(prompts, image=[small, small], num_inference_steps=2).height == 64


def test_a_picture_from_other_pictures_cannot_be_replayed_without_them(emoji: sdopt.Pipeline) -> None:
    picture = Image.new("L", (128, 128), 255)
    for name, given in (("strength", {"image": picture}), ("controls", {"control_image": {"silhouette": picture}})):
        record = emoji.plan("a cat", seed=1, **given).parameters(0)
        assert name in record
        with pytest.raises(UsageError, match="does not carry; use --"):
            replayed(record)
