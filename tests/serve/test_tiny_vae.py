"""A tiny autoencoder over HTTP is a field, and the picture is the one that Python makes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.export.onto import add_adapter
from tests import tiny
from tests.serve.conftest import Running, pixels, running
from tests.serve.test_page import User, browser

__all__ = ["browser"]  # a fixture
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def coded(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a tiny autoencoder, `small`."""
    folder = tmp_path_factory.mktemp("coded")
    bundle = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    tiny.taesd().save_pretrained(folder / "taesd")
    add_adapter(folder / "taesd", bundle, "small", report=lambda line: None, offline=True)
    return bundle


@pytest.fixture(scope="module")
def served(coded: Path) -> Iterator[Running]:
    with running(coded.parent, f"model={coded}") as server:
        yield server


def test_it_is_a_field_and_a_name_that_is_none_is_the_clients_mistake(served: Running, coded: Path) -> None:
    assert served.get("/v1/models")[1]["data"][0]["sdopt"]["adapters"] == {"small": "tiny_vae"}
    with sdopt.load(coded, threads=1) as pipe:
        for own in ({}, {"vae": "small"}):
            status, answer = served.post("/v1/images/generations", {"prompt": "apple", **OPTIONS, **own})
            assert status == 200, answer
            expected = pipe("apple", **OPTIONS, **own)
            np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(expected.images[0]))
            assert answer["data"][0]["parameters"].get("vae_digest") == expected.parameters[0].get("vae_digest")
    status, answer = served.post("/v1/images/generations", {"prompt": "apple", **OPTIONS, "vae": "smal"})
    assert (status, answer["error"]["param"]) == (400, "vae")
    assert "there are small" in answer["error"]["message"]
    assert str(coded.parent) not in answer["error"]["message"]


def test_the_page_offers_it_by_name_and_asks_for_no_picture(served: Running, coded: Path, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    user = User(context, f"{served.url}/").ready()
    assert user.page.locator("#control-part").is_hidden()
    user.page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    user.fill("apple", seed=1, width=24, height=24, **{"option-num_inference_steps": 2})
    user.page.select_option("#option-vae", "small")
    made = user.make()
    with sdopt.load(coded, threads=1) as pipe:
        expected = pipe("apple", vae="small", **OPTIONS).images[0]
    np.testing.assert_array_equal(made, np.asarray(expected))
    context.close()
    assert user.problems == []
