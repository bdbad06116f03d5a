"""Base + the sum of products of low rank, for the large weights of a model: a block at a time, in several threads.

Nearly every file is plain LoRA, and a model has hundreds of millions of such weights. What takes time then is memory
and no arithmetic. So the base is read, widened and added to while a block of it is in the processor's cache, and each
number of the result is written once, in the layout that the engine takes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from mmap import mmap
from typing import TypeVar

import numpy as np

from sdopt.adapters.lora.algorithms import DORA, Factors, algorithm
from sdopt.bundle.specs import Float32, Scalar
from sdopt.bundle.weights import PIECE, Held, Weights
from sdopt.dataclass import dataclass

# OpenBLAS starts threads of its own for a product of more multiplications. They wait for each other, and for ours.
MULTIPLICATIONS = 1 << 18
LARGEST = float(np.finfo(np.float32).max)
ROWS = 16  # at least, in a block
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Product:
    """scale * (up @ down), with the axes of a convolution's kernel joined with its inputs."""

    up: Float32
    down: Float32
    scale: Scalar


def low_rank(factors: Factors, m: Scalar) -> Product | None:
    """The change of a weight by plain LoRA, for the multiplier `m`; None for another algorithm.

    None too where the factors are so large that a number of the product might overflow.
    """
    if algorithm(factors).name != "LoRA" or any(role in factors for role in DORA):
        return None
    up, down = (factors[role].reshape(len(factors[role]), -1) for role in ("up", "down"))
    scale: Scalar = factors.scale(len(down)) * m
    largest = float(np.abs(up).max()) * float(np.abs(down).max()) * len(down)
    return Product(up, down, scale) if largest * max(1.0, abs(scale)) < LARGEST else None


def base_and_products(weights: Weights, part: Held, products: Sequence[Product]) -> Float32:
    """The numbers of an initializer, in its own layout: those of the base and the sum of the products."""
    total = _memory(part.initializer.shape)
    sides = [_sides(part, product) for product in products]
    rows = total.reshape(len(total), -1)
    step = min(len(rows), max(ROWS, PIECE // rows.shape[1]))
    block = np.empty((step, rows.shape[1]), np.float32)
    for filled in weights.filled(part, rows, step):
        change = block[: filled.stop - filled.start]
        for left, right, scale in sides:
            _multiply(left[filled], right, change)
            change *= scale
            rows[filled] += change
    return total


def _memory(shape: tuple[int, ...]) -> Float32:
    """An array whose memory goes back to the system with it.

    What the C library frees after hundreds of large arrays stays with the process: about 1 GB at Stable Diffusion 1.5's
    size.
    """
    return np.ndarray(shape, np.float32, mmap(-1, 4 * math.prod(shape)))


def _sides(part: Held, product: Product) -> tuple[Float32, Float32, Scalar]:
    """Two matrices whose product is the change in the initializer's layout, and its scale."""
    of_outputs, of_inputs = (*part.weight.slices, slice(None), slice(None))[:2]
    up: Float32 = product.up[of_outputs]
    down: Float32 = product.down[:, of_inputs]
    if part.weight.transposed:
        up, down = np.transpose(down), np.transpose(up)
    return up, down, product.scale


def _multiply(left: Float32, right: Float32, to: Float32) -> None:
    step = max(1, MULTIPLICATIONS // left.size)
    for first in range(0, right.shape[1], step):
        columns = slice(first, first + step)
        np.matmul(left, right[:, columns], out=to[:, columns])


def in_order(make: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
    """What `make` makes of each item, `threads` at once, in the items' order; a few are made before they are taken."""
    if threads < 2:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
