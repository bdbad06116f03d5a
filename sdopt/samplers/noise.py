"""Gaussian noise from a seed, equal to torch's, without torch.

Three generators, one method `randn(shape)`; successive calls advance the generator as torch's does:

    cpu          torch.Generator("cpu"), the default of diffusers: MT19937 and Box-Muller in blocks of 16
    cuda:<gpu>   torch.Generator("cuda"): Philox4x32-10, whose numbers depend on the launch geometry of the GPU
    numpy        np.random.RandomState(seed).randn, what old ONNX pipelines and Core ML use

Equality with torch is to about 5e-7: torch's vectorised log, sin and cos differ from NumPy's in the last digit.
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

# Threads that one grid holds: streaming multiprocessors x threads per multiprocessor.
# Beyond this many elements a launch wraps around, so the noise depends on the GPU.
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
    """A generator for `seed`; `rng` is "cpu" (torch's default), "cuda:<gpu>" or "numpy".

    "cuda" alone means the shortcut of AUTOMATIC1111 and stable-diffusion.cpp: it equals every GPU as long as a draw is
    no larger than the smallest grid known here (40,960 numbers, two SD 1.5 images of 512x512); beyond, it raises and
    asks for the GPU. A list of seeds is a list of generators: see `batch`.

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

    Raises: UsageError for anything else (torch itself remaps negative seeds silently; we refuse them).
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
    """Noise of `shape`, drawn as diffusers draws it from a list of generators: one sample from each.

    One generator draws the whole batch at once (image i then differs from the same seed alone); as many generators as
    samples draw shape (1, ...) each, so image i of a batch is the image of its own seed.

    Raises: UsageError when the number of generators is neither 1 nor shape[0].
    """
    if len(generators) == 1:
        return generators[0].randn(shape)
    if len(generators) != shape[0]:
        raise UsageError(f"{len(generators)} seeds for a batch of {shape[0]}: give one seed, or {shape[0]}.")
    return np.concatenate([g.randn((1, *shape[1:])) for g in generators])


class TorchCpu:
    """torch.Generator("cpu"): MT19937 seeded with the low 32 bits of the seed (so seeds equal mod 2**32 are equal).

    16 numbers or more are 24-bit uniforms through Box-Muller in blocks of 16; fewer are 53-bit ones, one pair at a
    time, whose second half waits in the generator for the next small draw.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._cached: float | None = None

    def randn(self, shape: Sequence[int]) -> Float32:
        """The next numbers as a float32 array of `shape`."""
        n = math.prod(shape)
        flat = self._blocks(n) if n >= 16 else np.array([self._one() for _ in range(n)], dtype=np.float32)
        return np.reshape(flat, tuple(shape))

    def _blocks(self, n: int) -> Float32:
        flat, whole = self._uniform24(n), n // 16 * 16
        _box_muller(flat[:whole])
        if n != whole:  # torch draws the last 16 again, over numbers already made
            flat[-16:] = self._uniform24(16)
            _box_muller(flat[-16:])
        return flat

    def _one(self) -> float:
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        turn, radius = 2 * math.pi * self._uniform53(), self._uniform53()
        radius = math.sqrt(-2 * math.log1p(-radius))
        self._cached = radius * math.sin(turn)
        return radius * math.cos(turn)

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
        return ((high << 32 | low) & (1 << 53) - 1) * 2.0**-53


def drawing(seeds: Sequence[int], rng: str, shape: Sequence[int]) -> Callable[[], Float32]:
    """Draws standard normal noise of `shape`, each image's from its own seed: a batch equals its images made alone."""
    generators = [generator(seed, rng) for seed in seeds]
    return lambda: batch(generators, shape)


def _box_muller(uniform: Float32) -> None:
    """Turn uniforms into normals, in place, in blocks of 16: cosines in a block's first half, sines in its second."""
    u = uniform.reshape(-1, 2, 8)
    radius = 1 - u[:, 0]
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    turn = 2 * math.pi * u[:, 1]
    np.multiply(radius, np.cos(turn), out=u[:, 0])
    np.multiply(radius, np.sin(turn), out=u[:, 1])


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
    """torch.Generator("cuda") on a GPU whose grid holds `threads` threads (None: any GPU, draws up to 40,960).

    Thread i of T makes numbers i, i + T, i + 2T, i + 3T from one Philox block, then its next block.
    Ref: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox4x32-10); cuRAND's curand_normal4.
    """

    def __init__(self, seed: int, threads: int | None) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32)
        self._threads = threads
        self._offset = 0  # in blocks of four numbers per thread

    def randn(self, shape: Sequence[int]) -> Float32:
        """The next numbers as a float32 array of `shape`."""
        n = math.prod(shape)
        grid = self._grid(n)
        rounds = -(-n // (4 * grid)) if n else 0
        counters = np.arange(grid, dtype=np.uint64)
        blocks = [_philox_normal(counters, self._offset + i, self._key) for i in range(rounds)]
        self._offset += rounds
        flat = np.ravel(np.concatenate(blocks))[:n] if blocks else np.empty(0, np.float32)
        return np.reshape(flat, tuple(shape))

    def _grid(self, n: int) -> int:
        """Threads of the launch: whole blocks of 256, no more than the GPU holds."""
        smallest = min(GPU_THREADS.values())
        if self._threads is None and n > smallest:
            raise UsageError(
                f"rng 'cuda' is the same on every GPU only up to {smallest} numbers a draw, and this draw has {n}: "
                f"name the GPU to reproduce, rng 'cuda:<gpu>' with one of {', '.join(GPU_THREADS)}."
            )
        return min(self._threads or smallest, -(-n // 256) * 256)


def _philox_normal(thread: NDArray[np.uint64], block: int, key: tuple[int, int]) -> Float32:
    """Four normals per thread, as rows: [4, threads]."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0 = np.full_like(thread, block & 0xFFFFFFFF)
    c1 = np.full_like(thread, block >> 32)
    c2, c3 = thread & low, thread >> high
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> high) ^ c1 ^ np.uint64(k0), b & low, (a >> high) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.concatenate([_curand_pair(c0, c1), _curand_pair(c2, c3)])


def _curand_pair(x: NDArray[np.uint64], y: NDArray[np.uint64]) -> Float32:
    """Two normals from two words, sine first; float32 throughout."""
    u = x.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    v = y.astype(np.float32) * np.float32(2.0**-32 * 2 * math.pi) + np.float32(2.0**-33 * 2 * math.pi)
    radius = np.sqrt(-2 * np.log(u))
    return np.stack([radius * np.sin(v), radius * np.cos(v)])
