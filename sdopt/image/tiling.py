"""Large pictures tile by tile, and batches one by one: memory is that of one tile of one picture.

The overlaps of tiles are blended so that no seam shows. The grid and the blending are those of diffusers'
AutoencoderKL: a quarter of each tile overlaps its neighbours, and there each row and column passes linearly from one
to the other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdopt.bundle.specs import Float32
from sdopt.errors import UsageError

OVERLAP = 0.25
MIN_TILE = 4
Run = Callable[[Float32], Float32]  # [images, channels, h, w] -> the same, larger or smaller


def sliced(run: Run) -> Run:
    """`run`, given one image of a batch at a time."""
    return lambda batch: np.concatenate([run(batch[i : i + 1]) for i in range(len(batch))])


def decode_tiled(decode: Run, latents: Float32, tile: int, factor: int) -> Float32:
    """The picture of `latents` [images, channels, h, w], decoded in tiles of at most `tile` latents a side;
    a latent is `factor` pixels.

    Raises: UsageError for a tile that is too small to overlap.
    """
    return _tiled(decode, latents, tile, tile * factor, tile)


def encode_tiled(encode: Run, pictures: Float32, tile: int, factor: int) -> Float32:
    """The latents of `pictures`, encoded in the same tiles: at most `tile * factor` pixels a side."""
    return _tiled(encode, pictures, tile * factor, tile, tile)


def _tiled(run: Run, whole: Float32, size: int, result: int, tile: int) -> Float32:
    """`run` on tiles of `size` a side, which become `result` a side, blended into one."""
    if tile < MIN_TILE:
        raise UsageError(f"vae_tile = {tile}; allowed are {MIN_TILE} latents a side or more")
    if max(whole.shape[2:]) <= size:
        return run(whole)
    step = int(size * (1 - OVERLAP))
    blend = int(result * OVERLAP)
    keep = result - blend
    above: list[Float32] = []
    rows: list[Float32] = []
    for y in range(0, whole.shape[2], step):
        row: list[Float32] = []
        for j, x in enumerate(range(0, whole.shape[3], step)):
            piece = run(np.ascontiguousarray(whole[:, :, y : y + size, x : x + size]))
            if above:
                _blend(above[j], piece, blend, axis=2)
            if row:
                _blend(row[-1], piece, blend, axis=3)
            row.append(piece)
        rows.append(np.concatenate([piece[:, :, :keep, :keep] for piece in row], 3))
        above = row
    return np.concatenate(rows, 2)


def _blend(before: Float32, piece: Float32, extent: int, axis: int) -> None:
    """Let the first `extent` lines of `piece` pass over from the last lines of `before`, in place."""
    extent = min(before.shape[axis], piece.shape[axis], extent)
    if not extent:
        return
    shape = [1, 1, 1, 1]
    shape[axis] = extent
    weight = (np.arange(extent, dtype=np.float32) / np.float32(extent)).reshape(shape)
    tail = np.moveaxis(np.moveaxis(before, axis, 0)[-extent:], 0, axis)
    head = np.moveaxis(np.moveaxis(piece, axis, 0)[:extent], 0, axis)
    head[...] = tail * (1 - weight) + head * weight
