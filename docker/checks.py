"""What each image must do; docker/prove.py runs the checks. The first line of a check says what it shows."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prove import Image

DOCKER = Path(__file__).resolve().parent
SOMEBODY = "12345:12345"  # a user that no image knows
KEY = "0123456789abcdef0123"
PICTURE = ("generate", "a red apple", "--steps", "2", "-o", "/data/apple.png")
# Asks the server of the network namespace that it runs in: prints the status and the body of the answer.
CLIENT = """
import http.client, sys
key, path, body = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=120)
connection.request("POST" if body else "GET", path, body or None, {"authorization": f"Bearer {key}"})
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


def at_most(measured: int, budget: int) -> None:
    assert measured <= budget, "look for what became larger, or give it a larger budget in sizes.json"


def refused(image: Image) -> None:
    """no pip and no sources; no PyTorch and what it needs, but for the export"""
    names = {"pip", "ensurepip", "wheel"}
    if image.target != "export":
        names |= {"setuptools", "torch", "diffusers"}
    there = [
        os.path.join(folder, name)
        for folder, folders, _ in os.walk(image.root)
        if re.fullmatch(r"site-packages|dist-packages|python3\.\d+", os.path.basename(folder))
        for name in names.intersection(folders)
    ]
    assert not there, there
    assert not (image.root / "src").exists()


def configured(image: Image) -> None:
    """user 10001, HOME, a volume for the cache, labels"""
    config = image.config
    assert config["User"] == "10001", config["User"]
    assert "HOME=/tmp" in config["Env"], config["Env"]
    assert list(config["Volumes"]) == ["/cache"], config["Volumes"]
    labels = {name.rpartition(".")[2] for name in config["Labels"] if name.startswith("org.opencontainers.image.")}
    assert {"title", "description", "source", "licenses", "version", "revision"} <= labels, labels


@contextmanager
def folders() -> Iterator[dict[str, Path]]:
    """A folder for pictures of somebody who is not the image's user, and one for the cache as a volume is."""
    with tempfile.TemporaryDirectory() as name:
        data, cache = Path(name) / "data", Path(name) / "cache"
        data.mkdir(mode=0o755)
        os.chown(data, *map(int, SOMEBODY.split(":")))
        cache.mkdir()
        cache.chmod(0o1777)
        yield {"/data": data, "/cache": cache}


def picture(image: Image) -> None:
    """a picture in a folder of another user, with --user, on a read-only root; the cache is used"""
    with folders() as mounts:
        code, text = image.run(*PICTURE, user=SOMEBODY, mounts=mounts, entrypoint="sdopt")
        assert code == 0, text
        assert (mounts["/data"] / "apple.png").read_bytes()[1:4] == b"PNG", text
        assert (mounts["/data"] / "apple.png").stat().st_uid == 12345
        assert list((mounts["/cache"] / "sdopt").rglob("record.json")), "nothing was kept"


def without_user(image: Image) -> None:
    """the same without --user: a sentence that says what to type, and no traceback"""
    with folders() as mounts:
        code, text = image.run(*PICTURE, mounts=mounts, entrypoint="sdopt")
        assert code == 2, text
        assert "Traceback" not in text, text
        assert '--user "$(id -u):$(id -g)"' in text, text


def doctor(image: Image) -> None:
    """the doctor finds an engine"""
    code, text = image.run("doctor", entrypoint="sdopt")
    assert code == 0, text
    assert "ort, fp32" in text, text


def driver(image: Image) -> None:
    """the doctor says which driver TensorRT needs"""
    _, text = image.run("doctor", entrypoint="sdopt")
    assert "580" in text, text


def signed(image: Image) -> None:
    """engines that one container builds are trusted by the next one, with the same volume and user"""
    bundle = DOCKER.parent / "engines/emoji/bundle"
    with folders() as mounts:
        shutil.copytree(bundle, mounts["/data"] / "emoji")
        for folder, names, files in os.walk(mounts["/data"] / "emoji"):
            for name in (".", *names, *files):
                os.chown(os.path.join(folder, name), 12345, 12345)
        # TensorRT-RTX builds without a GPU
        backend = "tensorrt-rtx" if list(image.root.glob("opt/sdopt/lib/*/site-packages/tensorrt_rtx")) else "ort"
        words = ("build", "/data/emoji", "--backend", backend, "--component", "vae_decoder")
        code, text = image.run(*words, user=SOMEBODY, mounts=mounts)
        assert code == 0, text
        code, text = image.run("engines", "/data/emoji", "--json", user=SOMEBODY, mounts=mounts)
        assert code == 0, text
        engines = json.loads(text)["engines"]
        assert engines, text
        assert all(engine["ours"] for engine in engines), text


def keys_in(mounts: dict[str, Path]) -> Path:
    """A file of keys beside the folders of a container."""
    keys = mounts["/cache"].parent / "keys"
    keys.write_text(f"anna = {KEY}\n")
    return keys


def keyless(image: Image) -> None:
    """a server without its file of keys does not begin, and says why"""
    code, text = image.run()
    assert code == 2, text
    assert "/run/secrets/sdopt-keys" in text, text
    assert "Traceback" not in text, text


def child(process: subprocess.Popen[str]) -> int:
    """The process 1 of a container, by its number here."""
    for _ in range(100):
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.05)
    raise AssertionError("the container did not start")


