"""webuiapi, a client of AUTOMATIC1111's web UI, against a running server: its pictures are those that Python makes."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

import sdopt
from sdopt.image import masks
from tests.serve.conftest import Running, pixels, running
from tests.serve.test_openai import gradient, png

webuiapi = pytest.importorskip("webuiapi", reason="the extra `test` is not installed")

SMALL: dict[str, Any] = {"steps": 4, "width": 64, "height": 64, "cfg_scale": 4.0, "seed": 11}
OWN: dict[str, Any] = {  # the same as keywords
    "num_inference_steps": 4, "width": 64, "height": 64, "guidance_scale": 4.0, "seed": 11, "prompt_style": "a1111",
}  # fmt: skip
EULER_A = {"sampler": "euler_a"}


def client_of(server: Running, **options: Any) -> Any:
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", **options)


@pytest.fixture(scope="module")
def api(server: Running) -> Any:
    return client_of(server)


def same(image: Image.Image, expected: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(expected))


def base(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


# name -> (fields, keywords)
TEXT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the client's own sampler": ({}, EULER_A),
    "with its scheduler": (
        {"sampler_name": "DPM++ 2M Karras"},
        {"sampler": "dpmpp_2m", "schedule": "karras"},
    ),
    "a label": ({"sampler_name": "Euler", "scheduler": "SGM Uniform"}, {"sampler": "euler", "schedule": "sgm_uniform"}),
    "a name": ({"sampler_name": "Heun", "scheduler": "exponential"}, {"sampler": "heun", "schedule": "exponential"}),
    "evenly": ({"sampler_name": "Euler", "scheduler": "Normal"}, {"sampler": "euler", "schedule": "linspace"}),
    "ddim": ({"sampler_name": "DDIM", "eta": 0.0}, {"sampler": "ddim", "eta": 0.0}),
    "ddim with noise": ({"sampler_name": "DDIM"}, {"sampler": "ddim", "eta": 1.0}),  # the client sends 1
    "negative": ({"negative_prompt": "[green] (frame:1.2)"}, {**EULER_A, "negative_prompt": "[green] (frame:1.2)"}),
    "clip skip": ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, {**EULER_A, "clip_skip": 1}),
    "hires": (
        {"width": 32, "height": 32, "enable_hr": True, "hr_scale": 2, "denoising_strength": 0.6},
        {**EULER_A, "width": 32, "height": 32, "hires": 2.0, "hires_strength": 0.6},
    ),
    "hires with its steps": (
        {"width": 32, "height": 48, "enable_hr": True, "hr_scale": 1.5, "hr_second_pass_steps": 6},
        {**EULER_A, "width": 32, "height": 48, "hires": 1.5, "hires_strength": 0.7, "hires_steps": 6},
    ),
    "hires is off": ({"hr_upscaler": "R-ESRGAN 4x+", "hr_resize_x": 512}, EULER_A),
}


@pytest.mark.parametrize("name", TEXT)
def test_a_picture_is_the_one_that_python_makes(name: str, api: Any, pipe: sdopt.Pipeline) -> None:
    fields, own = TEXT[name]
    prompt = "a (red:1.3) apple"
    result = api.txt2img(prompt=prompt, **{**SMALL, **fields})
    expected = pipe(prompt, **{**OWN, **own})
    same(result.image, expected.images[0])
    assert result.info["all_seeds"] == [11]
    assert result.info["infotexts"][0].startswith(prompt)
    assert f"Sampler: {result.info['sampler_name']}" in result.info["infotexts"][0]
    assert result.image.info["parameters"] == result.info["infotexts"][0]
    assert json.loads(result.image.info["sdopt"]) == json.loads(json.dumps(expected.parameters[0]))
    assert result.parameters["prompt"] == prompt


def test_what_is_left_out_is_the_bundles_own(server: Running, pipe: sdopt.Pipeline) -> None:
    status, body = server.post("/sdapi/v1/txt2img", {"prompt": "a cat", "seed": 3})
    assert status == 200
    np.testing.assert_array_equal(pixels(body["images"][0]), np.asarray(pipe("a cat", seed=3).images[0]))


def test_images_have_seeds_that_follow_each_other(api: Any, pipe: sdopt.Pipeline) -> None:
    result = api.txt2img(prompt="a cat", batch_size=2, n_iter=2, **SMALL)
    assert result.info["all_seeds"] == [11, 12, 13, 14]
    expected = pipe("a cat", **OWN, **EULER_A, num_images_per_prompt=4).images
    for image, own in zip(result.images, expected, strict=True):
        same(image, own)


def test_a_seed_of_minus_one_is_drawn(api: Any) -> None:
    first, second = (api.txt2img(prompt="the sun", **{**SMALL, "seed": -1}) for _ in range(2))
    assert first.info["seed"] != second.info["seed"]
    again = api.txt2img(prompt="the sun", **{**SMALL, "seed": first.info["seed"]})
    same(again.image, first.image)


@pytest.mark.parametrize("tag", ["<lora:neon:0.7>", "<lora:neon:0.3:0.9>"])
def test_a_tag_names_a_lora_of_the_startup_table(tag: str, api: Any, pipe: sdopt.Pipeline) -> None:
    result = api.txt2img(prompt=f"a cat {tag}", **SMALL)
    pipe.load_lora_weights("engines/emoji/neon.safetensors", "neon")
    try:
        pipe.set_adapters("neon", 0.7 if "0.7" in tag else {"unet": 0.9, "text_encoder": 0.3})
        expected = pipe("a cat", **OWN, **EULER_A).images[0]
    finally:
        pipe.unload_lora_weights()
    same(result.image, expected)
    assert tag in result.info["infotexts"][0]
    assert result.info["prompt"] == f"a cat {tag}"


def mask_of() -> Image.Image:
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
    return mask


def mask_in_transparency() -> Image.Image:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    image.putalpha(mask_of())
    return image


ORIGINAL: dict[str, Any] = {"inpainting_fill": 1}
PICTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"strength": 0.75}),
    "strength": ({"denoising_strength": 0.5}, {"strength": 0.5}),
    "mask": (
        {**ORIGINAL, "mask_image": mask_of(), "inpaint_full_res": False},
        {"strength": 0.75, "mask_image": mask_of(), "mask_blur": 4.0},
    ),
    "transparency": (
        {**ORIGINAL, "mask_image": mask_in_transparency(), "inpaint_full_res": False, "mask_blur": 0},
        {"strength": 0.75, "mask_image": mask_of()},
    ),
    "only the region": (
        {**ORIGINAL, "mask_image": mask_of(), "inpaint_full_res_padding": 8, "mask_blur": 2},
        {"strength": 0.75, "mask_image": mask_of(), "mask_blur": 2.0, "padding_mask_crop": 8},
    ),
    "the other part": (
        {**ORIGINAL, "mask_image": mask_of(), "inpainting_mask_invert": 1, "inpaint_full_res": False, "mask_blur": 0},
        {"strength": 0.75, "mask_image": ImageOps.invert(mask_of())},
    ),
    "colours around it": (
        {"mask_image": mask_of(), "inpaint_full_res": False, "mask_blur": 2},
        {
            "strength": 0.75, "mask_image": mask_of(), "mask_blur": 2.0,
            "image": masks.filled_from_around(gradient(), mask_of().filter(ImageFilter.GaussianBlur(2.0))),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_from_a_picture(name: str, api: Any, pipe: sdopt.Pipeline) -> None:
    fields, own = PICTURES[name]
    result = api.img2img(prompt="a heart", images=[gradient()], **SMALL, **fields)
    expected = pipe("a heart", **{"image": gradient(), **OWN, **EULER_A, **own})
    same(result.image, expected.images[0])
    assert "init_images" not in result.parameters


@pytest.mark.parametrize(("mode", "resized"), [(1, masks.covering), (2, masks.filled)])
def test_a_picture_of_another_shape(mode: int, resized: Any, api: Any, pipe: sdopt.Pipeline) -> None:
    wide = gradient(96, 64)
    result = api.img2img(prompt="a heart", images=[wide], resize_mode=mode, **SMALL)
    same(result.image, pipe("a heart", image=resized(wide, 64, 64), strength=0.75, **OWN, **EULER_A).images[0])


def test_colours_around_a_mask_come_from_around_it() -> None:
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    ImageDraw.Draw(image).rectangle((20, 20, 43, 43), fill=(0, 0, 255))
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
    filled = np.asarray(masks.filled_from_around(image, mask)).astype(int)
    assert np.abs(filled - (200, 30, 30)).max() <= 8  # of 255: blurs with little opacity are rounded


def test_images_can_be_left_out_of_the_answer(api: Any) -> None:
    result = api.txt2img(prompt="a cat", send_images=False, **SMALL)
    assert result.images == []
    assert result.info["all_seeds"] == [11]


# name -> (fields, the field that is named, what else the answer says)
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"stepz": 3}, "stepz", "steps"),
    "steps": ({"steps": 0}, "steps", "from 1"),
    "many steps": ({"steps": 100000}, "steps", "up to 150"),
    "type": ({"prompt": 3}, "prompt", "text"),
    "several prompts": ({"prompt": ["a", "b"]}, "prompt", "one text"),
    "size": ({"width": 63}, "width", "multiples"),
    "large": ({"width": 8192, "height": 8192}, "width", "pixels"),
    "seed": ({"seed": -2}, "seed", "-1"),
    "count": ({"batch_size": 8, "n_iter": 8}, "batch_size", "64 images"),
    "scheduler": ({"scheduler": "Align Your Steps"}, "scheduler", "Karras"),
    "two schedulers": ({"sampler_name": "Euler Karras", "scheduler": "Beta"}, "scheduler", "one of them"),
    "no such scheduler": ({"sampler_name": "DPM++ 2M", "scheduler": "Normal"}, "scheduler", "SGM Uniform"),
    "not its scheduler": ({"sampler_name": "DDIM", "scheduler": "Karras"}, "scheduler", "karras"),
    "styles": ({"styles": ["anime"]}, "styles", "prompt"),
    "subseed": ({"subseed": 5, "subseed_strength": 0.5}, "subseed", "seed"),
    "subseed strength": ({"subseed_strength": 0.5}, "subseed_strength", "seed"),
    "seed resize": ({"seed_resize_from_h": 512}, "seed_resize_from_h", "seed"),
    "churn": ({"s_churn": 0.5}, "s_churn", "noise"),
    "noise": ({"s_noise": 1.1}, "s_noise", "noise"),
    "faces": ({"restore_faces": True}, "restore_faces", "face"),
    "tiling": ({"tiling": True}, "tiling", "edges"),
    "files": ({"save_images": True}, "save_images", "files"),
    "script": ({"script_name": "X/Y/Z plot"}, "script_name", "scripts"),
    "script arguments": ({"script_args": [1]}, "script_args", "scripts"),
    "extension": ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, "alwayson_scripts", "ADetailer"),
    "extension by hand": ({"alwayson_scripts": {"ControlNet": [1]}}, "alwayson_scripts", "ControlNet"),
    "setting": ({"override_settings": {"eta_ancestral": 0.5}}, "override_settings", "eta_ancestral"),
    "clip skip": ({"override_settings": {"CLIP_stop_at_last_layers": 0}}, "override_settings", "from 1"),
    "eta": ({"sampler_name": "Euler a", "eta": 0.5}, "eta", "Euler a"),
    "eta of ddim": ({"sampler_name": "DDIM", "eta": 2}, "eta", "0 to 1"),
    "lora": ({"prompt": "a cat <lora:ink>"}, "prompt", "neon"),
    "tag": ({"prompt": "a cat <lora:neon:strong>"}, "prompt", "no numbers"),
    "negative tag": ({"negative_prompt": "<lora:neon:1>"}, "negative_prompt", "prompt"),
    "long prompt": ({"prompt": "a" * 9000}, "prompt", "8192"),
    "upscaler": ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler", "Latent"),
    "other latents": ({"enable_hr": True, "hr_upscaler": "Latent (bicubic)"}, "hr_upscaler", "Latent"),
    "hires size": ({"enable_hr": True, "hr_resize_x": 512}, "hr_resize_x", "hr_scale"),
    "hires prompt": ({"enable_hr": True, "hr_prompt": "a dog"}, "hr_prompt", "both passes"),
    "hires sampler": ({"enable_hr": True, "hr_sampler_name": "Euler"}, "hr_sampler_name", "both passes"),
    "hires scale": ({"enable_hr": True, "hr_scale": 9}, "hr_scale", "4"),
    "refiner": ({"refiner_checkpoint": "xl"}, "refiner_checkpoint", "refiner"),
    "id": ({"force_task_id": "a/../b"}, "force_task_id", "letters"),
    "weight of a lora": ({"prompt": "a cat <lora:neon:nan>"}, "prompt", "neon"),
}
WRONG_PICTURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "missing": ({"init_images": None}, "init_images", "missing"),
    "several": ({"init_images": [base(gradient())] * 2}, "init_images", "list"),
    "address": ({"init_images": ["http://127.0.0.1/a.png"]}, "init_images", "addresses"),
    "file": ({"init_images": ["file:///etc/passwd"]}, "init_images", "addresses"),
    "no picture": ({"init_images": ["aGVsbG8="]}, "init_images", "PNG"),
    "mask": ({"mask": "aGVsbG8="}, "mask", "PNG"),
    "mask's size": ({"mask": base(Image.new("L", (32, 32), 255)), "inpaint_full_res": False}, "mask", "32x32"),
    "black mask": ({"mask": base(Image.new("L", (64, 64)))}, "mask", "mask"),
    "latent fill": ({"mask": base(mask_of()), "inpainting_fill": 2}, "inpainting_fill", "0 and 1"),
    "latent resize": ({"resize_mode": 3}, "resize_mode", "0, 1 and 2"),
    "two blurs": ({"mask": base(mask_of()), "mask_blur_x": 2, "mask_blur_y": 4}, "mask_blur_x", "one radius"),
    "noise": ({"initial_noise_multiplier": 1.2}, "initial_noise_multiplier", "size"),
    "strength": ({"denoising_strength": 1.5}, "denoising_strength", "1"),
    "hires": ({"enable_hr": True}, "enable_hr", "unknown"),
}  # fmt: skip


def refused(server: Running, route: str, body: dict[str, Any], field: str, said: str, status: int = 422) -> None:
    got, answer = server.post(f"/sdapi/v1/{route}", body)
    assert got == status, answer
    assert set(answer) >= {"error", "detail", "body", "errors"}
    assert answer["param"] == field
    assert said in answer["detail"]
    assert field in answer["detail"]


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_or_not_there_is_named(name: str, server: Running) -> None:
    fields, field, said = WRONG[name]
    refused(server, "txt2img", {"prompt": "a cat", **SMALL, **fields}, field, said)


@pytest.mark.parametrize("name", WRONG_PICTURES)
def test_a_wrong_picture_is_named(name: str, server: Running) -> None:
    fields, field, said = WRONG_PICTURES[name]
    body = {"prompt": "a cat", **SMALL, "init_images": [base(gradient())], **fields}
    refused(server, "img2img", body, field, said)


def test_what_is_meant_is_read_as_fields_are(server: Running) -> None:
    refused(server, "interrupt", {"id": "task-1"}, "id", "force_task_id")
    refused(server, "skip", {"force_task_id": [1]}, "force_task_id", "letters")
    status, answer = server.get("/sdapi/v1/progress?skip_current_image=perhaps")
    assert (status, answer["param"]) == (422, "skip_current_image")


@pytest.mark.parametrize(
    "text",
    ['{"\\ud800": 1}', '{"alwayson_scripts": {"\\udfff": 1}}', '{"override_settings": {"a\\ud83d": 1}}', '{"\xff": 1}'],
)
def test_half_a_letter_is_no_text(text: str, server: Running) -> None:
    content, kind = text.encode("latin-1"), {"content-type": "application/json"}
    status, answer = server.send("POST", "/sdapi/v1/txt2img", content, **kind)
    assert status == 422
    assert answer["detail"].startswith("the body is no JSON")
    assert server.send("POST", "/v1/images/generations", content, **kind)[0] == 400
    whole = {"prompt": "a \U0001f431", **SMALL}  # two halves that belong together
    assert server.post("/sdapi/v1/txt2img", whole)[0] == 200


def test_a_sampler_and_a_model_that_are_not_found(server: Running, api: Any) -> None:
    body = {"prompt": "a cat", **SMALL}
    status, answer = server.post("/sdapi/v1/txt2img", {**body, "sampler_name": "Restart"})
    assert (status, answer["param"]) == (404, "sampler_name")
    assert answer["detail"].startswith("Sampler not found")
    status, answer = server.post("/sdapi/v1/txt2img", {**body, "override_settings": {"sd_model_checkpoint": "sd15"}})
    assert (status, answer["param"]) == (404, "sd_model_checkpoint")
    assert "emoji" in answer["detail"]
    with pytest.raises(RuntimeError, match="Sampler not found"):
        api.txt2img(prompt="a cat", sampler_name="Restart")
    status, answer = server.post("/sdapi/v1/interrogate", {"image": base(gradient())})
    assert status == 404
    assert "interrogate" in answer["detail"]


def test_the_lists_that_clients_ask_for(api: Any) -> None:
    assert {"Euler a", "DPM++ 2M", "DDIM", "UniPC"} <= set(api.util_get_sampler_names())
    assert "EDM Euler" not in api.util_get_sampler_names()  # not for this model
    schedulers = {one["name"]: one["label"] for one in api.get_schedulers()}
    assert schedulers["automatic"] == "Automatic"
    assert schedulers["sgm_uniform"] == "SGM Uniform"
    (model,) = api.get_sd_models()
    assert model["title"] == f"emoji [{model['hash']}]"
    assert model["sha256"].startswith(model["hash"])
    assert [one["name"] for one in api.get_loras()] == ["neon"]
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.get_latent_upscale_modes() == [{"name": "Latent"}]
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_cmd_flags()["api"] is True
    ram = api.get_memory()["ram"]
    assert 0 < ram["used"] < ram["total"]
    for empty in (api.get_upscalers, api.get_sd_vae, api.get_hypernetworks, api.get_face_restorers,
                  api.get_realesrgan_models, api.get_prompt_styles):  # fmt: skip
        assert empty() == []


def test_every_scheduler_of_the_list_is_taken(api: Any, server: Running) -> None:
    for one in api.get_schedulers():
        for word in (one["name"], one["label"], *one["aliases"]):
            body = {"prompt": "a cat", **SMALL, "steps": 2, "sampler_name": "Euler", "scheduler": word}
            status, answer = server.post("/sdapi/v1/txt2img", body)
            if one["label"] == "Lu":  # another sampler's
                assert (status, answer["param"]) == (422, "scheduler")
                continue
            assert status == 200, (word, answer)
            text = json.loads(answer["info"])["infotexts"][0]
            assert one["label"] == "Automatic" or f"Schedule type: {one['label']}," in text


def test_a_picture_says_how_it_was_made(api: Any) -> None:
    result = api.txt2img(prompt="a cat, a hat", negative_prompt="a dog", **SMALL)
    told = api.png_info(result.image)
    assert told.info == result.info["infotexts"][0]
    assert told.parameters["Prompt"] == "a cat, a hat"
    assert told.parameters["Negative prompt"] == "a dog"
    assert told.parameters["Seed"] == "11"
    assert (told.parameters["Size-1"], told.parameters["Size-2"]) == ("64", "64")
    assert set(told.json["items"]) == {"parameters", "sdopt"}
    nothing = api.png_info(gradient())
    assert (nothing.info, nothing.parameters) == ("", {})


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_other_formats_say_it_too(form: str, api: Any) -> None:
    result = api.txt2img(prompt="a cat", override_settings={"samples_format": form}, **SMALL)
    assert result.image.format == form.upper()
    content = io.BytesIO(base64.b64decode(result.json["images"][0]))
    assert content.getbuffer().nbytes
    response = api.session.post(f"{api.baseurl}/png-info", json={"image": result.json["images"][0]}).json()
    assert response["info"] == result.info["infotexts"][0]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with two callers and one slot."""
    folder: Path = tmp_path_factory.mktemp("secured")
    keys = folder / "keys.txt"
    keys.write_text("ann = 0123456789abcdef-ann\nbob = 0123456789abcdef-bob\n")
    with running(folder, "--api-key-file", keys, "--slots", 1) as one:
        yield one


