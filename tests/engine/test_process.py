"""Threads, forks, spawned processes and the end of a process: no hang, no abort, no other picture."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.files import Bundle
from sdopt.engine import BACKENDS, installed_backends, open_engine
from sdopt.engine.failures import failure, memory_in_words
from sdopt.engine.pool import EnginePool
from sdopt.errors import BackendError, BundleError, UsageError
from tests.conftest import EMOJI_BUNDLE, ROOT

READY = [name for name in installed_backends() if BACKENDS[name].precisions]
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", "seed": 1}
on_each_backend = pytest.mark.parametrize("backend", READY)
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def python(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, **environment}, check=False
    )


FORK = """
import os, sys
import numpy as np, sdopt
options = dict(num_inference_steps=2, height=64, width=64, output_type="np", seed=1)
pipe = sdopt.load(backend=sys.argv[1], cache=False)
expected = pipe("a cat", **options).images
unet = pipe.engine("unet")
child = os.fork()
if child == 0:
    if sys.argv[2] == "picture":
        assert np.abs(pipe("a cat", **options).images - expected).max() < 1e-4
    if sys.argv[2] == "engine":
        try:
            unet(sample=0)
        except sdopt.BackendError as error:
            assert "forked" in str(error)
        else:
            raise SystemExit(3)
    sys.exit(0)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""


@forks
@on_each_backend
@pytest.mark.parametrize("work", ["nothing", "picture", "engine"])
def test_a_forked_child_ends_and_makes_the_same_picture(backend: str, work: str) -> None:
    done = python(FORK, backend, work)
    assert (done.stdout.split()[-1:], done.returncode) == (["0"], 0), done.stderr


DAEMON = """
import sys, threading, time, sdopt
pipe = sdopt.load(backend=sys.argv[1], cache=False)
begun = threading.Event()
def work():
    while True:
        for _ in pipe.denoise("a cat", num_inference_steps=50):
            begun.set()
threading.Thread(target=work, daemon=True).start()
begun.wait()
time.sleep(float(sys.argv[2]))
"""


@on_each_backend
@pytest.mark.parametrize("delay", ["0", "0.05", "0.31"])
def test_a_process_ends_well_while_a_daemon_thread_generates(backend: str, delay: str) -> None:
    done = python(DAEMON, backend, delay)
    assert (done.returncode, done.stderr) == (0, "")


def picture_of(pipe: sdopt.Pipeline) -> Any:
    return pipe("a <toy>", **OPTIONS).images


def test_a_used_pipeline_is_sent_to_a_spawned_process_with_its_embeddings() -> None:
    with sdopt.load(threads=1) as pipe:
        pipe.load_embedding(np.full((2, 128), 0.1, np.float32), "<toy>")
        expected = picture_of(pipe)
        with multiprocessing.get_context("spawn").Pool(1) as processes:
            np.testing.assert_array_equal(processes.apply(picture_of, (pipe,)), expected)
        copy = pickle.loads(pickle.dumps(pipe))
        assert copy.pool.opened == ()
        np.testing.assert_array_equal(picture_of(copy), expected)
        with pytest.raises(UsageError, match="an open engine belongs to its process"):
            pickle.dumps(pipe.engine("unet"))
    given: Any = {"unet": object()}
    with pytest.raises(UsageError, match=r"given engines \(unet\) cannot be pickled"):
        pickle.dumps(EnginePool(Bundle.open(EMOJI_BUNDLE), given=given))


@on_each_backend
def test_a_dropped_pipeline_is_freed_at_once(backend: str) -> None:
    gc.collect()
    gc.disable()
    try:
        pipe = sdopt.load(backend=backend, threads=1, cache=False)
        pipe("a cat", **OPTIONS)
        for _ in pipe.denoise("a cat", num_inference_steps=5):
            break
        engines = [weakref.ref(pipe.engine(name)) for name in ("text_encoder", "unet", "vae_decoder")]
        del pipe, _
        assert [engine() for engine in engines] == [None] * 3
    finally:
        gc.enable()


def test_a_pipeline_outlives_a_change_of_the_working_directory(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle_copy.parent)
    with sdopt.load("bundle", threads=1) as pipe:
        monkeypatch.chdir("/")
        assert pipe("a cat", **OPTIONS).seeds == (1,)


WITHOUT = """
import os, pathlib, sys
import sdopt
sdopt.load(sys.argv[1], cache=False)("a cat", num_inference_steps=1, height=64, width=64)  # imports all
os.umask(0o022)
kind = sys.argv[2]
for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "HOME"):
    os.environ.pop(name, None)
if kind == "unreadable":
    os.environ["HOME"] = sys.argv[3]
if kind == "relative":
    os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = "somewhere"
if kind == "nowhere":
    os.environ["HOME"] = "/nonexistent/home"
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(54321, 54321, 54321)
    os.setresuid(54321, 54321, 54321)
with sdopt.load(sys.argv[1]) as pipe:
    print(pipe("a cat", num_inference_steps=1, height=64, width=64, seed=1).seeds, sorted(os.listdir(".")))
"""


@pytest.mark.parametrize("kind", ["unknown", "unreadable", "relative", "nowhere"])
def test_a_user_without_a_home_gets_a_picture_of_a_bundle_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    top = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        top.chmod(0o755)
        (top / "home").mkdir()
        (top / "here").mkdir(mode=0o777)
        (top / "home").chmod(0)
        shutil.copytree(EMOJI_BUNDLE, top / "bundle")
        (top / "bundle").chmod(0o555)
        command = [sys.executable, "-c", WITHOUT, str(top / "bundle"), kind, str(top / "home")]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=top / "here", timeout=120, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
        )  # fmt: skip
        assert (done.stdout, done.returncode) == ("(1,) []\n", 0), done.stderr
    finally:
        (top / "home").chmod(0o755)
        (top / "bundle").chmod(0o755)
        shutil.rmtree(top)


