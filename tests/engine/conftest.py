"""A fake GPU and a fake TensorRT in place of NVIDIA's libraries; see `tests.fakes`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sdopt
from sdopt.engine import device
from tests.conftest import EMOJI_BUNDLE
from tests.engine.plans import stock
from tests.fakes.gpu import TOTAL, Simulator, as_module
from tests.fakes.trt import FLAVOURS, fake_tensorrt

WIDE = "batch=1:1:4 tokens=1:32:64 height=8:128:256 width=8:128:256"
PlugIn = Callable[..., Simulator]


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlugIn]:
    """Puts a GPU in place, and a TensorRT of some flavour; afterwards nothing may be left on the GPU."""
    plugged: list[Simulator] = []

    def put(flavour: str = "10", total: int = TOTAL, devices: int = 1) -> Simulator:
        simulator = Simulator(total, devices)
        monkeypatch.setattr(device, "_devices", {})
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", as_module(simulator))
        module = fake_tensorrt(simulator, flavour)
        monkeypatch.setitem(sys.modules, FLAVOURS[flavour], module)
        plugged.append(simulator)
        return simulator

    yield put
    for simulator in plugged:
        if not simulator.fail:
            assert simulator.leaks() == {}
            assert simulator.spins == 0


@pytest.fixture
def gpu(plug_in: PlugIn) -> Simulator:
    return plug_in()


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What sdopt's engines say by way of `logging`."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sdopt.engine")
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded bundle with float32 engines for the fake TensorRT, of the UNet fused and alone."""
    return stock(EMOJI_BUNDLE, tmp_path_factory.mktemp("stocked") / "bundle", [WIDE])


@pytest.fixture
def pipe(stocked: Path, gpu: Simulator) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(stocked, backend="tensorrt") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def reference() -> Iterator[sdopt.Pipeline]:
    with sdopt.load(EMOJI_BUNDLE, backend="ort:cpu", threads=1) as pipeline:
        yield pipeline