def healthy(image: Image, pid: int) -> bool:
    """Whether the health check of the image passes in a container."""
    words = image.config["Healthcheck"]["Test"]
    assert words[0] == "CMD", words
    enter = ["nsenter", "-t", str(pid), "-m", "-n", "-p", "--"]
    return subprocess.run([*enter, *image.command(words[1:])], capture_output=True, check=False).returncode == 0


def ask(pid: int, key: str, path: str, body: str = "") -> subprocess.Popen[str]:
    command = ["nsenter", "-t", str(pid), "-n", "--", sys.executable, "-c", CLIENT, key, path, body]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def generate(pid: int, key: str, steps: int) -> subprocess.Popen[str]:
    body = json.dumps({"prompt": "a red apple", "seed": 1, "num_inference_steps": steps})
    return ask(pid, key, "/v1/images/generations", body)


def answered(request: subprocess.Popen[str]) -> tuple[int, str]:
    """The status and the body; 0 where nobody listens."""
    status, _, body = request.communicate(timeout=120)[0].partition(" ")
    return int(status or 0), body


def is_picture(answer: tuple[int, str]) -> bool:
    status, body = answer
    return status == 200 and base64.b64decode(json.loads(body)["data"][0]["b64_json"])[1:4] == b"PNG"


def until(what: str, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until `condition` holds, for two minutes at most, while the process runs."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"it never came that {what}"
        time.sleep(0.2)


def served(image: Image) -> None:
    """a server: not healthy, then healthy; 401 without a key, a picture with it; SIGTERM drains, and the code is 0"""
    with folders() as mounts:
        process = image.start("--threads", "1", mounts={**mounts, "/run/secrets/sdopt-keys": keys_in(mounts)})
        try:
            pid = child(process)
            assert not healthy(image, pid), "the health check passes before the server is there"
            until("the health check passes", lambda: healthy(image, pid), process)
            assert answered(generate(pid, "", 2))[0] == 401
            assert answered(ask(pid, "", "/metrics"))[0] == 401
            assert is_picture(answered(generate(pid, KEY, 2)))
            under_way = generate(pid, KEY, 150)
            is_active = re.compile(r"^sdopt_active\S* [1-9]", re.MULTILINE)
            until("a picture begins", lambda: bool(is_active.search(answered(ask(pid, KEY, "/metrics"))[1])), process)
            os.kill(pid, signal.SIGTERM)
            assert under_way.poll() is None, "the picture was done before the signal: take more steps"
            assert is_picture(answered(under_way)), "the picture was lost"
            text, _ = process.communicate(timeout=60)
            assert process.returncode == 0, f"code {process.returncode}: {text}"
        finally:
            process.kill()


def clustered(image: Image) -> None:
    """a Ray cluster from a login shell, as KubeRay starts it, for a user without a name; wget for its probes"""
    program = "wget --version | head -1 && ray start --head --num-cpus=1 --include-dashboard=false && ray status"
    with folders() as mounts:
        code, text = image.run("-lc", program, entrypoint="/bin/bash", user=SOMEBODY, mounts=mounts)
        assert code == 0, text
        assert "GNU Wget" in text, text
        assert "1.0 CPU" in text, text


def on_ray(image: Image) -> None:
    """the application of kuberay.yaml, with the embedded model and one replica: 401 without a key, a picture with it"""
    service = (
        (DOCKER / "kuberay.yaml").read_text().partition("serveConfigV2: |\n")[2].partition("  rayClusterConfig:")[0]
    )
    config = textwrap.dedent(service).replace("bundles: {sd15: /bundles/sd15}", "threads: 1")
    with folders() as mounts:
        (mounts["/data"] / "serve.yaml").write_text(config.replace("replicas: 2", "replicas: 1"))
        program = "ray start --head --num-cpus=2 --include-dashboard=false && exec serve run /data/serve.yaml"
        here = {**mounts, "/run/secrets/sdopt-keys": keys_in(mounts)}
        process = image.start("-lc", program, entrypoint="/bin/bash", user=SOMEBODY, mounts=here)
        try:
            pid = child(process)
            until("the replica is ready", lambda: answered(ask(pid, KEY, "/health/ready"))[0] == 200, process)
            assert answered(generate(pid, "", 2))[0] == 401
            assert is_picture(answered(generate(pid, KEY, 2)))
        finally:
            process.kill()


def exported(image: Image) -> None:
    """a checkpoint becomes a bundle in a folder of another user, and the bundle makes a picture"""
    checkpoint = DOCKER.parent / "engines/emoji/checkpoint"
    with folders() as mounts:
        here = {**mounts, "/checkpoint": checkpoint}
        words = ("export", "/checkpoint", "-o", "/data/bundle")
        code, text = image.run(*words, user=SOMEBODY, mounts=here)
        assert code == 0, text
        code, text = image.run(*PICTURE, "-m", "/data/bundle", user=SOMEBODY, mounts=here)
        assert code == 0, text


OF_ONE = {
    "server": [keyless, served],
    "ray": [clustered, on_ray],
    "tensorrt": [driver, signed],
    "export": [exported],
}


def of(target: str) -> list[Callable[[Image], None]]:
    """The checks of a target."""
    return [refused, configured, picture, without_user, doctor, *OF_ONE.get(target, [])]
