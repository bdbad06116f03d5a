"""Noise equals torch's: against torch where it is installed, and against numbers that people have published."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.errors import UsageError
from sdopt.samplers.noise import GPU_THREADS, TorchCuda, batch, generator

SEEDS = (0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**63, 2**64 - 1)


def test_small_draws_are_the_published_ones() -> None:
    assert generator(0).randn((5,)) == pytest.approx([1.5410, -0.2934, -2.1788, 0.5684, -1.0845], abs=1e-4)
    assert generator(42).randn((2, 2)).ravel() == pytest.approx([0.3367, 0.1288, 0.2345, 0.2303], abs=1e-4)


def test_draws_of_sixteen_and_with_a_tail_are_the_published_ones() -> None:
    whole, tail = generator(0).randn((4, 4)), generator(0).randn((4, 5))
    assert whole[0] == pytest.approx([-1.1258, -1.1524, -0.2506, -0.4339], abs=1e-4)
    assert whole[3] == pytest.approx([0.1198, 1.2377, 1.1168, -0.2473], abs=1e-4)
    assert tail[0] == pytest.approx([-1.1258, -1.1524, -0.2506, -0.4339, 0.5988], abs=1e-4)
    assert tail[3] == pytest.approx([-0.8437, 0.9318, 1.2590, 2.0050, 0.0537], abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_order_of_draws_equals_torch(seed: int) -> None:
    torch = pytest.importorskip("torch")
    ours, theirs = generator(seed), torch.Generator("cpu").manual_seed(seed)
    for shape in [(5,), (3,), (4, 4), (1,), (17,), (15,), (1, 4, 64, 64), (1,), (2, 3, 5), (2, 4, 33, 31), (1,)]:
        expected = torch.randn(shape, generator=theirs).numpy()
        assert np.abs(ours.randn(shape) - expected).max() < 2e-6, shape


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(1, 70), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_random_seeds_and_sizes_equal_torch(seed: int, sizes: list[int]) -> None:
    torch = pytest.importorskip("torch")
    ours, theirs = generator(seed), torch.Generator("cpu").manual_seed(seed)
    for size in sizes:
        assert np.abs(ours.randn((size,)) - torch.randn(size, generator=theirs).numpy()).max() < 2e-6


def test_seeds_equal_modulo_32_bits_are_equal_on_the_cpu_and_differ_on_cuda() -> None:
    assert (generator(7).randn((20,)) == generator(7 + 2**32).randn((20,))).all()
    assert (generator(7, "cuda:a100").randn((20,)) != generator(7 + 2**32, "cuda:a100").randn((20,))).any()


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.0, "1", None, np.float64(3)])
def test_other_seeds_are_refused_with_what_is_allowed(seed: Any) -> None:
    with pytest.raises(UsageError, match=r"integer from 0 to 2\*\*64-1"):
        generator(seed)


def test_integers_of_numpy_are_seeds() -> None:
    assert (generator(np.uint64(5)).randn((3,)) == generator(5).randn((3,))).all()  # type: ignore[arg-type]


def test_numpy_noise_is_that_of_random_state() -> None:
    ours, state = generator(3, "numpy"), np.random.RandomState(3)
    for shape in [(3,), (1, 4, 8, 8)]:
        assert (ours.randn(shape) == state.randn(*shape).astype(np.float32)).all()
    with pytest.raises(UsageError, match=r"2\*\*32-1"):
        generator(2**32, "numpy")


def test_a_list_of_seeds_makes_each_image_alone() -> None:
    together = batch([generator(1), generator(2)], (2, 4, 8, 8))
    assert (together[1] == generator(2).randn((1, 4, 8, 8))[0]).all()
    assert (batch([generator(1)], (2, 4, 8, 8)) == generator(1).randn((2, 4, 8, 8))).all()
    with pytest.raises(UsageError, match="2 seeds for a batch of 3"):
        batch([generator(1), generator(2)], (3, 4, 8, 8))


# -------------------------------------------------------------------------------------- CUDA, published outputs


def test_philox_is_the_generator_of_automatic1111() -> None:
    """Its rng_philox.py, docstring."""
    expected = [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284, -1.0745, -0.3631]
    for rng in ("cuda", "cuda:t4", "cuda:h200"):
        assert generator(0, rng).randn((3, 4)).ravel()[:10] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("gpu", "last"), [("h100", [-0.6970, -0.7780, 0.3267]), ("a100", [0.1549, -0.6797, -0.1656])])
def test_nine_million_numbers_end_as_on_the_gpu(gpu: str, last: list[float]) -> None:
    """github.com/pytorch/pytorch/issues/143086: the same seed on an H100 and an A100."""
    drawn = generator(1, f"cuda:{gpu}").randn((1, 49 * 12 * 112 * 144))[0]
    assert drawn[:3] == pytest.approx([-0.2963, 2.6764, -0.1408], abs=1e-4)
    assert drawn[-3:] == pytest.approx(last, abs=1e-4)


def test_a_grid_that_wraps_once_is_that_of_an_a4000() -> None:
    """github.com/pytorch/pytorch/issues/97097: normal_(5, sqrt 5) after manual_seed(14)."""
    drawn = generator(14, "cuda:a4000").randn((1000, 100)) * 5**0.5 + 5
    assert drawn[0, -3:] == pytest.approx([1.6853, 9.6331, 6.6319], abs=1e-4)
    assert drawn[-1, :3] == pytest.approx([2.7337, 2.2106, 7.7815], abs=1e-4)
    assert drawn[-1, -3:] == pytest.approx([8.2207, 6.5395, 4.2604], abs=1e-4)


def test_a_grid_of_43008_threads_is_that_of_its_gpu() -> None:
    """github.com/pytorch/pytorch/issues/158398: the first machine."""
    drawn = TorchCuda(42, GPU_THREADS["3060"]).randn((64, 2048))
    assert drawn[0, -3:] == pytest.approx([1.4540, -2.7733, -0.8932], abs=1e-4)
    assert drawn[-1, -3:] == pytest.approx([-0.4841, 1.2850, -0.0282], abs=1e-4)


def test_successive_cuda_draws_go_on_where_the_last_one_ended() -> None:
    """Each thread takes the next block of four: with one block of 256 threads, blocks are consecutive draws."""
    first, second, both = TorchCuda(5, 256), TorchCuda(5, 256), TorchCuda(5, 256)
    drawn = [first.randn((1024,)), first.randn((1024,))]
    assert (np.concatenate(drawn) == both.randn((2048,))).all()
    second.randn((1,))  # one number moves the offset by a whole block
    assert (second.randn((1024,)) == drawn[1]).all()


def test_cuda_without_a_gpu_refuses_draws_that_depend_on_it() -> None:
    assert generator(1, "cuda").randn((40960,)).shape == (40960,)
    with pytest.raises(UsageError, match=r"name the GPU .* a100"):
        generator(1, "cuda").randn((40961,))


@pytest.mark.parametrize("rng", ["cuda:z9", "gpu", "", "cpu:0"])
def test_unknown_generators_list_what_there_is(rng: str) -> None:
    with pytest.raises(UsageError, match="use one of|known are"):
        generator(1, rng)


@pytest.mark.parametrize("rng", ["cpu", "numpy", "cuda:l4"])
def test_noise_is_standard_normal(rng: str) -> None:
    drawn = generator(9, rng).randn((200_000,))
    assert drawn.dtype == np.float32
    assert abs(float(drawn.mean())) < 0.01
    assert abs(float(drawn.std()) - 1) < 0.01
    assert float((drawn**4).mean()) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("rng", ["cpu", "numpy", "cuda:l4"])
def test_an_empty_draw_takes_nothing(rng: str) -> None:
    one, other = generator(2, rng), generator(2, rng)
    assert one.randn((0, 4)).shape == (0, 4)
    assert (one.randn((20,)) == other.randn((20,))).all()
