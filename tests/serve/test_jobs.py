"""Jobs: submitted, watched, cancelled, found again; and what happened, from the beginning, for whoever comes late."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import sdopt
from tests.serve.conftest import SMALL, Running, pixels


def events_of(server: Running, id: str) -> Iterator[tuple[str, Any]]:
    """The server-sent events of a job."""
    with urllib.request.urlopen(f"{server.url}/v1/jobs/{id}/events", timeout=60) as stream:
        kind = ""
        for line in stream:
            text = line.decode().rstrip("\n")
            if text.startswith("event: "):
                kind = text[7:]
            elif text.startswith("data: "):
                yield kind, json.loads(text[6:])


def wait(server: Running, id: str, status: str = "completed") -> dict[str, Any]:
    for _ in range(600):
        job = server.get(f"/v1/jobs/{id}")[1]
        if job["status"] == status:
            return job
        time.sleep(0.05)
    pytest.fail(f"job {id} is {job['status']}")


def test_a_job_is_made_without_its_client(server: Running, pipe: sdopt.Pipeline) -> None:
    status, job = server.post("/v1/jobs", {"prompt": "a red apple", "seed": 7, "n": 2, **SMALL})
    assert (status, job["object"], len(job["data"])) == (202, "job", 2)
    done = wait(server, job["id"])
    expected = pipe("a red apple", seed=7, num_images_per_prompt=2, **SMALL).images
    for i, image in enumerate(expected):
        np.testing.assert_array_equal(pixels(done["data"][i]["b64_json"]), np.asarray(image))
        content = server.get(f"/v1/jobs/{job['id']}/images/{i}")[1]
        np.testing.assert_array_equal(pixels(content), np.asarray(image))
    assert done["data"][1]["seed"] == 8
    assert any(one["id"] == job["id"] for one in server.get("/v1/jobs")[1]["data"])
    assert server.send("DELETE", f"/v1/jobs/{job['id']}", None)[0] == 204
    assert server.get(f"/v1/jobs/{job['id']}")[0] == 404


def test_events_from_the_beginning_with_a_preview_of_every_step(server: Running) -> None:
    body = {"prompt": "a fish", "id": "watched", "partial_images": "all", **SMALL, "num_inference_steps": 6}
    job = server.post("/v1/jobs", body)[1]
    seen = list(events_of(server, job["id"]))
    kinds = [kind for kind, _ in seen]
    assert kinds[0] == "job"
    assert kinds[-2:] == ["completed", "done"]
    steps = [data for kind, data in seen if kind == "progress"]
    assert all(pixels(data["b64_json"]).shape == (64, 64, 3) for data in steps if data["index"] < 5)
    again = [kind for kind, _ in events_of(server, job["id"])]
    assert again == ["job", "accepted", "completed", "done"]
    assert server.post("/v1/jobs", body)[0] == 409


def test_a_job_that_is_cancelled_stops(server: Running) -> None:
    job = server.post("/v1/jobs", {"prompt": "a cat", **SMALL, "num_inference_steps": 150})[1]
    status, cancelled = server.send("POST", f"/v1/jobs/{job['id']}/cancel", b"")
    assert (status, cancelled["status"]) == (200, "cancelled")
    assert cancelled["data"][0]["index"] < 150
    assert cancelled["error"]["code"] == "cancelled"
    assert [kind for kind, _ in events_of(server, job["id"])][-2:] == ["failed", "done"]
    assert server.get(f"/v1/jobs/{job['id']}/images/0")[0] == 409


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "id": "../x"}, "id"),
        ({"prompt": "a", "stream": True}, "stream"),
        ({"prompt": "a", "partial_images": "some"}, "partial_images"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps"),
        ({}, "prompt"),
    ],
)
def test_a_wrong_job_is_none(body: dict[str, Any], param: str, server: Running) -> None:
    before = server.get("/v1/jobs")[1]["data"]
    status, answer = server.post("/v1/jobs", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert [one["id"] for one in server.get("/v1/jobs")[1]["data"]] == [one["id"] for one in before]


def test_there_is_no_such_job(server: Running) -> None:
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", ""), ("GET", "/images/0")):
        status, answer = server.send(method, f"/v1/jobs/nobody{path}", None)
        assert (status, answer["error"]["code"]) == (404, "not_found")
