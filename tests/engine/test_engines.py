"""Every backend that is installed keeps the contract, and one that is not says how to get it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sdopt import engine as engines
from sdopt.bundle.files import Bundle
from sdopt.bundle.write import new_folder
from sdopt.engine import BACKENDS, Engine, choose_backend, cuda, installed_backends, open_engine, ort_device
from sdopt.engine import ort as ort_engine
from sdopt.engine.store import Record, engines_folder, write_record
from sdopt.errors import BackendError, BundleError, UsageError
from tests.conftest import EMOJI_BUNDLE, ROOT
from tests.engine.contract import CONTRACT, unet_inputs

READY = [name for name in installed_backends() if BACKENDS[name].precisions]  # the others need a build: test_trt.py


@pytest.fixture(scope="module", params=READY)
def unet(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with open_engine(Bundle.open(EMOJI_BUNDLE), "unet", request.param) as engine:
        yield engine


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda p: p.__name__)
def test_contract(unet: Engine, promise: Callable[[Engine], None]) -> None:
    promise(unet)


def test_bf16_is_near_float32_and_only_where_it_is_asked_for() -> None:
    pytest.importorskip("openvino")
    from sdopt.engine.openvino import native_bf16
    from sdopt.metrics import psnr

    bundle = Bundle.open(EMOJI_BUNDLE)
    if not native_bf16():
        with pytest.raises(BackendError, match="does not compute in bf16"):
            open_engine(bundle, "unet", "openvino", precision="bf16")
        return
    outputs = []
    for precision in ("auto", "bf16"):
        with open_engine(bundle, "unet", "openvino", precision=precision) as engine:
            outputs.append(engine(**unet_inputs(engine))["noise_pred"])
    with open_engine(bundle, "unet", "ort") as engine:
        exact = engine(**unet_inputs(engine))["noise_pred"]
    assert psnr(exact, outputs[0]) >= 100
    assert 35 <= psnr(exact, outputs[1]) < 80


def test_a_precision_finds_a_backend_that_has_it() -> None:
    assert choose_backend() == ("ort", "fp32") == choose_backend("auto", "float32")
    with pytest.raises(UsageError, match=r"precision 'fp4' is not known; there are .*bf16"):
        choose_backend("auto", "fp4")
    with pytest.raises(UsageError, match=r"backend 'ort' computes in fp32; for bf16 there is openvino"):
        choose_backend("ort", "bf16")
    if "openvino" in installed_backends():
        assert choose_backend("auto", "bf16") == ("openvino", "bf16")


@pytest.mark.parametrize("backend", READY)
def test_a_closed_engine_refuses_to_be_called(backend: str) -> None:
    engine = open_engine(Bundle.open(EMOJI_BUNDLE), "unet", backend, threads=1)
    given = unet_inputs(engine)
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine(**given)


def test_an_unknown_backend_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"backend 'orrt' is not known; there are auto, ort"):
        choose_backend("orrt")


def test_a_backend_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "installed_backends", lambda: ())
    for backend in ("auto", *BACKENDS):
        with pytest.raises(BackendError, match="pip install"):
            choose_backend(backend)


def test_the_device_can_be_named_and_a_missing_one_says_what_there_is() -> None:
    bundle = Bundle.open(EMOJI_BUNDLE)
    with open_engine(bundle, "text_encoder", "ort:cpu", threads=1) as engine:
        assert engine.inputs[0].name == "input_ids"
    with pytest.raises(UsageError, match=r"backend 'ort:tpu' is not known; there are ort:cuda, ort:cpu"):
        open_engine(bundle, "text_encoder", "ort:tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(BackendError, match=r"this onnxruntime has .*sdopt\[cuda\]"):
            open_engine(bundle, "text_encoder", "ort:cuda")


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_positive(threads: int) -> None:
    with pytest.raises(UsageError, match="threads = "):
        open_engine(Bundle.open(EMOJI_BUNDLE), "unet", threads=threads)


def test_a_graph_that_is_not_what_the_manifest_says_is_refused() -> None:
    bundle = Bundle.open(EMOJI_BUNDLE)
    entry = replace(bundle.manifest.components["unet"], graph="vae_decoder.onnx", graphs={})
    manifest = replace(bundle.manifest, components={**bundle.manifest.components, "unet": entry})
    with pytest.raises(BundleError, match=r"vae_decoder.onnx: its inputs are .*latent_sample.* the manifest says"):
        open_engine(Bundle(bundle.path, manifest), "unet")


MEMORY = """
import sys
from pathlib import Path
from sdopt.bundle.files import Bundle
from sdopt.bundle.write import new_folder
from sdopt.engine.ort import OrtEngine
unet = Bundle.open(sys.argv[1]).component("unet")
def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024
before = held()
engine = OrtEngine(unet, 1, "cpu", lean=sys.argv[2] == "small")
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounts of memory")
def test_a_small_engine_leaves_the_weights_in_their_file() -> None:
    command = [sys.executable, "-c", MEMORY, str(EMOJI_BUNDLE)]
    small, whole = (
        float(subprocess.run([*command, kind], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
        for kind in ("small", "whole")
    )
    weights = (EMOJI_BUNDLE / "unet.onnx.data").stat().st_size / 2**20
    assert small < weights < whole / 2  # MiB


def test_providers_are_named_with_their_options_and_cuda_stands_behind_tensorrt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = {name: ort_engine.providers(ort_engine.find_device(name)) for name in ("cuda", "cuda:1", "tensorrt")}
    assert [name for name, _ in chosen["cuda"]] == ["CUDAExecutionProvider"]
    assert [chosen[name][0][1]["device_id"] for name in ("cuda", "cuda:1")] == ["0", "1"]
    assert chosen["cuda"][0][1]["use_tf32"] == "0"
    (first, options), (second, _) = chosen["tensorrt"]
    assert [first, second] == there[:2]
    assert options["trt_engine_cache_path"] == str(tmp_path / "sdopt/ort-tensorrt")
    for wrong in ("cpu:1", "cuda:x", "cuda:"):
        with pytest.raises(UsageError, match=r"ort:cuda:1 for the second GPU"):
            ort_engine.find_device(wrong)


def test_onnx_runtime_knows_every_provider_of_the_table() -> None:
    assert {entry.name for entry in ort_device.PROVIDERS.values()} <= set(onnxruntime.get_all_providers())


@pytest.mark.parametrize("kind", ort_device.PROVIDERS)
def test_a_provider_that_is_missing_is_named_with_its_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ort_device.PROVIDERS[kind]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider"])
    with pytest.raises(BackendError, match=f"'ort:{kind}' needs ONNX Runtime's {entry.name}.*pip install") as caught:
        open_engine(Bundle.open(EMOJI_BUNDLE), "vae_encoder", f"ort:{kind}")
    assert entry.package in str(caught.value)


@pytest.mark.parametrize("kind", ["dml", "coreml", "rocm", "openvino"])
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_an_error_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This onnxruntime has none of them: told otherwise, it warns and goes on with the CPU."""
    entry = ort_device.PROVIDERS[kind]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [entry.name])
    device = ort_device.find_device(kind)
    assert (device.memory, device.provider) == ("cpu", kind.upper())
    assert ort_device.providers(device) == [
        (entry.name, {**entry.options, **({"device_id": "0"} if entry.number else {})})
    ]
    with pytest.raises(BackendError, match=rf"could not start its {entry.name} .*--backend ort:cpu") as caught:
        open_engine(Bundle.open(EMOJI_BUNDLE), "vae_encoder", f"ort:{kind}")
    assert entry.package in str(caught.value)
    if not entry.number:
        with pytest.raises(UsageError, match=f"'ort:{kind}:1' is not known"):
            ort_device.find_device(f"{kind}:1")


def test_a_provider_that_takes_one_call_at_a_time_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(ort_device.PROVIDERS["cpu"], one_call_at_a_time=True)
    monkeypatch.setitem(ort_device.PROVIDERS, "cpu", row)
    bundle = Bundle.open(EMOJI_BUNDLE)
    inputs = {"sample": np.zeros((1, 3, 64, 64), np.float32)}
    at_once = [0, 0]  # now, and at most

    class Watched:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, *arguments: Any) -> Any:
            at_once[0] += 1
            at_once[1] = max(at_once)
            try:
                return self.session.run(*arguments)
            finally:
                at_once[0] -= 1

    with open_engine(bundle, "vae_encoder", "ort:cpu", threads=1, cache=False) as engine:
        assert isinstance(engine, ort_engine.OrtEngine)
        session = Watched(engine._session.get())
        monkeypatch.setattr(engine._session, "get", lambda: session)
        expected = engine(**inputs)["mean"]
        with ThreadPoolExecutor(4) as threads:
            for found in threads.map(lambda _: engine(**inputs)["mean"], range(12)):
                np.testing.assert_array_equal(found, expected)
    assert at_once == [0, 1]


@pytest.mark.parametrize("sees", [True, False])
def test_without_a_named_device_the_gpu_is_taken_if_there_is_one(sees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort_device, "sees_gpu", lambda: sees)
    assert ort_engine.find_device(None) == ort_engine.Device("cuda" if sees else "cpu")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_gpu_whose_libraries_cannot_be_loaded_is_an_error_and_not_a_slow_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU's onnxruntime that is said to have CUDA: as the real one without cuDNN, it goes on with the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    preloaded: list[bool] = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: preloaded.append(True), raising=False)
    with pytest.raises(BackendError, match=r"could not start its CUDAExecutionProvider.*cudnn.*--backend ort:cpu"):
        open_engine(Bundle.open(EMOJI_BUNDLE), "vae_encoder", "ort:cuda")
    assert preloaded


def test_an_engine_that_was_built_for_cuda_is_not_there_for_the_cpu(bundle: Bundle) -> None:
    record = Record(
        component="vae_encoder", backend="ort", inputs=(), outputs=(), carry={}, profiles=(), command="", sources={},
        environment={"provider": "CUDA"}, options={"precision": "fp16"},
    )  # fmt: skip
    with new_folder(engines_folder(bundle) / record.key) as folder:
        (folder / "graph.onnx").write_bytes(b"not for a CPU")
        write_record(folder, record, ["graph.onnx"])
    assert engines.built_components(bundle, "ort:cpu") == {}
    with open_engine(bundle, "vae_encoder", "ort:cpu") as engine:
        assert engine.inputs


def test_a_driver_is_asked_whether_it_shows_a_gpu() -> None:
    assert cuda.sees_gpu() in (True, False)  # the real driver, where there is one


def test_plans_of_onnx_runtimes_tensorrt_are_kept_where_nobody_else_writes(own_folders: Path) -> None:
    device = ort_engine.Device("tensorrt")
    (_, options), *_ = ort_engine.providers(device)
    plans = Path(options["trt_engine_cache_path"])
    assert plans == own_folders / "cache/sdopt/ort-tensorrt"
    assert (options["trt_engine_cache_enable"], plans.stat().st_mode & 0o777) == ("1", 0o700)
    (plans / "a.engine").touch(mode=0o600)
    assert ort_engine.providers(device)[0][1]["trt_engine_cache_enable"] == "1"
    (plans / "a.engine").chmod(0o666)
    (_, options), *_ = ort_engine.providers(device)
    assert (options["trt_engine_cache_enable"], "trt_engine_cache_path" in options) == ("0", False)


EVIL = """
import sys
import numpy as np
import onnx
from onnx import TensorProto, helper
from pathlib import Path
from sdopt.bundle.files import Component
from sdopt.bundle.specs import TensorSpec
from sdopt.engine import ort
from sdopt.errors import SdoptError
kind, path = sys.argv[1], Path(sys.argv[2])
name = "evil\\x1b[31m\\x07"
op, shift = {"load": ("NoSuch\\x1b[31m", ()), "gather": ("Gather", (99,)), "reshape": ("Reshape", (7,))}[kind]
constant = [helper.make_tensor("c", TensorProto.INT64, [1], shift)] if shift else []
more = {"axis": 1} if kind == "gather" else {}
node = helper.make_node(op, ["x", "c"] if shift else ["x"], ["y"], name=name, **more)
x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"] if kind != "reshape" else ["a"])
graph = helper.make_graph([node], name, [x], [y], constant)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
model.ir_version = 9
onnx.save(model, path)
component = Component("unet", path, (TensorSpec("x", "float32", ("n", 4)),),
                      (TensorSpec("y", "float32", ("a", "b") if kind != "reshape" else ("a",)),))
try:
    ort.OrtEngine(component, 1)(x=np.zeros((2, 4), np.float32))
except SdoptError as error:
    print(repr(str(error)))
"""


@pytest.mark.parametrize("kind", ["load", "gather", "reshape"])
def test_onnx_runtime_writes_nothing_by_itself_of_what_it_raises(kind: str, tmp_path: Path) -> None:
    """It would write texts of the graph, with their control characters, into the terminal."""
    command = [sys.executable, "-c", EVIL, kind, str(tmp_path / "graph.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert ("NoSuch" if kind == "load" else "evil") in done.stdout
    assert done.stderr == ""
