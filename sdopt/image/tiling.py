"""Decode and encode large pictures tile by tile, and batches image by image, in the memory of one tile.

Tiles overlap, and the overlaps are blended, so that no seam is visible. The grid and the blending are those of
diffusers' AutoencoderKL: a quarter of each tile overlaps its neighbours. In the overlap, the weight changes linearly
from one tile to the other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdopt.bundle.specs import Float32
from sdopt.errors import UsageError

OVERLAP = 0.25
MIN_TILE = 4  # latents a side
Run = Callable[[Float32], Float32]  # [images, channels, h, w] -> the same, larger or smaller


def sliced(run: Run) -> Run:
    """A version of `run` that takes the images of a batch one at a time."""
    return lambda batch: np.concatenate([run(batch[i : i + 1]) for i in range(len(batch))])


def decode_tiled(decode: Run, latents: Float32, tile: int, factor: int) -> Float32:
    """The picture of `latents` [images, channels, h, w], decoded in tiles of at most `tile` latents a side.

    `factor`: pixels for each latent, along a side.
    Raises: UsageError for a tile that is too small to overlap.
    """
    return _tiled(decode, latents, tile, 1, factor)


def encode_tiled(encode: Run, pictures: Float32, tile: int, factor: int) -> Float32:
    """The latents of `pictures`, encoded in the same tiles: at most `tile * factor` pixels a side."""
    return _tiled(encode, pictures, tile, factor, 1)


def _tiled(run: Run, images: Float32, tile: int, scale_in: int, scale_out: int) -> Float32:
    """`run` on each tile of `images`, blended into one result.

    `tile` is in latents. `scale_in` and `scale_out`: lines of `images` and of the result for each latent.
    """
    if tile < MIN_TILE:
        raise UsageError(f"vae_tile = {tile}; allowed are {MIN_TILE} latents a side or more")
    height, width = images.shape[2:]
    size_in = tile * scale_in
    if max(height, width) <= size_in:
        return run(images)
    latents_kept = int(tile * (1 - OVERLAP))  # rounded once, in latents, so that both sides agree
    step, kept = latents_kept * scale_in, latents_kept * scale_out
    blended = (tile - latents_kept) * scale_out
    row_above: list[Float32] = []
    result_rows: list[Float32] = []
    for y in range(0, height, step):
        row: list[Float32] = []
        for column, x in enumerate(range(0, width, step)):
            piece = run(np.ascontiguousarray(images[:, :, y : y + size_in, x : x + size_in]))
            if row_above:
                _blend(row_above[column], piece, blended, axis=2)
            if row:
                _blend(row[-1], piece, blended, axis=3)
            row.append(piece)
        result_rows.append(np.concatenate([piece[:, :, :kept, :kept] for piece in row], 3))
        row_above = row
    return np.concatenate(result_rows, 2)


def _blend(before: Float32, piece: Float32, extent: int, axis: int) -> None:
    """Mix the last lines of `before` into the first `extent` lines of `piece`, in place, with falling weight."""
    extent = min(before.shape[axis], piece.shape[axis], extent)
    if not extent:
        return
    shape = [1, 1, 1, 1]
    shape[axis] = extent
    weight = (np.arange(extent, dtype=np.float32) / np.float32(extent)).reshape(shape)
    tail = np.moveaxis(np.moveaxis(before, axis, 0)[-extent:], 0, axis)
    head = np.moveaxis(np.moveaxis(piece, axis, 0)[:extent], 0, axis)
    head[...] = tail * (1 - weight) + head * weight
