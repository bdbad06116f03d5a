"""A fake GPU and a fake TensorRT in place of NVIDIA's libraries; see `tests.fakes`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdopt
from tests.conftest import EMOJI_BUNDLE
from tests.engine.plans import stock
from tests.fakes.gpu import Simulator

WIDE = "batch=1:1:4 tokens=1:32:64 height=8:128:256 width=8:128:256"


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
