"""Who may call, from where, with how much: keys, origins, hosts, bodies; and that every answer has its id."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sdopt.errors import UsageError
from sdopt.serve.auth import Keys
from sdopt.serve.settings import Settings
from tests.conftest import sdopt
from tests.serve.conftest import SMALL, Running, free_port, running

ANNA, BELA = "anna-has-a-long-key", "bela-has-a-long-key-too"
SITE = "https://shop.example"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with keys, a site that may call, and small limits."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(f"# who may call\nanna = {ANNA}\nbela={BELA}\n")
    options = ("--api-key-file", folder / "keys", "--cors", SITE, "--max-body", 20_000, "--max-steps", 30)
    with running(folder, *options) as one:
        yield one


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_is_needed_but_for_health(guarded: Running) -> None:
    assert guarded.get("/health/live")[0] == 200
    assert guarded.get("/health/ready")[0] == 200
    for path in ("/v1/models", "/metrics", "/v1/jobs", "/nothing"):
        status, answer = guarded.get(path)
        assert (status, answer["error"]["type"]) == (401, "authentication_error")
    assert guarded.get("/v1/models", **bearer(ANNA + "x"))[0] == 401
    assert guarded.get("/v1/models", **bearer(ANNA))[0] == 200
    basic = base64.b64encode(f"any:{BELA}".encode()).decode()
    assert guarded.get("/v1/models", authorization=f"Basic {basic}")[0] == 200
    assert guarded.get("/v1/models", authorization="Basic !")[0] == 401


def test_a_job_belongs_to_its_key(guarded: Running) -> None:
    status, job = guarded.post("/v1/jobs", {"prompt": "a cat", "user": "u1", **SMALL}, **bearer(ANNA))
    assert status == 202
    assert guarded.get(f"/v1/jobs/{job['id']}", **bearer(BELA))[0] == 404
    assert guarded.send("POST", f"/v1/jobs/{job['id']}/cancel", b"", **bearer(BELA))[0] == 404
    assert guarded.get("/v1/jobs", **bearer(BELA))[1]["data"] == []
    assert guarded.get(f"/v1/jobs/{job['id']}", **bearer(ANNA))[0] == 200


def test_each_key_has_ids_of_its_own(guarded: Running) -> None:
    body = {"prompt": "a cat", "id": "fox", **SMALL}
    assert guarded.post("/v1/jobs", body, **bearer(ANNA))[0] == 202
    assert guarded.post("/v1/jobs", {**body, "seed": 5}, **bearer(BELA))[0] == 202
    assert guarded.post("/v1/jobs", body, **bearer(ANNA))[0] == 409
    seeds = [guarded.get("/v1/jobs/fox", **bearer(key))[1]["data"][0]["seed"] for key in (ANNA, BELA)]
    assert seeds[0] != seeds[1] == 5


def test_an_origin_that_is_none_is_not_one_of_ours(guarded: Running) -> None:
    for origin in ("http://[", "null", "http://evil.example:80:80"):
        status, answer = guarded.get("/v1/models", origin=origin, **bearer(ANNA))
        assert (status, answer["error"]["code"]) == (403, "origin")


def test_pages_of_other_sites(guarded: Running, server: Running) -> None:
    assert guarded.get("/v1/models", origin="https://evil.example", **bearer(ANNA))[0] == 403
    assert guarded.get("/v1/models", origin=SITE, **bearer(ANNA))[0] == 200
    assert server.get("/v1/models", origin=SITE)[0] == 403
    assert server.get("/v1/models", origin=server.url)[0] == 200
    connection = http.client.HTTPConnection(urlsplit(guarded.url).netloc)
    asks = {"origin": SITE, "access-control-request-method": "POST"}
    connection.request("OPTIONS", "/v1/images/generations", headers=asks)
    answer = connection.getresponse()
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (204, SITE)
    answer.read()
    connection.request("OPTIONS", "/v1/images/generations", headers={**asks, "origin": "https://evil.example"})
    assert connection.getresponse().status == 403


def test_a_name_that_a_site_gave_this_machine_is_no_way_in(server: Running) -> None:
    assert server.get("/v1/models", host="evil.example")[0] == 403
    assert server.get("/v1/models", host="localhost:1")[0] == 200


def test_limits(guarded: Running) -> None:
    status, answer = guarded.post("/v1/images/generations", {"prompt": "a" * 30_000}, **bearer(ANNA))
    assert (status, answer["error"]["code"]) == (413, "too_large")
    body = {"prompt": "a cat", "num_inference_steps": 31}
    status, answer = guarded.post("/v1/images/generations", body, **bearer(ANNA))
    assert (status, answer["error"]["param"]) == (400, "num_inference_steps")


def test_the_steps_that_a_request_leaves_out_are_within_the_limit_too(tmp_path: Path) -> None:
    with running(tmp_path, "--max-steps", 5) as server:
        status, answer = server.post("/v1/images/generations", {"prompt": "a"})
        assert (status, answer["error"]["param"]) == (400, "num_inference_steps")
        assert server.post("/sdapi/v1/txt2img", {"prompt": "a"})[0] == 422
        assert server.post("/v1/images/generations", {"prompt": "a", **SMALL})[0] == 200


def test_two_origins_are_none_of_ours(server: Running) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    connection.putrequest("GET", "/v1/models")
    connection.putheader("Origin", "https://evil.example")
    connection.putheader("Origin", server.url)
    connection.endheaders()
    assert connection.getresponse().status == 403


def test_a_body_without_a_length_is_counted(guarded: Running) -> None:
    connection = http.client.HTTPConnection(urlsplit(guarded.url).netloc)
    headers = {"content-type": "application/json", **bearer(ANNA)}
    pieces = (b"x" * 1000 for _ in range(100))
    connection.request("POST", "/v1/images/generations", pieces, headers, encode_chunked=True)
    assert connection.getresponse().status == 413


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"prompt=a", "application/x-www-form-urlencoded", 415),
        (b"", "application/json", 400),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "application/json", 400),
        (b'{"prompt": "a", "image": ' + b"[" * 500 + b"]" * 500 + b"}", "application/json", 400),
        (b'{"prompt": "a", "x": [' + b"[]," * 200_000 + b"1]}", "application/json", 413),
    ],
)
def test_what_is_no_json(content: bytes, kind: str, status: int, server: Running) -> None:
    got, answer = server.send("POST", "/v1/images/generations", content, content_type=kind)
    kind = "request_too_large" if status == 413 else "invalid_request_error"
    assert (got, answer["error"]["type"]) == (status, kind)


@pytest.mark.parametrize("charset", ["undefined", "unicode_escape", "latin-1"])
def test_a_form_is_utf_8(charset: str, server: Running) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    kind = f"multipart/form-data; boundary=x; charset={charset}"
    got, answer = server.send("POST", "/v1/images/edits", body, content_type=kind)
    assert (got, "utf-8" in answer["error"]["message"]) == (415, True)


def test_a_request_with_a_length_and_no_body_still_gets_its_events(server: Running) -> None:
    server.post("/v1/jobs", {"prompt": "a", "id": "short", **SMALL})
    host, _, port = urlsplit(server.url).netloc.partition(":")
    with socket.create_connection((host, int(port)), 60) as sock:
        sock.sendall(f"GET /v1/jobs/short/events HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\n\r\n".encode())
        got = b""
        while b"event: done" not in got:
            piece = sock.recv(65536)
            assert piece
            got += piece


def test_there_is_no_such_route_and_no_such_method(server: Running) -> None:
    for method, path, status in (("GET", "/v2", 404), ("PUT", "/v1/jobs", 405), ("GET", "/v1/images/edits", 405)):
        got, answer = server.send(method, path, None)
        assert (got, set(answer["error"])) == (status, {"message", "type", "param", "code"})


def test_every_answer_has_its_id_and_a_line_in_the_log(server: Running) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    connection.request("GET", "/nothing", headers={"x-request-id": "mine-1"})
    answer = connection.getresponse()
    assert answer.headers["x-request-id"] == "mine-1"
    answer.read()
    connection.request("GET", "/nothing", headers={"x-request-id": "not\ta word"})
    assert connection.getresponse().headers["x-request-id"] != "not\ta word"
    time.sleep(0.1)
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    mine = next(line for line in lines if line["request_id"] == "mine-1")
    assert (mine["status"], mine["method"], mine["path"]) == (404, "GET", "/nothing")


def test_what_is_no_http_at_all(server: Running) -> None:
    host, _, port = urlsplit(server.url).netloc.partition(":")
    with socket.create_connection((host, int(port)), 10) as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b"400" in sock.recv(1000)
    assert server.get("/health/live")[0] == 200


def test_metrics(server: Running) -> None:
    server.post("/v1/images/generations", {"prompt": "a cat", "seed": 1, **SMALL})
    time.sleep(1.2)
    text = server.get("/metrics")[1].decode()
    for name in ("sdopt_requests_total", "sdopt_pictures_total", "sdopt_unet_calls", "sdopt_call_seconds"):
        assert f"\n{name}" in text
    assert all(line.startswith(("#", "sdopt_")) for line in text.splitlines())


KEYS: dict[str, tuple[str, str]] = {
    "short": ("anna = short", "line 1"),
    "none": ("# nothing\n\n", "has no key"),
    "twice": (f"a = {ANNA}\na = {BELA}", "line 2"),
    "slash": (f"a/b = {ANNA}", "line 1"),
    "foreign": ("a = schlüssel-schlüssel", "line 1"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_are_none(name: str, tmp_path: Path) -> None:
    content, words = KEYS[name]
    (tmp_path / "keys").write_text(content)
    with pytest.raises(UsageError, match=words):
        Keys.read(str(tmp_path / "keys"))


def test_a_key_alone_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(ANNA)
    assert Keys.read(str(tmp_path / "keys")).owner(f"Bearer {ANNA}") == "key-1"


def test_other_machines_need_a_key() -> None:
    with pytest.raises(UsageError, match="--api-key-file"):
        Settings({"emoji": "x"}, host="0.0.0.0")
    assert Settings({"emoji": "x"}, host="0.0.0.0", api_key_file="keys").port == 8000


COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "no bundle": (("no/such",), "no/such"),
    "open": (("--host", "0.0.0.0"), "--api-key-file"),
    "port": (("--port", "99999"), "port = 99999"),
    "slots": (("--slots", "0"), "slots = 0"),
    "two of a name": (("a=x", "a=y"), "two bundles are called a"),
    "lora of nobody": (("--lora", "sd15/neon=x.safetensors"), "there is no bundle sd15"),
    "no lora": (("--lora", "ink=no/such.safetensors"), "no/such.safetensors"),
    "no keys": (("--api-key-file", "no/such"), "no/such"),
    "no config": (("--config", "no/such.toml"), "no/such.toml"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_cannot_serve_says_why(name: str) -> None:
    options, words = COMMANDS[name]
    port = () if "--port" in options else ("--port", str(free_port()))  # the usual one may be in use
    done = sdopt("serve", *options, *port)
    assert done.returncode in (2, 3, 4)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_configuration_in_a_file(tmp_path: Path) -> None:
    bundle = Path("engines/emoji/bundle").resolve()
    (tmp_path / "serve.toml").write_text(f'slots = 2\n[bundles]\nsmiley = "{bundle}"\n')
    with running(tmp_path, "--config", tmp_path / "serve.toml") as server:
        assert [one["id"] for one in server.get("/v1/models")[1]["data"]] == ["smiley"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("slotz = 2", "slotz"),
        ('slots = "2"', "slots"),
        ("slots = true", "slots"),
        ("cors = [1]", "cors"),
        ("= 2", "cannot"),
    ],
)
def test_a_configuration_that_is_wrong(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text(content)
    done = sdopt("serve", "--config", tmp_path / "serve.toml")
    assert done.returncode == 2
    assert words in done.stderr
