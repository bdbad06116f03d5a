"""Gaussian noise from a seed, equal to torch's, without torch.

There are three generators with one method, `randn(shape)`. Successive calls advance a generator as torch's does:

    cpu          torch.Generator("cpu"), the default of diffusers: MT19937 and Box-Muller in blocks of 16
    cuda:<gpu>   torch.Generator("cuda"): Philox4x32-10, whose numbers depend on the launch geometry of the GPU
    numpy        np.random.RandomState(seed).randn, what old ONNX pipelines and Core ML use

The numbers equal torch's to about 5e-7: torch's vectorised log, sin and cos differ from NumPy's in the last digit.
Ref: PyTorch aten/src/ATen/native/cpu/DistributionTemplates.h and native/cuda/DistributionTemplates.h.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdopt.errors import UsageError, choices

Float32 = NDArray[np.float32]

RNGS = ("cpu", "numpy", "cuda:<gpu>")

# GPU -> the threads of its largest grid: streaming multiprocessors x threads per multiprocessor.
# If a draw has more numbers than that, its threads make several each, so the noise depends on the GPU.
GPU_THREADS = {
    "t4": 40 * 1024,
    "rtx2070s": 40 * 1024,
    "v100": 80 * 2048,
    "a4000": 48 * 1536,
    "a10": 72 * 1536,
    "l4": 58 * 1536,
    "3060": 28 * 1536,
    "3080": 68 * 1536,
    "3090": 82 * 1536,
    "4070": 46 * 1536,
    "4080": 76 * 1536,
    "4090": 128 * 1536,
    "l40s": 142 * 1536,
    "a100": 108 * 2048,
    "h100": 132 * 2048,  # SXM
    "h100-pcie": 114 * 2048,
    "h200": 132 * 2048,
}


class Generator(Protocol):
    """A source of standard normal numbers."""

    def randn(self, shape: Sequence[int]) -> Float32:
        """The next numbers as a float32 array of `shape`."""
        ...


def generator(seed: int, rng: str = "cpu") -> Generator:
    """A generator for `seed`. `rng` is "cpu" (torch's default), "cuda:<gpu>" or "numpy".

    "cuda" alone is the GPU noise of AUTOMATIC1111 and stable-diffusion.cpp. It equals the noise of every GPU as long as
    a draw is no larger than the smallest grid known here: 40,960 numbers, two SD 1.5 images of 512x512. A larger draw
    raises an error that asks for the GPU's name. For several seeds, make several generators: see `batch`.

    Raises: UsageError for a seed outside 0..2**64-1 or an unknown `rng`.
    """
    seed = check_seed(seed)
    if rng == "cpu":
        return TorchCpu(seed)
    if rng == "numpy":
        return NumpyLegacy(seed)
    name, _, gpu = rng.partition(":")
    if name == "cuda" and (not gpu or gpu in GPU_THREADS):
        return TorchCuda(seed, GPU_THREADS[gpu] if gpu else None)
    if name == "cuda":
        raise UsageError(f"rng {rng!r}: unknown GPU {gpu!r}; known are {choices(gpu, GPU_THREADS)}.")
    raise UsageError(f"rng {rng!r} is unknown; use one of {choices(rng, RNGS)}.")


def check_seed(seed: Any) -> int:
    """`seed` as an int in 0..2**64-1.

    Raises: UsageError for anything else. Negative seeds are refused, although torch silently maps them to other ones.
    """
    allowed = "a seed is an integer from 0 to 2**64-1 (18446744073709551615)"
    try:
        value = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        raise UsageError(f"seed {seed!r} is a {type(seed).__name__}; {allowed}.") from None
    if not 0 <= value < 2**64:
        raise UsageError(f"seed {seed} is out of range; {allowed}.")
    return value


def batch(generators: Sequence[Generator], shape: Sequence[int]) -> Float32:
    """Noise of `shape`, drawn as diffusers draws it from a list of generators.

    One generator draws the whole batch at once, so image i differs from the image that its seed gives alone. As many
    generators as images draw one image each, so image i is the same as if it were made alone.

    Raises: UsageError if the number of generators is neither 1 nor shape[0].
    """
    if len(generators) == 1:
        return generators[0].randn(shape)
    if len(generators) != shape[0]:
        raise UsageError(f"{len(generators)} seeds for a batch of {shape[0]}: give one seed, or {shape[0]}.")
    return np.concatenate([g.randn((1, *shape[1:])) for g in generators])


class TorchCpu:
    """torch.Generator("cpu"): MT19937, seeded with the low 32 bits of the seed, so seeds equal mod 2**32 agree.

    A draw of 16 numbers or more turns 24-bit uniforms into normals by Box-Muller, in blocks of 16. A smaller draw uses
    53-bit uniforms, and Box-Muller makes two numbers at a time. If the second is not used, the next small draw gets it.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._second_of_pair: float | None = None

    def randn(self, shape: Sequence[int]) -> Float32:
        """The next numbers as a float32 array of `shape`."""
        n = math.prod(shape)
        flat = self._blocks(n) if n >= 16 else np.array([self._one() for _ in range(n)], dtype=np.float32)
        return np.reshape(flat, tuple(shape))

    def _blocks(self, n: int) -> Float32:
        numbers = self._uniform24(n)
        in_full_blocks = n // 16 * 16
        _box_muller(numbers[:in_full_blocks])
        if in_full_blocks < n:  # torch draws the last 16 numbers anew, also those that a full block has made already
            numbers[-16:] = self._uniform24(16)
            _box_muller(numbers[-16:])
        return numbers

    def _one(self) -> float:
        if self._second_of_pair is not None:
            number, self._second_of_pair = self._second_of_pair, None
            return number
        angle = 2 * math.pi * self._uniform53()
        radius = math.sqrt(-2 * math.log1p(-self._uniform53()))
        self._second_of_pair = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uint32(self, n: int) -> NDArray[np.uint32]:
        return self._words.randint(0, 1 << 32, size=n, dtype=np.uint32)

    def _uniform24(self, n: int) -> Float32:
        words = self._uint32(n)
        words &= np.uint32(0xFFFFFF)
        uniform = words.astype(np.float32)
        uniform *= np.float32(2.0**-24)
        return uniform

    def _uniform53(self) -> float:
        high, low = (int(word) for word in self._uint32(2))
        low_53_bits = ((high << 32) | low) & ((1 << 53) - 1)
        return low_53_bits * 2.0**-53


def drawing(seeds: Sequence[int], rng: str, shape: Sequence[int]) -> Callable[[], Float32]:
    """A function that draws standard normal noise of `shape`, each image's from its own seed.

    So every image of a batch is the same as if it were made alone.
    """
    generators = [generator(seed, rng) for seed in seeds]
    return lambda: batch(generators, shape)


def _box_muller(uniform: Float32) -> None:
    """Turn uniforms into normals in place, in blocks of 16: eight cosines, then eight sines."""
    blocks = uniform.reshape(-1, 2, 8)
    radius = 1 - blocks[:, 0]
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    angle = 2 * math.pi * blocks[:, 1]
    np.multiply(radius, np.cos(angle), out=blocks[:, 0])
    np.multiply(radius, np.sin(angle), out=blocks[:, 1])


class NumpyLegacy:
    """np.random.RandomState(seed).randn, rounded to float32."""

    def __init__(self, seed: int) -> None:
        if seed >= 2**32:
            raise UsageError(f"seed {seed} is out of range; rng 'numpy' takes seeds from 0 to 2**32-1. Use rng 'cpu'.")
        self._state = np.random.RandomState(seed)

    def randn(self, shape: Sequence[int]) -> Float32:
        """The next numbers as a float32 array of `shape`."""
        return self._state.standard_normal(tuple(shape)).astype(np.float32)


class TorchCuda:
    """torch.Generator("cuda") on a GPU whose largest grid has `threads` threads. None: any GPU, for draws up to 40,960.

    Thread i of T makes the numbers i, i + T, i + 2T and i + 3T from one Philox block, then four more from the next one.
    Ref: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox4x32-10); cuRAND's curand_normal4.
    """

    def __init__(self, seed: int, threads: int | None) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32)
        self._threads = threads
        self._offset = 0  # in blocks of four numbers per thread

    def randn(self, shape: Sequence[int]) -> Float32:
        """The next numbers as a float32 array of `shape`."""
        n = math.prod(shape)
        threads = self._threads_for(n)
        rounds = math.ceil(n / (4 * threads)) if n else 0
        thread_ids = np.arange(threads, dtype=np.uint64)
        blocks = [_philox_normal(thread_ids, self._offset + i, self._key) for i in range(rounds)]
        self._offset += rounds
        flat = np.ravel(np.concatenate(blocks))[:n] if blocks else np.empty(0, np.float32)
        return np.reshape(flat, tuple(shape))

    def _threads_for(self, n: int) -> int:
        """The threads of a launch that draws n numbers: blocks of 256, but no more than the GPU's largest grid."""
        smallest = min(GPU_THREADS.values())
        if self._threads is None and n > smallest:
            raise UsageError(
                f"rng 'cuda' is the same on every GPU only up to {smallest} numbers a draw, and this draw has {n}: "
                f"name the GPU to reproduce, rng 'cuda:<gpu>' with one of {', '.join(GPU_THREADS)}."
            )
        return min(self._threads or smallest, math.ceil(n / 256) * 256)


def _philox_normal(threads: NDArray[np.uint64], block: int, key: tuple[int, int]) -> Float32:
    """Four normals for each thread, as rows: [4, threads]."""
    low_word, word_bits = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0 = np.full_like(threads, block & 0xFFFFFFFF)
    c1 = np.full_like(threads, block >> 32)
    c2, c3 = threads & low_word, threads >> word_bits
    k0, k1 = key
    for _ in range(10):  # the names of counter and key are the paper's
        product0, product2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (product2 >> word_bits) ^ c1 ^ np.uint64(k0), product2 & low_word
        c2, c3 = (product0 >> word_bits) ^ c3 ^ np.uint64(k1), product0 & low_word
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.concatenate([_curand_pair(c0, c1), _curand_pair(c2, c3)])


def _curand_pair(x: NDArray[np.uint64], y: NDArray[np.uint64]) -> Float32:
    """Two normals from two words, the sine first. All of it is computed in float32."""
    uniform = x.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    angle = y.astype(np.float32) * np.float32(2.0**-32 * 2 * math.pi) + np.float32(2.0**-33 * 2 * math.pi)
    radius = np.sqrt(-2 * np.log(uniform))
    return np.stack([radius * np.sin(angle), radius * np.cos(angle)])
