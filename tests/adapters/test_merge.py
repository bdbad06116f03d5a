"""Weights that are merged a block at a time are those that the plain formula gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdopt.adapters.lora.algorithms import Factors
from sdopt.adapters.lora.loaded import Loras
from sdopt.adapters.lora.low_rank import in_order, low_rank
from sdopt.bundle.files import Bundle, embedded
from sdopt.bundle.weights import FLOAT16, Weights, widen
from sdopt.errors import UsageError
from tests.adapters.lora_files import shapes, tensors, write


def test_every_float16_is_widened_exactly() -> None:
    every: np.ndarray = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.ascontiguousarray(every[np.isfinite(every)])
    for halves in (every, finite, finite[:0]):
        wide = np.empty(halves.shape, np.float32)
        widen(halves, FLOAT16, wide)
        assert np.array_equal(wide.view(np.uint32), halves.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("rank", [1, 4, 200])
@pytest.mark.parametrize("variant", ["", "ort"])
def test_blocks_give_the_numbers_of_the_formula(rank: int, variant: str, tmp_path: Path) -> None:
    bundle = Bundle.open(embedded())
    loras = Loras(bundle)
    for i in range(2):
        unet = {"unet": shapes(bundle, "unet")}
        loras.load(write(tmp_path / f"{i}.safetensors", tensors(unet, rank=rank, alpha=3.0, seed=i)), f"{i}")
    loras.use(["0", "1"], [0.7, -1.3])
    weights = Weights.of(bundle.component("unet", variant))
    expected = dict(loras.overlay.changed("unet", weights))
    parts = list(loras.overlay.merged("unet", weights))
    assert {part.weight.parameter for part, _ in parts} == set(expected)
    for part, numbers in parts:
        wanted = part.weight.held(expected[part.weight.parameter])
        np.testing.assert_allclose(numbers, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))
    threaded = list(loras.overlay.merged("unet", weights, threads=3))
    assert [part.name for part, _ in threaded] == [part.name for part, _ in parts]
    assert all((one == other).all() for (_, one), (_, other) in zip(parts, threaded, strict=True))


def test_a_product_that_overflows_is_refused_with_its_name(tmp_path: Path) -> None:
    bundle = Bundle.open(embedded())
    path, shape = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", (160, 160)
    assert shapes(bundle, "unet")[path] == shape
    huge = tensors({"unet": {path: shape}}, size=1e25)
    loras = Loras(bundle)
    loras.load(write(tmp_path / "huge.safetensors", huge), None)
    with pytest.raises(UsageError, match=r"huge.*with multiplier 1 .*to_q.weight would be NaN or infinite"):
        list(loras.overlay.merged("unet", Weights.of(bundle.component("unet")), threads=2))


def test_low_rank_is_for_plain_lora_alone() -> None:
    up, down = np.ones((6, 2), np.float32), np.ones((2, 5), np.float32)
    product = low_rank(Factors({"up": up, "down": down}, alpha=1.0), 0.5)
    assert product is not None
    assert product.scale == 0.25
    assert low_rank(Factors({"up": up, "down": down, "dora_scale": np.ones((6, 1), np.float32)}), 1.0) is None
    assert low_rank(Factors({"diff": np.ones((6, 5), np.float32)}), 1.0) is None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_items_come_in_order_and_an_error_comes_at_its_place(threads: int) -> None:
    assert list(in_order(lambda n: n * n, range(40), threads)) == [n * n for n in range(40)]
    made: list[float] = []
    with pytest.raises(ZeroDivisionError):
        made.extend(in_order(lambda n: 1 / (7 - n), range(40), threads))
    assert list(in_order(lambda n: n, [], threads)) == []


def test_a_weight_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(embedded(), tmp_path / "bundle")
    bundle = Bundle.open(folder)
    weights = Weights.of(bundle.component("unet"))
    (folder / "unet.onnx.data").write_bytes(b"12")
    with pytest.raises(OSError, match=r"unet\.onnx\.data is too short"):
        weights.read("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight")
