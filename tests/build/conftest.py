"""Two random UNets, traced alone: that of SDXL, and the nine-channel one of inpainting."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import make_tiny_checkpoint


def trace_unet(checkpoint: Path) -> Path:
    """The UNet of a checkpoint as a graph beside it."""
    from sdopt.export import families, trace
    from sdopt.export.source import open_checkpoint

    path = checkpoint.with_name(f"{checkpoint.name}-unet.onnx")
    with open_checkpoint(str(checkpoint)) as opened:
        unet = families.of(opened).builds(opened)["unet"]
        trace.save(trace.trace(unet(opened)), path)
    return path


@pytest.fixture(scope="session")
def sdxl_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trace_unet(tiny.sdxl(tmp_path_factory.mktemp("passes") / "sdxl"))


@pytest.fixture(scope="session")
def nine_channels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trace_unet(make_tiny_checkpoint(tmp_path_factory.mktemp("passes") / "nine", in_channels=9))
