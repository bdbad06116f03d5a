"""The page at /: its policy, and what a person does with it in a real Chromium against a running server."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from tests.serve.conftest import SMALL, Running, pixels, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STEPS, SIZE = SMALL["num_inference_steps"], SMALL["height"]
LONG = 150  # steps: time enough to press Stop
WAIT = 60_000  # milliseconds that a picture may take


class User:
    """A browser with the page open. `problems`: what its console said, and requests to other hosts."""

    def __init__(self, context: Any, url: str) -> None:
        self.context, self.url, self.problems = context, url, list[str]()
        self.open()

    def open(self) -> None:
        """The page in a new tab."""
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("console", self._console)
        self.page.on("request", self._request)
        self.page.goto(self.url)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.problems.append(f"a request to {request.url}")

    def ready(self) -> User:
        self.page.wait_for_selector("html[data-ready]")
        return self

    def fill(self, prompt: str, **fields: object) -> User:
        """A small picture's settings, and others by the ids of their fields."""
        ids = {"width": SIZE, "height": SIZE, "option-num_inference_steps": STEPS, **fields}
        self.page.fill("#prompt", prompt)
        for id, value in ids.items():
            self.page.fill(f"#{id}", str(value))
        return self

    def make(self) -> Any:
        """The pixels of a picture that is made, as the button Download gives them."""
        self.page.click("#make")
        return self.download()

    def download(self) -> Any:
        return pixels(self.file())

    def file(self) -> bytes:
        """The file of the picture on the stage, when nothing is under way."""
        self.idle()
        assert self.page.inner_text("#fault") == ""
        with self.page.expect_download() as caught:
            self.page.click("#download")
        return Path(caught.value.path()).read_bytes()

    def idle(self) -> None:
        self.page.wait_for_selector("#stop:disabled")

    def drop(self, content: bytes, name: str = "picture.png") -> None:
        script = """([text, name]) => {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: "image/png"}));
            return transfer;
        }"""
        transfer = self.page.evaluate_handle(script, [base64.b64encode(content).decode(), name])
        self.page.dispatch_event("#frame", "drop", {"dataTransfer": transfer})

    def value(self, id: str) -> str:
        return self.page.input_value(f"#{id}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def user(browser: Any, server: Running) -> Iterator[User]:
    """Somebody who sees the page for the first time, and in whose console nothing may appear."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    one = User(context, f"{server.url}/").ready()
    yield one
    context.close()
    assert one.problems == []


def test_the_policy_allows_the_script_of_the_page_and_no_other(server: Running) -> None:
    import urllib.request

    with urllib.request.urlopen(f"{server.url}/") as answer:
        text, headers = answer.read().decode(), answer.headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert (policy["connect-src"], policy["img-src"]) == ("'self'", "'self' blob: data:")
    markup = re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"<[^>]*\s(on\w+|style)=", markup)
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", markup)
    assert server.send("GET", "/", None, if_none_match=headers["etag"])[0] == 304


def test_the_declarations_are_those_of_the_keywords(server: Running) -> None:
    status, body = server.get("/v1/keywords")
    declared = {one["name"]: one for one in body["data"]}
    assert status == 200
    assert "latents" not in declared  # arrays cannot be sent
    assert declared["mask_blur"]["maximum"] == 1000
    assert declared["strength"]["help"] == "how much of image is replaced, 0 to 1"
    assert body["limits"]["max_images"] == 10
    (model,) = server.get("/v1/models")[1]["data"]
    assert "prompt_2" in model["sdopt"]["without_effect"]
    assert "guidance_scale" not in model["sdopt"]["without_effect"]
    for name in model["sdopt"]["without_effect"]:  # each of them is refused, or remarked on
        value = {"prompt_2": "a cat", "negative_prompt_2": "a cat"}.get(name, [8, 8] if "score" not in name else 3.0)
        status, answer = server.post("/v1/images/generations", {"prompt": "a", **SMALL, name: value})
        assert status == 400
        assert answer["error"]["param"] in model["sdopt"]["without_effect"]  # the name, or its other half


def test_it_makes_the_picture_that_the_library_makes(user: User, pipe: sdopt.Pipeline) -> None:
    got = user.fill("a red apple", seed=7, negative_prompt="a green background").make()
    want = pipe("a red apple", negative_prompt="a green background", seed=7, **SMALL).images[0]
    assert np.array_equal(got, np.asarray(want))
    assert "Seed 7" in user.page.inner_text("#facts")


def test_the_preview_appears_and_escape_stops(user: User, server: Running) -> None:
    user.fill("a red apple", width=256, height=256, **{"option-num_inference_steps": LONG})
    user.page.press("#prompt", "Control+Enter")
    user.page.wait_for_selector("#picture[src^='blob:'][alt='Preview: a red apple']")
    user.page.wait_for_selector("#progress:visible")
    user.page.keyboard.press("Escape")
    user.idle()
    assert user.page.locator(".tile").count() == 0
    assert all(job["status"] not in ("queued", "running") for job in server.get("/v1/jobs")[1]["data"])


def test_a_mask_is_drawn_and_the_rest_of_the_picture_stays(user: User, pipe: sdopt.Pipeline) -> None:
    user.fill("a red apple", seed=3).page.click("#make")
    first = user.file()
    user.page.click("#start-from")
    user.page.click("#mask-open")
    user.page.wait_for_selector("#mask-canvas:focus")
    box = user.page.locator("#mask-canvas").bounding_box()

    def stroke(*ends: tuple[float, float]) -> None:
        at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in ends]
        user.page.mouse.move(*at[0])
        user.page.mouse.down()
        for point in at[1:]:
            user.page.mouse.move(*point, steps=6)
        user.page.mouse.up()

    user.page.fill("#mask-size", "80")
    stroke((0.1, 0.2), (0.9, 0.2))
    stroke((0.1, 0.8), (0.9, 0.8))
    user.page.keyboard.press("Control+z")
    user.page.fill("#mask-soft", "2")
    user.page.click("#mask-done")
    user.page.wait_for_selector("#mask-dialog", state="hidden")
    sent = user.page.evaluate("() => toDataUrl(inputs.mask)").partition(",")[2]
    mask = Image.open(io.BytesIO(base64.b64decode(sent))).convert("L")
    assert np.asarray(mask)[int(0.2 * SIZE), SIZE // 2] == 255
    assert not np.asarray(mask)[SIZE // 2 :].any()  # the second stroke was taken back
    got = user.fill("a blue star", seed=4).make()
    image = Image.open(io.BytesIO(first))
    want = pipe("a blue star", image=image, mask_image=mask, mask_blur=2, seed=4, **SMALL).images[0]
    assert np.array_equal(got, np.asarray(want))


def test_the_mask_is_drawn_by_keyboard(user: User) -> None:
    user.fill("a red apple").make()
    user.page.click("#start-from")
    user.page.click("#mask-open")
    user.page.wait_for_selector("#mask-canvas:focus")
    for key in ("Space", "ArrowLeft", "ArrowLeft", "Space", "ArrowUp"):
        user.page.press("#mask-canvas", key)
    user.page.click("#mask-done")
    user.page.wait_for_selector("#mask-dialog", state="hidden")
    sent = user.page.evaluate("() => toDataUrl(inputs.mask)").partition(",")[2]
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(sent))).convert("L"))
    assert mask[SIZE // 2, SIZE // 2] == 255
    assert not mask[: SIZE // 4].any()


def test_a_png_that_is_dropped_makes_its_picture_again(user: User, pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    seed = 2**64 - 2  # more than a number of JavaScript holds
    result = pipe("ein Äpfel ☀", seed=seed, sampler="euler", schedule="karras", guidance_scale=3.5, **SMALL)
    result.save(tmp_path / "one.png")
    user.drop((tmp_path / "one.png").read_bytes())
    user.page.wait_for_selector("#notice:has-text('The settings of the picture are in place')")
    assert (user.value("prompt"), user.value("seed")) == ("ein Äpfel ☀", str(seed))
    assert (user.value("option-sampler"), user.value("option-guidance_scale")) == ("euler", "3.5")
    assert np.array_equal(user.make(), np.asarray(result.images[0]))


def test_a_replay_sets_loras_and_says_what_the_png_does_not_carry(
    user: User, server: Running, pipe: sdopt.Pipeline, tmp_path: Path
) -> None:
    fields = {"seed": 8, "lora": {"neon": 0.5}, "lora_scale": 0.5, **SMALL}
    made = server.post("/v1/images/generations", {"prompt": "a red apple", **fields})[1]["data"][0]["b64_json"]
    user.drop(base64.b64decode(made))
    user.page.wait_for_selector("#notice:has-text('The settings of the picture are in place')")
    assert np.array_equal(user.make(), pixels(made))
    assert user.page.locator("#lora-part .count").text_content() == "1"
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    given = {"image": picture, "strength": 0.5, "control_image": {"silhouette": picture}}
    pipe("a cat", seed=1, controlnet_conditioning_scale=0.75, **given, **SMALL).save(tmp_path / "one.png")
    user.drop((tmp_path / "one.png").read_bytes())
    user.page.wait_for_selector("#fault:has-text('choose them under Control')")
    assert "starting picture" in user.page.inner_text("#fault")
    assert user.value("scale-silhouette") == "0.75"
    user.drop(b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b'sdopt\0{"prompt": "a", "seed": 1, "loras": 5}'), "odd.png")
    user.page.wait_for_selector("#fault:has-text('odd.png has settings that cannot be read')")
    assert user.value("prompt") == "a cat"  # as it was


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_a_picture_without_settings_becomes_the_starting_picture(user: User, pipe: sdopt.Pipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    user.drop(stream.getvalue())
    user.page.wait_for_selector("#image-slot img:visible")
    user.page.fill("#option-strength", "0.5")
    got = user.fill("a red apple", seed=5).make()
    want = pipe("a red apple", image=picture, strength=0.5, seed=5, **SMALL).images[0]
    assert np.array_equal(got, np.asarray(want))


def test_the_gallery_and_the_form_survive_a_reload(user: User) -> None:
    picture = user.fill("a yellow sun", count=2).make()
    assert user.page.locator(".tile").count() == 2
    user.page.reload()
    user.ready()
    assert user.page.locator(".tile").count() == 2
    assert user.value("prompt") == "a yellow sun"
    user.page.locator(".tile > button").nth(0 if np.array_equal(user.download(), picture) else 1).click()
    assert np.array_equal(user.download(), picture)
    user.page.click("#delete")
    user.page.wait_for_selector("#total:has-text('1 picture')")
    user.page.reload()
    user.ready()
    assert user.page.locator(".tile").count() == 1


def test_a_form_that_was_never_sent_survives_a_reload_at_once(user: User) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (200, 30, 30)).save(stream, "PNG")
    user.drop(stream.getvalue())
    user.page.wait_for_selector("#image-slot img:visible")
    user.fill("a green", seed=7)
    user.page.type("#prompt", " tree")
    user.page.reload()
    user.ready()
    values = [user.value(id) for id in ("prompt", "seed", "width", "option-num_inference_steps")]
    assert values == ["a green tree", "7", str(SIZE), str(STEPS)]
    user.page.wait_for_selector("#image-slot img:visible")


def test_a_form_of_another_version_is_left_out(user: User) -> None:
    user.page.evaluate("localStorage.setItem('sdopt-form', '{\"prompt\": \"old\"}')")
    user.page.reload()
    user.ready()
    assert user.value("width") != ""
    assert user.fill("a red apple").make().shape == (SIZE, SIZE, 3)


def test_a_job_goes_on_when_the_tab_is_closed(user: User, pipe: sdopt.Pipeline) -> None:
    user.fill("a blue fish", seed=9, **{"option-num_inference_steps": 60}).page.click("#make")
    user.page.wait_for_selector("#picture[src^='blob:']")
    user.page.close()
    user.open()
    user.ready()
    user.page.wait_for_selector(".tile > button[aria-label='a blue fish, seed 9']")
    want = pipe("a blue fish", seed=9, **{**SMALL, "num_inference_steps": 60}).images[0]
    assert np.array_equal(user.download(), np.asarray(want))


def test_the_lock_keeps_the_seed(user: User) -> None:
    seeds: list[str] = []
    user.fill("a red apple")
    for _ in range(2):
        user.make()
        seeds.append(user.value("seed"))
    user.page.click("#lock")
    for _ in range(2):
        user.make()
        seeds.append(user.value("seed"))
    assert len(set(seeds)) == 2
    assert seeds[1] == seeds[2] == seeds[3]


def test_loras_and_control_pictures_are_picked(user: User, server: Running, tmp_path: Path) -> None:
    shape = Image.new("RGB", (SIZE, SIZE))
    shape.paste((255, 255, 255), (16, 16, 48, 48))
    shape.save(tmp_path / "shape.png")
    user.page.click("#lora-part summary")
    user.page.check("#lora-neon-on")
    user.page.fill("#lora-neon", "0.5")
    user.page.click("#control-part summary")
    with user.page.expect_file_chooser() as caught:
        user.page.click("#control-silhouette-choose")
    caught.value.set_files(tmp_path / "shape.png")
    user.page.wait_for_selector("#control-silhouette img:visible")
    user.page.fill("#scale-silhouette", "0.75")
    got = user.fill("a red apple", seed=6).make()
    sent = base64.b64encode((tmp_path / "shape.png").read_bytes()).decode()
    fields = {"seed": 6, "lora": {"neon": 0.5}, "controlnet_conditioning_scale": 0.75, **SMALL}
    answer = server.post("/v1/images/generations", {"prompt": "a red apple", "control_image": sent, **fields})[1]
    assert np.array_equal(got, pixels(answer["data"][0]["b64_json"]))


def test_a_refusal_stands_above_the_button_and_marks_its_field(user: User) -> None:
    user.fill("a red apple", width=60).page.click("#make")
    user.page.wait_for_selector("#width[aria-invalid='true']")
    assert "56 and 64" in user.page.inner_text("#fault")  # the browser's sentence
    user.page.click("#more-part summary")
    user.fill("a red apple", **{"option-guidance_interval": "0.8, 0.1"})
    user.page.click("#more-part summary")
    user.page.click("#make")
    user.page.wait_for_selector("#option-guidance_interval[aria-invalid='true']:visible")
    assert user.page.inner_text("#fault").startswith("guidance_interval = ")  # the server's
    assert user.page.locator("[aria-invalid]").count() == 1
    assert user.page.locator(".tile").count() == 0
    assert [one for one in user.problems if "status of 400" not in one] == []
    user.problems.clear()  # Chromium's own line about the answer 400


def test_all_is_reached_by_tab(user: User) -> None:
    user.fill("a red apple").make()
    seen: set[str] = set()
    focused = "() => document.activeElement.id || document.activeElement.parentElement.className"
    for _ in range(80):
        user.page.keyboard.press("Tab")
        seen.add(user.page.evaluate(focused))
    wanted = {"theme", "prompt", "negative_prompt", "width", "height", "option-num_inference_steps", "option-sampler"}
    assert wanted | {"seed", "lock", "count", "make", "download", "reuse", "start-from", "replay", "tile"} <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(browser: Any, server: Running, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="the extra `browser` is not installed").Axe()
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    user = User(context, f"{server.url}/").ready()
    user.page.evaluate("() => document.querySelectorAll('details').forEach((one) => (one.open = true))")

    def serious() -> list[Any]:
        found = axe.run(user.page)["violations"]
        return [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]

    assert serious() == []
    user.fill("a red apple").make()
    assert serious() == []
    user.page.click("#start-from")
    user.page.click("#mask-open")
    user.page.wait_for_selector("#mask-canvas:focus")
    assert serious() == []
    context.close()


def test_the_switch_of_the_theme_stays(user: User) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = user.page.evaluate(ground)
    for _ in range(2):  # as the system, light, dark
        user.page.click("#theme")
    dark = user.page.evaluate(ground)
    assert dark != light
    user.page.reload()
    user.ready()
    assert user.page.evaluate(ground) == dark


def test_a_key_is_asked_for_and_the_queue_is_shown(browser: Any, tmp_path: Path) -> None:
    key = "a-key-of-the-test-42"
    (tmp_path / "keys.txt").write_text(f"one = {key}\n")
    with running(tmp_path, "--api-key-file", tmp_path / "keys.txt", "--slots", 1) as server:
        context = browser.new_context()
        user = User(context, f"{server.url}/")
        for text in ("a-wrong-key-of-the-test", key):
            user.page.wait_for_selector("#key-dialog[open]")
            user.page.fill("#key", text)
            user.page.click("#key-dialog button")
        user.ready()
        assert json.dumps(user.page.evaluate("() => Object.keys(localStorage)")).find("sdopt-key") < 0
        user.fill("a red apple", width=256, height=256, **{"option-num_inference_steps": LONG}).page.click("#make")
        user.page.fill("#prompt", "a blue fish")
        user.page.click("#make")
        user.page.wait_for_selector("#facts:has-text('In the queue: 1 picture before this one')")
        assert {one.split(" (")[0].split("of ")[-1] for one in user.problems} == {"401"}
        context.close()
