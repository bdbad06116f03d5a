"""The OpenAPI document: it has every route and every field, and schemathesis finds nothing that it does not say."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from sdopt.request.keywords import KEYWORDS
from sdopt.serve import app, jobs, openai
from sdopt.serve.openapi import APIS, OPERATIONS, document
from sdopt.serve.sdapi_fields import IMG2IMG, TXT2IMG
from tests.serve.conftest import Running, running
from tests.serve.test_openai import gradient, png

schemathesis = pytest.importorskip("schemathesis", reason="the extra `test` is not installed")

ARRAYS = {name for name, keyword in KEYWORDS.items() if keyword.flag is None and "embeds" in name} | {"latents"}
EXAMPLES = 8  # of each operation, valid ones and others; 40 operations in a minute
LIMITS = {"--max-steps": 3, "--max-pixels": 64 * 64, "--max-images": 2, "--drain-seconds": 5}


def body(path: str, kind: str = "application/json") -> dict[str, Any]:
    return document(app.ROUTES)["paths"][path]["post"]["requestBody"]["content"][kind]["schema"]


def test_every_route_is_there() -> None:
    told = {(m.upper(), path) for path, methods in document(app.ROUTES)["paths"].items() for m in methods}
    routes: list[Any] = list(app.ROUTES)
    assert told == {(m, r.path) for r in routes for m in r.methods - {"HEAD"} if r.path.startswith(APIS)}
    assert set(OPERATIONS) <= told


def test_every_field_is_there_with_its_limits() -> None:
    generation = body("/v1/images/generations")["properties"]
    assert set(generation) == {*KEYWORDS, *openai.OWN} - ARRAYS - {"num_images_per_prompt"}
    assert generation["num_inference_steps"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 2**31}
    assert generation["sampler"]["description"].startswith("`sdopt samplers` lists them")
    assert set(body("/v1/jobs")["properties"]) == {*generation, *jobs.OWN}
    assert set(body("/v1/images/edits", "multipart/form-data")["properties"]) == {*generation, *openai.FILES}
    assert set(body("/sdapi/v1/txt2img")["properties"]) == set(TXT2IMG)
    assert set(body("/sdapi/v1/img2img")["properties"]) == set(IMG2IMG)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose largest requests are small."""
    options = [word for pair in LIMITS.items() for word in pair]
    with running(tmp_path_factory.mktemp("small"), *options) as one:
        yield one


def likely(case: Any, chance: random.Random) -> None:
    """Make a request that may well succeed: few fields, small pictures, and a job that is there."""
    known = {"id": "known", "name": "emoji", "index": "0"}
    case.path_parameters = {name: known[name] for name in case.path_parameters}
    if not isinstance(case.body, dict):
        return
    is_form = case.operation.path in ("/v1/images/edits", "/v1/images/variations")
    content = png(gradient())
    picture = content if is_form else base64.b64encode(content).decode()
    small = {"prompt": "a cat", "image": picture, "init_images": [picture], "mask": picture, "mask_image": picture}
    # The model's own size and steps are above the limits of this server.
    if case.operation.path.endswith("/png-info"):
        sizes = {}
    elif case.operation.path.startswith("/sdapi"):
        sizes = {"width": 64, "height": 64, "steps": 2}
    else:
        sizes = {"size": "64x64", "num_inference_steps": "2" if is_form else 2}
    needed = {"prompt", "image", "init_images"}
    kept = {name for name in case.body if name in needed or chance.random() < 0.1}
    case.body = {name: small.get(name, value) for name, value in case.body.items() if name in kept} | sizes


def test_schemathesis_finds_no_answer_that_the_document_does_not_have(small: Running) -> None:
    document = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    checks, modes, chance = schemathesis.checks, schemathesis.GenerationMode, random.Random(7)
    expected = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    statuses: dict[str, set[int]] = {}

    def run(operation: Any, mode: Any, change: Any = None) -> None:
        @seed(7)
        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            if change is not None:
                small.post("/v1/jobs", {"id": "known", "prompt": "a cat", "size": "64x64", "num_inference_steps": 2})
                change(case, chance)
            response = case.call(base_url=small.url, timeout=60)
            statuses.setdefault(operation.label, set()).add(response.status_code)
            case.validate_response(response, checks=expected)

        ask()

    for found in document.get_all_operations():
        operation = found.ok()
        run(operation, modes.POSITIVE)
        if operation.body or operation.path_parameters:
            run(operation, modes.POSITIVE, likely)
        if operation.body or operation.query:
            run(operation, modes.NEGATIVE)
    never = [label for label, codes in statuses.items() if not codes & {200, 202, 204}]
    assert not never, statuses
    assert len(statuses) > 30
    assert small.process.poll() is None
    assert small.get("/health/ready")[0] == 200
    assert "Traceback" not in small.log.read_text()


def test_the_limit_of_pixels_counts_what_is_left_out(small: Running) -> None:
    small_enough = {"prompt": "a cat", "num_inference_steps": 2}  # the bundle's own size
    assert small.post("/v1/images/generations", small_enough)[0] == 200
    status, answer = small.post("/v1/images/generations", {**small_enough, "hires": 2.0})
    assert (status, answer["error"]["param"]) == (400, "size")
    assert "256x256" in answer["error"]["message"]
