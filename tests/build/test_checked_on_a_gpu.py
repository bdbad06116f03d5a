"""What a build does once its plan is there and a GPU too, on the fake one: it runs the plan and compares its rows."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdopt.build.agree import Agreement
from sdopt.build.options import Options, part_options
from sdopt.build.plan import build
from sdopt.build.recipe import read_recipe
from sdopt.build.target import Target
from sdopt.build.trt_build import Builder
from sdopt.bundle import Bundle
from sdopt.engine import device
from sdopt.engine.device import Device
from sdopt.engine.plans import PLAN, stored
from sdopt.errors import BackendError
from sdopt.specs import Profile, TensorSpec
from tests.engine.fake_gpu import FakeCuda, fake_plan, fake_tensorrt

SIZES = ["batch=1:1:3 height=64 width=64"]


@pytest.fixture(params=["tensorrt", "tensorrt:1"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, own_folders: Path, tmp_path: Path) -> str:
    """A GPU with a TensorRT that makes plans for the fake runtime; the GPU is the one that the backend names."""
    fake, index = FakeCuda(), int(request.param.partition(":")[2] or 0)
    trt: Any = fake_tensorrt(fake)
    trt.DataType = SimpleNamespace(BF16=7)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(device._devices, index, Device(fake))
    if index:
        monkeypatch.delitem(device._devices, 0, raising=False)

    def make(
        builder: Builder, graph: Path, plan: Path, inputs: Sequence[TensorSpec], profiles: Sequence[Profile], *_: Any
    ) -> dict[str, int]:
        kept = tmp_path / "kept"
        shutil.copytree(graph.parent, kept, dirs_exist_ok=True)
        shapes = [{s.name: [p.shape(s, i) for i in range(3)] for s in inputs} for p in profiles]
        plan.write_bytes(fake_plan(kept / graph.name, shapes))
        return {"FLOAT": 9}

    monkeypatch.setattr(Builder, "build", make)
    monkeypatch.setattr(Builder, "unsupported", lambda builder, names: [])
    monkeypatch.setattr(Builder, "strongly_typed", True)
    return request.param


@pytest.mark.parametrize("component", ["unet_step", "text_encoder"])
def test_a_finished_engine_is_run_and_its_rows_agree(component: str, backend: str, bundle: Bundle) -> None:
    lines: list[str] = []
    options = Options(precision="fp32")
    (folder,) = build(bundle, backend, components=[component], profiles=SIZES, options=options, report=lines.append)
    (found,) = stored(bundle, "tensorrt")
    assert (folder / PLAN).exists()
    agreement = found.record.notes["agreement"]
    assert set(agreement) == {"rows", "alone", *(["halves"] if component == "unet_step" else [])}
    assert min(agreement.values()) > 80
    assert not [held for held in device.shared_device(int(backend[9:] or 0)).held if held != device.SCRATCH]


def test_an_engine_whose_rows_differ_is_not_kept(backend: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdopt.build.agree.measure", lambda engine, profile: Agreement(rows=11.4))
    with pytest.raises(BackendError, match=r"vae_encoder: identical rows .* alike to 11.4 dB, and 40 dB is what fp32"):
        build(
            bundle, backend, components=["vae_encoder"], profiles=SIZES, options=Options(precision="fp32"),
            report=lambda line: None,
        )  # fmt: skip
    assert stored(bundle, "tensorrt") == []


def test_a_vae_that_overflows_in_half_is_bf16_on_a_gpu_that_computes_in_it(backend: str, bundle: Bundle) -> None:
    unsafe = Bundle(bundle.path, {**bundle.manifest, "float16_unsafe": ["vae_encoder"]})
    part, target = read_recipe().parts["vae_encoder"], Target.here(backend)
    assert part_options(Options(), part, unsafe, target.has_bf16)["precision"] == "bf16"