def test_basic_authentication(secured: Running) -> None:
    ann = client_of(secured, username="ann", password="0123456789abcdef-ann")
    assert ann.txt2img(prompt="a cat", **SMALL).info["seed"] == 11
    response = client_of(secured).session.get(f"{secured.url}/sdapi/v1/samplers")
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Basic")
    assert "key" in response.json()["detail"]


def in_background(call: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(call())
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, results


def wait_for(check: Any, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = check()
        if value:
            return value
        time.sleep(0.02)
    pytest.fail("it does not happen")


LONG: dict[str, Any] = {**SMALL, "width": 256, "height": 256, "steps": 150}  # under way for seconds


def test_progress_interrupt_and_options_are_the_callers_own(secured: Running) -> None:
    ann, bob = (client_of(secured, username=name, password=f"0123456789abcdef-{name}") for name in ("ann", "bob"))
    assert ann.get_progress()["state"]["job_count"] == 0
    large = {**LONG, "width": 384, "height": 384}
    thread, results = in_background(lambda: ann.txt2img(prompt="a cat", n_iter=2, **large))
    shown = wait_for(lambda: (p := ann.get_progress())["current_image"] and p)
    assert 0 < shown["progress"] < 1
    assert shown["state"]["sampling_steps"] == 150
    assert shown["state"]["job_count"] == 2
    assert pixels(shown["current_image"]).shape == (384, 384, 3)
    assert bob.get_progress()["state"]["job_count"] == 0
    skipped = f"{ann.baseurl}/progress?skip_current_image=true&force_task_id={shown['state']['job']}"
    assert ann.session.get(skipped).json()["current_image"] is None
    bob.interrupt()  # not his
    status = bob.session.post(f"{bob.baseurl}/interrupt", json={"force_task_id": shown["state"]["job"]}).status_code
    assert status == 404
    assert ann.get_progress()["state"]["job_count"] == 2
    ann.interrupt()
    thread.join(120)
    assert isinstance(results[0], RuntimeError)
    assert results[0].args[0] == 409
    assert ann.get_progress()["progress"] == 0
    ann.set_options({"samples_format": "webp", "sd_model_checkpoint": "emoji", "CLIP_stop_at_last_layers": 2})
    assert ann.get_options()["samples_format"] == "webp"
    assert ann.util_get_current_model().startswith("emoji [")
    assert bob.get_options()["samples_format"] == "png"
    assert ann.txt2img(prompt="a cat", **SMALL).image.format == "WEBP"
    assert bob.txt2img(prompt="a cat", **SMALL).image.format == "PNG"
    assert ann.session.post(f"{ann.baseurl}/options", json={"eta_ancestral": 0}).status_code == 422
    assert ann.session.post(f"{ann.baseurl}/options", json={"sd_model_checkpoint": "sd15"}).status_code == 404
    ann.set_options({"samples_format": "png", "CLIP_stop_at_last_layers": 1})


def test_settings_of_a_request_can_stay(secured: Running) -> None:
    bob = client_of(secured, username="bob", password="0123456789abcdef-bob")
    own = {"override_settings": {"samples_format": "jpeg"}}
    assert bob.txt2img(prompt="a cat", **own, **SMALL).image.format == "JPEG"
    assert bob.get_options()["samples_format"] == "png"
    bob.txt2img(prompt="a cat", override_settings_restore_afterwards=False, **own, **SMALL)
    assert bob.get_options()["samples_format"] == "jpeg"
    bob.set_options({"samples_format": "png"})


def test_skip_ends_the_current_batch_and_interrupt_one_request_by_its_id(secured: Running) -> None:
    ann = client_of(secured, username="ann", password="0123456789abcdef-ann")
    thread, results = in_background(lambda: ann.txt2img(prompt="a cat", n_iter=2, **LONG))
    wait_for(lambda: ann.get_progress()["state"]["sampling_step"])
    ann.skip()
    wait_for(lambda: ann.get_progress()["state"]["job_no"] == 1)
    assert ann.get_progress()["state"]["skipped"]
    thread.join(120)
    assert results[0].info["all_seeds"] == [12]
    assert len(results[0].images) == 1
    url = f"{ann.baseurl}/txt2img"
    body = {"prompt": "a cat", **LONG}
    first, one = in_background(lambda: ann.session.post(url, json={**body, "force_task_id": "task(one)"}))
    second, two = in_background(lambda: ann.session.post(url, json={**body, "steps": 20, "force_task_id": "two"}))
    wait_for(lambda: ann.session.get(f"{ann.baseurl}/progress?force_task_id=task(one)").json()["state"]["job_count"])
    wait_for(lambda: ann.session.get(f"{ann.baseurl}/progress?force_task_id=two").json()["state"]["job_count"])
    assert ann.session.post(f"{ann.baseurl}/interrupt?force_task_id=task(one)").json() == {}
    first.join(60)
    second.join(60)
    assert (one[0].status_code, two[0].status_code) == (409, 200)
