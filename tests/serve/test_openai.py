"""The official openai client against a running server: each picture is the one that Python makes, bit for bit."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sdopt
from tests.serve.conftest import SMALL, Running, pixels

openai = pytest.importorskip("openai", reason="the extra `test` is not installed")


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def gradient(width: int = 64, height: int = 64) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([rows * 3 % 256, columns * 3 % 256, (rows + columns) % 256], -1).astype(np.uint8))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampler": {"sampler": "euler_a", "guidance_scale": 4.0, "negative_prompt": "green"},
    "a1111": {"prompt_style": "a1111", "clip_skip": 1, "sampler": "dpmpp_2m", "schedule": "karras"},
    "hires": {"height": 32, "width": 32, "hires": 2.0, "hires_strength": 0.6},
    "interval": {"guidance_interval": [0.2, 0.7], "guidance_rescale": 0.5},
    "tiled": {"vae_tile": 16},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_picture_is_the_one_that_python_makes(name: str, client: Any, pipe: sdopt.Pipeline) -> None:
    options = {**SMALL, "seed": 11, **OPTIONS[name]}
    answer = client.images.generate(model="emoji", prompt="a red apple", extra_body=options)
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    expected = pipe("a red apple", **own)
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), np.asarray(expected.images[0]))
    assert answer.data[0].parameters == json.loads(json.dumps(expected.parameters[0]))
    assert answer.size == f"{expected.images[0].width}x{expected.images[0].height}"


def test_n_pictures_have_seeds_that_follow_each_other(client: Any, pipe: sdopt.Pipeline) -> None:
    answer = client.images.generate(
        model="emoji",
        prompt="a cat",
        n=3,
        size="64x96",
        extra_body={**SMALL, "seed": 5} | {"height": None, "width": None},
    )
    assert [one.seed for one in answer.data] == [5, 6, 7]
    expected = pipe("a cat", num_inference_steps=4, width=64, height=96, seed=5, num_images_per_prompt=3).images
    for one, image in zip(answer.data, expected, strict=True):
        np.testing.assert_array_equal(pixels(one.b64_json), np.asarray(image))


def test_a_seed_that_is_drawn_makes_the_picture_again(client: Any) -> None:
    first, again = (
        client.images.generate(model="emoji", prompt="the sun", extra_body={**SMALL, **seed}).data[0]
        for seed in ({}, {})
    )
    assert first.seed != again.seed
    once_more = client.images.generate(model="emoji", prompt="the sun", extra_body={**SMALL, "seed": first.seed})
    assert once_more.data[0].b64_json == first.b64_json


@pytest.mark.parametrize(("partials", "expected"), [(0, 0), (1, 1), (3, 3)])
def test_a_stream_has_previews_on_the_way(partials: int, expected: int, client: Any, pipe: sdopt.Pipeline) -> None:
    options = {**SMALL, "seed": 3, "num_inference_steps": 8}
    stream = client.images.generate(
        model="emoji", prompt="a fish", stream=True, partial_images=partials, extra_body=options
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * expected + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == list(range(expected))
    assert all(pixels(event.b64_json).shape == (64, 64, 3) for event in events)
    np.testing.assert_array_equal(pixels(events[-1].b64_json), np.asarray(pipe("a fish", **options).images[0]))


def test_an_edit_keeps_what_its_mask_keeps(client: Any, pipe: sdopt.Pipeline) -> None:
    image, mask = gradient(), Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
    options = {"num_inference_steps": 6, "seed": 2, "strength": 0.8}
    answer = client.images.edit(
        model="emoji", prompt="a heart", image=("a.png", png(image)), mask=("m.png", png(mask)), extra_body=options
    )
    expected = pipe("a heart", image=image, mask_image=mask, **options).images[0]
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), np.asarray(expected))
    transparent = image.convert("RGBA")
    transparent.putalpha(Image.eval(mask, lambda shade: 255 - shade))
    same = client.images.edit(
        model="emoji", prompt="a heart", image=[png(image)], mask=("m.png", png(transparent)), extra_body=options
    )
    np.testing.assert_array_equal(pixels(same.data[0].b64_json), np.asarray(expected))


def test_a_variation_is_a_picture_from_a_picture_without_a_prompt(client: Any, pipe: sdopt.Pipeline) -> None:
    answer = client.images.create_variation(
        image=png(gradient()), model="emoji", extra_body={"num_inference_steps": 5, "seed": 4}
    )
    expected = pipe("", image=gradient(), num_inference_steps=5, seed=4).images[0]
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), np.asarray(expected))


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_formats(form: str, client: Any) -> None:
    answer = client.images.generate(model="emoji", prompt="a car", output_format=form, extra_body={**SMALL, "seed": 1})
    opened = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert opened.format == form.upper()
    assert answer.output_format == form


def test_a_lora_of_the_startup_table(client: Any, pipe: sdopt.Pipeline) -> None:
    options = {**SMALL, "seed": 1}
    answer = client.images.generate(model="emoji", prompt="a cat", extra_body={**options, "lora": {"neon": 0.7}})
    pipe.load_lora_weights("engines/emoji/neon.safetensors", "neon")
    try:
        pipe.set_adapters("neon", 0.7)
        expected = pipe("a cat", **options)
    finally:
        pipe.unload_lora_weights()
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), np.asarray(expected.images[0]))
    assert answer.data[0].parameters["loras"][0]["name"] == "neon"


def test_a_control_net_sees_the_picture_that_was_sent(client: Any, pipe: sdopt.Pipeline) -> None:
    shape = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(shape).ellipse((8, 8, 55, 55), fill=255)
    options = {**SMALL, "seed": 3, "controlnet_conditioning_scale": 0.9}
    sent = {"silhouette": base64.b64encode(png(shape)).decode()}
    answer = client.images.generate(model="emoji", prompt="a cat", extra_body={**options, "control_image": sent})
    expected = pipe("a cat", control_image={"silhouette": shape}, **options).images[0]
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), np.asarray(expected))
    with pytest.raises(openai.BadRequestError, match="emoji has no adapter 'nobody'"):
        client.images.generate(model="emoji", prompt="a", extra_body={"control_image": {"nobody": sent["silhouette"]}})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"num_inference_steps": 0}, "num_inference_steps"),
    "many steps": ({"num_inference_steps": 100000}, "num_inference_steps"),
    "unknown": ({"stepz": 3}, "stepz"),
    "seed": ({"seed": -1}, "seed"),
    "several seeds": ({"seed": [1, 2]}, "seed"),
    "size": ({"height": 63}, "height"),
    "large": ({"height": 8192, "width": 8192}, "size"),
    "lora": ({"lora": {"ink": 1.0}}, "lora"),
    "weights": ({"lora": {"neon": "strong"}}, "lora"),
    "array": ({"prompt_embeds": [[1.0]]}, "prompt_embeds"),
    "address": ({"image": "http://127.0.0.1/x.png"}, "image"),
    "path": ({"image": "file:///etc/passwd"}, "image"),
    "no picture": ({"image": "aGVsbG8="}, "image"),
    "n by the keyword": ({"num_images_per_prompt": 2}, "num_images_per_prompt"),
    "sampler": ({"sampler": "nobody"}, "sampler"),
    "unread": ({"strength": 0.5}, "strength"),
    "background": ({"background": "transparent"}, "background"),
    "url": ({"response_format": "url"}, "response_format"),
    "quality": ({"quality": "golden"}, "quality"),
    "partials": ({"partial_images": 2}, "partial_images"),
    "compression": ({"output_compression": 50}, "output_compression"),
    "deadline": ({"deadline": 0}, "deadline"),
    "size by its name": ({"size": "1x64"}, "size"),
    "size of no model": ({"size": "63x64"}, "size"),
    "two pictures": ({"image": ["aGVsbG8="] * 2}, "image"),
    "many pictures": ({"control_image": {"silhouette": ["aGVsbG8="] * 17}}, "control_image"),
    "lists in lists": ({"control_image": {"silhouette": [[["aGVsbG8="]]]}}, "control_image"),
    "many steps at last": ({"hires": 1.5, "hires_steps": 900}, "hires_steps"),
    "too wide": ({"output_format": "webp", "width": 16384, "height": 8, "num_inference_steps": 1}, "output_format"),
    "two prompts": ({"prompt": ["a", "b"]}, "prompt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named(name: str, client: Any) -> None:
    fields, param = WRONG[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="emoji", prompt="a cat", extra_body=fields)
    assert caught.value.param == param
    assert len(caught.value.message) > 20
    assert caught.value.request_id


@pytest.mark.parametrize("text", ["[" * 100_000, '{"neon": ', "9" * 5000, "NaN"])
def test_a_field_of_a_form_that_is_no_json(text: str, client: Any) -> None:
    for name in ("lora", "n", "strength"):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(model="emoji", prompt="a cat", image=png(gradient()), extra_body={name: text})
        assert caught.value.param == name


def test_models(client: Any) -> None:
    assert [one.id for one in client.models.list()] == ["emoji"]
    assert client.models.retrieve("emoji").sdopt["defaults"]["height"] == 128
    with pytest.raises(openai.NotFoundError, match="dall-e-9"):
        client.images.generate(model="dall-e-9", prompt="a cat")


def test_what_is_ignored_is_told(server: Running, client: Any) -> None:
    raw = client.images.with_raw_response.generate(
        model="emoji", prompt="a cat", quality="high", style="vivid", extra_body={**SMALL, "seed": 1}
    )
    assert raw.headers["x-sdopt-ignored"] == "quality, style"