def test_embeddings_that_threads_add_mean_their_own_rows_while_others_make_pictures() -> None:
    interval, together = sys.getswitchinterval(), Barrier(6)
    with sdopt.load(threads=1) as pipe:
        plain = pipe("a cat", **OPTIONS).images

        def add(i: int) -> None:
            together.wait()
            for j in range(10):
                pipe.load_embedding(np.full((2, 128), (10 * i + j) / 100, np.float32), f"<e{i}q{j}>")

        def draw(_: int) -> None:
            together.wait()
            for _ in range(4):
                np.testing.assert_array_equal(pipe("a cat", **OPTIONS).images, plain)

        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(6) as threads:
                list(threads.map(lambda i: add(i) if i < 4 else draw(i), range(6)))
        finally:
            sys.setswitchinterval(interval)
        encoded = {f"<e{i}q{j}>": pipe.encode([f"<e{i}q{j}>"]) for i in range(4) for j in range(10)}
    with sdopt.load(threads=1) as alone:
        for i, j in ((0, 0), (1, 7), (3, 9)):
            alone.load_embedding(np.full((2, 128), (10 * i + j) / 100, np.float32), f"<e{i}q{j}>")
            np.testing.assert_allclose(alone.encode([f"<e{i}q{j}>"]), encoded[f"<e{i}q{j}>"], atol=1e-5)


def test_in_little_memory_threads_leave_one_engine_open() -> None:
    names = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    with EnginePool(Bundle.open(EMOJI_BUNDLE), "ort:cpu", memory="low", threads=1) as pool:
        for _ in range(3):
            threads = [Thread(target=pool.open, args=(name,)) for name in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(pool.opened) == 1


def replaced(bundle: Path) -> None:
    """Other weights under the name of the old ones, as a deployment puts them."""
    weights = np.fromfile(bundle / "unet.onnx.data", np.float16)
    weights[:200000] *= np.float16(0.5)
    weights.tofile(bundle / "new")
    (bundle / "new").replace(bundle / "unet.onnx.data")


def copied(bundle: Path) -> None:
    for path in list(bundle.glob("unet*")):
        (bundle / "new").write_bytes(path.read_bytes())
        (bundle / "new").replace(path)


@on_each_backend
@pytest.mark.parametrize("verify", [True, False])
def test_a_bundle_that_is_replaced_underneath_is_named_and_never_half_used(
    backend: str, verify: bool, bundle_copy: Path, own_folders: Path
) -> None:
    with sdopt.load(bundle_copy, backend=backend, verify=verify, threads=1) as pipe:
        replaced(bundle_copy)
        with pytest.raises(
            BundleError, match=r"unet\.onnx\.data has changed since the bundle was opened: open it again"
        ):
            pipe("a cat", **OPTIONS)
        assert not list((own_folders / "cache").rglob("loaded/*unet*"))
        bundle_copy.rename(own_folders / "moved")
        with pytest.raises(BundleError, match=r"unet.* is gone \(No such file"):
            pipe("a cat", **OPTIONS)


def test_a_bundle_that_is_copied_once_more_to_its_place_goes_on(bundle_copy: Path) -> None:
    with sdopt.load(bundle_copy, threads=1) as pipe:
        copied(bundle_copy)
        assert pipe("a cat", **OPTIONS).seeds == (1,)


LITTLE = """
import resource, sys, sdopt
pipe = sdopt.load(backend=sys.argv[1], threads=1, cache=False)
pipe("a cat", num_inference_steps=1)
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (40 << 20),) * 2)
try:
    pipe("a cat", num_inference_steps=1, height=1024, width=1024)
except sdopt.SdoptError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
@on_each_backend
def test_a_picture_too_large_for_the_memory_is_an_error_that_says_what_needs_less(backend: str) -> None:
    done = python(LITTLE, backend)
    assert done.returncode == 0, done.stderr
    assert "memory" in done.stdout
    assert "--vae-tile" in done.stdout


def test_what_a_library_raises_while_it_computes_is_an_error_of_sdopt() -> None:
    """An id past the end of the vocabulary, which only the library can see."""
    with open_engine(Bundle.open(EMOJI_BUNDLE), "text_encoder", "ort", threads=1) as engine:
        shapes = {"batch": 1, "tokens": 32, "extra_tokens": 1}
        arrays = {spec.name: np.full(spec.sized(shapes), 1 << 29, spec.dtype) for spec in engine.inputs}
        with pytest.raises(
            BackendError, match=r"text_encoder: .* failed while it computed. The call was input_ids \[1"
        ):
            engine(**arrays)


def test_memory_that_ends_in_numpy_is_an_error_of_sdopt() -> None:
    with (
        pytest.raises(BackendError, match=r"2 at 64x64: the memory of this process is full .*--vae-tile"),
        memory_in_words("2 at 64x64"),
    ):
        np.zeros(1 << 55, np.float32)
    full = failure("unet", "ONNX Runtime", {"sample": (1, 4, 8, 8)}, RuntimeError("std::bad_alloc"))
    assert "unet: the memory of this process is full. The call was sample [1, 4, 8, 8]" in str(full)
