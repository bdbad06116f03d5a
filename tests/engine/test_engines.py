"""Every backend that is installed keeps the contract, and one that is not says how to get it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest

from sdopt import engine as engines
from sdopt.bundle.files import Bundle, new_folder
from sdopt.engine import BACKENDS, Engine, choose_backend, cuda, installed_backends, open_engine
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
    with pytest.raises(UsageError, match=r"precision 'fp8' is not known; there are .*bf16"):
        choose_backend("auto", "fp8")
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
from sdopt.bundle.files import Bundle, new_folder
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


@pytest.mark.parametrize("sees", [True, False])
def test_without_a_named_device_the_gpu_is_taken_if_there_is_one(sees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort_engine, "sees_gpu", lambda: sees)
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
